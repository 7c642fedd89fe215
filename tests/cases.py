"""Named distributions and trees, each with its reason, and random legal calls of `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcsd_kernels import reference
from mcsd_kernels.sampling import SamplingParams

PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")
RULES = ("recursive", "traversal")

# name -> (parents, why this tree)
TREES: dict[str, tuple[list[int], str]] = {
    "root-alone": ([-1], "nothing drafted: the bonus token only"),
    "one-child": ([-1, 0], "a single test"),
    "chain": ([-1, 0, 1, 2], "block verification: traversal carries weights through several levels"),
    "star": ([-1, 0, 0, 0], "siblings only: every residual of one node"),
    "two-by-two": ([-1, 0, 0, 1, 1, 2, 2], "siblings and levels together"),
    "depth-first": ([-1, 0, 1, 1, 0, 4, 4], "the same tree in another node order"),
    "uneven": ([-1, 0, 0, 1, 3, 3], "leaves at several depths"),
    "padded": ([-1, 0, -1, 0, 1, -1, 3], "padding among the nodes and not only at the end"),
}

# name -> (target, draft, why); probabilities over five tokens, zero for a token that is masked out
LAWS: dict[str, tuple[list[float], list[float], str]] = {
    "overlap": ([0.4, 0.3, 0.15, 0.1, 0.05], [0.1, 0.35, 0.3, 0.05, 0.2], "the ordinary case"),
    "equal": ([0.4, 0.3, 0.15, 0.1, 0.05], [0.4, 0.3, 0.15, 0.1, 0.05], "p = q: the first candidate always stays"),
    "almost-equal": (
        [0.4, 0.3, 0.15, 0.1, 0.05],
        [0.4 + 1e-15, 0.3 - 1e-15, 0.15, 0.1, 0.05],
        "the residual is of the size of rounding, and still a law",
    ),
    "uniform": ([0.2] * 5, [0.2] * 5, "ties everywhere, in the filters too"),
    "tied": ([0.3, 0.3, 0.2, 0.1, 0.1], [0.1, 0.3, 0.3, 0.15, 0.15], "ties at a cut-off; q = p for one token"),
    "disjoint": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.3, 0.5], "no candidate can be accepted"),
    "one-hot-target": ([0.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2], "temperature 0 of the target"),
    "one-hot-draft": ([0.3, 0.25, 0.2, 0.15, 0.1], [0.0, 1.0, 0.0, 0.0, 0.0], "one candidate, the others missing"),
    "narrow-draft": ([0.3, 0.25, 0.2, 0.15, 0.1], [0.6, 0.0, 0.4, 0.0, 0.0], "fewer tokens with mass than children"),
    "confident-draft": ([0.3, 0.25, 0.2, 0.15, 0.1], [0.9997, 1e-4, 1e-4, 5e-5, 5e-5], "Z is small after a rejection"),
}


def logits_of(law: list[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits whose softmax is `law`; -inf where it is zero."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(law, dtype=np.float64))


@dataclass
class Case:
    """One call of `verify`: `verify(*case.arguments, **case.options)`, and what was put into it.

    Args:
        arguments: target_logits, draft_logits, tokens, parents, uniforms.
        options: the keyword arguments.
        note: how the case was made, for a failing test's message.
    """

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    note: str

    def to(self, device: torch.device | str) -> Case:
        """The same call with its tensors on `device`, strides kept."""
        return Case(
            tuple(_moved(value, device) for value in self.arguments),
            {name: _moved(value, device) for name, value in self.options.items()},
            self.note,
        )


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device == torch.device(device):
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)
    if isinstance(value, SamplingParams):
        return SamplingParams(*(_moved(getattr(value, name), device) for name in reference.RANGES))
    return value


CONFIDENT_KINDS = ("logits", "probabilities", "draft_ids", "repeated draft_ids")


def confident_draft(gap: float, rule: str, proposal: str, kind: str, vocab: int = 20) -> tuple[Case, list[int]]:
    """Two calls' worth of one decision: the draft is all but sure of token 0, and then draws token 1.

    Token 0 has no luck with the target, so candidate 1 is tested by its share of the e**-gap that the draft leaves. Two
    requests have a coin just below and just above what is to be accepted.

    Args:
        gap: how far below the logit of token 0 that of token 1 is, for the draft; token 2 is 1 lower.
        rule: of `RULES`.
        proposal: "without_replacement" or "greedy".
        kind: of `CONFIDENT_KINDS`: what the rows are.
        vocab: of the target's rows.

    Returns:
        the call; each request's first token.
    """
    p, q = np.zeros(vocab), np.zeros(vocab)
    p[:3] = [0.5, 0.3, 0.2]
    q[:3] = np.exp(np.array([0.0, -gap, -gap - 1.0]))
    q /= q.sum()
    drawn = q[1] / (q[1] + q[2])  # the law of the second candidate
    # "greedy" tests it first, and then offers token 0 what p leaves it; else the first rejection leaves (p - q)_+
    left, after = (p, 0) if proposal == "greedy" else (np.maximum(p - q, 0.0), 2)
    accepted = float(left[1] / left.sum() / drawn)
    rows = [torch.from_numpy(law if kind == "probabilities" else logits_of(law)).float() for law in (p, q)]
    target, draft = (row.expand(2, 3, vocab) for row in rows)
    options: dict[str, Any] = {"rule": rule, "proposal": proposal}
    if kind == "probabilities":
        options["inputs"] = "probabilities"
    if "draft_ids" in kind:
        draft, ids = draft[..., :3], [0, 1, 2]
        if kind == "repeated draft_ids":
            draft, ids = torch.nn.functional.pad(draft, (0, 2), value=-200.0), [0, 1, 2, 7, 7]
        options["draft_ids"] = torch.tensor(ids)
    coins = [[0.5, 1 - 2**-24, accepted * (1 + side), 0.5, 0.7] for side in (-1e-4, 1e-4)]
    uniforms = torch.tensor(coins, dtype=torch.float32)
    case = Case((target, draft, torch.tensor([[9, 0, 1]] * 2), torch.tensor([-1, 0, 0]), uniforms), options, f"{gap=}")
    return case, [1, after]


FAMILIES = ("near", "far", "ties", "masked", "equal", "peaked", "disjoint", "shifted")
FAULTS = ("nan-row", "inf-row", "empty-row", "bad-token", "bad-tree", "bad-uniform", "bad-sampling")


def random_case(
    rng: np.random.Generator,
    *,
    proposal: str | None = None,
    rule: str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    nodes: int | None = None,
    vocab: int | None = None,
    family: str | None = None,
    filters: bool = True,
    faults: bool = False,
) -> Case:
    """A random call of `verify`; what is None is drawn at random.

    Ragged trees with padding anywhere, siblings next to each other or not, strided and indirect rows with NaN wherever
    nothing may be read, virtual nodes, missing candidates, numbers and `[batch]` tensors as sampling parameters. The
    candidates are drawn as `proposal` says, from the draft's law after its filters.

    Args:
        rng: the only source of randomness.
        proposal: how the candidates are drawn.
        rule: passed on to `verify`.
        dtype: of the logits.
        batch: how many requests.
        nodes: how many nodes a request has, padding included.
        vocab: how many tokens.
        family: one of `FAMILIES`, how the draft's rows relate to the target's.
        filters: False keeps every request at temperature 1 without filters.
        faults: spoil one or more requests in one of the ways of `FAULTS`.
    """
    proposal = proposal or str(rng.choice(PROPOSALS))
    rule = rule or str(rng.choice(RULES))
    dtype = dtype or [torch.float32, torch.bfloat16, torch.float16][rng.integers(3)]
    batch = batch or int(rng.integers(1, 6))
    nodes = nodes or int(rng.choice([1, 2, 3, 5, 8, 13, 24, 33], p=[0.05, 0.1, 0.1, 0.2, 0.2, 0.15, 0.1, 0.1]))
    vocab = vocab or int(rng.choice([1, 2, 5, 17, 64, 257, 1023, 1024, 1025, 2500]))
    family = family or str(rng.choice(FAMILIES))

    parents = _random_parents(rng, batch, nodes)
    target, draft = _random_logits(rng, family, (batch, nodes, vocab), dtype)
    sampling = _random_sampling(rng, batch, vocab) if filters else SamplingParams()
    draft_sampling = _random_sampling(rng, batch, vocab) if filters and rng.random() < 0.3 else None
    tokens = _random_tokens(rng, parents, draft, proposal, draft_sampling or sampling)
    uniforms = torch.from_numpy(rng.random((batch, nodes + 2)).astype(np.float32)).clamp_(max=1 - 2**-24)
    if rng.random() < 0.1:
        extreme = torch.from_numpy(rng.random(uniforms.shape) < 0.3)
        uniforms[extreme] = float(rng.choice([0.0, 1 - 2**-24]))

    readers = torch.zeros(batch, nodes, dtype=torch.bool)
    for b, i in np.argwhere(parents > 0 if nodes > 1 else np.zeros((0, 2))):
        readers[b, parents[b, i]] = True
    readers[:, 0] = torch.from_numpy((parents == 0).any(axis=1))
    padding = torch.from_numpy(parents == -1)
    padding[:, 0] = False
    draft[~readers] = float("nan")
    target[padding] = float("nan")

    options: dict[str, Any] = {"proposal": proposal, "rule": rule, "sampling": sampling}
    if draft_sampling is not None:
        options["draft_sampling"] = draft_sampling
    if rng.random() < 0.3:
        options["max_depth"] = int(rng.integers(0, nodes + 1))
    faulty = _inject(rng, batch, nodes, vocab, target, tokens, parents, uniforms, options) if faults else "none"

    if rng.random() < 0.5:
        options["target_rows"], target = _indirect(rng, target)
        virtual = torch.from_numpy(rng.random((batch, nodes)) < rng.choice([0.0, 0.2]))
        virtual[:, 0] = False
        options["target_rows"][virtual] = -1
    else:
        target = _strided(rng, target)
    if proposal == "point" and rng.random() < 0.5:
        draft_argument = None
    elif rng.random() < 0.5:
        options["draft_rows"], draft_argument = _indirect(rng, draft)
    else:
        draft_argument = _strided(rng, draft)

    parents_argument = torch.from_numpy(parents).to(torch.int32 if rng.random() < 0.5 else torch.int64)
    if batch == 1 or bool((parents_argument == parents_argument[0]).all()):
        parents_argument = parents_argument[0] if rng.random() < 0.7 else parents_argument
    tokens_argument = torch.from_numpy(tokens).to(torch.int32 if rng.random() < 0.5 else torch.int64)
    note = (
        f"{proposal} {rule} {family} {dtype} batch={batch} nodes={nodes} vocab={vocab} fault={faulty} "
        f"parents={parents.tolist()} sampling={sampling} draft_sampling={draft_sampling}"
    )
    return Case((target, draft_argument, tokens_argument, parents_argument, uniforms), options, note)


def _random_parents(rng: np.random.Generator, batch: int, nodes: int) -> NDArray[np.int64]:
    parents = np.full((batch, nodes), -1, dtype=np.int64)
    shared = rng.random() < 0.3
    for b in range(batch):
        if shared and b > 0:
            parents[b] = parents[0]
            continue
        spread = rng.choice([0.0, 0.5, 1.0])
        fill = rng.choice([0.7, 1.0, 1.0])
        real = [0]
        for i in range(1, nodes):
            if rng.random() > fill:
                continue
            # chains at one end, any earlier node at the other, two or three siblings a node in between
            parents[b, i] = real[-1] if rng.random() > spread else real[int(rng.integers(len(real)))]
            if rng.random() < 0.4 and real[-1] != 0:
                parents[b, i] = parents[b, real[-1]]
            real.append(i)
    return parents


def _random_logits(
    rng: np.random.Generator, family: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows after each node and the rows that its children are drawn from, in `dtype`."""
    target = rng.normal(size=shape) * 2.0
    draft = target + rng.normal(size=shape) * 0.7
    if family == "far":
        draft = rng.normal(size=shape) * 2.0
    elif family == "ties":
        target, draft = np.round(target), np.round(draft)
    elif family == "masked":
        target[rng.random(shape) < 0.4] = -np.inf
        draft[rng.random(shape) < 0.4] = -np.inf
        target[..., shape[-1] // 2] = 0.0
        draft[..., shape[-1] // 2] = 0.0
    elif family == "equal":
        draft = target.copy()
    elif family == "peaked":
        np.put_along_axis(target, rng.integers(shape[-1], size=(*shape[:2], 1)), 12.0, axis=-1)
        np.put_along_axis(draft, rng.integers(shape[-1], size=(*shape[:2], 1)), 12.0, axis=-1)
    elif family == "disjoint" and shape[-1] > 1:
        target[..., ::2] = -np.inf
        draft[..., 1::2] = -np.inf
    elif family == "shifted":
        draft = target + 100.0
    return torch.from_numpy(target).to(dtype), torch.from_numpy(draft).to(dtype)


def _random_sampling(rng: np.random.Generator, batch: int, vocab: int) -> SamplingParams:
    """Numbers, or tensors with a value of its own for every request, or a mixture of the two."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    choices: dict[str, list[float]] = {
        "temperature": [0.0, 0.5, 1.0, 1.5],
        "top_k": [0, 1, 2, 5, vocab, vocab + 3],
        "top_p": [1.0, 0.95, 0.7, 0.2],
        "min_p": [0.0, 0.05, 0.3, 1.0],
    }
    values: dict[str, Any] = {}
    for name, options in choices.items():
        if rng.random() < 0.5:
            values[name] = off[name]
        elif rng.random() < 0.5:
            values[name] = type(off[name])(rng.choice(options))
        else:
            dtype = torch.int64 if name == "top_k" else torch.float32
            values[name] = torch.tensor(rng.choice(options, size=batch), dtype=dtype)
    return SamplingParams(**values)


def _random_tokens(
    rng: np.random.Generator, parents: NDArray[np.int64], draft: torch.Tensor, proposal: str, sampling: SamplingParams
) -> NDArray[np.int64]:
    batch, nodes, vocab = draft.shape
    tokens = rng.integers(vocab, size=(batch, nodes))
    for b in range(batch):
        numbers = {
            name: float(value[b]) if isinstance(value, torch.Tensor) else float(value)
            for name, value in ((name, getattr(sampling, name)) for name in reference.RANGES)
        }
        for node in range(nodes):
            children = np.flatnonzero((parents[b] == node) & (np.arange(nodes) > 0))
            if len(children):
                q = reference.row_law(
                    draft[b, node], numbers["temperature"], int(numbers["top_k"]), numbers["top_p"], numbers["min_p"]
                )
                tokens[b, children] = draw_children(rng, q, len(children), proposal)
    return tokens


def draw_children(rng: np.random.Generator, q: NDArray[np.float64], k: int, proposal: str) -> list[int]:
    """The k children of one node as `proposal` draws them, -1 for the missing ones."""
    if proposal == "with_replacement":
        return [int(x) for x in rng.choice(len(q), size=k, p=q)]
    if proposal == "point":
        order = rng.permutation(len(q)) if rng.random() < 0.5 else np.argsort(-q, kind="stable")
        return _completed([int(x) for x in order[:k]], k)
    if proposal == "greedy":
        order = np.argsort(-q, kind="stable")
        top = [int(x) for x in order[: k - 1] if q[x] > 0]
        rest = q.copy()
        rest[top] = 0.0
        drawn = int(rng.choice(len(q), p=rest / rest.sum())) if rest.sum() > 0 else -1
        return [*_completed(top, k - 1), drawn]
    rest, drawn_tokens = q.copy(), []
    while len(drawn_tokens) < k and rest.sum() > 0:
        drawn_tokens.append(int(rng.choice(len(q), p=rest / rest.sum())))
        rest[drawn_tokens[-1]] = 0.0
    return _completed(drawn_tokens, k)


def _completed(tokens: list[int], k: int) -> list[int]:
    return tokens + [-1] * (k - len(tokens))


def _indirect(rng: np.random.Generator, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled rows, some NaN rows among them, with the index of each node's row; the index is int32."""
    batch, nodes, vocab = rows.shape
    count = batch * nodes + int(rng.integers(0, 4))
    order = torch.from_numpy(rng.permutation(count)[: batch * nodes])
    store = torch.full((count, vocab + int(rng.integers(0, 5))), float("nan"), dtype=rows.dtype)
    store[order, :vocab] = rows.reshape(-1, vocab)
    return order.reshape(batch, nodes).to(torch.int32), store[:, :vocab]


def _strided(rng: np.random.Generator, rows: torch.Tensor) -> torch.Tensor:
    """The same values: contiguous, inside something wider, or with the batch and node axes swapped in memory."""
    batch, nodes, vocab = rows.shape
    layout = rng.integers(3)
    if layout == 0:
        return rows.contiguous()
    if layout == 1:
        wide = torch.full((batch, nodes + 1, vocab + 3), float("nan"), dtype=rows.dtype)
        wide[:, :nodes, :vocab] = rows
        return wide[:, :nodes, :vocab]
    return rows.transpose(0, 1).contiguous().transpose(0, 1)


def _inject(
    rng: np.random.Generator,
    batch: int,
    nodes: int,
    vocab: int,
    target: torch.Tensor,
    tokens: NDArray[np.int64],
    parents: NDArray[np.int64],
    uniforms: torch.Tensor,
    options: dict[str, Any],
) -> str:
    """Spoil some requests, in place; returns how."""
    kind = str(rng.choice(FAULTS))
    for b in np.flatnonzero(rng.random(batch) < 0.6):
        node = int(rng.integers(nodes))
        if kind == "nan-row":
            target[b, node, int(rng.integers(vocab))] = float("nan")
        elif kind == "inf-row":
            target[b, node, int(rng.integers(vocab))] = float("inf")
        elif kind == "empty-row":
            target[b, node] = -float("inf")
        elif kind == "bad-token":
            tokens[b, node] = int(rng.choice([-7, -2, vocab, vocab + 5]))
        elif kind == "bad-tree":
            parents[b, node] = int(rng.choice([-2, node, node + 1, nodes + 3]))
        elif kind == "bad-uniform":
            uniforms[b, int(rng.integers(nodes + 2))] = float(rng.choice([-0.1, 1.0, np.nan, np.inf]))
        else:
            bad: dict[str, list[float]] = {
                "temperature": [-0.5, np.nan, np.inf],
                "top_p": [0.0, -0.1, 1.5, np.nan],
                "min_p": [-0.1, 1.1, np.nan],
                "top_k": [-1],
            }
            name = str(rng.choice(list(bad)))
            old = getattr(options["sampling"], name)
            dtype = torch.int64 if name == "top_k" else torch.float32
            values = old.clone() if isinstance(old, torch.Tensor) else torch.full((batch,), old, dtype=dtype)
            values[b] = rng.choice(bad[name])
            fields = {field: getattr(options["sampling"], field) for field in reference.RANGES}
            options["sampling"] = SamplingParams(**{**fields, name: values})
    return kind


NEAR = 1e-5  # decisions this close are float32's to make

EXTRAS = ("probabilities", "draft-probabilities", "bitmask", "draft-ids", "point-nodes")


def words_of(allowed: torch.Tensor) -> torch.Tensor:
    """`[..., vocab]` bool as `[..., ceil(vocab / 32)]` int32, token v in bit v % 32 of word v // 32."""
    words = -(-allowed.shape[-1] // 32)
    padded = torch.zeros(*allowed.shape[:-1], words * 32, dtype=torch.int64)
    padded[..., : allowed.shape[-1]] = allowed
    packed = (padded.unflatten(-1, (words, 32)) << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def extended(rng: np.random.Generator, extras: set[str], **choices: Any) -> Case:
    """A random call with some of `EXTRAS`; tokens need not come from the draft for two implementations to agree.

    Args:
        rng: the only source of randomness.
        extras: some of `EXTRAS`.
        choices: see `random_case`.
    """
    case = random_case(rng, filters="probabilities" not in extras, **choices)
    target, draft, tokens, parents, uniforms = case.arguments
    options = dict(case.options)
    vocab = target.shape[-1]
    if "draft-ids" in extras and draft is not None:
        columns = int(rng.integers(1, vocab + 1))
        ids = torch.from_numpy(rng.permutation(vocab + 3)[:columns] - (1 if rng.random() < 0.5 else 0))
        draft = draft[..., :columns]
        options["draft_ids"] = ids.sort().values if rng.random() < 0.5 else ids
    if "probabilities" in extras or "draft-probabilities" in extras:
        if "probabilities" in extras:
            target = torch.softmax(target.float(), -1).to(target.dtype)
            options["inputs"] = "probabilities"
        if draft is not None:
            draft = torch.softmax(draft.float(), -1).to(draft.dtype)
            options["draft_inputs"] = "probabilities"
        options["draft_sampling"] = None
    if "bitmask" in extras:
        batch, nodes = tokens.shape
        allowed = torch.from_numpy(rng.random((batch, nodes, vocab)) < rng.choice([0.1, 0.5, 0.9]))
        options["bitmask"] = words_of(allowed)
    if "point-nodes" in extras:
        shape = tokens.shape if rng.random() < 0.5 else tokens.shape[1:]
        options["point_nodes"] = torch.from_numpy(rng.random(tuple(shape)) < 0.4)
    return Case((target, draft, tokens, parents, uniforms), options, case.note)


LEAVES = {"no children": [-1, -1], "at max_depth": [1, 1], "all children missing": [1, 1]}


def refused_leaf(kind: str) -> dict[str, Any]:
    """Arguments of a call whose two requests refuse node 1, a leaf; the second one's rows after it are NaN.

    Nothing but its coin refuses a leaf, so what its rows hold is of no matter.
    """
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 4, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    draft[:, 0, 1] = 6.0  # the draft likes the token so much better that a coin of 0.97 refuses it
    target[1, 1], draft[1, 1] = torch.nan, torch.nan
    missing = kind == "all children missing"
    return {
        "target_logits": target,
        "draft_logits": draft,
        "tokens": torch.tensor([[0, 1, -1, -1] if missing else [0, 1, 2, 3]] * 2),
        "parents": torch.tensor([-1, 0, *LEAVES[kind]]),
        "uniforms": torch.full((2, 6), 0.97),
        "max_depth": 1 if kind == "at max_depth" else None,
    }


def leaves_without_law(vocab: int, proposal: str, rule: str) -> Case:
    """Four requests that accept a leaf whose row came as probabilities: with NaN, all 0, with infinity, and sound."""
    target = torch.full((4, 2, vocab), 1 / vocab)
    target[0, 1, 5], target[1, 1], target[2, 1, 5] = torch.nan, 0.0, torch.inf
    draft = None if proposal == "point" else torch.full((4, 2, vocab), 1 / vocab)
    uniforms = torch.tensor([[0.0, 0.0, 0.3, 0.411]] * 4)
    options = {"proposal": proposal, "rule": rule, "inputs": "probabilities"}
    return Case((target, draft, torch.tensor([[0, 3]] * 4), torch.tensor([-1, 0]), uniforms), options, "broken leaves")
