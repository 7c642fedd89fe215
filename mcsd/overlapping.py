"""Changes to an object that several contexts share."""

from __future__ import annotations

from threading import RLock
from typing import Any


class Overlapping:
    """Counts the contexts that change an object: the first one finds what was there, the last one puts it back.

    They may end in any order, and in several threads; whoever changes or restores an object holds `lock`.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        # id -> the object, its contexts, and what was there before the first
        self._users: dict[int, tuple[Any, int, Any]] = {}

    def enter(self, changed: Any, before: Any) -> None:
        """One context more; `before` counts if it is the first."""
        _, count, first = self._users.get(id(changed), (changed, 0, before))
        self._users[id(changed)] = changed, count + 1, first

    def leave(self, changed: Any) -> tuple[bool, Any]:
        """One context less: whether it was the last, and what was there before the first."""
        _, count, before = self._users.pop(id(changed))
        if count > 1:
            self._users[id(changed)] = changed, count - 1, before
        return count == 1, before
