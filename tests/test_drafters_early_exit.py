"""Early exit: the target's first layers as drafter, on the target's own weights and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import mcsd
from mcsd import Proposal, State, UnsupportedModelError
from mcsd.drafters.early_exit import EarlyExitDrafter, first_layers
from mcsd.drafters.stopping import EntropyStop
from tests.cases import PROPOSALS, RULES
from tests.small_law import P, few, p_of, sample
from tests.test_drafters import PROMPTS, paths_of, state_of
from tests.tiny import VOCAB, greedy, pad, perturbed, prompt, tiny

FAMILIES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "phi3",
    "mixtral",
    "gpt_oss",
    "gpt_neox",
    "cohere",
]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny(num_hidden_layers=4)


def early(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A model of its own with the same first layers, norm and head, built and filled the ordinary way."""
    stack = "h" if model.config.model_type == "gpt2" else "layers"
    sizes: dict[str, Any] = {"n_layer" if stack == "h" else "num_hidden_layers": layers}
    if getattr(model.config, "layer_types", None):
        sizes["layer_types"] = model.config.layer_types[:layers]
    other = tiny(model.config.model_type, **sizes)
    weights = model.state_dict()
    other.load_state_dict({name: weights[name] for name in other.state_dict()})
    return other


class Watched(EarlyExitDrafter):
    """Compares every row with the model of its own."""

    def __init__(self, target: PreTrainedModel, layers: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(target, layers, *args, **kwargs)
        self.plain = early(target, layers)
        self.rows, self.error = 0, 0.0

    def propose(self, state: State) -> Proposal:
        proposal = super().propose(state)
        assert proposal.draft_logits is not None and proposal.draft_rows is not None
        parents = proposal.parents.tolist()
        for request, sequence in enumerate(state.sequences):
            for node, path in paths_of(proposal, request).items() if state.active[request] else ():
                if node in parents:
                    text = torch.tensor([sequence + path])
                    wanted = self.plain(text, attention_mask=torch.ones_like(text), use_cache=False).logits[0, -1]
                    row = proposal.draft_logits[proposal.draft_rows[request, node].long()]
                    self.error = max(self.error, float((row - wanted).abs().max()))
                    self.rows += 1
        return proposal


@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_are_those_of_the_first_layers(name: str) -> None:
    layers = {"gemma3_text": {}, "gpt2": {"n_layer": 3}}.get(name, {"num_hidden_layers": 3})
    model = tiny(name, **layers)
    ids, mask = pad([*PROMPTS, prompt(1, 4)])
    wanted = greedy(model, ids, mask, 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    drafter = Watched(model, 1, (3, 2))
    found = mcsd.generate(model, drafter, ids, mask, max_new_tokens=10, seed=3)
    assert drafter.rows > 50 and drafter.error < 1e-4 and found.stats.status == [0] * 4
    point = EarlyExitDrafter(model, 1, (3, 2), "point")
    assert torch.equal(mcsd.generate(model, point, ids, mask, max_new_tokens=10, temperature=0.0).sequences, wanted)
    assert torch.equal(greedy(model, ids, mask, 10), wanted), "the target is as it was"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("attention", ["tree", "dense"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_greedy_text_is_plain_greedy(proposal: str, rule: str, attention: str, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = EarlyExitDrafter(llama, 3, (3, 2), proposal)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=24, temperature=0.0, rule=rule, attention=attention)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 24))
    assert found.stats.tokens_per_call > 1.1


def test_weights_and_cache_are_the_targets(llama: PreTrainedModel) -> None:
    model = first_layers(llama, 2)
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert mine < {parameter.data_ptr() for parameter in llama.parameters()}
    assert len(model.model.layers) == 2 and len(llama.model.layers) == 4 and llama.config.num_hidden_layers == 4
    read: list[int] = []
    drafter = EarlyExitDrafter(llama, 2, (2, 2))
    handle = drafter.model.model.layers[0].register_forward_pre_hook(
        lambda module, arguments: read.append(arguments[0].shape[1])
    )
    found = mcsd.generate(llama, drafter, *pad([prompt(50, 1)]), max_new_tokens=12)
    handle.remove()
    # the layer is the target's: in a step it reads the root, two nodes below it, and the whole tree
    assert read == [49] + [1, 2, 7] * found.stats.target_calls


def test_another_model_is_decoded(llama: PreTrainedModel) -> None:
    other = perturbed(llama)
    ids, mask = pad(PROMPTS)
    drafter = Watched(llama, 3, (3, 2))
    found = mcsd.generate(other, drafter, ids, mask, max_new_tokens=12, seed=1)
    assert drafter.rows > 30 and drafter.error < 1e-4 and sum(found.stats.accepted_by_depth) > 0
    found = mcsd.generate(other, drafter, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(other, ids, mask, 12))


def test_a_proposal_depends_on_its_own_request(llama: PreTrainedModel) -> None:
    drafter = EarlyExitDrafter(llama, 2, (3, 2))
    ids, mask = pad(PROMPTS)
    together = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, seed=[4, 5, 6]).sequences
    for request, text in enumerate(PROMPTS):
        alone = mcsd.generate(llama, drafter, *pad([text]), max_new_tokens=12, seed=[4 + request]).sequences
        assert torch.equal(alone[0, len(text) :], together[request, ids.shape[1] :])
    state = state_of([PROMPTS[0]])  # made by hand, without the target
    with torch.inference_mode():
        drafter.begin(state)
        assert drafter.propose(state).tokens.shape == (1, 10)
        drafter.end()


@pytest.mark.parametrize(("proposal", "rule"), [("without_replacement", "recursive"), ("greedy", "traversal")])
def test_sampled_text_has_the_targets_law(proposal: str, rule: str) -> None:
    found, stats = sample(EarlyExitDrafter(few(), 1, (2, 2), proposal, stopping=EntropyStop(1.5)), rule=rule)
    assert 0 < stats.accepted_by_depth[1] < stats.tested_by_depth[1] < stats.accepted_by_depth[0]
    assert p_of(found) > P


@pytest.mark.parametrize(
    ("name", "reason"), [("opt", "right under the head"), ("mamba", "recurrent"), ("bloom", "mask")]
)
def test_other_models_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        EarlyExitDrafter(tiny(name), 1)


def test_mistakes_are_named(llama: PreTrainedModel) -> None:
    for layers in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="layers"):
            EarlyExitDrafter(llama, layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="branching"):
        EarlyExitDrafter(llama, 2, (0,))
    with pytest.raises(ValueError, match="target"):
        EarlyExitDrafter("llama", 2)  # type: ignore[arg-type]
    assert llama.config.vocab_size == VOCAB
