"""A preallocated key-value cache whose requests advance each by its own length."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mcsd_kernels import keep_path


class TreeCacheLayer(CacheLayerMixin):
    """One layer's view of a `TreeCache`: `update` writes where the cache says and returns the slots in use."""

    is_sliding = False

    def __init__(self, cache: TreeCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take this layer's slice of the cache."""
        self.keys, self.values = self.cache.allocate(self.index, key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[batch, kv_heads, nodes, head_dim]` to the cache's current slots; returns the slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        slots, used = self.cache.slots, self.cache.used
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(slots, int):
                stored[:, :, slots : slots + new.shape[2]] = new
            else:
                batch = torch.arange(new.shape[0], device=new.device)[:, None]
                stored.transpose(1, 2)[batch, slots] = new.transpose(1, 2)
        return self.keys[:, :, :used], self.values[:, :, :used]

    def get_seq_length(self) -> int:
        """The longest prefix."""
        return self.cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use, and where they start."""
        return self.cache.used, 0

    def get_max_length(self) -> int:
        """How many slots there are."""
        return self.cache.capacity


class TreeCache(Cache):
    """Keys and values of a batch: each request's prefix in slots 0 to length - 1, the nodes of a tree after it.

    All layers of one shape share one allocation, `[batch, layers, kv_heads, slots, head_dim]`, so that keeping a path
    moves every layer at once.

    Args:
        layers: how many layers the model has.
        capacity: slots a request: its tokens, and the largest tree.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[TreeCacheLayer(self, index) for index in range(layers)])
        self.capacity = capacity
        self.longest = 0
        self.used = 0
        self.slots: int | torch.Tensor = 0
        self._stores: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def place(self, first: list[int], count: int, longest: int | None = None) -> None:
        """Say where the next forward's `count` nodes go: request b's from slot `first[b]` on.

        Args:
            first: a slot for each request.
            count: nodes a request.
            longest: the longest prefix; None: the largest of `first`.
        """
        self.longest = max(first) if longest is None else longest
        self.used = min(max(first) + count, self.capacity)
        if max(first) == min(first):
            self.slots = first[0]
        else:
            device = next(iter(self._stores.values()))[0].device if self._stores else torch.device("cpu")
            self.slots = torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)

    def allocate(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of layer `index`, `[batch, kv_heads, slots, head_dim]`, zero at first."""
        shape = (key.shape[0], key.shape[1], key.shape[3], value.shape[3], key.dtype)
        if shape not in self._stores:
            room = (key.shape[0], len(self.layers), key.shape[1], self.capacity)
            self._stores[shape] = key.new_zeros(*room, key.shape[3]), value.new_zeros(*room, value.shape[3])
        keys, values = self._stores[shape]
        return keys[:, index], values[:, index]

    def keep(self, prefix_lengths: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> None:
        """In place: move the accepted nodes to the end of the prefix, in every layer; see `mcsd_kernels.keep_path`."""
        for keys, values in self._stores.values():
            keep_path(keys.flatten(1, 2), values.flatten(1, 2), prefix_lengths, path, length)
