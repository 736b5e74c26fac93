"""What an operator sees of the tenants: figures on vLLM's own Prometheus endpoint, lines in its log.

Tokens, loads and refusals are counted where the API server sees them. The workers are asked every few
seconds what they hold, since a scrape cannot wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger

from deltacome.format.clip import clip
from deltacome.vllm import compat

logger = init_logger("vllm.deltacome")  # only loggers below `vllm` have a handler
WATCH_SECONDS = 5.0

TOKENS = Counter("deltacome_tokens", "Tokens generated, by tenant", ["tenant"])
LOADS = Counter("deltacome_loads", "Artifacts loaded by request")
LOAD_SECONDS = Histogram(
    "deltacome_load_seconds",
    "Seconds from a request to load until it is done, without downloads",
)
REREAD_SECONDS = Histogram("deltacome_reread_seconds", "Seconds to read a dropped tenant again")
REFUSED = Counter(
    "deltacome_refused_loads", "Refused loads, and refused requests whose tenant had to be read"
)


def _gauge(name: str, text: str) -> Gauge:
    # With ordinary adapters there can be several API servers; all ask the same workers.
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
"""Gauges by the keys of `WorkerManager.figures`."""


def loaded(name: str, path: str, seconds: float) -> None:
    """An artifact was loaded."""
    LOADS.inc()
    LOAD_SECONDS.observe(seconds)
    logger.info("Loaded tenant %r in %.2f s: %s", name, seconds, clip(path))


def reread(name: str, path: str, seconds: float) -> None:
    """A tenant that the workers had dropped was read again."""
    REREAD_SECONDS.observe(seconds)
    logger.info("Read tenant %r again in %.2f s: %s", name, seconds, clip(path))


def refused(name: str, error: Exception) -> None:
    """An artifact was refused. The log also has the error's cause, which clients are not told."""
    REFUSED.inc()
    why = f" ({error.__cause__!r})" if error.__cause__ else ""
    logger.warning("Refused tenant %r: %s", name, clip(f"{error}{why}"))


def dropped(name: str, path: str) -> None:
    """The workers no longer hold a tenant's weights."""
    logger.info("Dropped tenant %r from the workers: %s", name, clip(path))


def unloaded(name: str, path: str) -> None:
    """A name is no longer a tenant's."""
    logger.info("Unloaded tenant %r: %s", name, clip(path))


def forgotten(name: str) -> None:
    """Nothing has a name any more, and nobody uses what had it: its figures are removed."""
    with suppress(KeyError):  # in older Prometheus clients, if nothing was counted
        TOKENS.remove(name)


async def counted(outputs: Any, name: str, params: Any) -> AsyncGenerator[Any, None]:
    """Passes on the engine's outputs for a tenant and counts their tokens."""
    tokens = TOKENS.labels(name)
    seen: dict[int, int] = {}
    delta = getattr(getattr(params, "output_kind", None), "name", "") == "DELTA"
    async with aclosing(outputs):
        async for output in outputs:
            for one in output.outputs if isinstance(output.outputs, list) else ():
                tokens.inc(len(one.token_ids) - (0 if delta else seen.get(one.index, 0)))
                seen[one.index] = len(one.token_ids)
            yield output


def record_present_adapters(
    original: Callable[..., None], self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any
) -> None:
    """vLLM's `record`, with its gauge limited to the adapters that run and wait now.

    vLLM would keep a line for each list of adapters that there ever was, and each load gives a tenant
    another name in the engine.
    """
    gauge = self.gauge_lora_info
    if scheduler_stats is not None and isinstance(gauge, Gauge):  # Ray's has another type
        gauge.clear()
    original(self, scheduler_stats, *args, **kwargs)


def watch(engine_client: Any) -> None:
    """Starts asking the workers for their figures every few seconds, if an event loop is running."""

    async def ask() -> None:
        failed = False
        while True:
            try:
                figures = (await compat.ask_workers(engine_client, "deltacome_figures"))[0]
                for key, gauge in FIGURES.items():
                    gauge.set(figures[key])
                failed = False
            except Exception as error:  # missing figures stop nothing: one line until they return
                if not failed:
                    logger.warning("No figures of tenants from the workers: %r", error)
                failed = True
            await asyncio.sleep(WATCH_SECONDS)

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    engine_client._deltacome_watch = loop.create_task(ask())
