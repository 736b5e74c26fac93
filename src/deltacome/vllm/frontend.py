"""What the API server does with tenants.

It loads them by name, refuses them clearly, finds and forgets them, uses their templates, sampling
defaults and end tokens, and asks for the key wherever they can be reached.

vLLM's own registry of names stays in charge. Its methods are wrapped where a tenant needs more, and
everything that is not a tenant passes through them unchanged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm import envs
from vllm.entrypoints.serve import create_error_response

from deltacome.errors import ArtifactError, DeltaError, MismatchError, UnsupportedError
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.vllm import compat, metrics
from deltacome.vllm.find import Finder, StorageError, fetched
from deltacome.vllm.locks import Locks
from deltacome.vllm.manners import SAMPLING
from deltacome.vllm.refuse import refuse_any_name
from deltacome.vllm.registry import MARK, Entry, Registry
from deltacome.vllm.request import has_digest, is_artifact
from deltacome.vllm.settings import Settings

Original = Callable[..., Any]
"""A method of vLLM, which `compat.wrap` passes to its wrapper."""
_registry: Registry | None = None
"""The registry of this process: an API server has one."""
OPEN = ("/health", "/ping", "/metrics", "/version")
"""Paths that are answered without the key, where there is one."""


def install() -> None:
    """Wraps methods of the API server, once."""
    for owner, name, wrapper in (
        (compat.OpenAIServingModels, "__init__", _init),
        (compat.OpenAIServingModels, "load_lora_adapter", _load),
        (compat.OpenAIServingModels, "_check_load_lora_adapter_request", _check_load),
        (compat.OpenAIServingModels, "_check_unload_lora_adapter_request", _check_unload),
        (compat.OpenAIServingModels, "resolve_lora", _resolve),
        (compat.BaseServing, "_get_active_default_mm_loras", _of_content),
        (compat.OnlineRenderer, "preprocess_chat", _preprocess_chat),
        (compat.PoolingBaseServing, "_preprocessing", _preprocess_pooling),
        (compat.ServingStructuredDecisions, "create_decision", _decide),
        (compat.AuthenticationMiddleware, "__call__", _authenticate),
        (compat.PrometheusStatLogger, "record", metrics.record_present_adapters),
        *((request, "to_sampling_params", _sampling) for request in compat.REQUESTS),
    ):
        compat.wrap(owner, name, wrapper)


def _entry(name: str | None) -> Entry | None:
    """The tenant that requests for a name get."""
    return None if _registry is None else _registry.named(name)


def _init(original: Original, self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
    global _registry
    original(self, engine_client, *args, **kwargs)
    # Some servers and tests have a client without an engine, and so without tenants.
    config = getattr(engine_client, "vllm_config", None)
    if config is None or config.lora_config is None:
        return
    settings = Settings.parse(config.additional_config)
    self.lora_resolver_lock = Locks()
    self._finder = None
    if settings.tenants is not None:
        refuse_any_name()
        if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            raise UnsupportedError(
                "deltacome: finding tenants by name needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        self._finder = Finder(settings.tenants)
    _registry = Registry(self, engine_client, settings)
    engine_client.generate = _with_tenant(engine_client.generate, _registry)
    engine_client.encode = _with_tenant(engine_client.encode, _registry)
    metrics.watch(engine_client)


async def _load(
    original: Original, self: Any, request: Any, base_model_name: str | None = None
) -> Any:
    if _registry is None:
        return await original(self, request, base_model_name)
    try:
        folder = await fetched(request.lora_path or "")
        # The request of SageMaker's route, /adapters, is of another class.
        request = compat.LoadLoRAAdapterRequest(**vars(request) | {"lora_path": folder})
    except (DeltaError, OSError, ValueError) as error:
        return _refusal(request.lora_name, error, "lora_path")
    if not is_artifact(folder):
        if _registry.settings.lora:
            return await original(self, request, base_model_name)
        reason = f"{folder}: expected an artifact ({MANIFEST_FILE}), found none and lora is off"
        return _refusal(request.lora_name, ArtifactError(reason), "lora_path")
    async with self.lora_resolver_lock[request.lora_name]:
        if error := await self._check_load_lora_adapter_request(request):
            return error
        try:
            await _registry.load(request.lora_name, folder)
        except DeltaError as error:
            return _refusal(request.lora_name, error, "lora_path")
    return f"Success: tenant '{request.lora_name}' added successfully."


async def _check_load(original: Original, self: Any, request: Any) -> Any:
    """Refuses names and paths that cannot be loaded, before anything is, and while the name is locked.

    vLLM gives an adapter that it loads in place the number of what had the name before, and a tenant's
    number belongs to its weights.
    """
    error = await original(self, request)
    if error or _registry is None:
        return error
    name, path = request.lora_name, request.lora_path
    if MARK in name:
        reason = (
            f"{name}: expected a name without {MARK!r}, which tenants' names in the engine have"
        )
        return _refusal(name, MismatchError(reason), "lora_name")
    if _registry.named(name) and not is_artifact(path):
        reason = (
            f"{path}: expected an artifact ({MANIFEST_FILE}), found none: {name} is a tenant; "
            "unload it to give its name to an ordinary adapter"
        )
        return _refusal(name, ArtifactError(reason), "lora_path")
    return None


async def _check_unload(original: Original, self: Any, request: Any) -> Any:
    """Retires a tenant, if nothing is wrong, while the unload holds the lock of its name.

    The unload takes the name away right after this. Any earlier, a load that holds the lock could still
    replace what has the name.
    """
    error = await original(self, request)
    if error is None and _registry is not None:
        _registry.unload(self.lora_requests[request.lora_name])
    return error


async def _resolve(original: Original, self: Any, lora_name: str) -> Any:
    if _registry is not None and MARK in lora_name:
        reason = f"The model `{lora_name}` does not exist: a name has no {MARK!r}."
        return create_error_response(reason, "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    finder: Finder | None = getattr(self, "_finder", None)
    if finder is None or _registry is None:
        return await original(self, lora_name)
    try:
        request = await _registry.find(lora_name, finder)
    except StorageError as error:
        # Raised, as vLLM makes an answer of 404 of any that is returned and is not one of 400.
        metrics.refused(lora_name, error)
        raise compat.RetryableRequestError(str(error)) from error
    except DeltaError as error:
        return _refusal(lora_name, error, "model")
    return request or await original(self, lora_name)


def _of_content(original: Original, self: Any, request: Any) -> Any:
    """The adapter for the kinds of content of a request to the base, `image` say; never a tenant.

    vLLM takes whatever has the name of a kind, of which `text` is one: a tenant of that name would
    answer in the base's place.
    """
    loaded = self.models.lora_requests.items()
    adapters = {name: one for name, one in loaded if not has_digest(one.lora_path)}
    models = SimpleNamespace(lora_requests=adapters)
    without = SimpleNamespace(models=models, _get_message_types=self._get_message_types)
    return original(without, request)


def _authenticate(original: Original, self: Any, scope: Any, receive: Any, send: Any) -> Any:
    """Asks for the key on every path that is not in `OPEN`.

    vLLM asks for it only on paths that begin with /v1 and the like. Tenants are loaded, unloaded and
    queried on other paths too, and a path that is added may be anywhere.
    """
    if _registry is not None and scope["type"] in ("http", "websocket"):
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        asks = path not in OPEN and scope.get("method") != "OPTIONS"
        if asks and not self.verify_token(Headers(scope=scope)):
            return JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
    return original(self, scope, receive, send)


def _refusal(name: str, error: Exception, parameter: str) -> Any:
    """What a client is told: a tenant that cannot be served counts as a mistake in its request."""
    metrics.refused(name, error)
    return create_error_response(str(error), status_code=HTTPStatus.BAD_REQUEST, param=parameter)


def _with_tenant(generate: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
    """The engine's `generate` or `encode`, during which the workers hold the request's tenant."""
    words = inspect.signature(generate)

    async def generating(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        call = words.bind(*args, **kwargs)  # some routes name all arguments
        request = call.arguments.get("lora_request")
        if request is None or not has_digest(request.lora_path):
            async with aclosing(generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    yield output
            return
        async with registry.using(request) as entry:
            params = call.arguments.get("sampling_params")
            if entry.manners.ends and isinstance(params, compat.SamplingParams):
                ends = {"eos_token_id": sorted(entry.manners.ends)}
                params.update_from_generation_config(ends)
            call.arguments["lora_request"] = entry.engine_request
            outputs = generate(*call.args, **call.kwargs)
            # Closed here: the engine must be told to stop before the workers are told to drop the tenant.
            async with aclosing(metrics.counted(outputs, entry.name, params)) as answers:
                async for output in answers:
                    yield output

    return generating


async def _preprocess_chat(original: Original, *args: Any, **kwargs: Any) -> Any:
    call = compat.signature(original).bind(*args, **kwargs)
    name = getattr(call.arguments["request"], "model", None)
    entry = _entry(name)
    if entry is not None:
        if entry.manners.template is not None:
            call.arguments["default_template"] = entry.manners.template
        # Otherwise the template would get the base's special tokens: its tokenizer renders it.
        given = call.arguments.get("default_template_kwargs") or {}
        call.arguments["default_template_kwargs"] = entry.manners.special | given
    return await original(*call.args, **call.kwargs)


async def _preprocess_pooling(original: Original, self: Any, io_processor: Any, ctx: Any) -> Any:
    """Chats that are embedded or classified; a template for scores is the server's, not a model's."""
    entry = _entry(ctx.request.model)
    if entry is not None and not isinstance(io_processor, compat.ScoringIOProcessor):
        io_processor = copy.copy(io_processor)  # requests share it
        io_processor.chat_template = entry.manners.template or io_processor.chat_template
        io_processor.template_kwargs = entry.manners.special | (io_processor.template_kwargs or {})
    return await original(self, io_processor, ctx)


async def _decide(original: Original, self: Any, request: Any, raw_request: Any = None) -> Any:
    """Refuses decisions of tenants with another template: vLLM reads them in the base's."""
    if error := await self._check_model(request):
        return error
    entry = _entry(request.model)
    if entry is not None and entry.manners.template is not None:
        reason = f"{entry.name}: has a chat template of its own, and decisions use the base's"
        return create_error_response(reason, param="model")
    return await original(self, request, raw_request)


def _sampling(original: Original, self: Any, max_tokens: int, defaults: dict[str, Any]) -> Any:
    entry = _entry(self.model)
    if entry is not None and entry.manners.sampling is not None:
        config = _registry.models.model_config  # pyright: ignore[reportOptionalMemberAccess]
        # With `--generation-config vllm` no model's own defaults count.
        if config.generation_config == "auto":
            kept = {name: value for name, value in defaults.items() if name not in SAMPLING}
            given = config.override_generation_config.items()
            defaults = kept | entry.manners.sampling | {n: v for n, v in given if n in SAMPLING}
    return original(self, max_tokens, defaults)
