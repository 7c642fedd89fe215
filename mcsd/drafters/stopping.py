"""Stopping early: which nodes of a level get children at all, decided on the device before the children exist."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mcsd_kernels import _checks as check


class Stopping(Protocol):
    """Asked once a level, after the draft has read the level's nodes and before it draws their children.

    It sees the law that a node's children will be drawn from, and the draft's state there; it does not see the
    children. That order is what keeps verification lossless: whether a node has children is then settled by its path
    alone, and its children, if it has any, are honest draws from that law. A rule that looks at a drawn candidate
    instead ("drop it if its own probability is below 0.2") hands over draws from another law, one without the tokens it
    drops, and verification, which takes them for draws from the whole law, emits those tokens too seldom: by 0.19 in
    total variation in a small check (tests/test_drafters_stopping.py). Only children that were not drawn ("point") may
    be dropped for any reason.

    Nothing may be read on the host: the answer is a tensor, and the levels below a stopped node are computed all the
    same, with token -1.
    """

    def __call__(self, level: int, logits: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Which nodes go on.

        Args:
            level: depth of the nodes, 0 for the root.
            logits: `[batch, nodes, columns]` the draft's, before temperature and filters. The nodes of a level may
                share one row: then nodes is 1.
            hidden: `[batch, nodes, width]` the draft's state at each node, where it has one at hand.

        Returns:
            `[batch, nodes]` bool: true where the node's children count.
        """


class EntropyStop:
    """Goes on where the draft's law has little entropy: it knows what comes next.

    Args:
        threshold: in nats, H = -sum p log p; a uniform law over v tokens has log v.

    Raises:
        ValueError: `threshold` is negative.
    """

    def __init__(self, threshold: float) -> None:
        if not threshold >= 0:
            raise ValueError(f"threshold: expected an entropy >= 0 in nats, got {threshold!r}")
        self.threshold = threshold

    def __call__(self, level: int, logits: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """See `Stopping`."""
        log_law = torch.log_softmax(logits.float(), -1)
        entropy = -(log_law.exp() * log_law.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        return entropy <= self.threshold


class ConfidenceStop:
    """Goes on where the most probable tokens of the draft's law hold much of its mass, whichever tokens they are.

    Args:
        threshold: the mass, in [0, 1].
        top: of how many tokens.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, threshold: float, top: int = 1) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a probability in [0, 1], got {threshold!r}")
        self.threshold, self.top = threshold, check.whole("top", top, 1)

    def __call__(self, level: int, logits: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """See `Stopping`."""
        law = torch.softmax(logits.float(), -1)
        return law.topk(min(self.top, law.shape[-1]), -1).values.sum(-1) >= self.threshold


def going_on(
    stopping: Stopping | None, level: int, logits: torch.Tensor, hidden: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """Which nodes of a level get children: those that are there themselves, and that `stopping` does not stop.

    Args:
        stopping: None: it stops nowhere.
        level, logits, hidden: see `Stopping`.
        tokens: `[batch, nodes]`, the level's own; -1 where a candidate is missing. The hook does not get them.

    Returns:
        `[batch, nodes]` bool.

    Raises:
        ValueError: the hook answers with something else.
    """
    there = tokens >= 0
    if stopping is None:
        return there
    going = stopping(level, logits, hidden)
    if not isinstance(going, torch.Tensor) or going.dtype != torch.bool:
        got = going.dtype if isinstance(going, torch.Tensor) else type(going).__name__
        raise ValueError(f"stopping: expected bool {list(there.shape)} back, got {got}")
    return there & going


def check_hook(stopping: Any) -> Any:
    """`stopping`; raise unless it can be asked."""
    if stopping is not None and not callable(stopping):
        raise ValueError(f"stopping: expected a function such as EntropyStop(1.0), got {stopping!r}")
    return stopping
