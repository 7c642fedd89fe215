"""A key-value cache whose requests advance each by its own length and which grows in blocks."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mcsd_kernels import keep_path

BLOCK = 256
REREAD = 64  # tokens at the end of a text that may be read again, and then see their own window


class Prefix(NamedTuple):
    """How many slots come before each request's tree.

    Args:
        lengths: `[batch]` int32, on the device.
        on_host: the same numbers.
    """

    lengths: torch.Tensor
    on_host: Sequence[int]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Prefix:
        """From numbers on the host."""
        return Prefix(torch.tensor(lengths, dtype=torch.int32, device=device), lengths)

    @property
    def longest(self) -> int:
        """Of the batch."""
        return max(self.on_host)

    @property
    def same(self) -> bool:
        """All requests have one length, so that a slice does where slots would have to be listed."""
        return min(self.on_host) == max(self.on_host)

    def back(self, count: int) -> Prefix:
        """The prefix `count` slots shorter, but not below 0."""
        return Prefix((self.lengths - count).clamp(min=0), [max(length - count, 0) for length in self.on_host])


class _Store:
    """Keys and values of the layers alike in shape, window and device, `[batch, layers, kv_heads, slots, head_dim]`.

    A request's slot s lies at `s - skipped[request]`: what is behind the window for good is dropped from time to time.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.layers: list[int] = []
        self.keys = self.values = torch.empty(0)
        self.skipped: list[int] = []
        self.skipped_on_device: torch.Tensor | None = None  # None: nowhere anything
        self.room = 0
        self.used = 0
        self.slots: int | torch.Tensor = 0
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.complete = False  # whether all its layers are known
        self.version = 0  # counts what would leave captured graphs with pointers to nowhere

    def allocate(self, key: torch.Tensor, value: torch.Tensor, layers: int, room: int) -> None:
        """Zeros for `room` slots a request: what is not written must be finite, as masked attention reads it."""
        batch, heads = key.shape[:2]
        self.room, self.skipped = room, [0] * batch
        self.keys = key.new_zeros(batch, layers, heads, room, key.shape[3])
        self.values = value.new_zeros(batch, layers, heads, room, value.shape[3])

    def add(self, layer: int) -> None:
        """Another layer."""
        self.layers.append(layer)
        self._rows = None

    def place(
        self, prefix: Prefix, offset: int, count: int, capacity: int, may_skip: bool, bound: int | None = None
    ) -> None:
        """Make room for nodes `offset` to `offset + count - 1` of the tree after the prefix, and note their slots.

        With a `bound` on the prefixes the slots in use follow from that, and where the nodes go from `aim`.
        """
        used = self._used(prefix, self.skipped) + offset + count
        if bound is not None and self.window is None:
            used = min(bound + offset + count, capacity)
        if used > self.room:
            used = self._make_room(prefix, offset + count, used, capacity, may_skip)
        self.used = self.room if bound is not None and self.window is not None else min(used, self.room)
        if bound is not None:
            return
        first = [length - skip + offset for length, skip in zip(prefix.on_host, self.skipped, strict=True)]
        if min(first) == max(first):
            self.slots = first[0]
        else:
            self.aim(prefix.lengths, offset, count)

    def aim(self, lengths: torch.Tensor, offset: int, count: int) -> None:
        """Note the nodes' slots, worked out on the device."""
        nodes = torch.arange(offset, offset + count, device=self.keys.device)
        self.slots = self.before(lengths)[:, None] + nodes

    def before(self, lengths: torch.Tensor) -> torch.Tensor:
        """`[batch]` int32: the slots of the prefix that are still there."""
        lengths = lengths.to(self.keys.device)
        return lengths if self.skipped_on_device is None else lengths - self.skipped_on_device

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layers so far, `[batch, layers * kv_heads, slots, head_dim]`: views, kept."""
        if self._rows is None:
            layers = len(self.layers)
            self._rows = self.keys[:, :layers].flatten(1, 2), self.values[:, :layers].flatten(1, 2)
        return self._rows

    @staticmethod
    def _used(prefix: Prefix, skipped: list[int]) -> int:
        return max(length - skip for length, skip in zip(prefix.on_host, skipped, strict=True))

    def _make_room(self, prefix: Prefix, nodes: int, wanted: int, capacity: int, may_skip: bool) -> int:
        """Drop what is behind the window and, if that is not enough, grow by a quarter; returns the slots in use."""
        before, skipped, room = self.skipped, self.skipped, self.room
        if self.window is not None and may_skip:
            needed = self.window + REREAD
            skipped = [max(s, n - needed) for s, n in zip(before, prefix.on_host, strict=True)]
            wanted = self._used(prefix, skipped) + nodes
        if wanted + wanted // 8 > room:  # a move for the sake of a few slots would soon be followed by another
            room = room_for(wanted, capacity)
        layers = len(self.layers) if self.complete else self.keys.shape[1]
        # where there is no memory for it, nothing has changed
        keys, values = (
            old.new_zeros(old.shape[0], layers, old.shape[2], room, old.shape[4]) for old in (self.keys, self.values)
        )
        for request, (now, then) in enumerate(zip(skipped, before, strict=True)):
            moved = slice(now - then, now - then + room)
            for old, new in ((self.keys[request], keys[request]), (self.values[request], values[request])):
                part = old[:layers, :, moved]
                new[:, :, : part.shape[2]] = part
        self.skipped = skipped
        if self.keys.shape == keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values, self.room, self._rows = keys, values, room, None
            self.version += 1
        self._skip_on_device()
        return wanted

    def _skip_on_device(self) -> None:
        if self.skipped_on_device is not None:
            self.skipped_on_device.copy_(torch.tensor(self.skipped, dtype=torch.int32))
        elif any(self.skipped):
            self.skipped_on_device = torch.tensor(self.skipped, dtype=torch.int32, device=self.keys.device)
            self.version += 1

    def reset(self) -> None:
        """Forget the texts; the memory stays, and is finite again whatever was in it."""
        self.keys.zero_()
        self.values.zero_()
        self.skipped = [0] * len(self.skipped)
        self._skip_on_device()


def room_for(used: int, capacity: int) -> int:
    """Slots to allocate where `used` are needed now: a quarter more, in whole blocks, and never past the capacity."""
    return min(-(-(used + used // 4) // BLOCK) * BLOCK, capacity)


class TreeCacheLayer(CacheLayerMixin):
    """One layer's view of a `TreeCache`: `update` writes where the cache says and returns the slots in use."""

    is_sliding = False

    def __init__(self, cache: TreeCache, index: int) -> None:
        super().__init__()
        # held weakly, or its memory would wait for the garbage collector
        self.cache, self.index = cast(TreeCache, weakref.proxy(cache)), index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Find this layer's place in the cache."""
        self.store, self.row = self.cache.allocate(self.index, key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch, kv_heads, nodes, head_dim]` to the cache's current slots; returns the slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        store = self.store
        slots, keys, values = store.slots, store.keys[:, self.row], store.values[:, self.row]
        if isinstance(slots, int):
            after = slots + key_states.shape[2]
            keys[:, :, slots:after] = key_states
            values[:, :, slots:after] = value_states
        else:
            batch = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
            keys.transpose(1, 2)[batch, slots] = key_states.transpose(1, 2)
            values.transpose(1, 2)[batch, slots] = value_states.transpose(1, 2)
        return keys[:, :, : store.used], values[:, :, : store.used]

    def get_seq_length(self) -> int:
        """The longest prefix."""
        return self.cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use, and where they start."""
        return self.cache.used, 0

    def get_max_length(self) -> int:
        """How many slots there may be."""
        return self.cache.capacity


_SERIALS = itertools.count()
CACHES: WeakValueDictionary[int, TreeCache] = WeakValueDictionary()  # those that are still there, by serial


class TreeCache(Cache):
    """Keys and values of a batch: each request's prefix in slots 0 to length - 1, the nodes of a tree after it.

    Layers of one shape share one allocation on each device, so that keeping a path moves them at once. It grows with
    the text; layers with a sliding window keep little more than the window.

    Args:
        windows: each layer's sliding window, None for a layer that sees everything.
        capacity: slots a request at most: its tokens, and the largest tree.

    Attributes:
        serial: a number that no other cache has.
    """

    def __init__(self, windows: Sequence[int | None], capacity: int) -> None:
        super().__init__(layers=[TreeCacheLayer(self, index) for index in range(len(windows))])
        self.windows, self.capacity = windows, capacity
        self.serial = next(_SERIALS)
        CACHES[self.serial] = self
        self.may_skip = False  # whether the attention knows that a windowed layer's slots do not begin at 0
        self.longest = 0
        self.used = 0
        self._placed: tuple[Prefix, int, int] | None = None
        self._stores: dict[Any, _Store] = {}

    def place(self, prefix: Prefix, offset: int, count: int, bound: int | None = None) -> None:
        """Say where the next forward's nodes go.

        Args:
            prefix: slots before each request's tree.
            offset: the first node's number.
            count: nodes a request.
            bound: read slots as if the longest prefix were this long, and leave it to `aim` to find the nodes' slots.
        """
        self.longest = prefix.longest
        self.used = min((self.longest if bound is None else bound) + offset + count, self.capacity)
        self._placed = prefix, offset, count
        complete = sum(len(store.layers) for store in self._stores.values()) == len(self.windows)
        for store in self._stores.values():
            store.complete = complete
            store.place(prefix, offset, count, self.capacity, self.may_skip, bound)

    def aim(self, lengths: torch.Tensor, offset: int, count: int) -> None:
        """Find the nodes' slots on the device, from prefix lengths that nobody knows on the host."""
        for store in self._stores.values():
            store.aim(lengths, offset, count)

    @property
    def version(self) -> int:
        """Changes whenever memory has moved."""
        return sum(store.version + 1 for store in self._stores.values())

    def reset(self, capacity: int) -> None:
        """Make ready for other texts in the same memory."""
        self.capacity = max(self.capacity, capacity)
        self.may_skip = False
        with torch.inference_mode():
            for store in self._stores.values():
                store.reset()

    def sums(self) -> list[torch.Tensor]:
        """Of each slot's keys and values, `[batch, layers, slots]` f32: equal where the same was written there."""
        stores = self._stores.values()
        return [part.sum((2, 4), dtype=torch.float32) for store in stores for part in (store.keys, store.values)]

    def before(self, lengths: torch.Tensor) -> dict[int, torch.Tensor]:
        """window -> `[batch]` int32, the slots before the tree in the layers of that window, where they are fewer."""
        return {
            store.window: store.before(lengths).to(lengths.device)
            for store in self._stores.values()
            if store.window is not None and store.skipped_on_device is not None
        }

    def allocate(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[_Store, int]:
        """The store of layer `index`, zero at first, and the layer's row in it."""
        assert self._placed is not None
        alike = (self.windows[index], key.shape[0], key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        if alike not in self._stores:
            store = self._stores[alike] = _Store(self.windows[index])
            # a bound, which holds until there is room to be made
            layers = self.windows.count(store.window)
            store.allocate(key, value, layers, room_for(self.used, self.capacity))
            store.place(*self._placed, self.capacity, self.may_skip)
        store = self._stores[alike]
        store.add(index)
        return store, len(store.layers) - 1

    def keep(self, prefix: Prefix, path: torch.Tensor, length: torch.Tensor) -> None:
        """In place: move the accepted nodes to the end of the prefix, in every layer; see `mcsd_kernels.keep_path`."""
        for store in self._stores.values():
            device = store.keys.device
            keep_path(*store.rows(), store.before(prefix.lengths), path.to(device), length.to(device))
