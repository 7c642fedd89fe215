"""`verify`: which tokens of a drafted token tree the target model keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import _checks as check
from . import _verify_torch
from ._backend import BACKENDS, choose
from ._library import operator
from .sampling import SamplingParams, pack
from .types import Verified

PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")
RULES = ("recursive", "traversal")
INPUTS = ("logits", "probabilities")


def verify(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    proposal: str = "without_replacement",
    rule: str = "recursive",
    sampling: SamplingParams = SamplingParams(),
    draft_sampling: SamplingParams | None = None,
    target_rows: torch.Tensor | None = None,
    draft_rows: torch.Tensor | None = None,
    max_depth: int | None = None,
    backend: str | None = None,
    inputs: str = "logits",
    draft_inputs: str | None = None,
    point_nodes: torch.Tensor | None = None,
    bitmask: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    group: Any = None,
) -> Verified:
    """Accept the longest path of each token tree that keeps the target's law, and draw the token that follows it.

    Whatever the draft, the emitted tokens are distributed as if the target had generated them one at a time. At a node
    with target law p and draft law q, children x are tested in draw order: x is accepted if
    ``u q(x) S < (p(x) - beta q(x))_+ Z``; a rejection adds S / Z to beta, S becomes the mass of (p - beta q)_+, and Z
    loses q(x) if candidates were drawn without replacement. If all are rejected, the last token comes from
    (p - beta q)_+; at a leaf, from p.

    Args:
        target_logits: `[batch, nodes, vocab]` f16, bf16 or f32, last axis contiguous: row i holds the target's logits
            after node i. With `target_rows`: `[rows, vocab]`.
        draft_logits: the same for the draft: row i holds the logits that node i's children were drawn from (rows of
            nodes without candidates are never read). With `draft_rows`: `[rows, vocab]`. None only for
            ``proposal="point"``.
        tokens: `[batch, nodes]` int64 or int32. Column 0 is the root, the last committed token; siblings stand in draw
            order. -1 is a missing candidate; so is a token >= vocab, which also sets `Status.BAD_TOKEN`.
        parents: `[nodes]` or `[batch, nodes]` int32 or int64, ``parents[0] = -1`` and ``parents[i] < i``; -1 for i > 0
            is padding.
        uniforms: `[batch, nodes + 2]` f32 in [0, 1): column i is node i's coin, the last two pick the block and the
            place of the final draw. They must be fresh for every call: see `draw_uniforms`.
        proposal: how siblings were drawn: "without_replacement", "with_replacement", "greedy" (the most probable ones
            and then one draw from the rest) or "point" (chosen deterministically).
        rule: "recursive" (top down) or "traversal" (bottom up; block verification on a chain). Traversal
            accepts at least as many nodes on average.
        sampling: temperature and filters of the target.
        draft_sampling: those of the draft; None: the same.
        target_rows: `[batch, nodes]` int32 or int64, the row of each node in `[rows, vocab]` logits. -1 makes a
            virtual node: it is tested, and if accepted it is the last token emitted.
        draft_rows: the same for the draft, any number for a node without candidates.
        max_depth: the caller's bound on the tree's depth, which fixes the width of the result; a node at that depth
            counts as a leaf. None: nodes - 1.
        backend: "torch" or "triton"; None to choose by device.
        inputs: "logits", or "probabilities": the target's rows are laws already and are used as they are; `sampling`
            then stays at its default. Such a row is not checked beyond what is read of it; its sum must stay below 4.
        draft_inputs: the same for the draft's rows and `draft_sampling`; None: as `inputs` says.
        point_nodes: `[nodes]` or `[batch, nodes]` bool: nodes that were chosen, not drawn, beside siblings that were
            drawn as `proposal` says. They are tested after the drawn ones, each offered what is left of p there; their
            tokens may depend on what was drawn.
        bitmask: `[batch, nodes, ceil(vocab / 32)]` int32: the target's law after node i is restricted to the tokens v
            whose bit v % 32 of word v // 32 is set, before temperature and filters (a grammar's mask).
        draft_ids: `[columns]` int64, the target's token of each column of `draft_logits`, for a draft with a vocabulary
            of its own. Tokens stay the target's, and columns of the same token add up. Where a column's id is no token
            of the target, a candidate drawn from it is a missing one, and the draft's law is that of the others; with
            `draft_inputs="probabilities"` such columns count for nothing and should hold 0.
        group: a `torch.distributed` process group whose ranks each hold a slice of the vocabulary: both sides' rows are
            then this rank's columns (consecutive, in the order of the ranks, as many as it likes), everything else,
            the bitmask included, is the same on all ranks, and so is the result. Ranks exchange sums, never rows. Not
            with `draft_ids`, and not inside `torch.compile`.

    Returns:
        `Verified(path, length, tokens, status)`, all on the device of the logits.

    Raises:
        ValueError: an argument's type, shape, dtype, stride, device or option is wrong. What only the device can see
            sets a bit of `status` for its own request: see `Status`.

    Source: Yang et al., arXiv 2401.06706 (MCSD); Miao et al., arXiv 2305.09781 (SpecInfer); Hu et al., arXiv
    2502.18779 ("greedy"); docs/algorithm.md for the scalar form.
    """
    check.choice("proposal", proposal, PROPOSALS)
    check.choice("rule", rule, RULES)
    check.choice("inputs", inputs, INPUTS)
    check.choice("draft_inputs", draft_inputs, (None, *INPUTS))
    draft_inputs = draft_inputs or inputs
    check.tensor("tokens", tokens, (None, None), check.INTEGERS)
    batch, nodes = tokens.shape
    if nodes == 0:
        raise ValueError("tokens: expected at least one node, the root, got [batch, 0]")
    vocab = _check_logits("target_logits", target_logits, "target_rows", target_rows, batch, nodes, None)
    if vocab == 0 and group is None:  # a rank may hold no column
        raise ValueError(f"target_logits: expected a vocabulary of at least one token, got {list(target_logits.shape)}")
    if proposal == "point":
        if draft_rows is not None and draft_logits is None:
            raise ValueError("draft_rows: expected None without draft_logits, got a tensor")
        draft_logits = draft_rows = point_nodes = None  # every node is one
    elif draft_logits is None:
        raise ValueError(f'draft_logits: expected a tensor for proposal="{proposal}", got None')
    else:
        columns = vocab
        if draft_ids is not None:
            check.tensor("draft_ids", draft_ids, (None,), (torch.int64,))
            columns = draft_ids.shape[0]
            if columns == 0:
                raise ValueError("draft_ids: expected at least one column, got [0]")
        _check_logits("draft_logits", draft_logits, "draft_rows", draft_rows, batch, nodes, columns)
    shared = isinstance(parents, torch.Tensor) and parents.dim() == 1
    check.tensor("parents", parents, (nodes,) if shared else (batch, nodes), check.INTEGERS)
    check.tensor("uniforms", uniforms, (batch, nodes + 2), (torch.float32,))
    if point_nodes is not None:
        one_tree = isinstance(point_nodes, torch.Tensor) and point_nodes.dim() == 1
        check.tensor("point_nodes", point_nodes, (nodes,) if one_tree else (batch, nodes), (torch.bool,))
    if bitmask is not None:
        check.tensor("bitmask", bitmask, (batch, nodes, -(-vocab // 32) if group is None else None), (torch.int32,))
    same = {"draft_logits": draft_logits, "tokens": tokens, "parents": parents, "uniforms": uniforms}
    same |= {"target_rows": target_rows, "draft_rows": draft_rows, "draft_ids": draft_ids}
    same |= {"point_nodes": point_nodes, "bitmask": bitmask}
    check.same_device("target_logits", target_logits, same)
    if inputs == "probabilities":
        _check_unused("inputs", {"sampling": sampling, "bitmask": bitmask})
    if draft_inputs == "probabilities":
        _check_unused("draft_inputs" if inputs == "logits" else "inputs", {"draft_sampling": draft_sampling})
    numbers, tensors = pack("sampling", sampling, batch, target_logits.device)
    draft_numbers, draft_tensors = numbers, tensors
    if draft_sampling is not None:
        draft_numbers, draft_tensors = pack("draft_sampling", draft_sampling, batch, target_logits.device)
    if max_depth is None:
        max_depth = nodes - 1
    max_depth = check.whole("max_depth", max_depth, 0, 2**31 - 2)
    check.choice("backend", backend, (None, *BACKENDS))

    if group is not None:
        if draft_ids is not None or backend == "triton":
            raise ValueError('group: expected None with draft_ids or backend="triton", got a process group')
        run: Callable[..., Any] = _parallel(group)
    else:
        run = _OPERATOR
    return Verified(
        *run(
            target_logits,
            draft_logits,
            tokens,
            parents,
            uniforms,
            target_rows,
            draft_rows,
            numbers,
            tensors,
            draft_numbers,
            draft_tensors,
            proposal,
            rule,
            max_depth,
            inputs,
            draft_inputs,
            point_nodes,
            bitmask,
            draft_ids,
            *([backend or ""] if group is None else []),
        )
    )


def _parallel(group: Any) -> Callable[..., Any]:
    """Verification by the ranks of a group."""
    from . import _verify_parallel  # torch.distributed is not in every build of torch

    return partial(_verify_parallel.verify, group)


def _check_unused(name: str, arguments: dict[str, Any]) -> None:
    """Raise if something asks for a pass over rows that are laws already."""
    for argument, value in arguments.items():
        if value is not None and not _is_default(value):
            got = value if isinstance(value, SamplingParams) else type(value).__name__
            raise ValueError(f'{argument}: expected the default with {name}="probabilities", got {got}')


def _is_default(value: Any) -> bool:
    fields = vars(value).values() if isinstance(value, SamplingParams) else [None]
    return all(isinstance(field, (int, float)) for field in fields) and value == _DEFAULT


_DEFAULT = SamplingParams()


def _check_logits(
    name: str,
    logits: torch.Tensor,
    rows_name: str,
    rows: torch.Tensor | None,
    batch: int,
    nodes: int,
    vocab: int | None,
) -> int:
    """Check one side's logits and row index; returns the size of the vocabulary."""
    if rows is None:
        check.tensor(name, logits, (batch, nodes, vocab), check.FLOATS)
    else:
        check.tensor(name, logits, (None, vocab), check.FLOATS)
        check.tensor(rows_name, rows, (batch, nodes), check.INTEGERS)
    check.contiguous_last_axis(name, logits)
    return logits.shape[-1]


def _verify(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backend that the last argument names ("": none); Triton is imported when it is first needed."""
    *rest, backend = arguments
    if choose(backend or None, rest[0].device) == "triton":
        from . import _verify_triton

        return _verify_triton.verify(*rest)
    return _verify_torch.verify(*rest)


def _fake(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    target_rows: torch.Tensor | None,
    draft_rows: torch.Tensor | None,
    sampling: list[float],
    sampling_tensors: list[torch.Tensor | None],
    draft_sampling: list[float],
    draft_sampling_tensors: list[torch.Tensor | None],
    proposal: str,
    rule: str,
    max_depth: int,
    inputs: str,
    draft_inputs: str,
    point_nodes: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    draft_ids: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, width = tokens.shape[0], max_depth + 1
    new = target_logits.new_empty
    return (
        new(batch, width, dtype=torch.int32),
        new(batch, dtype=torch.int32),
        new(batch, width, dtype=torch.int64),
        new(batch, dtype=torch.int32),
    )


_OPERATOR = operator(
    "verify(Tensor target_logits, Tensor? draft_logits, Tensor tokens, Tensor parents, Tensor uniforms,"
    " Tensor? target_rows, Tensor? draft_rows, float[] sampling, Tensor?[] sampling_tensors,"
    " float[] draft_sampling, Tensor?[] draft_sampling_tensors, str proposal, str rule, SymInt max_depth,"
    " str inputs, str draft_inputs, Tensor? point_nodes, Tensor? bitmask, Tensor? draft_ids, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _verify,
    _fake,
)
