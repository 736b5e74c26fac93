"""Figures of the tenants on vLLM's own Prometheus endpoint.

Tokens, loads and refusals are counted where the API server sees them. What the workers hold is asked
for every few seconds, as a scrape cannot wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from deltacome.vllm.request import is_artifact

WATCH_SECONDS = 5.0

TOKENS = Counter("deltacome_tokens", "Tokens generated, by tenant", ["tenant"])
LOADS = Counter("deltacome_loads", "Artifacts loaded by request")
LOAD_SECONDS = Histogram(
    "deltacome_load_seconds", "Seconds from a request to load until it is done"
)
REFUSED = Counter("deltacome_refused_loads", "Artifacts that were refused")
RESIDENT = Gauge("deltacome_resident_tenants", "Tenants in slots of the first worker")
KNOWN = Gauge("deltacome_host_tenants", "Tenants that the first worker holds on the host")
SLOT_BYTES = Gauge("deltacome_slot_bytes", "Bytes of a slot of the first worker")
EVICTIONS = Gauge(
    "deltacome_evictions", "Tenants that have left a slot of the first worker for another"
)


def loaded(seconds: float) -> None:
    """An artifact was loaded."""
    LOADS.inc()
    LOAD_SECONDS.observe(seconds)


def refused() -> None:
    """An artifact was refused."""
    REFUSED.inc()


def counted(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's `generate`, with the tokens of tenants counted."""

    async def counting(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        request = kwargs.get("lora_request")
        if request is None or not is_artifact(request.lora_path):
            async for output in generate(*args, **kwargs):
                yield output
            return
        tokens = TOKENS.labels(request.lora_name)
        seen: dict[int, int] = {}
        parameters = kwargs.get("sampling_params") or (args[1] if len(args) > 1 else None)
        delta = getattr(getattr(parameters, "output_kind", None), "name", "") == "DELTA"
        async for output in generate(*args, **kwargs):
            for one in output.outputs:
                new = len(one.token_ids) - (0 if delta else seen.get(one.index, 0))
                seen[one.index] = len(one.token_ids)
                tokens.inc(max(0, new))
            yield output

    return counting


def watch(engine_client: Any) -> None:
    """Asks the workers for their figures from now on, if an event loop runs."""

    async def ask() -> None:
        while True:
            try:
                figures = (await engine_client.collective_rpc("deltacome_figures"))[0]
            except Exception:  # an engine that has died says so itself
                return
            for gauge, key in (
                (RESIDENT, "resident"),
                (KNOWN, "known"),
                (SLOT_BYTES, "slot_bytes"),
                (EVICTIONS, "evictions"),
            ):
                gauge.set(figures[key])
            await asyncio.sleep(WATCH_SECONDS)

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    engine_client._deltacome_watch = loop.create_task(ask())
