"""Locks by name, kept only while somebody holds or waits for them."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks(WeakValueDictionary[str, asyncio.Lock]):
    """Locks by name. Names come from clients, so a lock that nobody has is forgotten."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())
