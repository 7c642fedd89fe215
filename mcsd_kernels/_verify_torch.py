"""`verify` in torch: batched, lazy, for any device.

Every request runs its rule (`_rules`) as a coroutine; what the rules ask for at the same time is one pass over the
vocabulary, so only rows on a request's own path are read. Requests are taken in chunks whose rows fit the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import _rules as rules
from . import _rows_torch as rows_torch
from ._rows_torch import Array, Sampling, host
from .types import PLACEHOLDER, Status


class _Logits:
    """One side's logits: row lookup by (request, node), dense or through a row index."""

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor | None) -> None:
        self.logits = logits
        self.rows = None if rows is None else host(rows)

    def take(self, requests: list[int], nodes: list[int]) -> torch.Tensor:
        """`[len(requests), vocab]`; a single row comes as a view."""
        if len(requests) == 1:
            request, node = requests[0], nodes[0]
            if self.rows is None:
                return self.logits[request, node][None]
            return self.logits[int(self.rows[request, node])][None]
        device = self.logits.device
        if self.rows is None:
            return self.logits[torch.tensor(requests, device=device), torch.tensor(nodes, device=device)]
        return self.logits[torch.from_numpy(self.rows[requests, nodes].astype(np.int64)).to(device)]


class _Batch:
    """The small inputs on the host, what is wrong with them, and each request's tree."""

    def __init__(
        self,
        target: _Logits,
        draft: _Logits | None,
        tokens: torch.Tensor,
        parents: torch.Tensor,
        uniforms: torch.Tensor,
        sampling: Sampling,
        draft_sampling: Sampling,
        max_depth: int,
    ) -> None:
        self.target, self.draft = target, draft
        self.sampling, self.draft_sampling = sampling, draft_sampling
        self.max_depth = max_depth
        self.tokens, self.parents, self.uniforms = host(tokens), host(parents), host(uniforms)
        if self.parents.ndim == 1:
            self.parents = self.parents[None]
        self.vocab = target.logits.shape[-1]
        # children of node i of tree b, in draw order: order[b, start[b, i] : start[b, i + 1]]
        trees, nodes = self.parents.shape
        self._order = self.parents.argsort(axis=1, kind="stable")
        sorted_parents = np.take_along_axis(self.parents, self._order, 1)
        self._start = [np.searchsorted(row, np.arange(nodes + 1)) for row in sorted_parents]

    def tree(self, request: int) -> rules.Tree:
        """The scalar side of one request."""
        shared = request if len(self._start) > 1 else 0
        order, start = self._order[shared], self._start[shared].tolist()
        tokens, vocab, deepest = self.tokens[request], self.vocab, self.max_depth
        rows = self.target.rows

        def children(node: int, depth: int) -> list[rules.Child]:
            if depth >= deepest:
                return []
            ids = order[start[node] : start[node + 1]].tolist()
            found = [(i, x if 0 <= x < vocab else rules.MISSING) for i, x in zip(ids, tokens[ids].tolist(), strict=True)]
            return found if any(x != rules.MISSING for _, x in found) else []

        def is_virtual(node: int) -> bool:
            return rows is not None and bool(rows[request, node] < 0)

        return rules.Tree(children, self.uniforms[request].tolist(), is_virtual)

    def faults(self) -> Array:
        """`[batch]` int32: the status bits that need no row."""
        batch, nodes = self.tokens.shape
        status = np.zeros(batch, np.int32)
        parents, below = self.parents, self.parents[:, 1:]
        used = below >= 0
        if nodes > 1:
            candidates = self.tokens[:, 1:]
            if candidates.min() < rules.MISSING or candidates.max() >= self.vocab:
                wrong = ((candidates < rules.MISSING) | (candidates >= self.vocab)) & used
                status |= np.where(wrong.any(1), np.int32(Status.BAD_TOKEN), np.int32(0))
        orphan = used & (below > 0) & (np.take_along_axis(parents, below.clip(0, nodes - 1), 1) < 0)
        bad = ((below < -1) | (below >= np.arange(1, nodes)) | orphan).any(1) | (parents[:, 0] != -1)
        for side, lowest in ((self.target, -1), (self.draft, 0)):
            if side is not None and side.rows is not None:
                outside = (side.rows < lowest) | (side.rows >= side.logits.shape[0])
                if side is self.target:
                    in_use = np.concatenate([np.ones((len(parents), 1), bool), used], 1)
                    bad = bad | (outside & in_use).any(1) | (side.rows[:, 0] < 0)
                else:
                    # only rows of nodes with children are read
                    inner = np.broadcast_to(below.clip(0, nodes - 1), (batch, nodes - 1))
                    bad = bad | (np.take_along_axis(outside, inner, 1) & used).any(1)
        if bad.any():
            status |= np.where(bad, np.int32(Status.BAD_TREE), np.int32(0))
        uniforms = self.uniforms
        if batch and not (uniforms.min() >= 0 and uniforms.max() < 1):
            sound = ((uniforms >= 0) & (uniforms < 1)).all(1)
            status |= np.where(sound, np.int32(0), np.int32(Status.BAD_UNIFORM))
        sampling = self.sampling.out_of_range()
        if self.draft is not None:
            sampling = sampling | self.draft_sampling.out_of_range()
        status |= np.where(sampling, np.int32(Status.BAD_SAMPLING), np.int32(0))
        return status


class _Walk:
    """One request under way: its coroutine and what it waits for."""

    def __init__(self, request: int, tree: rules.Tree, rule: rules.Step) -> None:
        self.request, self.tree, self.rule = request, tree, rule
        self.wants: Any = None
        self.slot = 0


class _Chunk:
    """Answers what the rules of a few requests ask for, as passes over `[requests, vocab]` buffers."""

    def __init__(self, batch: _Batch, walks: list[_Walk]) -> None:
        self.batch, self.walks = batch, walks
        self.device = batch.target.logits.device
        self.p, self.q, self.weights = rows_torch.buffers(len(walks), batch.vocab, self.device)
        self.held: list[tuple[_Walk, Any]] = []  # whose weights the buffer holds, and which
        self.masses: Array = np.zeros((0, 0), np.float32)
        for slot, walk in enumerate(walks):
            walk.slot = slot

    def run(self, path: Array, length: Array, emitted: Array, status: Array) -> None:
        """Run every rule to its end and write what it decided."""
        for walk in self.walks:
            walk.wants = next(walk.rule)
        alive = self.walks
        while alive:
            answers: dict[_Walk, Any] = {}
            for kind, serve in ((rules.Rows, self._rows), (rules.Mass, self._mass), (rules.Draw, self._draw)):
                asking = [walk for walk in alive if isinstance(walk.wants, kind)]
                if asking:
                    answers.update(zip(asking, serve(asking), strict=True))
            still = []
            for walk in alive:
                answer = answers[walk]
                try:
                    if isinstance(answer, Status):
                        status[walk.request] |= int(answer)
                        self._finish(walk, PLACEHOLDER, path, length, emitted)
                        continue
                    walk.wants = walk.rule.send(answer)
                    still.append(walk)
                except StopIteration as stop:
                    self._finish(walk, stop.value, path, length, emitted)
            alive = still

    def _finish(self, walk: _Walk, token: int, path: Array, length: Array, emitted: Array) -> None:
        nodes, request = walk.tree.path, walk.request
        path[request, : len(nodes)] = nodes
        emitted[request, : len(nodes) - 1] = self.batch.tokens[request, nodes[1:]]
        emitted[request, len(nodes) - 1] = token
        length[request] = len(nodes)

    def _rows(self, asking: list[_Walk]) -> list[Any]:
        """Load p, and q where there are children; answered with their values at the children's tokens."""
        self.held = []
        broken = self._load(asking, self.p, self.batch.target, self.batch.sampling)
        if self.batch.draft is not None:
            inner = [walk for walk in asking if walk.wants.tokens and walk not in broken]
            if inner:
                broken |= self._load(inner, self.q, self.batch.draft, self.batch.draft_sampling)
        sizes = [len(walk.wants.tokens) for walk in asking]
        at = [walk.slot for walk in asking for _ in walk.wants.tokens]
        tokens = [max(x, 0) for walk in asking for x in walk.wants.tokens]
        p = rows_torch.read(self.p, at, tokens)
        q = p if self.batch.draft is None else rows_torch.read(self.q, at, tokens)
        answers: list[Any] = []
        end = 0
        for walk, size in zip(asking, sizes, strict=True):
            start, end = end, end + size
            answers.append(broken.get(walk) or (p[start:end], q[start:end]))
        return answers

    def _load(
        self, asking: list[_Walk], buffer: torch.Tensor, side: _Logits, sampling: Sampling
    ) -> dict[_Walk, Status]:
        requests = [walk.request for walk in asking]
        logits = side.take(requests, [walk.wants.node for walk in asking])
        some = None if len(asking) == len(self.walks) else [walk.slot for walk in asking]
        status = rows_torch.law(logits, sampling.take(requests), buffer, some)
        return {walk: bits for walk, bits in zip(asking, status, strict=True) if bits} if status else {}

    def _mass(self, asking: list[_Walk]) -> list[float]:
        self._fill(asking)
        total: list[float] = self.masses.sum(1).tolist()
        # the buffer holds (p - beta / w q)_+, or q itself
        return [mass * (walk.wants.w or 1.0) for mass, walk in zip(total, asking, strict=True)]

    def _draw(self, asking: list[_Walk]) -> list[int | None]:
        if self.held != [(walk, tuple(walk.wants)) for walk in asking]:
            self._fill(asking)
        uniforms = np.array([walk.tree.uniforms[-2:] for walk in asking])
        tokens = rows_torch.draw(self.weights[: len(asking)], self.masses, uniforms[:, 0], uniforms[:, 1])
        return [token if mass > 0 else None for token, mass in zip(tokens, self.masses.sum(1).tolist(), strict=True)]

    def _fill(self, asking: list[_Walk]) -> None:
        """Put each request's (w p - beta q)_+ / w outside `without` into the weights, and sum its blocks."""
        wants = [walk.wants for walk in asking]
        slots = [walk.slot for walk in asking]
        self.masses = rows_torch.residual(self.p, self.q, slots, wants, self.weights)
        self.held = [(walk, tuple(walk.wants)) for walk in asking]


def verify(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `mcsd_kernels.verify`; arguments as there, already checked."""
    batch = tokens.shape[0]
    inputs = _Batch(
        _Logits(target_logits, target_rows),
        None if draft_logits is None else _Logits(draft_logits, draft_rows),
        tokens,
        parents,
        uniforms,
        Sampling.on_host(sampling, sampling_tensors, batch),
        Sampling.on_host(draft_sampling, draft_sampling_tensors, batch),
        max_depth,
    )
    program = rules.RULES[rule]
    status = inputs.faults()
    path = np.full((batch, max_depth + 1), -1, np.int32)
    emitted = np.full((batch, max_depth + 1), -1, np.int64)
    length = np.ones(batch, np.int32)
    refused = status & ~int(Status.BAD_TOKEN) != 0
    path[:, 0], emitted[refused, 0] = 0, PLACEHOLDER
    todo = np.flatnonzero(~refused).tolist()
    step = rows_torch.chunk_rows(inputs.vocab)
    for start in range(0, len(todo), step):
        walks = []
        for request in todo[start : start + step]:
            tree = inputs.tree(request)
            walks.append(_Walk(request, tree, program(tree, proposal)))
        _Chunk(inputs, walks).run(path, length, emitted, status)
    outputs = (torch.from_numpy(array) for array in (path, length, emitted, status))
    path_t, length_t, emitted_t, status_t = (tensor.to(target_logits.device) for tensor in outputs)
    return path_t, length_t, emitted_t, status_t
