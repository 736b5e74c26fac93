"""What the API server does with tenants: loads them by name, refuses them clearly, finds and forgets
them.

vLLM's own registry of adapters stays in charge; its methods are wrapped where a tenant needs more:

- *load*: the folder's content goes into the path (`request`), so that the prefix cache never mixes
  weights; workers read and check the artifact in a thread before the engine is asked to load it, so
  that decoding goes on meanwhile; what they refuse is the client's mistake, HTTP 400, and says why.
- *unload* frees the memory too; vLLM forgets the name alone.
- *resolve*: a name that nobody has loaded is looked for in the folder of tenants, after a restart too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve import create_error_response

from deltacome.errors import DeltaError
from deltacome.vllm import compat, metrics
from deltacome.vllm.request import content_path, is_artifact
from deltacome.vllm.resolver import TenantResolver
from deltacome.vllm.settings import Settings

POLL_SECONDS = 0.01
"""Between two questions whether the workers have read an artifact."""


def install() -> None:
    """Wraps the API server's registry of models, once."""
    registry = compat.OpenAIServingModels
    if hasattr(registry, "_deltacome"):
        return
    registry._deltacome = True  # pyright: ignore[reportAttributeAccessIssue]
    for name, wrapper in (
        ("__init__", _init),
        ("load_lora_adapter", _load),
        ("unload_lora_adapter", _unload),
    ):
        original = getattr(registry, name)
        setattr(registry, name, functools.wraps(original)(wrapper(original)))


def _init(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        config = getattr(engine_client, "vllm_config", None)
        settings = Settings.parse(getattr(config, "additional_config", None))
        if settings.tenants is not None:
            self.lora_resolvers.append(TenantResolver(settings.tenants))
        add_lora, generate = engine_client.add_lora, engine_client.generate
        engine_client.add_lora = _prefetched(engine_client, add_lora)
        engine_client.generate = metrics.counted(generate)
        metrics.watch(engine_client)

    return init


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        if not is_artifact(request.lora_path or ""):
            return await original(self, request, base_model_name)
        path = content_path(request.lora_path)
        start = time.perf_counter()
        request = request.model_copy(update={"lora_path": path})
        result = await original(self, request, base_model_name)
        if isinstance(result, str):
            metrics.loaded(time.perf_counter() - start)
            # Loading in place is done; a request that said so would load it again in every step.
            with contextlib.suppress(KeyError):
                self.lora_requests[request.lora_name].load_inplace = False
            return result
        metrics.refused()
        if result.error.code == HTTPStatus.INTERNAL_SERVER_ERROR:
            return create_error_response(
                message=result.error.message,
                err_type="BadRequestError",
                status_code=HTTPStatus.BAD_REQUEST,
                param="lora_path",
            )
        return result

    return load


def _unload(original: Callable[..., Any]) -> Callable[..., Any]:
    async def unload(self: Any, request: Any) -> Any:
        known = self.lora_requests.get(request.lora_name)
        result = await original(self, request)
        if isinstance(result, str) and known is not None and is_artifact(known.lora_path):
            await self.engine_client.remove_lora(known.lora_int_id)
        return result

    return unload


def _prefetched(engine_client: Any, add_lora: Callable[..., Any]) -> Callable[..., Any]:
    """`add_lora` that lets workers read an artifact beside their work before they take it."""

    async def add(lora_request: Any) -> Any:
        if is_artifact(lora_request.lora_path):
            arguments = (lora_request.lora_int_id, lora_request.lora_path)
            await engine_client.collective_rpc("deltacome_prefetch", args=arguments)
            while True:
                states = await engine_client.collective_rpc("deltacome_fetched", args=arguments)
                refusals = [state for state in states if isinstance(state, str)]
                if refusals:
                    raise DeltaError(refusals[0])
                if all(states):
                    break
                await asyncio.sleep(POLL_SECONDS)
        return await add_lora(lora_request)

    return add
