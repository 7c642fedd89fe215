"""The drafter that reads hidden states: its forward against a plain one, and the target's law whatever it drafts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import PValue

import mcsd
from mcsd.distill.product import quantise
from mcsd.draft_model import DATA, WEIGHTS_FILE, dequantise, load_feature_model
from mcsd.drafters.base import Proposal, State
from mcsd.drafters.feature import FeatureConfig, FeatureDrafter, FeatureModel
from mcsd_kernels import SamplingParams

WIDTH = 32


def feature_model(target: torch.nn.Module, rows: int = tiny.VOCAB, seed: int = 0) -> FeatureModel:
    """A random model over `rows` of the target's tokens, every third id left out where that is possible."""
    vocab, width = target.get_input_embeddings().weight.shape
    config = FeatureConfig(vocab, width, 48, 4, 2, 8, rows)
    model = FeatureModel(config, target.get_input_embeddings().weight)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
        model.draft_ids.copy_(torch.randperm(vocab, generator=random)[:rows].sort().values)
    return model.eval().requires_grad_(False)


def plain_law(model: FeatureModel, tokens: list[int], hidden: torch.Tensor, guessed: int) -> torch.Tensor:
    """Draft logits after `tokens`, without a cache: the last `guessed` pairs take the model's own guesses.

    Args:
        hidden: `[len(tokens), width]`, the true hidden states.
    """
    before = F.pad(hidden, (0, 0, 1, 0))[: len(tokens)].clone()
    ids = torch.tensor([tokens])
    for last in range(len(tokens) - guessed, len(tokens) + 1):
        z = model.mix(ids[:, :last], before[None, :last])
        query, key, value = model.project(z, torch.arange(last)[None])
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        g = model.finish(z, attended)[0, -1]
        if last < len(tokens):
            before[last] = g
    return model.logits(g)


def target_hidden(target: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return target.get_decoder()(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


class Watched(FeatureDrafter):
    """Keeps every proposal with the texts that it was made for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[list[int]], list[bool], Proposal]] = []

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        held = replace(proposal, draft_logits=proposal.draft_logits.clone())  # the next step takes the same memory
        self.seen.append(([list(s) for s in state.sequences], list(state.active), held))
        return proposal


@pytest.mark.parametrize(
    "parents",
    [
        pytest.param((-1, 0, 0, 0), id="one-level"),
        pytest.param((-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6), id="three-levels"),
        pytest.param((-1, 0, 1, 0, 3, 1, 4), id="numbered-by-branch"),
    ],
)
def test_draft_logits_are_those_of_a_plain_forward(parents: tuple[int, ...]) -> None:
    target = tiny.tiny()
    model = feature_model(target, rows=60)
    drafter = Watched(model, parents=parents)
    ids, mask = tiny.pad([tiny.prompt(7), tiny.prompt(1, 1), tiny.prompt(12, 2)])
    mcsd.generate(target, drafter, ids, mask, max_new_tokens=9, temperature=0.8, seed=3)
    assert len(drafter.seen) > 2
    kept = 0
    for before, after in zip(drafter.seen, drafter.seen[1:], strict=False):
        kept += sum(len(b) > len(a) + 1 for a, b in zip(before[0], after[0], strict=True))
    assert kept, "nothing was accepted: the reading of kept tokens is not tested"
    for texts, active, proposal in drafter.seen:
        nodes = proposal.parents.tolist()
        for request, text in enumerate(texts):
            if not active[request]:
                continue
            hidden = target_hidden(target, text)
            for node in set(nodes) - {-1}:
                path, at = [], node
                while at > 0:
                    path, at = [int(proposal.tokens[request, at]), *path], nodes[at]
                room = torch.cat([hidden[:-1], torch.zeros(1 + len(path), WIDTH)])
                wanted = plain_law(model, text + path, room, len(path))
                got = proposal.draft_logits[proposal.draft_rows[request, node]]
                torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("rows", [tiny.VOCAB, 40])
@pytest.mark.parametrize("branching", [(1, 1, 1), (3, 2)])
def test_greedy_text_is_plain_greedy(branching: tuple[int, ...], rows: int) -> None:
    target = tiny.tiny()
    ids, mask = tiny.pad([tiny.prompt(5), tiny.prompt(9, 1), tiny.prompt(1, 2)])
    drafter = FeatureDrafter(feature_model(target, rows), branching, "point")
    got = mcsd.generate(target, drafter, ids, mask, max_new_tokens=16, temperature=0).sequences
    assert torch.equal(got, tiny.greedy(target, ids, mask, 16))


@pytest.mark.parametrize("proposal", ["without_replacement", "with_replacement", "greedy", "point"])
def test_sampled_text_has_the_targets_law(proposal: str, p_value: PValue) -> None:
    vocab, trials = 5, 1500
    target = tiny.tiny(vocab_size=vocab, gain=1.5)
    prompt = [1, 3, 2]
    law = []
    with torch.inference_mode():
        first = target(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for a in range(vocab):
            second = target(torch.tensor([[*prompt, a]])).logits[0, -1].softmax(-1)
            law += [((a, b), float(first[a] * second[b])) for b in range(vocab)]
    drafter = FeatureDrafter(feature_model(target, rows=4), (2, 2), proposal)
    ids = torch.tensor([prompt]).expand(trials, -1)
    text = mcsd.generate(target, drafter, ids, max_new_tokens=2, seed=11).sequences[:, 3:]
    counts = Counter(map(tuple, text.tolist()))
    assert set(counts) <= set(product(range(vocab), repeat=2))
    assert p_value(law, counts) > 1e-4


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    target = tiny.tiny()
    prompts = [tiny.prompt(6), tiny.prompt(11, 1), tiny.prompt(2, 2)]
    drafter = FeatureDrafter(feature_model(target, 70), (2, 2))
    ids, mask = tiny.pad(prompts)
    together = mcsd.generate(target, drafter, ids, mask, max_new_tokens=12, seed=5).sequences[:, ids.shape[1] :]
    for request, prompt in enumerate(prompts):
        alone = mcsd.generate(target, drafter, torch.tensor([prompt]), max_new_tokens=12, seed=5 + request).sequences
        assert torch.equal(alone[0, len(prompt) :], together[request])


def test_another_target_is_refused() -> None:
    target = tiny.tiny()
    drafter = FeatureDrafter(feature_model(tiny.tiny(vocab_size=50), 20))
    with pytest.raises(ValueError, match="vocabulary of 50"):
        mcsd.generate(target, drafter, torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def test_a_tree_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="branching"):
        FeatureDrafter(feature_model(tiny.tiny()), [])


def test_branching_reaches_a_drafter_without_one_of_its_own() -> None:
    model = feature_model(tiny.tiny())
    shared = FeatureDrafter(model, sampling=SamplingParams(temperature=0.5))
    other = shared.with_branching((5,), "point")
    assert (other.branching, other.proposal, other.model, other.sampling) == ((5,), "point", model, shared.sampling)
    own = FeatureDrafter(model, (2, 2))
    assert own.with_branching((5,), "point") is own


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_weight_int8pack_mm"), reason="this torch has no int8 product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_the_packed_head_is_the_head(rows: int, dtype: torch.dtype) -> None:
    model = feature_model(tiny.tiny(), 64).to(dtype)
    stored = quantise({"head": model.head_rows})
    model.head_rows.copy_(dequantise(stored, dtype)["head"])
    g = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = model.logits(g)
    model.pack_head(stored["head"], stored["head.scale"])
    assert model.packed is not None
    # one product of bfloat16 roundings against another, or against one of float32
    torch.testing.assert_close(model.logits(g), wanted, atol=0.06, rtol=0.02)


class _Merged(FeatureDrafter):
    """Its candidates beside a chain of the right continuation that it knows nothing of.

    The last request gets it first, so that it is over, at the end of its room, while another still takes long paths.
    """

    def __init__(self, model: FeatureModel, answers: list[list[int]]) -> None:
        super().__init__(model, (2,), "point")
        self.answers = answers

    def propose(self, state: State) -> Proposal:
        own = super().propose(state)
        chain = torch.full((len(state.sequences), 8), -1)
        for request, (text, answer) in enumerate(zip(state.sequences, self.answers, strict=True)):
            helped = request == 2 or (request == 1 and not state.active[2])
            following = answer[len(text) : len(text) + 8] if helped else []
            chain[request, : len(following)] = torch.tensor(following, dtype=torch.long)
        parents = torch.cat([own.parents, torch.tensor([0, *range(3, 10)], dtype=torch.int32)])
        return Proposal(torch.cat([own.tokens, chain], 1), parents, 8)


def test_paths_of_other_drafters_are_read() -> None:
    target = tiny.tiny()
    ids, mask = tiny.pad([tiny.prompt(9), tiny.prompt(3, 1), tiny.prompt(9, 2)])
    wanted = tiny.greedy(target, ids, mask, 20)
    answers = [row[padding:] for row, padding in zip(wanted.tolist(), (mask == 0).sum(1).tolist(), strict=True)]
    drafter = _Merged(feature_model(target, 40), answers)
    got = mcsd.generate(target, drafter, ids, mask, max_new_tokens=20, temperature=0)
    assert torch.equal(got.sequences, wanted)
    assert max(got.stats.accepted_by_depth[5:]) > 0


def test_the_bundled_drafter_is_whole() -> None:
    folder = DATA / "smollm2-feature"
    assert (folder / WEIGHTS_FILE).stat().st_size <= 15_000_000
    model = load_feature_model(folder, torch.randn(49_152, 576, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model.draft_ids, model.draft_ids.unique()) and len(model.draft_ids) == 16_384
    assert int(model.draft_ids[0]) >= 0 and int(model.draft_ids[-1]) < 49_152
    logits = model.logits(torch.randn(1, 2, 576))
    assert logits.shape == (1, 2, 16_384) and bool(logits.isfinite().all())
    with pytest.raises(ValueError, match="input embedding of shape"):
        load_feature_model(folder, torch.zeros(9, 576))
