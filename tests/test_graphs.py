"""Forwards and steps captured as CUDA graphs: a tape stands for the graph, so that no Python runs in a replay."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

import mcsd
from mcsd import Drafter, ModelDrafter, Proposal, State
from mcsd.adaptive import AdaptiveDrafter
from mcsd.cache import CACHES
from mcsd.decode import _are_captured, _read
from mcsd.drafters import EarlyExitDrafter, EntropyStop, FeatureDrafter, HeadsDrafter, MergedDrafter, NgramDrafter
from mcsd.drafters.base import Captures
from mcsd.graphs import PADDING, Captured, Graphs, Rehearsal, _alike, capturing, fingerprint, prefix_bucket, row_bucket
from mcsd.profile import Ladder
from mcsd.scoring import _KEPT, Scorer
from mcsd.step import Stepped, pack
from mcsd.trees import StaticTree, chain_bits, chain_depths
from mcsd_kernels import SamplingParams, Verified
from tests.tape import Tape
from tests.test_drafters_heads import medusa, speculator
from tests.test_feature_drafter import feature_model
from tests.tiny import VOCAB, greedy, pad, perturbed, prompt, tiny

PROMPTS = [prompt(17, 1), prompt(4, 2), prompt(9, 3)]
NEW = 12


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    monkeypatch.setattr("mcsd.cache.BLOCK", 8)
    return Tape(monkeypatch)


# Forwards


class Plain(Drafter):
    """A drafter that has no say on graphs: only forwards are captured."""

    def __init__(self, drafter: ModelDrafter) -> None:
        self.drafter, self.proposal = drafter, drafter.proposal
        self.begin, self.keep, self.end = drafter.begin, drafter.keep, drafter.end  # type: ignore[method-assign]

    def propose(self, state: State) -> Proposal:
        return self.drafter.propose(state)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_captured_forwards_are_replayed(name: str, tape: Tape) -> None:
    model = tiny(name)
    ids, mask = pad(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 16}
    draft = Plain(ModelDrafter(perturbed(model), (3, 2), "point"))
    found = mcsd.generate(model, draft, ids, mask, temperature=0.0, graphs=True, **options)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 16)) and "step" not in found.stats.seconds
    # a read and a level of the draft, and the target's tree; and once more where memory moved
    assert 3 <= tape.captured < tape.replayed
    before = tape.captured
    again = mcsd.generate(model, draft, ids, mask, temperature=0.0, graphs=True, **options)
    assert torch.equal(again.sequences, found.sequences)
    assert tape.captured - before < before, "graphs and cache stay with the model"
    draft = Plain(ModelDrafter(perturbed(model), (3, 2)))
    sampled = [mcsd.generate(model, draft, ids, mask, seed=4, graphs=g, **options) for g in (True, False)]
    assert torch.equal(sampled[0].sequences, sampled[1].sequences)


def test_a_model_that_was_changed_is_captured_anew() -> None:
    model = tiny()
    seen = {fingerprint(model)}
    assert seen == {fingerprint(model)}
    model.model.layers[0].mlp.adapter_is_on = False
    seen.add(fingerprint(model))
    model.model.layers[0].mlp.adapter_is_on = True
    seen.add(fingerprint(model))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    seen.add(fingerprint(model))
    model.model.norm = copy.deepcopy(model.model.norm)
    seen.add(fingerprint(model))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    seen.add(fingerprint(model))
    model.model.norm.scaling = {"default": 2.0}
    seen.add(fingerprint(model))
    for factor in (2, 3):
        hook = model.model.norm.register_forward_hook(lambda module, arguments, output: factor * output)  # noqa: B023
        seen.add(fingerprint(model))
        hook.remove()
    assert len(seen) == 9


@pytest.mark.parametrize("progress", [True, False])
def test_what_cannot_be_captured_runs_as_always(
    progress: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    llama = tiny()
    ids, mask = pad(PROMPTS)
    wanted = greedy(llama, ids, mask, NEW)
    found = mcsd.generate(
        llama, perturbed(llama), ids, mask, max_new_tokens=NEW, temperature=0.0, graphs=True, progress=progress
    )
    assert torch.equal(found.sequences, wanted)
    told, logged = capsys.readouterr().err, caplog.text
    reason = "forwards run eagerly: RuntimeError: there is no CUDA device"
    assert reason in (told if progress else logged) and reason not in (logged if progress else told)


def test_trees_of_one_bucket_share_a_captured_forward(tape: Tape) -> None:
    """A tree that changes from step to step, as long as its padded size does not."""

    class Changing(Drafter):
        proposal = "point"

        def propose(self, state: State) -> Proposal:
            nodes = 6 + state.step % 3
            parents = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 4][:nodes])
            children = torch.arange(1, nodes).expand(len(state.sequences), -1)
            return Proposal(torch.cat([state.tail[:, -1:], children], 1), parents, depth=3)

    assert {row_bucket(nodes) for nodes in (6, 7, 8)} == {8}
    model = tiny()
    ids, mask = pad(PROMPTS)
    found = mcsd.generate(model, Changing(), ids, mask, max_new_tokens=20, temperature=0.0, graphs=True)
    assert torch.equal(found.sequences, greedy(model, ids, mask, 20))
    moves = tape.captured
    again = mcsd.generate(model, Changing(), ids, mask, max_new_tokens=20, temperature=0.0, graphs=True)
    assert torch.equal(again.sequences, found.sequences) and tape.captured == moves and tape.replayed > 12


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (2, 2), (3, 4), (13, 16), (16, 16), (17, 32), (29, 32), (33, 48)])
def test_rows_are_padded_to_buckets(rows: int, padded: int) -> None:
    assert row_bucket(rows) == padded and padded - rows <= PADDING


def test_prefixes_are_padded_to_buckets() -> None:
    assert [prefix_bucket(n) for n in (0, 1, 512, 513, 5000)] == [512, 512, 512, 1024, 8192]


# Whole steps


def both(model: PreTrainedModel, draft: Any, **options: Any) -> tuple[mcsd.Generation, mcsd.Generation]:
    """The same generation with and without graphs."""
    ids, mask = pad(PROMPTS)
    with_graphs, without = (
        mcsd.generate(model, draft, ids, mask, graphs=graphs, **options) for graphs in (True, False)
    )
    return with_graphs, without


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "mistral"])
def test_captured_steps_are_replayed(name: str, tape: Tape) -> None:
    model = tiny(name)
    draft = perturbed(model)
    for seed in (4, 9):
        found, wanted = both(model, draft, max_new_tokens=20, branching=(3, 2), seed=seed)
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.stats.accepted_by_depth == wanted.stats.accepted_by_depth
        assert found.stats.tested_by_depth == wanted.stats.tested_by_depth
    assert "step" in found.stats.seconds and "step" not in wanted.stats.seconds
    assert 1 <= tape.captured < tape.replayed


def test_steps_are_captured_on_cuda_unless_asked_otherwise(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    ids, mask = pad(PROMPTS)
    mcsd.generate(model, perturbed(model), ids, mask, max_new_tokens=12)
    assert tape.captured == 0
    asked = {True: True, False: False, None: False}
    assert all(_are_captured(graphs, model) is wanted for graphs, wanted in asked.items())
    monkeypatch.setattr("mcsd.decode.input_device", lambda model: torch.device("cuda", 0))
    asked[None] = True
    assert all(_are_captured(graphs, model) is wanted for graphs, wanted in asked.items())
    monkeypatch.setattr("mcsd.decode.is_spread", lambda model: True)
    assert _are_captured(None, model) is False


def test_captured_steps_with_dense_masks(tape: Tape) -> None:
    model = tiny()
    found, wanted = both(model, perturbed(model), max_new_tokens=12, seed=4, attention="dense")
    assert torch.equal(found.sequences, wanted.sequences) and tape.captured == 1


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "greedy", "point"])
def test_a_captured_step_serves_every_text_and_temperature(rule: str, proposal: str, tape: Tape) -> None:
    model = tiny()
    draft = perturbed(model)
    drafters = [ModelDrafter(draft, (2, 2), proposal) for _ in range(4)]
    rows = [pad([prompt(n, 7 * i + n) for n in (9, 17, 4)]) for i in range(4)]
    for index, (drafter, (ids, mask)) in enumerate(zip(drafters, rows, strict=True)):
        options: dict[str, Any] = {
            "max_new_tokens": 10,
            "rule": rule,
            "seed": [index, 50, 2 * index],
            "temperature": torch.tensor([0.5, 1.0, 0.2 * index]),
            "top_k": torch.tensor([0, 3 + index, 0]),
            "eos_token_id": 5,
        }
        found = mcsd.generate(model, drafter, ids, mask, graphs=True, **options)
        wanted = mcsd.generate(model, ModelDrafter(draft, (2, 2), proposal), ids, mask, **options)
        assert torch.equal(found.sequences, wanted.sequences)
    captured = tape.captured
    for numbers in ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7}):
        found, wanted = both(model, ModelDrafter(draft, (2, 2), proposal), max_new_tokens=8, rule=rule, **numbers)
        assert torch.equal(found.sequences, wanted.sequences)
    assert captured <= 2 and tape.captured == captured + 2, "one for each kind of filter"


def test_parameters_of_every_shape_and_type(tape: Tape) -> None:
    model = tiny()
    draft = perturbed(model)
    parameters = [torch.tensor(1.5), torch.tensor([1, 2, 1]), torch.tensor([0.5, 1.0, 0.4]), torch.tensor(0.5)]
    for temperature in parameters:
        found, wanted = both(model, draft, max_new_tokens=12, temperature=temperature)
        assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("per_request", [False, True])
def test_an_answer_on_the_device_says_what_lists_say(per_request: bool) -> None:
    tokens = torch.tensor([[7, 3, 4, 5, -1], [8, 3, -1, 5, 6], [9, -1, -1, -1, -1]])
    parents = torch.tensor([-1, 0, 0, 1, 2], dtype=torch.int32)
    tree = Proposal(tokens, parents.expand(3, -1) if per_request else parents, 2)
    path = torch.tensor([[0, 1, 3], [0, -1, -1], [0, -1, -1]], dtype=torch.int32)
    emitted = torch.tensor([[3, 5, 11], [12, -1, -1], [13, -1, -1]])
    verified = Verified(path, torch.tensor([3, 1, 1]).int(), emitted, torch.tensor([0, 0, 4]).int())
    lists = _read(Stepped(tree, torch.empty(0), verified, None))
    assert pack(verified, tree).tolist() == lists == [[3, 0, 0, 3, 5, 11], [1, 0, 1, 12, -1, -1], [1, 4, 0, 13, -1, -1]]


def test_a_captured_step_keeps_what_it_points_to(tape: Tape) -> None:
    # a draft that knows some tokens only: what maps its columns is made anew in each generation
    model = tiny()
    draft = perturbed(model)
    ids = torch.arange(0, VOCAB, 2)
    draft.sub_vocab = ids
    draft.reduced = nullcontext
    draft.lm_head.weight = torch.nn.Parameter(draft.lm_head.weight[::2].clone())
    for seed in range(3):
        found, wanted = both(model, draft, max_new_tokens=20, branching=(3, 2), seed=seed)
        assert torch.equal(found.sequences, wanted.sequences)
        gc.collect()
    assert tape.captured == 1


def test_longer_texts_get_steps_of_their_own(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.graphs._PREFIX_BUCKET", 16)
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny()
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.info", lines.append)
    found, wanted = both(model, perturbed(model), max_new_tokens=60, branching=(2,))
    assert torch.equal(found.sequences, wanted.sequences)
    assert lines[0].startswith("captured a step: batch 3, 3 nodes, prefixes up to 32, in ")
    assert [line.split("up to ")[1].split(",")[0] for line in lines] == ["32", "64", "128"]


def test_drafts_in_turn_keep_their_steps(tape: Tape) -> None:
    model = tiny()
    drafts = [perturbed(model, seed=seed) for seed in range(2)]
    for draft in 2 * drafts:
        found, wanted = both(model, draft, max_new_tokens=12, branching=(3,))
        assert torch.equal(found.sequences, wanted.sequences)
    assert tape.captured == 2


def test_what_points_to_memory_that_moved_goes(tape: Tape) -> None:
    model = tiny("mistral")  # whose layers begin to skip slots
    found, wanted = both(model, perturbed(model), max_new_tokens=60, branching=(3,))
    assert torch.equal(found.sequences, wanted.sequences)
    ((_, _, steps),) = _KEPT[model].values()
    assert len(steps) == 1 < tape.captured


def test_what_points_to_a_draft_that_is_gone_goes(tape: Tape) -> None:
    model = tiny()
    for seed in range(4):
        both(model, perturbed(model, seed=seed), max_new_tokens=12, branching=(3,))
        gc.collect()
    ((_, _, steps),) = _KEPT[model].values()
    assert tape.captured == 4 and len(steps) == 1


def test_caches_do_not_wait_for_the_garbage_collector() -> None:
    model = tiny()
    gc.disable()
    try:
        before = len(CACHES)
        both(model, perturbed(model), max_new_tokens=4, branching=(3,))
        # those of the generation with graphs stay with the models
        assert len(CACHES) - before == 2
    finally:
        gc.enable()


HIDDEN: dict[str, Any] = {
    "feature": lambda model, *tree: FeatureDrafter(feature_model(model, 60), *tree),
    "medusa": lambda model, *tree: HeadsDrafter(medusa(model), *tree),
    "speculator": lambda model, *tree: HeadsDrafter(speculator(model), *tree),
}


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("proposal", ["without_replacement", "point"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_states_go_from_one_captured_step_to_the_next(
    kind: str, proposal: str, rule: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny()
    drafter = HIDDEN[kind](model, (9, 6), proposal)
    accepted = [0, 0]
    for seed in range(3):
        options: dict[str, Any] = {"temperature": torch.tensor([2.0, 0.0, 5.0]), "eos_token_id": [5, 9]}
        found, wanted = both(model, drafter, max_new_tokens=30, rule=rule, seed=seed, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.stats.accepted_by_depth == wanted.stats.accepted_by_depth
        assert "step" in found.stats.seconds
        accepted = [have + more for have, more in zip(accepted, found.stats.accepted_by_depth, strict=False)]
    assert tape.captured == 1 < tape.replayed
    assert accepted[0] > 0 and (accepted[1] > 0 or proposal == "point")


def test_an_observer_sees_the_hidden_states_of_captured_steps(tape: Tape) -> None:
    model = tiny()
    ids, mask = pad(PROMPTS)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for graphs, states in seen.items():

        def note(state: State, *_: Any) -> None:
            assert state.hidden is not None
            states.append(state.hidden.clone())  # noqa: B023

        drafter = HIDDEN["feature"](model, (2, 2))
        mcsd.generate(model, drafter, ids, mask, max_new_tokens=9, graphs=graphs, observer=note)
    assert len(seen[True]) == len(seen[False]) > 5
    for found, wanted in zip(*seen.values(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_other_tokens_of_a_draft_are_captured_anew(tape: Tape) -> None:
    model = tiny()
    draft = feature_model(model, 60)
    for captured in (1, 2):
        found, wanted = both(model, FeatureDrafter(draft, (4,)), max_new_tokens=30, seed=3)
        assert torch.equal(found.sequences, wanted.sequences) and tape.captured >= captured
        draft.draft_ids.copy_(torch.randperm(VOCAB)[:60].sort().values)


def test_graphs_hold_what_they_point_to(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny(num_hidden_layers=3)
    drafters = [HIDDEN[kind](model, (2, 2)) for kind in HIDDEN] + [EarlyExitDrafter(model, 1, (2, 2))]
    for _ in range(2):
        for drafter in (*drafters, perturbed(model)):
            found, wanted = both(model, drafter, max_new_tokens=20)
            assert torch.equal(found.sequences, wanted.sequences)
        for kept in (chain_bits, chain_depths, StaticTree.of):
            kept.cache_clear()
        gc.collect()


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_states_go_on_where_steps_are_captured_no_more(
    kind: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From captured steps to others, to captured forwards, and to captured steps again."""
    monkeypatch.setattr("mcsd.graphs._PREFIX_BUCKET", 16)
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    begun = []

    def at_times(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) in (2, 3):
            raise RuntimeError("not now")
        return tape(*arguments)

    monkeypatch.setattr("mcsd.graphs.capture", at_times)
    model = tiny()
    found, wanted = both(model, HIDDEN[kind](model, (7, 4, 2)), max_new_tokens=110, seed=1)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(begun) == 4 and {"step", "draft"} <= found.stats.seconds.keys()


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_reads_hidden_states_is_not_kept_by_graphs(kind: str, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)  # or graphs would go because the target's memory moves
    gc.collect()
    model, before, gone = tiny(), set(CACHES), []
    for _ in range(3):
        drafter = HIDDEN[kind](model, (3,))
        both(model, drafter, max_new_tokens=12)
        gone.append(weakref.ref(drafter.model if kind == "feature" else drafter.heads))
        del drafter
        gc.collect()
        assert len(set(CACHES) - before) == 1, "the target's"
    assert tape.captured >= 3 and all(reference() is None for reference in gone)
    assert all(len(steps) == 1 for _, _, steps in _KEPT[model].values())
    target = weakref.ref(model)
    del model
    gc.collect()
    assert target() is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_targets_own_layers_draft_in_captured_steps(
    name: str, shared: bool, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny(name, num_hidden_layers=3)
    target = model if shared else tiny(name, num_hidden_layers=3)
    drafters = [EarlyExitDrafter(model, layers, (4, 2)) for layers in (1, 2)]
    for seed in range(2):
        for drafter in drafters:
            found, wanted = both(target, drafter, max_new_tokens=30, seed=seed, temperature=2.0)
            assert torch.equal(found.sequences, wanted.sequences) and "step" in found.stats.seconds
    assert tape.captured == 2 and sum(found.stats.accepted_by_depth) > 3
    gone = weakref.ref(model)
    del model, target, drafters, drafter
    gc.collect()
    assert gone() is None


def test_heads_that_were_changed_are_captured_anew(tape: Tape) -> None:
    model = tiny()
    drafter = HIDDEN["speculator"](model, (3,))
    for captured in (1, 2):
        found, wanted = both(model, drafter, max_new_tokens=12)
        assert torch.equal(found.sequences, wanted.sequences) and tape.captured == captured
        drafter.heads.head[0].weight = torch.nn.Parameter(drafter.heads.head[0].weight.flip(0), requires_grad=False)


def test_a_step_over_a_large_tree_is_captured(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.scoring.LARGEST", 8)  # forwards over more nodes are not captured by themselves
    model = tiny()
    found, wanted = both(model, perturbed(model), max_new_tokens=12, branching=(3, 3))
    assert torch.equal(found.sequences, wanted.sequences) and tape.captured == 1


def test_every_tree_rule_and_proposal_has_a_step_of_its_own(tape: Tape) -> None:
    model = tiny()
    draft = perturbed(model)
    kinds: list[tuple[ModelDrafter, str]] = [
        (ModelDrafter(draft, (3, 2)), "recursive"),
        (ModelDrafter(draft, (3, 2)), "traversal"),
        (ModelDrafter(draft, (3, 2), "with_replacement"), "recursive"),
        (ModelDrafter(draft, (2, 2)), "recursive"),
        (ModelDrafter(draft, (3, 2), sampling=SamplingParams(temperature=2.0)), "recursive"),
    ]
    for seed, (drafter, rule) in enumerate(2 * kinds):
        found, wanted = both(model, drafter, max_new_tokens=20, rule=rule, seed=seed)
        assert torch.equal(found.sequences, wanted.sequences)
    assert tape.captured == len(kinds)


def test_what_changes_from_step_to_step_is_not_captured(tape: Tape) -> None:
    class Shrinking(ModelDrafter):
        def propose(self, state: State) -> Proposal:
            found = super().propose(state)
            if state.step % 2:
                found.tokens[:, -1] = -1
            return found

    class Passing(Plain):
        def captures(self, state: State) -> Captures | None:
            return self.drafter.captures(state)

    model = tiny()
    draft = perturbed(model)
    sizes = ModelDrafter(draft, (3,))
    sizes.nodes = 3
    merged = MergedDrafter([ModelDrafter(draft, (2, 2)), NgramDrafter()])
    passing = Passing(ModelDrafter(draft, (3,)))
    passing.drafter.alone = False
    for drafter in (Shrinking(draft, (3,)), sizes, merged, passing):
        found, wanted = both(model, drafter, max_new_tokens=20, seed=3)
        assert torch.equal(found.sequences, wanted.sequences) and "step" not in found.stats.seconds


def test_graphs_do_not_heap_up(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.graphs._MOST", 2)
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny()
    draft = perturbed(model)
    captured = []
    for temperature in (0.5, 1.0, 0.5, 1.5, 0.5, 1.0):
        found, wanted = both(model, draft, max_new_tokens=8, branching=(3,), temperature=temperature)
        assert torch.equal(found.sequences, wanted.sequences)
        captured.append(tape.captured)
    assert captured == [1, 2, 2, 3, 3, 4], "the one that was in use longest ago goes"


class Table(Drafter):
    """A tree without a model, from a table of successors."""

    def __init__(self, table: torch.Tensor, *, looks: bool = False) -> None:
        self.table, self.looks = table, looks

    def propose(self, state: State) -> Proposal:
        root = state.tail[:, -1:]
        if self.looks:
            root = root + 0 * int(root[0, 0])
        child = self.table[root]
        tree = StaticTree.of((-1, 0, 0, 1), state.device)
        tokens = torch.cat([root, child, (child + 1) % VOCAB, self.table[child]], 1)
        return Proposal(tokens, tree.parents, 2, ancestors=tree.node_ancestors, node_depth=tree.node_depth)

    def captures(self, state: State) -> Captures | None:
        return Captures(4, id(self.table))


def test_a_drafter_may_offer_its_steps(tape: Tape) -> None:
    model = tiny()
    table = torch.randperm(VOCAB)
    for _ in range(2):
        found, wanted = both(model, Table(table), max_new_tokens=20, temperature=0.0)
        assert torch.equal(found.sequences, wanted.sequences)
    assert tape.captured == 1


@pytest.mark.parametrize("spoilt", [(1, "results"), (2, "results"), (1, "caches"), (2, "caches")])
@pytest.mark.parametrize("kind", ["steps", "forwards", "hidden", "windows"])
def test_a_replay_that_goes_wrong_costs_no_token(
    kind: str, spoilt: tuple[int, str], tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first uses of a graph are compared with what was captured; then all texts are read again."""
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.info", lines.append)
    monkeypatch.setattr("mcsd.graphs.LOG.warning", lines.append)
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny("mistral" if kind == "windows" else "llama")
    draft: Any = perturbed(model)
    if kind == "forwards":
        draft = Plain(ModelDrafter(draft, (4, 2, 2)))
    if kind == "hidden":
        draft = FeatureDrafter(feature_model(model), (4, 2, 2))
    tape.spoils = spoilt
    found, wanted = both(model, draft, max_new_tokens=40, seed=3)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.stats.target_calls == wanted.stats.target_calls
    (line,) = {line for line in lines if "did not do" in line}
    assert ("a replay of a forward" if kind == "forwards" else "a replay of a step") in line
    # nothing more of the kind is replayed, then or later, whatever else a graph would be of
    lines.clear()
    for temperature in (1.0, 0.5):
        found, wanted = both(model, draft, max_new_tokens=40, seed=4, temperature=temperature)
        assert torch.equal(found.sequences, wanted.sequences) and line in lines
    assert not any("captured a step" in line for line in lines)


@pytest.mark.parametrize("spoilt", [8, 17])
def test_windows_begin_again_after_a_wrong_replay(spoilt: int, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been let go of behind the window is there again."""
    monkeypatch.setattr(Captured.__init__, "__defaults__", (1000,))  # every use is compared
    model = tiny("mistral")
    tape.spoils = spoilt, "caches"
    skipped = []
    restart = Scorer.restart

    def noted(scorer: Scorer) -> None:
        skipped.append(max(max(store.skipped) for store in scorer.cache._stores.values()))
        restart(scorer)

    monkeypatch.setattr(Scorer, "restart", noted)
    draft = perturbed(model)
    ids, mask = pad([prompt(90, 1), prompt(83, 2), prompt(97, 3)])
    options: dict[str, Any] = {"max_new_tokens": 40, "branching": (2, 1)}
    found, wanted = (mcsd.generate(model, draft, ids, mask, graphs=graphs, **options) for graphs in (True, False))
    assert torch.equal(found.sequences, wanted.sequences) and skipped[0] > 0


LADDER = Ladder((-1, 0, 0, 1, 1, 3, 3, 5), (1.0, 0.6, 0.2, 0.3, 0.1, 0.2, 0.1, 0.1), (2, 4, 8), (1.0, 1.15, 1.4))
LEARNING: dict[str, Any] = {
    "alone": lambda draft, other: AdaptiveDrafter(draft, LADDER),
    "first": lambda draft, other: MergedDrafter([AdaptiveDrafter(draft, LADDER), NgramDrafter()]),
    # the first one's replay goes wrong before the other has learned from the step before
    "second": lambda draft, other: MergedDrafter(
        [ModelDrafter(draft, (2, 1)), AdaptiveDrafter(other, LADDER, proposal="point", decay=1.0, prior=0.5)]
    ),
}


@pytest.mark.parametrize("place", LEARNING)
def test_drafters_that_learn_go_on_after_a_wrong_replay(
    place: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    learned: list[list[tuple[int, int]]] = [[], []]
    learn = AdaptiveDrafter._learn
    for spoilt in (1, 2, 3, 5, 8):
        tape.replayed, tape.spoils = 0, (spoilt, "results")
        model = tiny()
        drafter = LEARNING[place](perturbed(model), perturbed(model, seed=1))
        ids, mask = pad(PROMPTS)
        texts: list[torch.Tensor] = []
        for graphs, seen in zip((True, False), learned, strict=True):

            def noted(self: AdaptiveDrafter, request: int, accepted: int) -> None:
                seen.append((request, accepted))  # noqa: B023
                learn(self, request, accepted)

            monkeypatch.setattr(AdaptiveDrafter, "_learn", noted)
            text = mcsd.generate(model, drafter, ids, mask, max_new_tokens=40, seed=1, graphs=graphs).sequences
            texts.append(text)
        assert torch.equal(*texts) and learned[0] == learned[1] and len(learned[0]) > 10


@pytest.mark.parametrize("proposal", ["without_replacement", "point"])
@pytest.mark.parametrize("kind", ["feature", "medusa", "early exit"])
def test_merged_drafters_have_their_forwards_captured(kind: str, proposal: str, tape: Tape) -> None:
    model = tiny(num_hidden_layers=3)
    make = HIDDEN.get(kind, lambda model, *tree: EarlyExitDrafter(model, 2, *tree))
    first = make(model, (3, 2), proposal)
    drafter = MergedDrafter([first, NgramDrafter()])
    ids, mask = pad([4 * prompt(5, 1), 3 * prompt(4, 2), 5 * prompt(3, 3)])
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 2}
    found, wanted = (mcsd.generate(model, drafter, ids, mask, graphs=graphs, **options) for graphs in (True, False))
    assert torch.equal(found.sequences, wanted.sequences) and tape.replayed > 5


@pytest.mark.parametrize("place", ["mcsd.graphs.Graphs._without", "mcsd.graphs._alike", "mcsd.cache._Store._make_room"])
def test_without_memory_to_compare_or_to_reserve_all_goes_on(
    place: str, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.info", lines.append)
    monkeypatch.setattr("mcsd.graphs.LOG.warning", lines.append)
    before = getattr(mcsd.cache._Store, place.rsplit(".", 1)[1], None)

    def fails(*arguments: Any) -> Any:
        if before is None or arguments[3] > 100:
            raise torch.OutOfMemoryError("too little memory")
        return before(*arguments)

    model = tiny()
    draft = perturbed(model)
    with monkeypatch.context() as patch:
        patch.setattr(place, staticmethod(fails) if "_without" in place else fails)
        found, wanted = both(model, draft, max_new_tokens=12, seed=2)
        assert torch.equal(found.sequences, wanted.sequences)
        assert any("OutOfMemoryError: too little memory" in line for line in lines)
    before_it = tape.captured
    found, wanted = both(model, draft, max_new_tokens=12, seed=2)
    assert torch.equal(found.sequences, wanted.sequences) and tape.captured > before_it, "tried again"


def test_without_memory_to_compare_texts_are_read_again_once_a_graph(
    tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr("mcsd.graphs._alike", fails)
    restarts = []
    monkeypatch.setattr(ModelDrafter, "restart", lambda self, state: restarts.append(1) or Drafter.restart(self, state))
    model = tiny()
    drafter = ModelDrafter(perturbed(model), (2, 1), stopping=EntropyStop(9.0))
    found, wanted = both(model, drafter, max_new_tokens=60, seed=2)
    assert torch.equal(found.sequences, wanted.sequences) and found.stats.target_calls > 20
    assert 1 <= len(restarts) <= 4, "the draft's two forwards and the target's, and one where memory moved"


def test_a_comparison_that_was_interrupted_is_made_later(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.cache.BLOCK", 256)
    model = tiny()
    draft = perturbed(model)
    with monkeypatch.context() as patch:
        patch.setattr("mcsd.graphs._alike", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(3):
            assert both(model, draft, max_new_tokens=12)[0].stats.interrupted
    assert tape.captured == 1
    tape.spoils = (tape.replayed + 1, "caches")
    found, wanted = both(model, draft, max_new_tokens=12)
    assert torch.equal(found.sequences, wanted.sequences)


def test_replays_are_trusted_in_the_end(tape: Tape) -> None:
    # so the test before this one would see a wrong replay that is not found
    model = tiny()
    tape.spoils = (3, "caches")
    found, wanted = both(model, perturbed(model), max_new_tokens=40, seed=3)
    assert not torch.equal(found.sequences, wanted.sequences)


class Looking(Drafter):
    """Its trees depend on a number on the host, which a graph has for good."""

    def propose(self, state: State) -> Proposal:
        root = state.tail[:, -1:]
        tree = StaticTree.of((-1, 0, 1), state.device)
        tokens = torch.cat([root, (root + len(state.sequences[0])) % VOCAB, (root + 1) % VOCAB], 1)
        return Proposal(tokens, tree.parents, 2, ancestors=tree.node_ancestors, node_depth=tree.node_depth)

    def captures(self, state: State) -> Captures | None:
        return Captures(3, "looking")


def test_a_number_from_the_host_that_a_graph_has_kept_is_found(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.warning", lines.append)
    model = tiny()
    found, wanted = both(model, Looking(), max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(lines) == 1 and "did not do what was captured" in lines[0]


@pytest.mark.parametrize(
    ("found", "is_alike"),
    [
        ([1.0, -torch.inf, torch.nan, 4.0], True),
        ([1.0, -torch.inf, torch.nan, 4.01], True),
        ([1.001, -torch.inf, torch.nan, 4.0], True),
        ([1.0, -torch.inf, torch.nan, 5.0], False),
        ([1.0, -torch.inf, 2.0, 4.0], False),
        ([1.0, 0.0, torch.nan, 4.0], False),
    ],
)
def test_results_are_alike_but_for_rounding(found: list[float], is_alike: bool) -> None:
    wanted = torch.tensor([1.0, -torch.inf, torch.nan, 4.0])
    same, other = torch.tensor([3, 4]), torch.tensor([3, 5])
    assert _alike((torch.tensor(found), None, same), (wanted, None, same)) is is_alike
    exact = torch.equal(torch.tensor(found).nan_to_num(), wanted.nan_to_num())
    # what rounding may have turned is not compared
    assert _alike((torch.tensor(found), same), (wanted, other)) is (is_alike and not exact)


def test_caches_are_alike_but_for_rounding_however_little_is_in_them() -> None:
    cache = torch.zeros(1, 4, 2, 500, 16)
    cache[:, :, :, :40] = torch.randn(1, 4, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    rounded, other = cache.bfloat16().float(), cache.clone()
    other[:, :, :, 39] = cache[:, :, :, 38]
    cached, *others = (one.sum((2, 4)) for one in (cache, rounded, other))
    assert not torch.equal(others[0], cached) and [_alike(one, cached) for one in others] == [True, False]


def test_a_step_that_waits_for_the_host_is_not_captured(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.info", lines.append)
    monkeypatch.setattr("mcsd.graphs.LOG.warning", lines.append)
    model = tiny()
    found, wanted = both(model, Table(torch.randperm(VOCAB), looks=True), max_new_tokens=20, temperature=0.0)
    assert torch.equal(found.sequences, wanted.sequences)
    assert lines[0] == "steps run part by part: RuntimeError: item waits for the device"
    assert lines[1].startswith("captured a forward") and tape.captured == 1


def test_one_drafter_that_is_refused_does_not_stop_another(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("mcsd.graphs.LOG.info", lines.append)
    monkeypatch.setattr("mcsd.graphs.LOG.warning", lines.append)
    model = tiny()
    draft, table = perturbed(model), torch.randperm(VOCAB)
    for drafter in (Table(table, looks=True), draft, Table(table, looks=True)):
        found, wanted = both(model, drafter, max_new_tokens=12, temperature=0.0)
        assert torch.equal(found.sequences, wanted.sequences)
    assert sum(line.startswith("captured a step") for line in lines) == 1
    assert sum(line.startswith("steps run part by part") for line in lines) == 3, "once a generation"


def test_what_there_was_no_memory_for_is_tried_again(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    model = tiny()
    draft = perturbed(model)
    with monkeypatch.context() as patch:
        patch.setattr("mcsd.graphs.capture", fails)
        found, wanted = both(model, draft, max_new_tokens=12)
        assert torch.equal(found.sequences, wanted.sequences) and tape.captured == 0
    found, wanted = both(model, draft, max_new_tokens=12)
    assert torch.equal(found.sequences, wanted.sequences) and tape.captured == 1


def test_after_many_refusals_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("not this one")

    monkeypatch.setattr("mcsd.graphs.capture", fails)
    graphs = Graphs("otherwise")
    for key in [key for key in range(12) for _ in range(2)]:
        assert graphs.run((key,), (), lambda x: x, [torch.ones(1)], "it") is None
    assert graphs.off and len(tried) == 8


def test_a_rehearsal_refuses_what_a_capture_would_not_survive() -> None:
    there = torch.device("meta")
    far, near = torch.ones(4, 3, device=there), torch.ones(4, 3)
    fine: list[Any] = [
        lambda: near.sum().item(),
        lambda: near[near > 0],
        lambda: near[[0, 1]].to(torch.float64),
        lambda: (far @ far.T).to(torch.float64).sum(),
        lambda: far[torch.zeros(2, dtype=torch.int64, device=there)],
        lambda: far.copy_(far + 1),
    ]
    waits: list[Any] = [
        lambda: far.sum().item(),
        lambda: bool(far.sum() > 0),
        lambda: torch.equal(far, far),
        lambda: far.nonzero(),
        lambda: far[far > 0],
        lambda: far.index_put_((torch.tensor([0, 1]),), far[:2]),
        lambda: near.to(there),
        lambda: far.copy_(near),
    ]
    with Rehearsal(there):
        for call in fine:
            call()
    for call in waits:
        with Rehearsal(there), pytest.raises(RuntimeError, match=r"waits for the device|the device and the host"):
            call()


class Device:
    """Stands for what `capture` asks of CUDA; a capture that fails leaves its stream, as CUDA's does.

    From then on there are no random numbers, until one ends well.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: Any = Stream("ours")
        self.has_random_numbers = True
        for name, stand_in in {
            "is_available": lambda: True,
            "device": lambda device: nullcontext(),
            "current_stream": lambda: self.current,
            "stream": self.stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 1),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr("mcsd.graphs._beside", lambda device: Stream("beside"))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, *, stream: Any, pool: Any = None, capture_error_mode: str = "") -> Iterator[None]:
        before, self.current = self.current, stream
        self.has_random_numbers = False
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.current, self.has_random_numbers = before, True


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.name)


def test_what_waits_for_the_device_is_refused_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    ours, calls, told = device.current, [], []
    graphs = Graphs("otherwise")
    graphs.begin(told.append)
    assert graphs.run(("key",), (), lambda x: calls.append(x.sum().item()), [torch.ones(1)], "it") is None
    assert len(calls) == 1 and told == ["otherwise: RuntimeError: _local_scalar_dense waits for the device"]
    assert device.current is ours and ours.waited == ["beside"]


@pytest.mark.parametrize("fails_at", [None, 0, 1, 2])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    fails_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    ours, calls = device.current, []

    def function(_: torch.Tensor) -> int:
        calls.append(device.current.name)
        if len(calls) - 1 == fails_at:
            raise ValueError("cannot")
        return 7

    told: list[str] = []
    graphs = Graphs("otherwise")
    graphs.begin(told.append)
    result = graphs.run(("key",), (), function, [torch.ones(1)], "it")
    assert result == (7 if fails_at is None else None) and set(calls[:3]) == {"beside"}
    assert calls[3:] == ["ours"] if fails_at is None else len(calls) == fails_at + 1
    assert device.current is ours and ours.waited == ["beside"] and not capturing()
    assert device.has_random_numbers
    assert told[0].startswith("captured it" if fails_at is None else "otherwise: ValueError: cannot")


def test_what_needs_the_host_is_run_part_by_part(tape: Tape) -> None:
    class Ban(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, input_ids[0, -3:], -torch.inf)

    model = tiny()
    draft = perturbed(model)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (draft, {"logits_processor": [Ban()]}),
        (ModelDrafter(draft, (2, 2), stopping=EntropyStop(3.0)), {}),
        ("ngram", {}),
    ]
    for drafter, options in cases:
        found, wanted = both(model, drafter, max_new_tokens=12, seed=3, **options)
        assert torch.equal(found.sequences, wanted.sequences) and "step" not in found.stats.seconds


def test_a_captured_step_does_not_keep_the_draft_alive(tape: Tape) -> None:
    model = tiny()
    draft = perturbed(model)
    found, _ = both(model, draft, max_new_tokens=12)
    assert tape.captured and "step" in found.stats.seconds
    there = weakref.ref(draft)
    del draft, found
    gc.collect()
    assert there() is None
