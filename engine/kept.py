"""Work that is done once: results kept by what they were made from, the least recently used dropped first."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """A bounded memory of results, which counts how often it helped."""

    def __init__(self, most_bytes: int, *, size: Callable[[Value], int]) -> None:
        self._entries: LRUCache[Key, Value] = LRUCache(most_bytes, getsizeof=size)
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return int(self._entries.currsize)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value for `key`, made when there is none; one that is larger than the bound is not kept."""
        try:
            value = self._entries[key]
        except KeyError:
            self.misses += 1
            value = make()
            if self._entries.getsizeof(value) <= self._entries.maxsize:
                self._entries[key] = value
        else:
            self.hits += 1
        return value

    def clear(self) -> None:
        """Forget everything; the counts go on."""
        self._entries.clear()
