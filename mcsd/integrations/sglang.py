"""SGLang: its tree and its chain verification, on top of `mcsd_kernels.verify`.

Source: argument order, shapes and in-place outputs of sgl-kernel's `tree_speculative_sampling_target_only`
(sgl-kernel/csrc/speculative/speculative_sampling.cu, commit 120affb) and of `chain_speculative_sampling_triton`
(python/sglang/srt/speculative/reject_sampling.py, 2026). Nothing of their code is here.
"""

from __future__ import annotations

import torch

from mcsd_kernels import draw_uniforms, verify

from ._trees import Ordered, chain, linked, rows_of


def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    *,
    proposal: str = "point",
    rule: str = "recursive",
    backend: str | None = None,
) -> None:
    """In place: verify trees of chosen candidates, or, with another `proposal`, of candidates drawn from `draft_probs`.

    Args:
        predicts: `[all nodes]` int32, written: at each accepted node the token that follows it.
        accept_index: `[batch, depth + 1]` int32, written: `retrieve_index` of the accepted nodes from the root on; what
            lies behind them stays as it is.
        accept_token_num: `[batch]` int32, written: accepted nodes below the root.
        candidates: `[batch, nodes]` int64; column 0 is the root.
        retrieve_index: `[batch, nodes]` int64, each node's place in `predicts`.
        retrieve_next_token: `[batch, nodes]` int64, each node's first child, -1 for none.
        retrieve_next_sibling: `[batch, nodes]` int64, the sibling tried after it, -1 for none.
        uniform_samples: `[batch, nodes]` f32 in [0, 1), fresh; the root's number serves the final draw.
        uniform_samples_for_final_sampling: `[batch]` f32.
        target_probs: `[batch, nodes, vocab]` f32, contiguous; filters applied.
        draft_probs: `[batch, nodes, vocab]` f32, contiguous: row i is what node i's children were drawn from. Read only
            if `proposal` is not "point", and never written: SGLang's scratch of zeros is not needed.
        threshold_single: 1.0; other values accept more than is lossless and are refused.
        threshold_acc: the same.
        deterministic: results never depend on the schedule here.
        proposal: how the candidates came about, see `verify`.
        rule: "recursive" or "traversal".
        backend: as in `verify`.

    Raises:
        ValueError: a threshold below 1, or a wrong shape or dtype.
    """
    _check_thresholds(threshold_single, threshold_acc)
    tree = linked(retrieve_next_token, retrieve_next_sibling)
    final = [uniform_samples[:, :1], uniform_samples_for_final_sampling[:, None]]
    _verify(
        predicts,
        accept_index,
        accept_token_num,
        candidates,
        retrieve_index,
        tree,
        torch.cat([uniform_samples.gather(1, tree.node), *final], 1),
        target_probs,
        draft_probs,
        proposal,
        rule,
        backend,
    )


def chain_speculative_sampling(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor | None,
    retrieve_next_sibling: torch.Tensor | None,
    uniform_samples: torch.Tensor | None,
    uniform_samples_for_final_sampling: torch.Tensor | None,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    *,
    rule: str = "recursive",
    backend: str | None = None,
) -> None:
    """In place: rejection sampling of chains, SGLang's `chain_speculative_sampling_triton`.

    Args:
        predicts: as for trees, and so are the others up to `deterministic`, except for these.
        accept_index: `[batch, nodes]` int32.
        accept_token_num: `[batch]` int32.
        candidates: `[batch, nodes]` int64, the root and its chain; -1 was never drafted.
        retrieve_index: `[batch, nodes]` int64.
        retrieve_next_token: not read; the candidates are a chain.
        retrieve_next_sibling: not read.
        uniform_samples: `[batch, nodes]` f32, column i for node i + 1; the last column serves the final draw.
        uniform_samples_for_final_sampling: `[batch]` f32.
        target_probs: `[batch, nodes, vocab]` f32, contiguous.
        draft_probs: `[batch, nodes or nodes - 1, vocab]` f32, contiguous; None: the drafts were chosen.
        threshold_single: 1.0.
        threshold_acc: 1.0.
        deterministic: results never depend on the schedule here.
        sampling_seed: `[batch]` int64; then the two `uniform_samples` are not read.
        positions: `[batch, nodes]` int64, of the text; the root's keys the numbers, with the seed.
        rule: "recursive", or "traversal" for block verification.
        backend: as in `verify`.

    Raises:
        ValueError: a threshold below 1, neither uniforms nor a seed with positions, or a wrong shape or dtype.
    """
    _check_thresholds(threshold_single, threshold_acc)
    batch, nodes = candidates.shape
    if sampling_seed is not None:
        if positions is None:
            raise ValueError("positions: expected a tensor beside sampling_seed, got None")
        step = (positions.reshape(batch, nodes)[:, 0].long() + 1) & 0xFFFFFFFF
        coins = draw_uniforms(sampling_seed.reshape(-1).long(), step, nodes + 2)
    elif uniform_samples is None or uniform_samples_for_final_sampling is None:
        raise ValueError("uniform_samples: expected tensors for the tests and the final draw, got None and no seed")
    else:
        # a root's number is never looked at
        coins = torch.cat([uniform_samples[:, -1:], uniform_samples, uniform_samples_for_final_sampling[:, None]], 1)
    number = torch.arange(nodes, device=candidates.device).expand(batch, nodes)
    tree = Ordered(number, chain(nodes, candidates.device))
    _verify(
        predicts,
        accept_index,
        accept_token_num,
        candidates,
        retrieve_index,
        tree,
        coins,
        target_probs,
        draft_probs,
        "point" if draft_probs is None else "with_replacement",
        rule,
        backend,
    )


def _check_thresholds(single: float, accumulated: float) -> None:
    for name, value in (("threshold_single", single), ("threshold_acc", accumulated)):
        if value != 1:
            raise ValueError(f"{name}: expected 1.0, got {value!r}; accepting above a threshold is not lossless")


def _verify(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    tree: Ordered,
    coins: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    proposal: str,
    rule: str,
    backend: str | None,
) -> None:
    """Verify the ordered tree and write SGLang's three outputs."""
    batch, nodes = candidates.shape
    request = torch.arange(batch, device=candidates.device)[:, None]
    drawn = draft_probs is not None and proposal != "point"
    rows = None
    if drawn:
        assert draft_probs is not None
        rows = request * draft_probs.shape[1] + tree.node.clamp(max=draft_probs.shape[1] - 1)
        draft_probs = rows_of("draft_probs", draft_probs)
    verified = verify(
        rows_of("target_probs", target_probs),
        draft_probs if drawn else None,
        candidates.gather(1, tree.node),
        tree.parents,
        coins,
        proposal=proposal,
        rule=rule,
        inputs="probabilities",
        target_rows=request * nodes + tree.node,
        draft_rows=rows,
        max_depth=accept_index.shape[1] - 1,
        backend=backend,
    )
    valid = verified.path >= 0
    node = tree.node.gather(1, verified.path.clamp(0, nodes - 1).long())
    index = retrieve_index.gather(1, node)
    accept_index.copy_(torch.where(valid, index, accept_index))
    accept_token_num.copy_(verified.length - 1)
    # what is not on a path keeps its value: a column more takes the writes that are none
    said = torch.nn.functional.pad(predicts[retrieve_index], (0, 1))
    said.scatter_(1, torch.where(valid, node, nodes), verified.tokens.to(said.dtype))
    predicts[retrieve_index] = said[:, :nodes]
