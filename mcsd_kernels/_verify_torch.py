"""`verify` in torch: batched, lazy, for any device.

Every request runs its rule (`_rules`) as a coroutine; what the rules ask for at the same time is one pass over the
vocabulary, so only rows on a request's own path are read. Requests are taken in chunks whose rows fit the cache; a CPU
takes long rows one by one, in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from . import _rows_host as rows_host
from . import _rows_torch as rows_torch
from . import _rules as rules
from ._draw import Array, pick
from ._rows_torch import Sampling, host
from .types import PLACEHOLDER, Status


class Side:
    """The target's or the draft's rows: where a node's row is, and how it becomes a law over the target's vocabulary.

    Args:
        values: `[batch, nodes, columns]`, or `[rows, columns]` with `rows`.
        rows: `[batch, nodes]`, the row of each node.
        sampling: what turns logits into laws; None: the values are laws already.
        vocab: tokens of the target.
        bitmask: `[batch, nodes, words]` int32, the tokens allowed after each node.
        ids: `[columns]` int64, each column's token where the columns are not the target's vocabulary.
    """

    def __init__(
        self,
        values: torch.Tensor,
        rows: torch.Tensor | None,
        sampling: Sampling | None,
        vocab: int,
        bitmask: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> None:
        self.values, self.sampling, self.vocab, self.bitmask = values, sampling, vocab, bitmask
        self.ids: torch.Tensor | None = None
        self._columns: rows_host.Columns | None = None
        plain = None if sampling is None or bitmask is not None else sampling.plain
        if ids is not None:
            low, high, ascend = rows_torch.span(ids)
            self.known = None if low >= 0 and high < vocab else ids.ge(0) & ids.lt(vocab)
            self.ids = ids if self.known is None else torch.where(self.known, ids, 0)
            if plain is not None and ascend and self.known is None and ids.is_cpu:
                self._columns = rows_host.Columns(host(ids))
            else:
                plain = None
        # on the host, 1 / temperature where that is all there is to do, and the same rows for NumPy
        self._plain = plain
        self._arrays = host(values) if values.is_cpu and values.dtype == torch.float32 else None
        self._greedy = sampling is not None and sampling.greedy and bitmask is None and ids is None
        self.rows = None if rows is None else host(rows)
        self._row_lists = [] if self.rows is None else self.rows.tolist()

    def outside(self, lowest: int) -> Array | None:
        """`[batch, nodes]` bool: nodes whose row number is below `lowest` or too large; None if there are none."""
        if self.rows is None:
            return None
        if all(min(row) >= lowest and max(row) < len(self.values) for row in self._row_lists):
            return None
        return (self.rows < lowest) | (self.rows >= len(self.values))

    def _place(self, request: int, node: int) -> int | tuple[int, int]:
        return self._row_lists[request][node] if self._row_lists else (request, node)

    def row(self, request: int, node: int) -> torch.Tensor:
        """`[columns]`, a view."""
        return self.values[self._place(request, node)]

    def take(self, requests: list[int], nodes: list[int]) -> torch.Tensor:
        """`[len(requests), columns]`; a single row comes as a view."""
        if len(requests) == 1:
            return self.row(requests[0], nodes[0])[None]
        device = self.values.device
        if self.rows is None:
            return self.values[torch.tensor(requests, device=device), torch.tensor(nodes, device=device)]
        return self.values[torch.from_numpy(self.rows[requests, nodes].astype(np.int64)).to(device)]

    def law(self, request: int, node: int, space: rows_host.Space) -> rows_host.Law | Status:
        """The law after a node, on the host: in `space`, where it lies if nothing is to be done, or over `ids`."""
        place = self._place(request, node)
        if self._plain is not None:
            row = self.values[place] if self._arrays is None else self._arrays[place]
            out = self._columns or space
            return rows_host.plain_law(row, self._plain, out) or out
        if self._greedy:
            return rows_host.greedy_law(self.values[place], space) or space
        if self.sampling is None and self.ids is None and self._arrays is not None:
            return rows_host.Law(self._arrays[place])
        found = self.load([request], [node], space.tensor[None], None)
        space.total = 1.0
        return found[0] if found else space

    def load(
        self, requests: list[int], nodes: list[int], buffer: torch.Tensor, slots: list[int] | None
    ) -> list[Status] | None:
        """Write the laws after some nodes into the buffer; arguments and result as in `rows_torch.law`."""
        values = self.take(requests, nodes)
        if self.ids is not None:
            laws = values.new_empty(values.shape, dtype=torch.float32)
            status = self._law(values, requests, laws, None)
            if self.known is not None:  # what was drawn, given that it is a token
                laws = torch.where(self.known, laws, 0.0)
                if self.sampling is not None:
                    mass = laws.sum(-1, keepdim=True)
                    laws = torch.where(mass < rules.LOST_DRAFT_MASS, 0.0, laws / mass)
            rows_torch.scatter(laws, self.ids, buffer, slots)
            return status
        if self.bitmask is not None:
            at = torch.tensor(requests, device=values.device), torch.tensor(nodes, device=values.device)
            values = rows_torch.masked(values, self.bitmask[at])
        return self._law(values, requests, buffer, slots)

    def _law(
        self, values: torch.Tensor, requests: list[int], buffer: torch.Tensor, slots: list[int] | None
    ) -> list[Status] | None:
        if self.sampling is not None:
            return rows_torch.law(values, self.sampling.take(requests), buffer, slots)
        if slots is None:
            buffer[: len(values)].copy_(values)
        else:
            buffer.index_copy_(0, torch.tensor(slots, device=buffer.device), values.float())
        return None


@lru_cache(maxsize=256)
def _topology(parents: tuple[int, ...]) -> list[list[int]] | None:
    """Each node's children in draw order, None if the parents describe no tree; the same trees come again and again."""
    children: list[list[int]] = [[] for _ in parents]
    if parents[0] != -1:
        return None
    for node, parent in enumerate(parents[1:], 1):
        if parent == -1:
            continue
        if not 0 <= parent < node or (parent > 0 and parents[parent] == -1):
            return None
        children[parent].append(node)
    return children


class Batch:
    """The small inputs on the host, what is wrong with them, and each request's tree."""

    def __init__(
        self,
        target: Side,
        draft: Side | None,
        tokens: torch.Tensor,
        parents: torch.Tensor,
        uniforms: torch.Tensor,
        point_nodes: torch.Tensor | None,
        max_depth: int,
    ) -> None:
        self.target, self.draft = target, draft
        # whether every law is made here, and none was handed over
        self.computed = target.sampling is not None and (draft is None or draft.sampling is not None)
        self.max_depth = max_depth
        self.points = None if point_nodes is None else np.broadcast_to(host(point_nodes), tokens.shape)
        # as lists: few numbers are looked at sooner one by one
        self.token_lists: list[list[int]] = tokens.tolist()
        self.uniform_lists: list[list[float]] = uniforms.tolist()
        self.vocab = target.vocab
        rows = parents.tolist() if parents.dim() == 2 else [parents.tolist()]
        self._topologies = [_topology(tuple(row)) for row in rows]

    def topology(self, request: int) -> list[list[int]] | None:
        """Children by node, None if there is no tree."""
        return self._topologies[request if len(self._topologies) > 1 else 0]

    def tree(self, request: int) -> rules.Tree:
        """The scalar side of one request."""
        topology = self.topology(request)
        assert topology is not None
        tokens, vocab, deepest = self.token_lists[request], self.vocab, self.max_depth
        rows = self.target.rows

        def children(node: int, depth: int) -> list[rules.Child]:
            found, some = [], False
            if depth < deepest:
                for child in topology[node]:
                    x = tokens[child]
                    if 0 <= x < vocab:
                        some = True
                    else:
                        x = rules.MISSING
                    found.append((child, x))
            return found if some else []

        def is_virtual(node: int) -> bool:
            return rows is not None and bool(rows[request, node] < 0)

        is_point = None if self.points is None else self.points[request].item
        rounded = self.draft is not None and self.draft.sampling is None
        return rules.Tree(children, self.uniform_lists[request], is_virtual, is_point, rounded)

    def faults(self) -> Array | None:
        """`[batch]` int32: the status bits that need no row; None if there are none at all."""
        batch = len(self.token_lists)
        found: list[tuple[Status, Any]] = []
        if batch == 0:
            return None
        vocab, of_no_token, no_coin = self.vocab, False, False
        for tokens, coins in zip(self.token_lists, self.uniform_lists, strict=True):
            of_no_token |= max(tokens) >= vocab or min(tokens) < rules.MISSING
            # a sum is NaN where one of the numbers is
            no_coin |= not (min(coins) >= 0.0 and max(coins) < 1.0 and sum(coins) >= 0.0)
        if of_no_token:
            every = np.array(self.token_lists)
            wrong = (every < rules.MISSING) | (every >= vocab)
            found.append((Status.BAD_TOKEN, (wrong & self._in_use())[:, 1:].any(1)))
        if no_coin:
            uniforms = np.array(self.uniform_lists)
            found.append((Status.BAD_UNIFORM, ~((uniforms >= 0) & (uniforms < 1)).all(1)))
        if None in self._topologies:
            found.append((Status.BAD_TREE, [self.topology(request) is None for request in range(batch)]))
        rows = self.target.rows
        if rows is not None and rows[:, 0].min() < 0:  # the root cannot be virtual
            found.append((Status.BAD_TREE, rows[:, 0] < 0))
        if (outside := self.target.outside(-1)) is not None:
            found.append((Status.BAD_TREE, (outside & self._in_use()).any(1)))
        if self.draft is not None and (outside := self.draft.outside(0)) is not None:
            found.append((Status.BAD_TREE, (outside & self._inner()).any(1)))  # no other row is read
        for side in (self.target, self.draft):
            if side is not None and side.sampling is not None and side.sampling.plain is None:
                found.append((Status.BAD_SAMPLING, side.sampling.out_of_range()))
        if not found:
            return None
        status = np.zeros(batch, np.int32)
        for bit, where in found:
            status |= np.where(where, np.int32(bit), np.int32(0))
        # a tree that is none has no candidates to speak of
        status[(status & int(Status.BAD_TREE)) != 0] &= ~int(Status.BAD_TOKEN)
        return status if status.any() else None

    def _in_use(self) -> Array:
        """`[batch, nodes]` bool: the root and every node that is no padding."""
        used = np.zeros((len(self.token_lists), len(self.token_lists[0])), bool)
        for request in range(len(used)):
            for siblings in self.topology(request) or ():
                used[request, siblings] = True
        used[:, 0] = True
        return used

    def _inner(self) -> Array:
        """`[batch, nodes]` bool: nodes with candidates, which virtual ones never have."""
        inner = np.zeros((len(self.token_lists), len(self.token_lists[0])), bool)
        for request, tokens in enumerate(self.token_lists):
            for node, siblings in enumerate(self.topology(request) or ()):
                inner[request, node] = any(0 <= tokens[child] < self.vocab for child in siblings)
        return inner if self.target.rows is None else inner & (self.target.rows >= 0)


class _Outputs:
    """What `verify` returns, filled in request by request; lists, for single entries of arrays are slow to write.

    Args:
        tokens: of the nodes, by request.
        width: of the paths.
        status: `[batch]` int32, the bits that are known already; None: there are none.
    """

    def __init__(self, tokens: list[list[int]], width: int, status: Array | None) -> None:
        self._tokens, self._width = tokens, width
        self._paths = [[0]] * len(tokens)
        self._last = [PLACEHOLDER] * len(tokens)
        self._status: list[int] = [0] * len(tokens) if status is None else status.tolist()

    def end(self, request: int, path: list[int], token: int | None, status: int = 0) -> None:
        """The request has accepted `path` and emits `token` last; None: there was no mass to draw it from."""
        if token is None:
            token, status = PLACEHOLDER, int(Status.EMPTY_ROW)
        self._paths[request], self._last[request] = path, token
        self._status[request] |= status

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        paths, emitted = [], []
        for nodes, tokens, last in zip(self._paths, self._tokens, self._last, strict=True):
            rest = [-1] * (self._width - len(nodes))
            paths.append(nodes + rest)
            emitted.append([*[tokens[node] for node in nodes[1:]], last, *rest])
        shape = len(paths), self._width
        path, length, token, status = (
            torch.from_numpy(np.array(paths, np.int32).reshape(shape)),
            torch.from_numpy(np.array([len(nodes) for nodes in self._paths], np.int32)),
            torch.from_numpy(np.array(emitted, np.int64).reshape(shape)),
            torch.from_numpy(np.array(self._status, np.int32)),
        )
        if device.type == "cpu":
            return path, length, token, status
        return path.to(device), length.to(device), token.to(device), status.to(device)


class Walk:
    """One request under way: its coroutine and what it waits for."""

    __slots__ = ("request", "rule", "slot", "tree", "wants")

    def __init__(self, request: int, tree: rules.Tree, rule: rules.Step, slot: int = 0) -> None:
        self.request, self.tree, self.rule, self.slot = request, tree, rule, slot
        self.wants: Any = next(rule)


def mass_of(total: float, wants: rules.Mass) -> float | Status:
    """A rule's answer to the sum of the weights, (p - beta / w q)_+ or q itself; laws handed over may be none."""
    return total * (wants.w or 1.0) if 0.0 <= total < _INFINITY else Status.NAN_ROW


def unless_broken(tokens: list[int | None], masses: Array, asking: list[Walk]) -> list[int | Status | None]:
    """The tokens drawn from blocks of these masses, or what is wrong with the laws handed over."""
    totals = (mass_of(mass, walk.wants) for mass, walk in zip(masses.sum(1).tolist(), asking, strict=True))
    return [total if isinstance(total, Status) else token for total, token in zip(totals, tokens, strict=True)]


def sound(*values: list[float]) -> bool:
    """Whether these can be probabilities; laws handed over may be none."""
    return all(0.0 <= value < _INFINITY for some in values for value in some)


_INFINITY = float("inf")


class _Alone:
    """Answers one request's rule: the schedule for long rows on a CPU, where a pass is worth more than batching."""

    def __init__(self, batch: Batch, space: rows_host.Workspace) -> None:
        self.batch, self.space = batch, space
        self.p: rows_host.Law = space.p
        self.q: rows_host.Law = space.q

    def run(self, walk: Walk, outputs: _Outputs) -> None:
        """Run the rule to its end."""
        send, wants = walk.rule.send, walk.wants
        weights = self.space.weights
        held: Any = None  # what the weights hold, in units of
        unit = 1.0
        masses: list[float]
        answer: Any
        try:
            while True:
                kind = type(wants)
                if kind is rules.Rows:
                    held = None
                    answer = self._rows(walk.request, wants)
                else:
                    if held != wants:
                        if self.p is not weights:
                            unit = rows_host.fill(self.p, self.q, wants, weights)
                        masses = weights.masses()
                        held = wants
                    if kind is rules.Mass:
                        answer = mass_of(sum(masses) / unit, wants)
                    elif not self.batch.computed and isinstance(mass_of(sum(masses), wants), Status):
                        answer = Status.NAN_ROW
                    else:
                        u = walk.tree.uniforms
                        answer = pick(masses, weights.blocks, u[-2], u[-1])
                if isinstance(answer, Status):
                    return outputs.end(walk.request, walk.tree.path, PLACEHOLDER, int(answer))
                wants = send(answer)
        except StopIteration as stop:
            outputs.end(walk.request, walk.tree.path, stop.value)

    def _rows(self, request: int, wants: rules.Rows) -> tuple[list[float], list[float]] | Status:
        node, tokens = wants
        # of a leaf nothing is asked but a draw from p itself
        p = self.batch.target.law(request, node, self.space.p if tokens else self.space.weights)
        if isinstance(p, Status):
            return p
        self.p = p
        if not tokens:
            return [], []
        p_at = p.at(tokens)
        if self.batch.draft is None:
            return (p_at, p_at) if self.batch.computed or sound(p_at) else Status.NAN_ROW
        q = self.batch.draft.law(request, node, self.space.q)
        if isinstance(q, Status):
            return q
        self.q = q
        q_at = q.at(tokens)
        return (p_at, q_at) if self.batch.computed or sound(p_at, q_at) else Status.NAN_ROW


class Together:
    """Answers the rules of several requests: the schedule for short rows, as passes over `[requests, vocab]`."""

    def __init__(self, batch: Batch, walks: list[Walk], room: rows_torch.Buffers) -> None:
        self.batch, self.walks = batch, walks
        self.p, self.q, self.weights = room.p[: len(walks)], room.q[: len(walks)], room.weights[: len(walks)]
        # whose weights the buffer holds, and which
        self.held: list[tuple[int, rules.Mass | rules.Draw]] = []
        self.masses: Array = np.zeros((0, 0), np.float32)

    def run(self, outputs: _Outputs) -> None:
        """Run every rule to its end."""
        alive = self.walks
        while alive:
            # one kind of request a round; the others wait and are joined by more of their kind
            kind = type(alive[0].wants)
            asking = alive if len(alive) == 1 else [walk for walk in alive if type(walk.wants) is kind]
            serve: Any = self._rows if kind is rules.Rows else self._mass if kind is rules.Mass else self._draw
            done = set()
            for walk, answer in zip(asking, serve(asking), strict=True):
                try:
                    if isinstance(answer, Status):
                        outputs.end(walk.request, walk.tree.path, PLACEHOLDER, int(answer))
                        done.add(walk)
                        continue
                    walk.wants = walk.rule.send(answer)
                except StopIteration as stop:
                    outputs.end(walk.request, walk.tree.path, stop.value)
                    done.add(walk)
            if done:
                alive = [walk for walk in alive if walk not in done]

    def _rows(self, asking: list[Walk]) -> list[Any]:
        """Load p, and q where there are children; answered with their values at the children's tokens."""
        self.held = []
        broken = self._load(asking, self.p, self.batch.target)
        if self.batch.draft is not None:
            inner = [walk for walk in asking if walk.wants.tokens and walk not in broken]
            if inner:
                broken |= self._load(inner, self.q, self.batch.draft)
        slots = [walk.slot for walk in asking]
        tokens = [walk.wants.tokens for walk in asking]
        p = rows_torch.read(self.p, slots, tokens)
        q = p if self.batch.draft is None else rows_torch.read(self.q, slots, tokens)
        answers: list[Any] = [both if sound(*both) else Status.NAN_ROW for both in zip(p, q, strict=True)]
        return [broken.get(w, a) for w, a in zip(asking, answers, strict=True)] if broken else answers

    def _load(self, asking: list[Walk], buffer: torch.Tensor, side: Side) -> dict[Walk, Status]:
        some = None if len(asking) == len(self.walks) else [walk.slot for walk in asking]
        status = side.load([walk.request for walk in asking], [walk.wants.node for walk in asking], buffer, some)
        return {walk: bits for walk, bits in zip(asking, status, strict=True) if bits} if status else {}

    def _mass(self, asking: list[Walk]) -> list[float | Status]:
        total: list[float] = self._fill(asking).sum(1).tolist()
        # the buffer holds (p - beta / w q)_+, or q itself
        return [mass_of(mass, walk.wants) for mass, walk in zip(total, asking, strict=True)]

    def _draw(self, asking: list[Walk]) -> list[Any]:
        if self.held != [(walk.slot, walk.wants) for walk in asking]:
            self._fill(asking)
        uniforms = [walk.tree.uniforms[-2:] for walk in asking]
        tokens = rows_torch.draw(self.weights, self.masses, [u for u, _ in uniforms], [u for _, u in uniforms])
        return tokens if self.batch.computed else unless_broken(tokens, self.masses, asking)

    def _fill(self, asking: list[Walk]) -> Array:
        """Put each request's (w p - beta q)_+ / w outside `without` into the weights, and sum its blocks."""
        wants = [walk.wants for walk in asking]
        slots = [walk.slot for walk in asking]
        rows_torch.fill_rows(self.p, self.q, slots, wants, self.weights[: len(asking), : self.p.shape[1]])
        self.masses = host(rows_torch.draw_blocks(self.weights[: len(asking)]).sum(-1))
        self.held = list(zip(slots, wants, strict=True))
        return self.masses


def run(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    target_rows: torch.Tensor | None,
    draft_rows: torch.Tensor | None,
    sampling: list[float],
    sampling_tensors: list[torch.Tensor | None],
    draft_sampling: list[float],
    draft_sampling_tensors: list[torch.Tensor | None],
    proposal: str,
    rule: str,
    max_depth: int,
    inputs: str,
    draft_inputs: str,
    point_nodes: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    draft_ids: torch.Tensor | None,
    *,
    vocab: int,
    answers: Callable[[Batch, list[Walk]], Together] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `mcsd_kernels.verify`; arguments as there, already checked.

    Args:
        vocab: tokens of the target.
        answers: who answers the rules of all requests together; None: this module, some requests at a time.
    """
    batch = tokens.shape[0]
    target_law = Sampling.on_host(sampling, sampling_tensors, batch) if inputs == "logits" else None
    draft_law = Sampling.on_host(draft_sampling, draft_sampling_tensors, batch) if draft_inputs == "logits" else None
    work = Batch(
        Side(target_logits, target_rows, target_law, vocab, bitmask=bitmask),
        None if draft_logits is None else Side(draft_logits, draft_rows, draft_law, vocab, ids=draft_ids),
        tokens,
        parents,
        uniforms,
        point_nodes,
        max_depth,
    )
    program = rules.RULES[rule]
    faults = work.faults()
    outputs = _Outputs(work.token_lists, max_depth + 1, faults)
    todo = list(range(batch))
    if faults is not None:
        refused = faults & ~int(Status.BAD_TOKEN) != 0
        todo = np.flatnonzero(~refused).tolist()
    device = target_logits.device
    size = rows_torch.chunk_rows(vocab) if answers is None else max(len(todo), 1)
    if size == 1 and device.type == "cpu" and answers is None:
        alone = _Alone(work, rows_host.workspace(vocab))
        for request in todo:
            tree = work.tree(request)
            alone.run(Walk(request, tree, program(tree, proposal)), outputs)
        return outputs.tensors(device)
    for start in range(0, len(todo), size):
        walks = []
        for slot, request in enumerate(todo[start : start + size]):
            tree = work.tree(request)
            walks.append(Walk(request, tree, program(tree, proposal), slot))
        if answers is None:
            together = Together(work, walks, rows_torch.buffers(len(walks), vocab, device))
        else:
            together = answers(work, walks)
        together.run(outputs)
    return outputs.tensors(device)


def verify(
    target_logits: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`run` with the vocabulary of the logits."""
    with np.errstate(all="ignore"):  # a logit as good as -inf may become it; what is wrong with a row has a status
        return run(target_logits, *arguments, vocab=target_logits.shape[-1])
