"""Heads on the target's hidden state: what they compute, what they load, and that training them raises acceptance."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import mcsd
from mcsd.drafters.heads import HeadsDrafter
from mcsd.drafters.medusa import MedusaHeads
from mcsd.drafters.mlp_speculator import MLPSpeculator
from mcsd.drafters.stopping import EntropyStop
from tests.cases import PROPOSALS, RULES
from tests.small_law import P, few, p_of, sample
from tests.test_drafters import PROMPTS, paths_of
from tests.tiny import VOCAB, greedy, pad, prompt, tiny

HIDDEN = 32


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny()


def noisy(heads: Any, amount: float = 0.5, seed: int = 0) -> Any:
    """Heads that are no copies of anything, so that a mix-up of heads, blocks or states would show."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=random) * parameter.shape[-1] ** -0.5)
    return heads.eval().requires_grad_(False)


def medusa(model: PreTrainedModel, heads: int = 3, layers: int = 2) -> MedusaHeads:
    made: MedusaHeads = noisy(MedusaHeads.of(model, heads, layers))
    return made


def speculator(model: PreTrainedModel, heads: int = 3, inner: int = 24, **options: Any) -> MLPSpeculator:
    head = model.get_output_embeddings().weight
    made: MLPSpeculator = noisy(MLPSpeculator(head.shape[1], head.shape[0], heads, inner, **options))
    return made


MAKERS = {"medusa": medusa, "speculator": speculator}


# Written out from the papers, one text at a time


def medusa_logits(heads: MedusaHeads, hidden: torch.Tensor, between: list[int]) -> torch.Tensor:
    """The law after `between` tokens past the root."""
    *blocks, last = heads[len(between)]
    x = hidden
    for block in blocks:
        z = block.linear.weight @ x + block.linear.bias
        x = x + z / (1 + (-z).exp())
    return last.weight @ x


def speculator_logits(heads: MLPSpeculator, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The law after the root and the tokens that follow it."""
    n = heads.count
    a = 0.5 ** (0.5 / n)
    state = hidden
    if heads.scale_input:
        state = state / (state.square().mean() + 1e-6).sqrt() / math.sqrt(2)
    for i, token in enumerate(tokens):
        z = heads.emb[i].weight[token]
        mixed = a * (heads.proj[i].weight @ state) + math.sqrt((1 - a * a) * len(z) / 2) * z
        normed = mixed / (mixed.square().mean() + 1e-6).sqrt() * heads.ln[i].weight + heads.ln[i].bias
        state = torch.nn.functional.gelu(normed)
    return heads.head[len(tokens) - 1].weight @ state


class Watched(HeadsDrafter):
    """Compares what every node's children were drawn from with the heads written out, on plain hidden states."""

    def __init__(self, model: PreTrainedModel, heads: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(heads, *args, **kwargs)
        self.plain, self.rows, self.error = copy.deepcopy(model), 0, 0.0

    def propose(self, state: mcsd.State) -> mcsd.Proposal:
        proposal = super().propose(state)
        for request, sequence in enumerate(state.sequences):
            if not state.active[request]:
                continue
            hidden = torch.zeros(HIDDEN)
            if len(sequence) > 1:
                text = torch.tensor([sequence[:-1]])
                hidden = self.plain.model(text, use_cache=False).last_hidden_state[0, -1]
            parents = proposal.parents.tolist()
            for node, path in paths_of(proposal, request).items():
                if node not in parents:
                    continue
                if isinstance(self.heads, MedusaHeads):
                    wanted = medusa_logits(self.heads, hidden, path)
                else:
                    wanted = speculator_logits(self.heads, hidden, [sequence[-1], *path])
                if self.proposal == "point":
                    children = [n for n, parent in enumerate(parents) if parent == node]
                    assert proposal.tokens[request, children].tolist() == wanted.topk(len(children)).indices.tolist()
                else:
                    assert proposal.draft_rows is not None and proposal.draft_logits is not None
                    row = proposal.draft_logits[proposal.draft_rows[request, node].long()]
                    self.error = max(self.error, float((row - wanted).abs().max()))
                self.rows += 1
        return proposal


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("kind", MAKERS)
def test_laws_are_those_of_the_accepted_node(kind: str, proposal: str, rule: str, llama: PreTrainedModel) -> None:
    ids, mask = pad([*PROMPTS, prompt(1, 8)])
    drafter = Watched(llama, MAKERS[kind](llama), (3, 2, 2), proposal)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=8, rule=rule, seed=1)
    assert drafter.rows > 100 and drafter.error < 1e-4
    assert found.stats.status == [0] * 4
    again = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=8, rule=rule, seed=1)
    assert torch.equal(found.sequences, again.sequences)


# three children, of which the first has two and the last one; the nodes are numbered depth first
UNEVEN = [-1, 0, 1, 2, 1, 0, 0, 6]


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("kind", MAKERS)
def test_trees_of_any_shape(kind: str, proposal: str, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = Watched(llama, MAKERS[kind](llama), proposal=proposal, parents=UNEVEN)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, seed=2)
    assert drafter.rows > 50 and drafter.error < 1e-4 and found.stats.status == [0] * 3
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 12))


def test_other_speculators(llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    for options in ({"tie_weights": True}, {"scale_input": True}, {"inner": 0}):
        drafter = Watched(llama, speculator(llama, **options), (2, 2), "without_replacement")
        mcsd.generate(llama, drafter, ids, mask, max_new_tokens=6)
        assert drafter.rows > 20 and drafter.error < 1e-4


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("kind", MAKERS)
def test_greedy_text_is_plain_greedy(kind: str, proposal: str, llama: PreTrainedModel) -> None:
    ids, mask = pad(PROMPTS)
    drafter = HeadsDrafter(MAKERS[kind](llama), (4, 2), proposal)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=16, temperature=0.0)
    assert torch.equal(found.sequences, greedy(llama, ids, mask, 16))


def test_a_proposal_depends_on_its_own_request(llama: PreTrainedModel) -> None:
    drafter = HeadsDrafter(speculator(llama), (3, 2), "without_replacement")
    ids, mask = pad(PROMPTS)
    together = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, seed=[4, 5, 6]).sequences
    for request, text in enumerate(PROMPTS):
        alone = mcsd.generate(llama, drafter, *pad([text]), max_new_tokens=12, seed=[4 + request]).sequences
        assert torch.equal(alone[0, len(text) :], together[request, ids.shape[1] :])


def test_sisters_draw_apart_though_they_share_a_row(llama: PreTrainedModel) -> None:
    drafter = HeadsDrafter(medusa(llama), (4, 2), "without_replacement")
    seen: list[mcsd.Proposal] = []
    propose = drafter.propose
    drafter.propose = lambda state: seen.append(propose(state)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    mcsd.generate(llama, drafter, *pad(PROMPTS), max_new_tokens=6)
    rows = seen[0].draft_rows
    assert rows is not None and seen[0].draft_logits is not None and len(seen[0].draft_logits) == 3 * 2
    assert rows[:, 0].tolist() == [0, 2, 4] and rows[:, 1:5].tolist() == [[1] * 4, [3] * 4, [5] * 4]
    assert any(len({tuple(pair) for pair in t.tokens[0, 5:].view(4, 2).tolist()}) > 1 for t in seen)


@pytest.mark.parametrize(
    ("kind", "proposal", "rule"),
    [
        ("medusa", "without_replacement", "recursive"),
        ("medusa", "with_replacement", "traversal"),
        ("speculator", "without_replacement", "traversal"),
        ("speculator", "point", "recursive"),
    ],
)
def test_sampled_text_has_the_targets_law(kind: str, proposal: str, rule: str) -> None:
    found, stats = sample(HeadsDrafter(MAKERS[kind](few()), (2, 2), proposal), rule=rule)
    assert 0 < stats.accepted_by_depth[1] < stats.tested_by_depth[1]
    assert p_of(found) > P


# Training


def train(heads: Any, model: PreTrainedModel, texts: torch.Tensor, steps: int = 120) -> None:
    """Cross-entropy of each head on its own token of the target's texts."""
    with torch.no_grad():
        hidden = model.model(texts, use_cache=False).last_hidden_state
    heads.train().requires_grad_(True)
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    length = texts.shape[1] - heads.count - 1  # a hidden state, the root after it, and a token for each head
    for _ in range(steps):
        state = heads.start(hidden[:, :length].flatten(0, 1))
        loss = torch.zeros(())
        for i in range(heads.count):
            logits, state = heads.level(i, state, texts[:, 1 + i : 1 + i + length].reshape(-1, 1))
            loss = loss + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), texts[:, 2 + i : 2 + i + length].flatten()
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    heads.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", MAKERS)
def test_training_raises_acceptance(kind: str, llama: PreTrainedModel) -> None:
    ids, mask = pad([prompt(6, seed) for seed in range(6)])
    texts = greedy(llama, ids, mask, 40)
    untrained = MedusaHeads.of(llama, 3) if kind == "medusa" else speculator(llama)
    accepted = []
    for steps in (0, 120):
        train(untrained, llama, texts, steps)
        drafter = HeadsDrafter(untrained, (2, 2, 1))
        found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=40, temperature=0.0)
        assert torch.equal(found.sequences, texts)
        accepted.append(found.stats.tokens_per_call)
    assert accepted[0] < 1.5 and accepted[1] > 2.5


# Checkpoints, with the names that the published ones have


def medusa_file(heads: int = 3, layers: int = 2, vocab: int = VOCAB, bias: bool = True) -> dict[str, torch.Tensor]:
    stored = {}
    for i in range(heads):
        for j in range(layers):
            stored[f"{i}.{j}.linear.weight"] = torch.randn(HIDDEN, HIDDEN)
            if bias:
                stored[f"{i}.{j}.linear.bias"] = torch.randn(HIDDEN)
        stored[f"{i}.{layers}.weight"] = torch.randn(vocab, HIDDEN)
    return stored


def converted(stored: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    names = {}
    for name in stored:
        i, j, *rest = name.split(".")
        names[name] = f"lm_heads.{i}.weight" if int(j) == layers else f"blocks.{i}.layers.{j}.{rest[-1]}"
    return {names[name]: tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("layout", ["pt", "safetensors", "prefixed", "converted"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_medusa_checkpoints(layers: int, layout: str, tmp_path: Path, llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    stored = medusa_file(layers=layers, bias=layout != "converted")
    if layout == "pt":
        torch.save(stored, tmp_path / "medusa_lm_head.pt")
    elif layout == "converted":
        save_file(converted(stored, layers), tmp_path / "model.safetensors")
    else:
        prefix = "medusa_head." if layout == "prefixed" else ""
        save_file({prefix + name: t for name, t in stored.items()}, tmp_path / "medusa_lm_head.safetensors")
    heads = MedusaHeads.from_folder(tmp_path, llama)
    assert heads.count == 3 and not any(parameter.requires_grad for parameter in heads.parameters())
    assert {name: t.tolist() for name, t in heads.state_dict().items()} == {n: t.tolist() for n, t in stored.items()}
    assert MedusaHeads.from_folder(tmp_path, llama, heads=2).count == 2
    HeadsDrafter(heads, (2, 2, 2))


def test_medusa_heads_write_what_they_read(tmp_path: Path, llama: PreTrainedModel) -> None:
    heads = medusa(llama)
    torch.save(heads.state_dict(), tmp_path / "medusa_lm_head.pt")
    loaded = MedusaHeads.from_folder(tmp_path, llama)
    x = torch.randn(2, 1, HIDDEN)
    assert torch.equal(loaded.level(2, x, torch.zeros(2, 1))[0], heads.level(2, x, torch.zeros(2, 1))[0])


def speculator_folder(folder: Path, tied: bool = False, once: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    inner, heads = 24, 3
    config = {"model_type": "mlp_speculator", "n_predict": heads, "emb_dim": HIDDEN, "inner_dim": inner}
    config |= {"vocab_size": VOCAB, "tie_weights": tied, "scale_input": tied, "n_candidates": 5}
    (folder / "config.json").write_text(json.dumps(config | changes))
    stored = {}
    for i in range(heads):
        stored[f"speculator.emb.{i}.weight"] = torch.randn(VOCAB, inner)
        stored[f"speculator.proj.{i}.weight"] = torch.randn(inner, inner if i else HIDDEN)
        stored[f"speculator.ln.{i}.weight"] = torch.randn(inner)
        stored[f"speculator.ln.{i}.bias"] = torch.randn(inner)
        stored[f"speculator.head.{i}.weight"] = torch.randn(VOCAB, inner)
    if tied:
        for name in list(stored):
            part, i = name.split(".")[1:3]
            first = name.replace(f".{i}.", ".1." if part == "proj" and i != "0" else ".0.")
            stored[name] = stored[first].clone()
            if once and first != name:
                del stored[name]
    return stored


@pytest.mark.parametrize("kind", ["own", "tied", "tied-stored-once"])
@pytest.mark.parametrize("shards", [1, 2, "bin"])
def test_speculator_checkpoints(shards: int | str, kind: str, tmp_path: Path, llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    stored = speculator_folder(tmp_path, tied=kind != "own", once=kind == "tied-stored-once")
    names = sorted(stored)
    if shards == "bin":
        torch.save(stored, tmp_path / "pytorch_model.bin")
    else:
        for shard in range(int(shards)):
            part = {name: stored[name] for name in names[shard :: int(shards)]}
            save_file(part, tmp_path / f"model-{shard + 1:05}-of-{int(shards):05}.safetensors")
    heads = MLPSpeculator.from_folder(tmp_path, llama)
    assert heads.count == 3 and heads.scale_input == (kind != "own")
    loaded = heads.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("speculator.")], tensor) for name, tensor in stored.items())
    drafter = Watched(llama, heads, (2, 1, 1), "without_replacement")
    mcsd.generate(llama, drafter, *pad(PROMPTS), max_new_tokens=4)
    assert drafter.rows > 5 and drafter.error < 1e-3


def test_mistakes_are_named(tmp_path: Path, llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="medusa_lm_head"):
        MedusaHeads.from_folder(tmp_path, llama)
    with pytest.raises(ValueError, match=r"config\.json"):
        MLPSpeculator.from_folder(tmp_path, llama)

    def medusa_of(stored: dict[str, torch.Tensor]) -> MedusaHeads:
        torch.save(stored, tmp_path / "medusa_lm_head.pt")
        return MedusaHeads.from_folder(tmp_path, llama)

    with pytest.raises(ValueError, match="output head"):
        medusa_of(medusa_file(vocab=VOCAB + 1))
    with pytest.raises(ValueError, match="Medusa heads"):
        medusa_of({"model.weight": torch.zeros(2)})
    stored = medusa_file()
    del stored["1.0.linear.bias"]
    with pytest.raises(ValueError, match=r"1\.0\.linear\.bias"):
        medusa_of(stored)
    with pytest.raises(ValueError, match="heads"):
        MedusaHeads.from_folder(tmp_path, llama, heads=4)

    stored = speculator_folder(tmp_path)
    with pytest.raises(ValueError, match="safetensors"):
        MLPSpeculator.from_folder(tmp_path, llama)
    save_file({name: t for name, t in stored.items() if "head.2" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.2\.weight"):
        MLPSpeculator.from_folder(tmp_path, llama)
    save_file(stored, tmp_path / "model.safetensors")
    speculator_folder(tmp_path, inner_dim=25)
    with pytest.raises(ValueError, match=r"config\.json"):
        MLPSpeculator.from_folder(tmp_path, llama)
    speculator_folder(tmp_path, emb_dim=31)
    with pytest.raises(ValueError, match="output head"):
        MLPSpeculator.from_folder(tmp_path, llama)

    with pytest.raises(ValueError, match="branching"):
        HeadsDrafter(medusa(llama), (2, 2, 2, 2))
    with pytest.raises(ValueError, match="parents"):
        HeadsDrafter(medusa(llama), parents=[-1, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="proposal"):
        HeadsDrafter(medusa(llama), (2,), "top-k")


THRESHOLDS = {"medusa": 2.6, "speculator": 4.47}  # about half of the nodes have less entropy


@pytest.mark.parametrize("kind", MAKERS)
def test_stopped_nodes_have_no_children(kind: str, llama: PreTrainedModel) -> None:
    heads = MAKERS[kind](llama)
    seen: list[mcsd.Proposal] = []

    class Seen(HeadsDrafter):
        def propose(self, state: mcsd.State) -> mcsd.Proposal:
            seen.append(copy.deepcopy(proposal := super().propose(state)))  # the rows' memory is used again
            return proposal

    ids, mask = pad(PROMPTS)
    stop = EntropyStop(THRESHOLDS[kind])
    drafter = Seen(heads, (3, 2), "without_replacement", stopping=stop)
    found = mcsd.generate(llama, drafter, ids, mask, max_new_tokens=12, temperature=1.0)
    assert found.stats.status == [0, 0, 0]
    stopped = gone_on = 0
    for proposal in seen:
        assert proposal.draft_rows is not None and proposal.draft_logits is not None
        for tokens, rows in zip(proposal.tokens.tolist(), proposal.draft_rows.long(), strict=True):
            going = stop(0, proposal.draft_logits[rows]).tolist()
            for node, children in {0: [1, 2, 3], 1: [4, 5], 2: [6, 7], 3: [8, 9]}.items():
                there = tokens[node] >= 0 and going[node]
                assert [tokens[child] >= 0 for child in children] == [there] * len(children)
                stopped, gone_on = stopped + (not there), gone_on + there
    assert stopped > 5 and gone_on > 5
