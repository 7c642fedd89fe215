"""A CUDA graph's stand-in on the CPU: what was done is done again with the same memory, and no Python runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from mcsd.cache import CACHES
from mcsd.graphs import Rehearsal


class _Elsewhere:
    """A tensor that was there before the capture. A graph has its address and does not keep it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)

    def there(self) -> torch.Tensor:
        tensor = self._tensor()
        if tensor is None:
            raise AssertionError("a graph reads memory that was given back")
        return tensor


class _Recorder(Rehearsal):
    """Takes down every operator with its very tensors, and refuses what a stream under capture refuses."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: list[tuple[Any, Any, list[torch.Tensor]]] = []
        self.inside = False
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name == "aten::lift_fresh":  # on a GPU, a copy from memory that the host may change
            raise RuntimeError("a tensor comes from the host")
        kwargs = kwargs or {}
        self.inside = True
        try:
            found = super().__torch_dispatch__(operator, types, args, kwargs)
        finally:
            self.inside = False
        given = {id(tensor) for tensor in _tensors((args, kwargs))}
        arguments = tree_map(self._address, (args, kwargs))
        made = [tensor for tensor in _tensors(found) if id(tensor) not in given]
        self._made |= {id(tensor): tensor for tensor in made}
        storages = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
        if new or operator._schema.is_mutable:  # the rest are views
            self.calls.append((operator, arguments, new))
        return found

    def _address(self, value: Any) -> Any:
        return _Elsewhere(value) if isinstance(value, torch.Tensor) and id(value) not in self._made else value

    def replay(self) -> None:
        for operator, arguments, made in self.calls:
            args, kwargs = tree_map(lambda value: value.there() if isinstance(value, _Elsewhere) else value, arguments)
            storages = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
            again = [t for t in _tensors(operator(*args, **kwargs)) if t.untyped_storage()._cdata not in storages]
            for old, new in zip(made, again, strict=True):
                old.copy_(new)

    def empty(self, value: float = torch.nan) -> None:
        """A capture computes nothing, so that nothing may be read before the first replay."""
        for _, _, made in self.calls:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(value)


def _spoil_caches() -> None:
    for cache in CACHES.values():
        for store in cache._stores.values():
            store.keys.fill_(3.0)
            store.values.fill_(3.0)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Tape:
    """In place of `mcsd.graphs.capture`, on the CPU.

    Attributes:
        captured, replayed: how often.
        spoils: the number of a replay, from 1 on, and where it leaves other numbers: in "results" or "caches".
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured = self.replayed = 0
        self.spoils: tuple[int, str] = (0, "")
        self._monkeypatch = monkeypatch
        monkeypatch.setattr("mcsd.graphs.capture", self)

    def __call__(
        self, function: Callable[[], Any], device: torch.device, pool: Any = None
    ) -> tuple[Callable[[], None], Any]:
        assert device.type == "cpu"
        function()
        with Rehearsal(device):
            function()
        recorder = _Recorder()
        with self._watched(recorder), recorder:
            outputs = function()
        recorder.empty()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            recorder.replay()
            if (self.replayed, "results") == self.spoils:
                recorder.empty(3.0)
            if (self.replayed, "caches") == self.spoils:
                _spoil_caches()

        return replay, outputs

    @contextmanager
    def _watched(self, recorder: _Recorder) -> Iterator[None]:
        """Reading a tensor on the host is refused, except inside an operator."""

        def refusing(name: str, method: Any) -> Any:
            def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if not recorder.inside:
                    raise RuntimeError(f"Tensor.{name} would wait for the host")
                return method(tensor, *args, **kwargs)

            return read

        with self._monkeypatch.context() as patch:
            for name in ("tolist", "numpy", "item"):
                patch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
            yield
