"""A lock for each name that somebody waits for or holds, and for no other."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks(WeakValueDictionary[str, asyncio.Lock]):
    """Locks by name. Names come from clients, so those of locks that nobody has are forgotten."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())
