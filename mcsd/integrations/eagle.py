"""EAGLE and Medusa: trees of chosen candidates, given as paths, on top of `mcsd_kernels.verify`.

Source: `evaluate_posterior` of eagle/model/utils.py (SafeAILab/EAGLE) and of medusa/model/utils.py
(FasterDecoding/Medusa): `candidates` and `logits` with one row a path, `retrieve_indices` with the node at each place
of a path. Nothing of their code is here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mcsd_kernels import SamplingParams, verify
from mcsd_kernels import _checks as check

from ._trees import ordered, rows_of


class Posterior(NamedTuple):
    """What was accepted of a tree.

    Args:
        best_candidate: int64 scalar, a path that begins with what was accepted.
        accept_length: int64 scalar, how many of its tokens after the root were.
        token: int64 scalar, the token that follows them: what EAGLE draws from `sample_p`.
    """

    best_candidate: torch.Tensor
    accept_length: torch.Tensor
    token: torch.Tensor


def evaluate_posterior(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    *,
    sampling: SamplingParams = SamplingParams(temperature=0.0),
    uniforms: torch.Tensor | None = None,
    rule: str = "recursive",
    backend: str | None = None,
) -> Posterior:
    """Which path to keep, from path-shaped logits; paths that begin alike share their nodes.

    Args:
        logits: `[paths, length, vocab]`, contiguous: the target's logits after each place of each path
            (`tree_logits[0, retrieve_indices]`). Where the tree's own logits are at hand, `evaluate_tree` spares that
            copy.
        candidates: `[paths, length]` int32 or int64: column 0 is the root, -1 the end of a shorter path.
        sampling: temperature and filters. The default is EAGLE's `logits_processor=None`.
        uniforms: `[paths * length + 2]` f32 in [0, 1); None: from torch's generator.
        rule: "recursive" or "traversal".
        backend: as in `verify`.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check.tensor("candidates", candidates, (None, None), check.INTEGERS)
    paths, length = candidates.shape
    if not candidates.numel():
        raise ValueError(f"candidates: expected at least a root, got {list(candidates.shape)}")
    check.tensor("logits", logits, (paths, length, None), check.FLOATS)
    check.same_device("logits", logits, {"candidates": candidates})
    # path p goes through the node of the first path that has the same tokens so far
    same = (candidates[:, None] == candidates).cummin(2).values  # [paths, paths, length]
    first = same.int().argmax(1).T  # [length, paths]
    number = torch.arange(paths, device=candidates.device)
    tokens = candidates.T
    missing = (tokens < 0) | (first != number)
    missing[0, 1:] = True
    # nodes level by level: place t of path p is node t * paths + p
    depth = torch.arange(length, device=candidates.device)[:, None]
    above = torch.nn.functional.pad(first[:-1], (0, 0, 1, 0)) + (depth - 1) * paths
    parents = torch.where(missing | (depth == 0), -1, above)
    verified = verify(
        rows_of("logits", logits),
        None,
        tokens.reshape(1, -1),
        parents.reshape(1, -1),
        _uniforms(uniforms, paths * length, logits.device),
        proposal="point",
        rule=rule,
        sampling=sampling,
        target_rows=(number * length + depth).reshape(1, -1),
        max_depth=length - 1,
        backend=backend,
    )
    last = verified.path[0].gather(0, verified.length.long() - 1)[0]
    return Posterior(last.long() % paths, verified.length[0].long() - 1, _token(verified.tokens, verified.length))


def evaluate_tree(
    tree_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    retrieve_indices: torch.Tensor,
    *,
    sampling: SamplingParams = SamplingParams(temperature=0.0),
    uniforms: torch.Tensor | None = None,
    rule: str = "recursive",
    backend: str | None = None,
) -> Posterior:
    """Which path to keep, from the logits of the tree's nodes.

    Args:
        tree_logits: `[1, nodes, vocab]`: the target's logits after each node.
        draft_tokens: `[1, nodes]` int32 or int64; node 0 is the root.
        retrieve_indices: `[paths, length]` int64, on any device: the node at each place of each path, -1 after its end.
        sampling: temperature and filters.
        uniforms: `[nodes + 2]` f32 in [0, 1), node i's number in column i; None: from torch's generator.
        rule: "recursive" or "traversal".
        backend: as in `verify`.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check.tensor("draft_tokens", draft_tokens, (1, None), check.INTEGERS)
    nodes = draft_tokens.shape[1]
    check.tensor("tree_logits", tree_logits, (1, nodes, None), check.FLOATS)
    check.tensor("retrieve_indices", retrieve_indices, (None, None), (torch.int64,))
    if not nodes or not retrieve_indices.numel():
        got = f"{list(retrieve_indices.shape)} for {nodes} nodes"
        raise ValueError(f"retrieve_indices: expected at least one path and one node, got {got}")
    check.same_device("tree_logits", tree_logits, {"draft_tokens": draft_tokens})
    retrieve_indices = retrieve_indices.to(tree_logits.device)  # some make it on the host
    inside = torch.where(retrieve_indices < nodes, retrieve_indices, -1).clamp(min=-1)
    above, below = inside[:, :-1].reshape(-1), inside[:, 1:].reshape(-1)
    parents = inside.new_full((nodes + 1,), -1)
    parents.scatter_(0, torch.where(below > 0, below, nodes), above)  # a column more takes what is no node
    tree = ordered(parents[None, :nodes])
    coins = _uniforms(uniforms, nodes, tree_logits.device)
    verified = verify(
        tree_logits[0],
        None,
        draft_tokens.gather(1, tree.node),
        tree.parents,
        torch.cat([coins[:, :nodes].gather(1, tree.node), coins[:, nodes:]], 1),
        proposal="point",
        rule=rule,
        sampling=sampling,
        target_rows=tree.node,
        max_depth=retrieve_indices.shape[1] - 1,
        backend=backend,
    )
    place = verified.length.long() - 1
    last = tree.node[0, verified.path[0].gather(0, place).long()]
    here = retrieve_indices.gather(1, place.expand(retrieve_indices.shape[0], 1))[:, 0]
    best = (here == last).int().argmax()
    return Posterior(best, place[0], _token(verified.tokens, verified.length))


def _uniforms(uniforms: torch.Tensor | None, nodes: int, device: torch.device) -> torch.Tensor:
    if uniforms is None:
        return torch.rand(1, nodes + 2, device=device)
    check.tensor("uniforms", uniforms, (nodes + 2,), (torch.float32,))
    return uniforms[None]


def _token(tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return tokens[0].gather(0, length.long() - 1)[0]
