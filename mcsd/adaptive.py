"""Trees whose size follows what was accepted so far, request by request."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from .checking import unwrapped
from .drafters import Drafter, LevelDrafter, ModelDrafter, Proposal, State
from .profile import Ladder, Profile

PRIOR = 8.0
"""Tested levels that the profile's own acceptance counts as, beside those of the request."""

DECAY = 0.95
"""A step's weight falls by this factor with each later one, so that what is seen now counts most."""


class AdaptiveDrafter(Drafter):
    """A drafter whose trees grow where much was accepted so far and shrink where little was.

    All trees are the first nodes of one, the ladder's largest, whose nodes are ordered by the probability of being
    accepted. Before each step a request chooses the size of most tokens a second: with a factor r of how much more than
    the profile says it accepted lately, a tree of size s gives `1 + Σ_{0 < i < s} r^depth(i) value(i)` tokens in
    `seconds(s)`. r is accepted over expected, level by level, over the levels that were tested, with the profile's
    own acceptance as a prior and old steps forgotten. The whole batch is drafted with the largest tree that a
    request chose; in the others' trees the nodes past their size are missing (-1).

    Lossless, because a choice depends on the past alone: on how many tokens earlier steps emitted. Given that past,
    the tree of a step is fixed before anything of the step is drawn, its candidates are honest draws from the draft's
    law and its coins are fresh, so the step's tokens have the target's law; and this holds for every past. (To drop a
    node for what was drawn there would be another matter: the siblings left are then no draws from that law.) The
    number of a node, which its random numbers hang on, is the same in every tree, so a request's text depends
    on its own past and not on the sizes that its neighbours chose.

    Args:
        draft: a causal language model, or a drafter that grows trees level by level (`LevelDrafter`).
        profile: of `mcsd tune`, its file, or a `Ladder`.
        proposal: how siblings are drawn; None: as the ladder says, and "point" where `mcsd.generate` decodes at
            temperature 0, at which a drawn draft has a single candidate.
        prior: tested levels that the profile's acceptance counts as.
        decay: weight of a step after one more step, in (0, 1].
        attention: of a model, as in `mcsd.generate`.

    Raises:
        ValueError: a number is out of range, the profile has no ladder, or the draft takes no trees.
    """

    def __init__(
        self,
        draft: PreTrainedModel | LevelDrafter,
        profile: Profile | Ladder | str | PathLike[str],
        *,
        proposal: str | None = None,
        prior: float = PRIOR,
        decay: float = DECAY,
        attention: str = "auto",
    ) -> None:
        ladder = profile if isinstance(profile, Ladder) else Profile.load(profile).ladder
        if ladder is None:
            raise ValueError("profile: expected one with a ladder of trees, got one without; run `mcsd tune` again")
        if not prior > 0:
            raise ValueError(f"prior: expected a number > 0, got {prior!r}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {decay!r}")
        if proposal == "greedy":
            raise ValueError('proposal: expected another than "greedy", whose siblings depend on how many there are')
        own = proposal or ladder.proposal
        self.drafter: LevelDrafter
        if isinstance(unwrapped(draft), PreTrainedModel):
            self.drafter = ModelDrafter(draft, proposal=own, attention=attention, parents=ladder.parents)
        elif isinstance(draft, LevelDrafter):
            self.drafter = draft.with_tree(ladder.parents, own)
        else:
            raise ValueError(f"draft: expected a model or a drafter that takes any tree, got {type(draft).__name__}")
        self.ladder, self.prior, self.decay = ladder, prior, decay
        self.proposal, self.parents, self.branching = own, ladder.parents, None
        self.reads_hidden, self.reads_cache = self.drafter.reads_hidden, self.drafter.reads_cache
        self._told = proposal is not None
        self._by_depth = [_depth_values(ladder, size) for size in ladder.sizes]

    def with_branching(self, branching: Sequence[int], proposal: str) -> AdaptiveDrafter:
        """This drafter, whose trees are its ladder's; with "point" if that is wanted and no proposal was given."""
        if self._told or proposal != "point":
            return self
        other = copy.copy(self)
        other.proposal, other.drafter = proposal, self.drafter.with_tree(self.parents, proposal)
        return other

    def parts(self) -> list[Any]:
        """This one and the drafter inside it."""
        return [self, *self.drafter.parts()]

    def begin(self, state: State) -> None:
        """Every request starts with the profile's own acceptance."""
        self.drafter.alone = self.alone
        self.drafter.begin(state)
        batch = len(state.sequences)
        self._accepted, self._expected = [0.0] * batch, [0.0] * batch
        self._lengths = [len(sequence) for sequence in state.sequences]
        self._rungs = [self._best(request) for request in range(batch)]

    def restart(self, state: State) -> None:
        """What was learned stays."""
        self.drafter.restart(state)

    def propose(self, state: State) -> Proposal:
        """Learn from the last step, choose each request's size, and draft the largest of them."""
        for request, sequence in enumerate(state.sequences):
            came = len(sequence) - self._lengths[request]
            if state.active[request] and came:  # nothing has before the first step, and where a step comes again
                self._learn(request, came - 1)
                self._rungs[request] = self._best(request)
            self._lengths[request] = len(sequence)
        sizes = [self.ladder.sizes[rung] for rung in self._rungs]
        nodes = max(
            (size for size, active in zip(sizes, state.active, strict=True) if active), default=self.ladder.sizes[0]
        )
        self.drafter.nodes = nodes
        proposal = self.drafter.propose(state)
        if min(sizes) >= nodes:
            return proposal
        own = torch.tensor(sizes, device=state.device)[:, None]
        number = torch.arange(nodes, device=state.device)
        return replace(proposal, tokens=torch.where(number < own, proposal.tokens, -1))

    def keep(self, state: State, path: torch.Tensor, length: torch.Tensor) -> None:
        """Tell the drafter."""
        self.drafter.keep(state, path, length)

    def end(self) -> None:
        """Tell the drafter."""
        self.drafter.end()

    def factor(self, request: int) -> float:
        """How much more than the profile says the request accepted lately."""
        return (self.prior + self._accepted[request]) / (self.prior + self._expected[request])

    def _learn(self, request: int, accepted: int) -> None:
        """Count the levels that the last step tested: all that were accepted, and the next one if the tree had it."""
        values = self._by_depth[self._rungs[request]]
        tested = min(accepted + 1, len(values) - 1)
        expected = sum(values[depth + 1] / values[depth] for depth in range(tested) if values[depth] > 0)
        self._accepted[request] = self.decay * self._accepted[request] + min(accepted, tested)
        self._expected[request] = self.decay * self._expected[request] + expected

    def _best(self, request: int) -> int:
        """The place in the ladder with the most tokens a second."""
        factor = self.factor(request)

        def speed(rung: int) -> float:
            tokens, likely = 0.0, 1.0
            for depth, value in enumerate(self._by_depth[rung]):
                # no more is accepted at a depth than above it
                likely = min(likely, factor**depth * value)
                tokens += likely
            return tokens / self.ladder.seconds[rung]

        return max(range(len(self.ladder.sizes)), key=speed)


def _depth_values(ladder: Ladder, size: int) -> list[float]:
    """For each depth the probability that a node of that depth is accepted, in the tree of the first `size` nodes."""
    depths = [0]
    for parent in ladder.parents[1:size]:
        depths.append(depths[parent] + 1)
    values = [0.0] * (max(depths) + 1)
    for depth, value in zip(depths, ladder.values, strict=False):
        values[depth] += value
    return values
