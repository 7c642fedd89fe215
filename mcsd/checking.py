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
        largest: size of the largest plain logit; 0 if none was seen.
    """

    ok: bool
    attention: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    reason: str = ""
    largest: float = 0.0

    def __bool__(self) -> bool:
        return self.ok


def check(model: PreTrainedModel, *, attention: str = "auto", prefix: int = 12, nodes: int = 9, seed: int = 0) -> Check:
    """Score a random tree after a random prefix, and every path of it as plain text; compare the logits.

    Args:
        model: a Hugging Face model. PEFT's around one must say what that says.
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
    wrapper, model = _eager(model), unwrapped(model)
    reason = refusal(model, attention)
    if reason:
        return Check(False, reason=reason)
    random = torch.Generator().manual_seed(seed)
    vocab = input_vocab(model)
    tokens = torch.randint(vocab, (1, prefix + nodes), generator=random)
    parents = torch.tensor([-1, *(int(torch.randint(i, (), generator=random)) for i in range(1, nodes))])
    parents[2:3] = 0  # it branches
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
            plain, inner = torch.zeros_like(tree), set(parents.tolist())
            leaves = [path for path in paths if path[-1] not in inner]
            for path in leaves:
                plain[path] = _plain(model, tokens, prefix, path)
            alone = plain[leaves[-1]]
            outside = alone if wrapper is model else _plain(wrapper, tokens, prefix, leaves[-1])
        except Exception as error:  # whatever a model does with an input it was not written for is the verdict
            return Check(False, route, reason=f"{type(model).__name__} failed on a token tree: {error}")
    # the very same computation, unless the wrapper adds to it
    largest = float(plain.abs().max())
    added = float((outside - alone).abs().max())
    if wrapper is not model and not added <= 100 * torch.finfo(torch.float32).eps * max(largest, 1.0):
        reason = (
            f"{type(wrapper).__name__} says something else than the {type(model).__name__} inside it: logits differ by "
            f"{added:.3g}; call eval() and merge_and_unload() first"
        )
        return Check(False, route, reason=reason)
    # rounding: a part in ten thousand in float32, a few units in the last place in shorter formats
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    relative = max(1e3 * torch.finfo(torch.float32).eps, 8 * torch.finfo(dtype).eps)
    tolerance = relative * max(largest, 1.0)
    difference = float((tree - plain).abs().max())
    if not difference <= tolerance:
        reason = (
            f"{type(model).__name__} scores a tree differently from plain text: "
            f"logits differ by {difference:.3g}, {tolerance:.3g} is rounding"
        )
        if any(module.training for module in model.modules()):
            reason += "; some of it is in training mode, which may add noise: call eval() first"
        return Check(False, route, difference, tolerance, reason, largest)
    return Check(True, route, difference, tolerance, largest=largest)


_CHECKED: tuple[WeakSet[torch.nn.Module], ...] = (WeakSet(), WeakSet())  # with dense masks, by tree attention


def require(name: str, model: Any, attention: str, *, exact: bool = True) -> PreTrainedModel:
    """Refuse a model that cannot score trees; it is tried out on a small one, once.

    Models with experts, or numbers of few bits, may fall out with themselves over a tree by more than rounding. So with
    tree attention, which is ours, only a difference that no rounding makes is a refusal: positions of the model's own,
    or rows that see what comes after them.

    Args:
        name: the argument it came in, for the error.
        model: a Hugging Face model, or a wrapper around one, see `unwrapped`.
        attention: "auto", "tree" or "dense".
        exact: False for a draft, from which nothing more than guesses is wanted: with tree attention it is not tried.

    Returns:
        the model itself.

    Raises:
        UnsupportedModelError: with the reason.
    """
    wrapper, inner = _eager(model), unwrapped(model)
    reason = refusal(inner, attention)
    tree = not reason and attention != "dense" and takes_tree_attention(inner)
    trusted = tree and (not exact or any(weight.is_meta for weight in inner.parameters()))
    if not reason and not trusted and wrapper not in _CHECKED[tree]:
        verdict = check(wrapper, attention=attention, **(_SMALL if tree else {}))
        close = tree and verdict.largest != 0 and not verdict.error > _GROSS * verdict.largest  # NaN has a status
        reason = None if close else verdict.reason
        if not reason:
            _CHECKED[tree].add(wrapper)
    if reason:
        raise UnsupportedModelError(f"{name}: {reason}")
    found: PreTrainedModel = inner
    return found


_SMALL = {"prefix": 4, "nodes": 4}
_GROSS = 0.25  # of the largest logit in size


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s wrapper, PEFT's, or both; anything else as it is.

    PEFT's adapters lie inside the layers, and then the model inside is all there is, unless they put tokens before the
    text, or look for some in it.
    """
    inner = _eager(model)
    adapter = getattr(inner, "active_peft_config", None)
    outside = getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model") and not outside:
        inner = _eager(inner.get_base_model())
    return inner if isinstance(inner, PreTrainedModel) else model


def _eager(model: Any) -> Any:
    """The model inside `torch.compile`'s wrapper; others pass on what is asked of them, this name included."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Inside this context calls of the model inside `torch.compile`'s wrapper are compiled as those of the wrapper.

    So that the model itself can be used in its place; without a wrapper nothing happens.
    """
    inner = unwrapped(model)
    if _eager(model) is model:
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
    """`[nodes of the path, vocab]` f32: logits after each node of a path that follows the prefix, as plain text."""
    nodes = torch.tensor([prefix + node for node in path], device=tokens.device)
    text = torch.cat([tokens[:, :prefix], tokens[:, nodes]], 1)
    logits: torch.Tensor = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits[0]
    return logits[prefix:].to(tokens.device).float()
