"""Values that are kept between calls, each thread its own."""

from __future__ import annotations

import threading
from typing import Any


class Kept(threading.local):
    """The newest values by key.

    Args:
        most: how many; for one more, the oldest goes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.values: dict[Any, Any] = {}

    def put(self, key: Any, value: Any) -> None:
        """Keep a value, in place of the one with this key."""
        self.values.pop(key, None)
        while len(self.values) >= self.most:
            del self.values[next(iter(self.values))]
        self.values[key] = value
