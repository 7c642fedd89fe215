"""One step of multi-candidate speculative decoding: draft a tree, score it, verify it, keep what was accepted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from mcsd_kernels import Verified, ancestor_bits, draw_uniforms, node_depths, verify

from .drafters import Drafter, Proposal, State
from .graphs import ROOM, prefix_bucket
from .scoring import Scorer
from .trees import LARGEST_TREE


class Stepped(NamedTuple):
    """What a step found.

    Args:
        tree: what was drafted.
        logits: `[batch, scored nodes, vocab]`, the target's.
        verified: `verify`'s answer.
        packed: what the host has to know of it in one tensor, see `pack`; None where the host has it at hand.
    """

    tree: Proposal
    logits: torch.Tensor
    verified: Verified
    packed: torch.Tensor | None


def _untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def step(
    drafter: Drafter,
    scorer: Scorer,
    state: State,
    rule: str,
    *,
    process: Callable[[torch.Tensor, Proposal], torch.Tensor] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = _untimed,
) -> Stepped:
    """One step: draft a tree, score it, verify it, keep what was accepted. Reads nothing back from the device.

    Args:
        drafter: where the tree comes from.
        scorer: the target.
        state: the batch; `step` changes nothing in it but `hidden` and `coins`.
        rule: see `mcsd_kernels.verify`.
        process: what makes other logits of the target's, given the tree.
        phase: a context for each of the four parts, by name.
    """
    with phase("draft"):
        tree = _rooted(drafter.propose(state), state, drafter.proposal)
    with phase("score"):
        logits = _score(scorer, state, tree)
    with phase("verify"):
        if process is not None:
            logits = process(logits, tree)
        verified = _verify(logits, state, tree, drafter.proposal, rule)
    with phase("keep"):
        scorer.keep(state.prefix, verified.path, verified.length)
        drafter.keep(state, verified.path, verified.length)
        at_hand = verified.path.is_cpu and tree.origin is None
        packed = None if at_hand else pack(verified, tree)
    return Stepped(tree, logits, verified, packed)


def captured_step(
    drafter: Drafter,
    scorer: Scorer,
    state: State,
    rule: str,
    *,
    phase: Callable[[str], AbstractContextManager[None]] = _untimed,
) -> Stepped | None:
    """`step` as one CUDA graph, captured when a step first comes like this, and replayed.

    What changes from step to step comes in by a few small tensors, so that a replay is a few copies and one launch.

    Returns:
        as `step`, in memory that the next one writes to; None, and nothing was done, where a step cannot be replayed.
    """
    if scorer.steps is None or scorer.steps.refuses(ROOM) or not scorer.ready:
        return None
    try:
        taken = drafter.captures(state)
        if taken is None:
            return None
        scorer.reserve(state.prefix, taken.nodes)
    except torch.OutOfMemoryError as error:  # a step by itself needs less room in the caches
        scorer.steps.refuse(ROOM, error)
        return None
    parameters = vars(state.sampling)
    tensors = {name: value for name, value in parameters.items() if isinstance(value, torch.Tensor)}
    numbers = tuple((name, value) for name, value in parameters.items() if name not in tensors)

    def run(small: torch.Tensor, seeds: torch.Tensor, *held: torch.Tensor) -> _Run:
        again, forgetful = copy.copy(state), drafter.forgetful()
        sampling, carried = held[: len(tensors)], held[len(tensors) :]
        again.seeds, again.sampling = seeds, replace(state.sampling, **dict(zip(tensors, sampling, strict=True)))
        again.read(small)
        again.shorter = again.shorter._replace(on_host=again.prefix.on_host)  # one bound for both
        again.step = again.step_on_device  # type: ignore[assignment]
        forgetful.carry(again, carried)
        stepped = step(forgetful, scorer, again, rule)
        # the graph has pointers into what the drafter holds
        return _Run(stepped, forgetful.carried(), again.hidden, forgetful)

    bound = prefix_bucket(state.prefix.longest)
    with phase("step"):
        found: _Run | None = scorer.steps.run(
            (bound, rule, drafter.proposal, type(drafter), numbers, taken.key),
            (*scorer.memory, *taken.memory),
            run,
            (state.small, state.seeds, *tensors.values(), *drafter.carried()),
            f"a step: batch {len(state.seeds)}, {taken.nodes} nodes, prefixes up to {bound}",
        )
    if found is None:
        return None
    drafter.carry(state, found.carried)
    state.hidden = found.hidden
    return found.stepped


class _Run(NamedTuple):
    stepped: Stepped
    carried: tuple[torch.Tensor, ...]
    hidden: torch.Tensor | None
    drafter: Drafter


def _score(scorer: Scorer, state: State, tree: Proposal) -> torch.Tensor:
    """One target forward over the tree's nodes that want it."""
    scored = tree.tokens.shape[1] if tree.scored is None else tree.scored
    ancestors, depth = tree.ancestors, tree.node_depth
    if ancestors is None or depth is None:
        ancestors = ancestor_bits(tree.parents[..., :scored])
        depth = node_depths(ancestors)
    logits = scorer.score(tree.tokens[:, :scored], ancestors[:, :scored], depth[..., :scored], state.prefix)
    state.hidden = scorer.hidden
    return logits


def _verify(logits: torch.Tensor, state: State, tree: Proposal, proposal: str, rule: str) -> Verified:
    """`mcsd_kernels.verify` of the tree; nodes that were not scored have no row."""
    if logits.shape[-1] != state.vocab:
        raise ValueError(
            f"target: expected logits over its {state.vocab} tokens, got {logits.shape[-1]}; a tensor-parallel plan "
            f"must gather the head's output (colwise_gather_output)"
        )
    target_rows = None
    batch, nodes = tree.tokens.shape
    if logits.shape[1] < nodes:
        scored = logits.shape[1]
        rows = torch.arange(batch * scored, dtype=torch.int32, device=logits.device).view(batch, scored)
        target_rows = torch.nn.functional.pad(rows, (0, nodes - scored), value=-1)
        logits = logits.flatten(0, 1)
    return verify(
        logits,
        tree.draft_logits,
        tree.tokens,
        tree.parents,
        coins_of(state, tree),
        proposal=proposal,
        rule=rule,
        sampling=state.sampling,
        target_rows=target_rows,
        draft_rows=tree.draft_rows,
        max_depth=tree.depth,
        draft_sampling=tree.draft_sampling,
        point_nodes=tree.point_nodes,
        draft_ids=tree.draft_ids,
    )


def _rooted(tree: Proposal, state: State, proposal: str) -> Proposal:
    """The proposal with the texts' last tokens as roots; a custom drafter's mistakes are named.

    Before they become an error deep in a model, or, as another root would, a text that is not the target's. What only
    a device can see is put right there.
    """
    if not isinstance(tree, Proposal):
        raise ValueError(f"Drafter.propose: expected a Proposal, got {type(tree).__name__}")
    batch = len(state.sequences)
    tokens, parents = tree.tokens, tree.parents
    if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
        raise ValueError(f"Proposal.tokens: expected int64 [{batch}, nodes], got {list(tokens.shape)} {tokens.dtype}")
    nodes = tokens.shape[1]
    if tuple(parents.shape) not in ((nodes,), (batch, nodes)):
        raise ValueError(f"Proposal.parents: expected [{nodes}] or [{batch}, {nodes}], got {list(parents.shape)}")
    if tree.scored is not None and not 1 <= tree.scored <= nodes:
        raise ValueError(f"Proposal.scored: expected a number in [1, nodes = {nodes}], got {tree.scored}")
    for name in ("point_nodes", "origin"):
        labels = getattr(tree, name)
        if labels is not None and tuple(labels.shape) not in ((nodes,), (batch, nodes)):
            raise ValueError(f"Proposal.{name}: expected [{nodes}] or [{batch}, {nodes}], got {list(labels.shape)}")
    if nodes > LARGEST_TREE:
        raise ValueError(f"Proposal.tokens: expected at most {LARGEST_TREE} nodes, got {nodes}")
    if proposal != "point" and tree.draft_logits is None:
        raise ValueError(f'Proposal.draft_logits: expected a tensor for proposal "{proposal}", got None')
    if not tokens.is_cpu:
        return replace(tree, tokens=torch.cat([state.tail[:, 1:], tokens[:, 1:]], 1))
    if not isinstance(state.step, torch.Tensor) and not torch.compiler.is_compiling():
        wanted, got = [text[-1] for text in state.sequences], tokens[:, 0].tolist()
        if got != wanted:
            raise ValueError(f"Proposal.tokens: expected the texts' last tokens in column 0, {wanted}, got {got}")
    return tree


def coins_of(state: State, tree: Proposal) -> torch.Tensor:
    """`[batch, nodes + 2]` fresh uniforms; a node's number, and the final draw's, do not depend on the tree's size.

    They depend on seeds and step alone, so those of many steps are drawn together where trees keep their size.
    """
    batch, count = len(state.seeds), tree.tokens.shape[1] + 2
    if isinstance(state.step, torch.Tensor) or torch.compiler.is_compiling():
        return draw_uniforms(state.seeds, state.step, count).roll(-2, 1)
    first, drawn = state.coins or (0, state.seeds.new_empty(0, 0, 0))
    same = drawn.shape[2] == count
    if not same or not first <= state.step < first + len(drawn):
        ahead = max(_DRAWN_AHEAD // (batch * count), 1) if same else 1
        steps = torch.arange(state.step, state.step + ahead, device=state.device).repeat_interleave(batch)
        drawn = draw_uniforms(state.seeds.repeat(ahead), steps, count).roll(-2, 1).view(ahead, batch, count)
        first, _ = state.coins = state.step, drawn
    return drawn[state.step - first]


_DRAWN_AHEAD = 1 << 9  # numbers


def pack(verified: Verified, tree: Proposal) -> torch.Tensor:
    """`[batch, ...]` int64: length, status, whether the last node had candidates, the tokens, and `_origins`."""
    last = verified.path.amax(1, keepdim=True)  # numbers ascend on every way down a tree
    offered = ((tree.parents == last) & (tree.tokens >= 0)).any(1)
    parts = [verified.length[:, None], verified.status[:, None], offered[:, None], verified.tokens]
    if tree.origin is not None:
        parts += _origins(tree, verified.path)
    return torch.cat(parts, 1)


def _origins(tree: Proposal, path: torch.Tensor) -> list[torch.Tensor]:
    """`[batch, depth + 1]` and `[batch, nodes]`: origins of the accepted nodes and of all candidates, -1 for none."""
    assert tree.origin is not None
    candidates = (tree.parents >= 0) & (tree.tokens >= 0)
    proposed = torch.where(candidates, tree.origin, -1)
    accepted = torch.where(path > 0, proposed.gather(1, path.clamp(min=0).long()), -1)
    return [accepted, proposed]
