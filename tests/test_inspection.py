"""What an inspection says of trees with chosen candidates, against what the oracle tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcsd import Drafter, ModelDrafter, Proposal, State
from mcsd.diagnostics import Recorder
from mcsd.drafters.merged import MergedDrafter
from mcsd.inspection import Step, inspect_steps
from mcsd.step import coins_of
from mcsd_kernels import Verified, reference
from tests.cases import PROPOSALS, RULES
from tests.small_law import START, few
from tests.tiny import perturbed


class Chooses(Drafter):
    """Chooses two tokens that the text decides, the first of them twice, and one after each."""

    def propose(self, state: State) -> Proposal:
        rows = []
        for s in state.sequences:
            first, second = (1, 4) if len(s) % 2 else (4, 2)
            rows.append([s[-1], first, second, first, second, first])
        return Proposal(torch.tensor(rows), torch.tensor([-1, 0, 0, 0, 1, 2], dtype=torch.int32), 2)


class Oracle(Recorder):
    """Verifies each step a second time, and notes which nodes have a turn."""

    def __init__(self, proposal: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(proposal)
        self.rule = rule
        self.turns: list[set[int]] = []
        self.weightless: list[set[int]] = []
        self.chosen: list[list[bool]] = []
        accept, enter = reference.UniformCoins.accept, reference._enter_child

        def accepting(coins: Any, node: int, scale: float, mass: float) -> bool:
            self.turns[-1].add(node)
            return accept(coins, node, scale, mass)

        def entering(problem: Any, coins: Any, path: list[int], child: Any, scale: float, mass: float) -> Any:
            self.turns[-1].add(child.node)
            if mass <= scale * reference.NO_WEIGHT:
                self.weightless[-1].add(child.node)
            return enter(problem, coins, path, child, scale, mass)

        monkeypatch.setattr(reference.UniformCoins, "accept", accepting)
        monkeypatch.setattr(reference, "_enter_child", entering)

    def observe(self, state: State, tree: Proposal, target_logits: torch.Tensor, verified: Verified) -> None:
        self.turns.append({0})
        self.weightless.append(set())
        nodes = tree.tokens.shape[1]
        own = tree.point_nodes
        self.chosen.append([self.proposal == "point"] * nodes if own is None else own[0].tolist())
        again = reference.verify(
            target_logits,
            tree.draft_logits,
            tree.tokens,
            tree.parents,
            coins_of(state, tree),
            proposal=self.proposal,
            rule=self.rule,
            draft_rows=tree.draft_rows,
            max_depth=tree.depth,
            point_nodes=own,
        )
        assert torch.equal(again.path, verified.path)


def inspected(drafter: Drafter, rule: str, seed: int, recorder: Recorder) -> list[Step]:
    steps, _ = inspect_steps(
        few(), drafter, torch.tensor([START]), str, steps=3, rule=rule, recorder=recorder, seed=seed, max_new_tokens=20
    )
    return steps


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_verdicts_of_merged_trees_are_the_rule_s(proposal: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = MergedDrafter([Chooses(), ModelDrafter(perturbed(few(), 0.7), (2,), proposal)])
    oracle = Oracle(proposal, rule, monkeypatch)
    steps = [step for seed in range(40) for step in inspected(drafter, rule, seed, oracle)]
    seen = set()
    for step, turns, weightless, chosen in zip(steps, oracle.turns, oracle.weightless, oracle.chosen, strict=True):
        verdicts = {node.id: node.verdict for node in step.nodes}
        parents = {node.id: node.parent for node in step.nodes}
        tested = {node for node, verdict in verdicts.items() if verdict in ("accepted", "rejected")}
        # a child of weight 0 is refused with all that stands below it
        assert {node for node in tested if parents[node] not in weightless} == turns
        assert [node for node, verdict in verdicts.items() if verdict == "accepted"] == sorted(step.path)
        for node in step.nodes[1:]:
            assert (node.q is None) == chosen[node.id]
            seen.add((chosen[node.id], node.verdict))
    assert seen >= {(True, verdict) for verdict in ("accepted", "rejected", "untested")}
