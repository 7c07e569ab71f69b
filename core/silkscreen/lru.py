"""Values kept in memory: the most recently used ones, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

V = TypeVar("V")


class LRU(Generic[V]):
    """Values by key; those used longest ago are dropped when there are too many. Threads may share it.

    Args:
        max_bytes: bound of the values' bytes together; None for no bound, 0 keeps nothing.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> V | None:
        """Return the value of a key, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keep a value of so many bytes, if they are within the bound, in the place of what the key had."""
        size = max(size, 1)
        with self._lock:
            self.bytes -= self._kept.pop(key, (value, 0))[1]
            if self.max_bytes is not None and size > self.max_bytes:
                return
            self._kept[key] = (value, size)
            self.bytes += size
            while self.max_bytes is not None and self.bytes > self.max_bytes:
                self.bytes -= self._kept.popitem(last=False)[1][1]
