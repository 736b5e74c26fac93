"""Figures of the tenants on vLLM's own Prometheus endpoint.

Tokens, loads and refusals are counted where the API server sees them. What the workers hold is asked
for every few seconds, as a scrape cannot wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

WATCH_SECONDS = 5.0

TOKENS = Counter("deltacome_tokens", "Tokens generated, by tenant", ["tenant"])
LOADS = Counter("deltacome_loads", "Artifacts loaded by request")
LOAD_SECONDS = Histogram(
    "deltacome_load_seconds", "Seconds from a request to load until it is done"
)
REFUSED = Counter("deltacome_refused_loads", "Artifacts that were refused")


def _gauge(name: str, text: str) -> Gauge:
    # Several API servers ask the same workers: the last answer counts.
    return Gauge(name, text, multiprocess_mode="mostrecent")


FIGURES = {
    "resident": _gauge("deltacome_resident_tenants", "Tenants in slots of the first worker"),
    "held": _gauge("deltacome_host_tenants", "Tenants that the first worker holds on the host"),
    "held_bytes": _gauge("deltacome_host_bytes", "Bytes of packed terms held on its host"),
    "slots": _gauge("deltacome_slots", "Slots of the first worker"),
    "slot_bytes": _gauge("deltacome_slot_bytes", "Bytes of a slot of the first worker"),
    "evictions": _gauge(
        "deltacome_evictions", "Tenants that have left a slot of the first worker for another"
    ),
}
"""By the keys of `WorkerManager.figures`."""


def loaded(seconds: float) -> None:
    """An artifact was loaded."""
    LOADS.inc()
    LOAD_SECONDS.observe(seconds)


def refused() -> None:
    """An artifact was refused."""
    REFUSED.inc()


async def counted(outputs: Any, name: str, params: Any) -> AsyncGenerator[Any, None]:
    """What the engine says for a tenant, with its tokens counted."""
    tokens = TOKENS.labels(name)
    seen: dict[int, int] = {}
    delta = getattr(getattr(params, "output_kind", None), "name", "") == "DELTA"
    async with aclosing(outputs):
        async for output in outputs:
            for one in output.outputs if isinstance(output.outputs, list) else ():
                tokens.inc(len(one.token_ids) - (0 if delta else seen.get(one.index, 0)))
                seen[one.index] = len(one.token_ids)
            yield output


def watch(engine_client: Any) -> None:
    """Asks the workers for their figures from now on, if an event loop runs."""

    async def ask() -> None:
        while True:
            try:
                figures = (await engine_client.collective_rpc("deltacome_figures"))[0]
            except Exception:  # an engine that has died says so itself
                return
            for key, gauge in FIGURES.items():
                gauge.set(figures[key])
            await asyncio.sleep(WATCH_SECONDS)

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    engine_client._deltacome_watch = loop.create_task(ask())
