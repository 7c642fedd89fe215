"""The fewest bytes that a call must move, and the time that takes at the copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def microseconds(byte_count: float, bandwidth: float) -> float:
    """The time to move bytes at `bandwidth`, in bytes a second."""
    return byte_count / bandwidth * 1e6


def visited_rows(path: torch.Tensor, length: torch.Tensor, parents: Sequence[int], max_depth: int) -> tuple[int, int]:
    """How many target and draft rows a batch's results needed: those of the nodes on the accepted paths.

    A node's draft row is needed if the node has children within `max_depth`. Under "traversal" other nodes have been
    entered before the one that stops, so there this is a lower bound.

    Args:
        path: `[batch, width]`, as `verify` returns it.
        length: `[batch]`.
        parents: of the tree that all requests have.
        max_depth: as given to `verify`.
    """
    depth = [0] * len(parents)
    for node, parent in enumerate(parents):
        if node and parent >= 0:
            depth[node] = depth[parent] + 1
    inner = {parent for parent in parents[1:] if parent >= 0 and depth[parent] < max_depth}
    has_children = torch.tensor([node in inner for node in range(len(parents))], device=path.device)
    on_path = torch.arange(path.shape[1], device=path.device) < length[:, None]
    drafted = has_children[path.clamp(min=0).long()] & on_path
    return int(length.sum()), int(drafted.sum())


def sweeps(parents: Sequence[int], rule: str, proposal: str, waves: int) -> int:
    """How many rejections a request's first waves of sweeps follow at most, see `mcsd_kernels._verify_triton`.

    Args:
        parents: of a tree; siblings stand side by side, in draw order.
        rule, proposal: of the call.
        waves: how many are launched.
    """
    wave, count, last = [0] * len(parents), 0, {parent: node for node, parent in enumerate(parents)}
    for node, parent in enumerate(parents):
        if node:
            is_last = node == last[parent]
            wave[node] = int(not is_last) if proposal == "greedy" else node - parents.index(parent)
            # under "recursive" the state of a node does not depend on how it was reached
            wave[node] += wave[parent] if rule == "traversal" else 0
            # of siblings under "greedy" the drawn one alone leads to a sweep
            count += wave[node] < waves and (is_last or proposal != "greedy")
    return count


def verify_bytes(target_rows: int, draft_rows: int, vocab: int, itemsize: int, batch: int, nodes: int) -> int:
    """Bytes that `verify` must move on any machine: the visited rows once, and the small inputs and outputs.

    Beside the kernels stands what theirs move, which takes Triton to be imported.
    """
    small = nodes * (8 + 4) + (nodes + 2) * 4 + 2 * 4
    return (target_rows + draft_rows) * vocab * itemsize + batch * small
