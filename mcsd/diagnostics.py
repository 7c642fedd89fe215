"""How good drafting and verification are, by depth: overlap of the two laws, acceptance, and the best possible one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mcsd_kernels import SamplingParams, Verified
from mcsd_kernels.cutoffs import row_cutoffs

from .drafters import Proposal, State

Floats = NDArray[np.float64]

EXACT = 4096
"""Vocabularies up to this size are treated token by token in the optimum without replacement."""

SMALL = 1e-4
"""In larger ones, tokens of less draft probability are taken in groups."""

_GROUPS = 64
_LOG_TIMES: Floats = np.arange(-12.0, 26.0, 0.2)


def laws(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """What tokens are drawn from: softmax of logits / temperature over what the filters keep.

    Args:
        logits: `[rows, vocab]` f16, bf16 or f32.
        sampling: numbers, or `[rows]` tensors.

    Returns:
        `[rows, vocab]` f64; at temperature 0 one-hot at the first argmax.
    """
    temperature = torch.as_tensor(sampling.temperature, dtype=torch.float64, device=logits.device)
    temperature = temperature.expand(len(logits))[:, None]
    cut = row_cutoffs(logits.contiguous(), sampling)[:, None]
    kept = logits.double().masked_fill(logits.float() < cut, -torch.inf)
    law = (kept / temperature.clamp(min=1e-30)).softmax(-1)
    top = torch.nn.functional.one_hot(logits.float().argmax(-1), logits.shape[-1]).double()
    return torch.where(temperature > 0, law, top)


def draft_logits_of(tree: Proposal, requests: Sequence[int], nodes: Sequence[int], vocab: int) -> torch.Tensor:
    """`[rows, vocab]`: what the children of these nodes were drawn from.

    Args:
        tree: with draft logits.
        requests, nodes: a pair for each row.
        vocab: the target's; a draft of fewer tokens (`Proposal.draft_ids`) has -inf elsewhere.
    """
    assert tree.draft_logits is not None
    device = tree.draft_logits.device
    request, node = (torch.tensor(list(numbers), device=device) for numbers in (requests, nodes))
    if tree.draft_rows is None:
        rows = tree.draft_logits[request, node]
    else:
        rows = tree.draft_logits[tree.draft_rows[request, node].long()]
    if tree.draft_ids is None:
        return rows
    wide = rows.new_full((len(rows), vocab), -torch.inf)  # tokens without a column are never drafted
    wide[:, tree.draft_ids] = rows
    return wide


def overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`[rows]`: Σ min(p, q), which is one minus the total variation distance, and what one candidate gets accepted.

    Args:
        p, q: `[rows, vocab]` laws.
    """
    return torch.minimum(p, q).sum(-1)


def with_replacement_stages(
    p: torch.Tensor, q: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scalars of recursive rejection over independent draws, which do not depend on what was drawn.

    Args:
        p, q: `[rows, vocab]` f64 laws.
        count: candidates.

    Returns:
        `[rows, count]` each: β and S before each candidate's test, and the probability that it is tested.
    """
    beta, mass = p.new_zeros(len(p), 1), p.new_ones(len(p), 1)
    reached = mass.clone()
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for _ in range(count):
        found.append((beta, mass, reached))
        residual = (p - beta * q).clamp(min=0)
        accepted = torch.minimum(q * mass, residual).sum(-1, keepdim=True) / mass.clamp(min=1e-300)
        reached = reached * (1 - accepted).clamp(min=0)
        beta = beta + mass
        mass = torch.where(reached > 0, (p - beta * q).clamp(min=0).sum(-1, keepdim=True), 0)
    stages = [torch.cat(column, 1) for column in zip(*found, strict=True)]
    return stages[0], stages[1], stages[2]


def chosen_nodes(tree: Proposal, proposal: str) -> torch.Tensor:
    """`[batch, nodes]` bool: nodes that were chosen, not drawn.

    Args:
        tree: what was proposed.
        proposal: see `mcsd_kernels.verify`; all nodes of "point" were chosen.
    """
    if proposal == "point" or tree.point_nodes is None:
        return torch.full_like(tree.tokens, proposal == "point", dtype=torch.bool)
    return tree.point_nodes.expand(tree.tokens.shape)


def acceptance_given(
    p: Floats, q: Floats | None, candidates: Sequence[int], proposal: str, chosen: Sequence[int] = ()
) -> float:
    """Probability that the recursive rule accepts one of a node's candidates, given which they are.

    Args:
        p: `[vocab]` the target's law.
        q: the draft's; None where there are no candidates, and for "point".
        candidates: in draw order; negative ones are missing.
        proposal: see `mcsd_kernels.verify`.
        chosen: candidates that were not drawn; they are tested after the others.
    """
    drawn = [token if 0 <= token < len(p) else -1 for token in candidates]
    offered = {*chosen}
    missed, rest = 1.0, p
    if proposal == "point":
        offered.update(drawn)
    elif drawn and q is not None:
        if proposal == "greedy":
            offered.update(drawn[:-1])
            missed, rest = _after_greedy_draw(p, q, drawn)
        else:
            missed, rest = _after_draws(p, q, drawn, proposal == "with_replacement")
    # each of the others is offered its share of what is left of p
    share = rest[[token for token in offered if 0 <= token < len(p)]].sum() / rest.sum()
    return 1 - missed * max(1 - float(share), 0.0)


def _after_draws(p: Floats, q: Floats, drawn: Sequence[int], replacement: bool) -> tuple[float, Floats]:
    """Probability that all drawn candidates are rejected, and what is then left of p."""
    beta, mass, drawable, missed, rest = 0.0, 1.0, 1.0, 1.0, p
    for token in drawn:
        if token < 0:
            continue
        wanted = max(float(p[token] - beta * q[token]), 0.0) * drawable
        price = float(q[token]) * mass
        if wanted >= price:
            return 0.0, p
        missed *= 1 - wanted / price
        beta += mass / drawable
        rest = np.clip(p - beta * q, 0, None)
        mass = float(rest.sum())
        if not replacement:
            drawable = max(drawable - float(q[token]), 1e-300)
        if mass <= 0:
            return 0.0, p
    return missed, rest


def _after_greedy_draw(p: Floats, q: Floats, drawn: Sequence[int]) -> tuple[float, Floats]:
    """The same of the last one, which alone was drawn, from q without the others."""
    *top, last = drawn
    law = q.copy()
    law[[token for token in top if token >= 0]] = 0.0
    if last < 0 or law[last] <= 0:
        return 1.0, p
    law /= law.sum()
    rest = np.clip(p - law, 0, None)
    missed = max(1 - float(p[last] / law[last]), 0.0)
    return (missed, rest) if missed > 0 and rest.any() else (0.0, p)


def optimal_acceptance(p: Floats, q: Floats, count: int, *, replacement: bool) -> float:
    """The most that any lossless rule can accept of `count` candidates drawn from q.

    `α* = 1 + min over H of p(H) - Pr(all candidates in H)`, where the best H is a prefix of the vocabulary sorted by
    q / p, descending. With replacement the probability is `q(H)^count`. Without, give each token an exponential clock
    of rate q_i; the order in which clocks ring is that of the draws, and with s = 1 - q(H)

        Pr = ∫ s exp(-s t) Pr(at least `count` clocks of H rang by t) dt,

    a quadrature over log t, adding one token to H at a time. Beyond `EXACT` tokens, those of q below `SMALL` are added
    in groups whose number of rings is taken as Poisson, and only H that end with a group are tried.

    Args:
        p, q: `[vocab]` laws.
        count: candidates.
        replacement: whether they are drawn with replacement.

    Source: Hu et al., arXiv 2502.18779.
    """
    order = np.argsort(-(q / np.maximum(p, 1e-300)), kind="stable")
    p, q = p[order], q[order]
    if replacement or count == 1:
        drawn = np.cumsum(q) ** count
        return float(min(1.0, 1 + (np.cumsum(p) - drawn).min()))
    # what is outside of H, summed from the small end
    outside = np.append(np.cumsum(q[::-1])[::-1][1:], 0.0)
    ends = _item_ends(q)
    times = np.exp(_LOG_TIMES)
    rang = np.zeros((count, len(times)))  # Pr(k clocks of H rang by t), k < count
    rang[0] = 1.0
    best, p_inside, start = 0.0, 0.0, 0
    step = _LOG_TIMES[1] - _LOG_TIMES[0]
    for end in ends:
        p_inside += float(p[start:end].sum())
        if p_inside - 1 >= best:
            break  # no probability makes up for that
        some = q[start:end]
        some = some[some > 0]
        start = end
        if some.size:
            quiet = np.exp(-some[:, None] * times)
            if len(some) == 1:
                shifted = np.vstack([np.zeros_like(times), rang[:-1]])
                rang = rang * quiet + shifted * (1 - quiet)
            else:
                rang = _poisson(rang, (1 - quiet).sum(0))
        s = outside[end - 1]
        inside = 1.0
        if s > 0:
            weight = s * times * np.exp(-s * times) * step
            inside = float(weight @ (1 - rang.sum(0)).clip(0))
        best = min(best, float(p_inside - inside))
    return 1 + best


def _item_ends(q: Floats) -> list[int]:
    """Where each token, or group of small ones in a row, ends."""
    if len(q) <= EXACT:
        return list(range(1, len(q) + 1))
    small = q < SMALL
    longest = max(int(small.sum()) // _GROUPS, 1)
    ends, start = [], 0
    for end in [*(np.flatnonzero(small[1:] != small[:-1]) + 1), len(q)]:
        ends += list(range(start + (longest if small[start] else 1), end, longest if small[start] else 1))
        ends.append(int(end))
        start = end
    return ends


def _poisson(rang: Floats, mean: Floats) -> Floats:
    """The law of a number of rings after a group's were added."""
    law = [np.exp(-mean)]
    for k in range(1, len(rang)):
        law.append(law[-1] * mean / k)
    return np.stack([sum(rang[k - j] * law[j] for j in range(k + 1)) for k in range(len(rang))])


def mcsd_acceptance_rate(tokens: int, calls: int, depth: int) -> float:
    """MCSD's own acceptance rate: accepted tokens over target calls times the depth of the tree.

    In the authors' code `acceptance_count / draft_token_count`, where a call accepts the length of its path and drafts
    `max_draft_len` tokens, however many candidates there are at each depth; their block efficiency is tokens per call.

    Args:
        tokens: emitted.
        calls: of the target.
        depth: of the tree.

    Source: Yang et al., arXiv 2401.06706; github.com/NJUNLP/MCSD, `evaluation.py` and `inference/generate.py`.
    """
    return (tokens - calls) / (calls * depth) if calls and depth else 0.0


@dataclass(frozen=True)
class Visit:
    """A node of the accepted path that had candidates.

    Args:
        depth: of the node.
        candidates: how many there were.
        accepted: whether the path goes on to one of them.
        expected: probability that the recursive rule accepts one, given which they are.
        overlap: Σ min(p, q); None where no candidate was drawn from a law.
        optimum_with: the most that any lossless rule accepts of as many draws with replacement; None where candidates
            were chosen, alone or beside drawn ones.
        optimum_without: the same without replacement.
    """

    depth: int
    candidates: int
    accepted: bool
    expected: float
    overlap: float | None
    optimum_with: float | None
    optimum_without: float | None


def visits_of(
    target_logits: torch.Tensor, tree: Proposal, verified: Verified, proposal: str, sampling: SamplingParams
) -> list[list[Visit]]:
    """What happened at each node of each request's accepted path.

    Args:
        target_logits: `[batch, scored nodes, vocab]`.
        tree: what was proposed.
        verified: what came of it.
        proposal: how siblings were drawn.
        sampling: of target and draft; numbers or `[batch]` tensors.

    Returns:
        for each request its visits, from the root on.
    """
    batch, nodes = tree.tokens.shape
    vocab = target_logits.shape[-1]
    parents = tree.parents.expand(batch, nodes).tolist()
    tokens, lengths = tree.tokens.tolist(), verified.length.tolist()
    is_chosen = chosen_nodes(tree, proposal).tolist()
    paths, emitted = verified.path.tolist(), verified.tokens.tolist()
    found: list[list[Visit]] = []
    for request in range(batch):
        path = paths[request][: lengths[request]]
        children: dict[int, list[int]] = {}
        for node in range(1, nodes):
            if parents[request][node] >= 0:
                children.setdefault(parents[request][node], []).append(node)
        own = _of_request(sampling, request)
        row: list[Visit] = []
        for depth, node in enumerate(path):
            offered = [child for child in children.get(node, []) if 0 <= tokens[request][child] < vocab]
            if not offered or depth >= tree.depth:
                continue
            candidates = [tokens[request][child] for child in offered]
            chosen = [tokens[request][child] for child in offered if is_chosen[request][child]]
            # missing ones keep their place: the last of "greedy" is the draw
            drawn = [tokens[request][child] for child in children[node] if not is_chosen[request][child]]
            logits = target_logits[request, node][None]
            if not bool(logits.float().amax().isfinite()):
                continue
            p: Floats = laws(logits, own)[0].cpu().numpy()
            q: Floats | None = None
            if len(chosen) < len(offered) and tree.draft_logits is not None:  # else the row is a placeholder
                drawn_from = draft_logits_of(tree, [request], [node], vocab)
                q = laws(drawn_from, _of_request(tree.draft_sampling or sampling, request))[0].cpu().numpy()
            # a candidate that the target did not score is accepted as the step's last token
            unscored = tree.scored is not None and offered[0] >= tree.scored
            accepted = depth + 1 < len(path) or (unscored and emitted[request][depth] in candidates)
            count = len(offered)
            row.append(
                Visit(
                    depth,
                    count,
                    accepted,
                    acceptance_given(p, q, drawn, proposal, chosen),
                    None if q is None else float(np.minimum(p, q).sum()),
                    None if q is None or chosen else optimal_acceptance(p, q, count, replacement=True),
                    None if q is None or chosen else optimal_acceptance(p, q, count, replacement=False),
                )
            )
        found.append(row)
    return found


def _of_request(sampling: SamplingParams, request: int) -> SamplingParams:
    fields = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return SamplingParams(*(f[request].item() if isinstance(f, torch.Tensor) and f.dim() else f for f in fields))


class Recorder:
    """Collects what happened at every node that was visited, and writes it as JSON lines, one a step and request.

    Its `observe` is made for `mcsd.generate(observer=...)`.

    Args:
        proposal: how siblings are drawn.
        path: file to write to; None: nothing is written. The first row replaces what is there.
        settings: stand in every line.
    """

    def __init__(
        self, proposal: str, path: str | PathLike[str] | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        self.proposal, self.settings = proposal, settings or {}
        self.rows: list[dict[str, Any]] = []
        self._path = None if path is None else Path(path)
        self._file: IO[str] | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def observe(self, state: State, tree: Proposal, target_logits: torch.Tensor, verified: Verified) -> None:
        """Record one step of every request that is still generating."""
        visits = visits_of(target_logits, tree, verified, self.proposal, state.sampling)
        lengths = verified.length.tolist()
        for request, row in enumerate(visits):
            if state.active[request]:
                self._write(
                    {
                        "step": state.step,
                        "request": request,
                        "tokens": lengths[request],
                        "tree_depth": tree.depth,
                        "visits": [asdict(visit) for visit in row],
                    }
                )

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._path is not None:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8")
            self._file.write(json.dumps({"mcsd_diagnostics": 1, **row, "settings": self.settings}) + "\n")
            self._file.flush()

    def summary(self) -> dict[str, Any]:
        """See `summarise`."""
        return summarise(self.rows)


def read_rows(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a recorder's file; a last line without its end is left out.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a file of diagnostics, cannot read {path}: {error}") from None
    rows = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("step", "request", "tokens", "tree_depth", "visits")})
            row["mcsd_diagnostics"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and rows:
                break
            raise ValueError(f"{path}, line {number}: expected a line of diagnostics, got {line[:60]}") from None
    if not rows:
        raise ValueError(f"{path}: expected lines of diagnostics, the file is empty")
    return rows


_MEANS = ("overlap", "accepted", "expected", "optimum_with", "optimum_without")


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means by depth, and over the whole recording.

    Args:
        rows: of `Recorder.rows` or `read_rows`.

    Returns:
        "steps", "tokens", "tokens_per_call", "mcsd_acceptance_rate", and "by_depth": for each depth the number of
        "visits" and the means of the fields of `Visit`, None where a field has no value. An optimum bounds "accepted":
        its mean is None, too, where some visits have none.
    """
    rows = list(rows)
    depths: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        for visit in row["visits"]:
            depths.setdefault(visit["depth"], []).append(visit)
    by_depth = []
    for depth, visits in sorted(depths.items()):
        entry: dict[str, Any] = {"depth": depth, "visits": len(visits)}
        for name in _MEANS:
            values = [float(visit[name]) for visit in visits if visit[name] is not None]
            whole = len(values) == len(visits) or not name.startswith("optimum")
            entry[name] = round(float(np.mean(values)), 5) if values and whole else None
        by_depth.append(entry)
    tokens, calls = sum(row["tokens"] for row in rows), len(rows)
    deepest = max((row["tree_depth"] for row in rows), default=0)
    return {
        "steps": calls,
        "tokens": tokens,
        "tokens_per_call": round(tokens / calls, 4) if calls else 0.0,
        "mcsd_acceptance_rate": round(mcsd_acceptance_rate(tokens, calls, deepest), 5),
        "by_depth": by_depth,
    }
