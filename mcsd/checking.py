"""`mcsd.check`: does a model score token trees as it scores plain text?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from mcsd_kernels import ancestor_bits
from mcsd_kernels._checks import whole

from .attention import takes_tree_attention
from .overlapping import Overlapping
from .placement import input_vocab
from .scoring import ATTENTION, Scorer, UnsupportedModelError, refusal


@dataclass(frozen=True)
class Check:
    """The verdict of `check`.

    Args:
        ok: the model can be decoded by mcsd.
        attention: the route taken, "tree" or "dense"; "" if none.
        error: largest difference between tree logits and plain logits.
        tolerance: what was allowed.
        reason: why it is not ok; "" if it is.
    """

    ok: bool
    attention: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def check(model: PreTrainedModel, *, attention: str = "auto", prefix: int = 12, nodes: int = 9, seed: int = 0) -> Check:
    """Score a random tree after a random prefix, and every path of it as plain text; compare the logits.

    Args:
        model: a Hugging Face model; PEFT's around one is what its plain text is scored by.
        attention: "auto", "tree" or "dense", as in `mcsd.generate`.
        prefix: tokens before the tree.
        nodes: of the tree.
        seed: of the random tokens and the random tree.

    Returns:
        a `Check`, true if the model can be used; else its `reason` says why not.

    Raises:
        ValueError: an unknown `attention`, or a number out of range.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(map(repr, ATTENTION))}, got {attention!r}")
    prefix, nodes, seed = whole("prefix", prefix, 0), whole("nodes", nodes, 1), whole("seed", seed, -(2**63), 2**64 - 1)
    whole_model, model = getattr(model, "_orig_mod", model), unwrapped(model)
    reason = refusal(model, attention)
    if reason:
        return Check(False, reason=reason)
    random = torch.Generator().manual_seed(seed)
    vocab = input_vocab(model)
    tokens = torch.randint(vocab, (1, prefix + nodes), generator=random)
    parents = torch.tensor([-1, *(int(torch.randint(i, (), generator=random)) for i in range(1, nodes))])
    ancestors = ancestor_bits(parents)
    paths = [[j for j in range(nodes) if int(ancestors[0, i, j // 32]) >> j % 32 & 1] for i in range(nodes)]
    depth = torch.tensor([len(path) - 1 for path in paths])
    scorer = Scorer(model, prefix + nodes, attention)
    route = "tree" if scorer.tree else "dense"
    device = scorer.device
    tokens = tokens.to(device)
    with torch.inference_mode():
        try:
            with scorer.attending():
                scorer.prefill(tokens[:, :prefix], [prefix])
                tree = scorer.score(tokens[:, prefix:], ancestors.to(device), depth.to(device), [prefix])[0].float()
            plain = torch.stack([_plain(whole_model, tokens, prefix, path) for path in paths])
        except Exception as error:  # whatever a model does with an input it was not written for is the verdict
            return Check(False, route, reason=f"{type(model).__name__} failed on a token tree: {error}")
    # rounding: a part in ten thousand in float32, a few units in the last place in shorter formats
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    relative = max(1e3 * torch.finfo(torch.float32).eps, 8 * torch.finfo(dtype).eps)
    tolerance = relative * max(float(plain.abs().max()), 1.0)
    difference = float((tree - plain).abs().max())
    if not difference <= tolerance:
        reason = (
            f"{type(whole_model).__name__} scores a tree differently from plain text: "
            f"logits differ by {difference:.3g}, {tolerance:.3g} is rounding{_hint(whole_model)}"
        )
        return Check(False, route, difference, tolerance, reason)
    return Check(True, route, difference, tolerance)


_CHECKED: WeakSet[torch.nn.Module] = WeakSet()


def require(name: str, model: Any, attention: str) -> PreTrainedModel:
    """Refuse a model that cannot score trees; one that would go the dense way, or is PEFT's, is tried out, once.

    Args:
        name: the argument it came in, for the error.
        model: a Hugging Face model, or a wrapper around one, see `unwrapped`.
        attention: "auto", "tree" or "dense".

    Returns:
        the model itself.

    Raises:
        UnsupportedModelError: with the reason.
    """
    wrapper, inner = getattr(model, "_orig_mod", model), unwrapped(model)
    reason = refusal(inner, attention)
    certain = wrapper is inner and attention != "dense" and not reason and takes_tree_attention(inner)
    if not reason and not certain and wrapper not in _CHECKED:
        reason = check(wrapper, attention=attention).reason
        if not reason:
            _CHECKED.add(wrapper)
    if reason:
        raise UnsupportedModelError(f"{name}: {reason}")
    found: PreTrainedModel = inner
    return found


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s wrapper, PEFT's, or both; anything else as it is.

    PEFT's adapters lie inside the layers, and then the model inside is all there is, unless they put tokens before the
    text, or look for some in it.
    """
    inner = getattr(model, "_orig_mod", model)
    adapter = getattr(inner, "active_peft_config", None)
    outside = getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model") and not outside:
        inner = inner.get_base_model()
    return inner if isinstance(inner, PreTrainedModel) else model


def _hint(wrapper: Any) -> str:
    """What may help, for the end of a reason."""
    return "" if isinstance(wrapper, PreTrainedModel) else "; call eval() and merge_and_unload() first"


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Inside this context calls of the model inside `torch.compile`'s wrapper are compiled as those of the wrapper.

    So that the model itself can be used in its place; without a wrapper nothing happens.
    """
    inner = unwrapped(model)
    if not hasattr(model, "dynamo_ctx"):
        yield
        return
    with _COMPILED.lock:
        _COMPILED.enter(inner, inner._compiled_call_impl)
        inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)  # as `inner.compile()` does
    try:
        yield
    finally:
        with _COMPILED.lock:
            last, before = _COMPILED.leave(inner)
            if last:
                del inner._compiled_call_impl
                if before is not None:
                    inner._compiled_call_impl = before


_COMPILED = Overlapping()  # models, and what they had


def _plain(model: PreTrainedModel, tokens: torch.Tensor, prefix: int, path: list[int]) -> torch.Tensor:
    """`[vocab]` f32: logits after the prefix and the nodes of a path, without cache or tree."""
    nodes = torch.tensor([prefix + node for node in path], device=tokens.device)
    text = torch.cat([tokens[:, :prefix], tokens[:, nodes]], 1)
    logits: torch.Tensor = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits[0, -1]
    return logits.to(tokens.device).float()
