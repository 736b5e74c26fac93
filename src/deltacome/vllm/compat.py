"""Everything in vLLM that is not its public interface, in one place, checked when the plugin starts.

A plugin that hooks into an engine breaks when the engine changes, and the worst way to break is to
serve the base under a tenant's name. So a version outside the tested range is refused, and so is one
whose functions have other parameters than those that the hooks were written for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.scoring.io_processor import ScoringIOProcessor
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import process_packed_modules_mapping
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms.cpu import CpuPlatform
from vllm.renderers.hf import AssistantTracker
from vllm.renderers.hf import _iter_nodes_assign_var_or_elems as assigned_from
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.kv_offload.cpu.host_register import host_register, host_unregister
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_STOP_TOKEN_IDS
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from deltacome.errors import UnsupportedError
from deltacome.vllm.version import check_version, version

__all__ = [
    "MAX_NUM_STOP_TOKEN_IDS",
    "AssistantTracker",
    "AuthenticationMiddleware",
    "BaseServing",
    "ColumnParallelLinear",
    "CpuPlatform",
    "GPUModelRunner",
    "GemmaRMSNorm",
    "LRUCacheLoRAModelManager",
    "LRUCacheWorkerLoRAManager",
    "LayerNorm",
    "LinearBase",
    "LoRAMapping",
    "LoRAMappingType",
    "LoRAModel",
    "LoRAModelManager",
    "LoRARequest",
    "LoadLoRAAdapterRequest",
    "LogitsProcessorWithLoRA",
    "MergedColumnParallelLinear",
    "OnlineRenderer",
    "OpenAIServingModels",
    "PPMissingLayer",
    "ParallelLMHead",
    "Pooler",
    "PoolingBaseServing",
    "PrometheusStatLogger",
    "PromptLogprobsWorker",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RetryableRequestError",
    "RowParallelLinear",
    "SamplingParams",
    "ScoringIOProcessor",
    "ServingStructuredDecisions",
    "VLLMValidationError",
    "VocabParallelEmbedding",
    "assigned_from",
    "host_register",
    "host_unregister",
    "lora_model_runner_mixin",
]

REQUESTS = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
BYPASSING = {
    MoERunner: "experts",
    MLAAttention: "latent attention, which multiplies by products of its matrices",
    MambaBase: "state-space and convolution layers, whose kernels read the weights themselves",
}
"""Layers whose matrices are used elsewhere than where linears are hooked, and why."""
NORMS = (RMSNorm, GemmaRMSNorm, LayerNorm)

SIGNATURES: dict[Any, tuple[str, ...]] = {
    LRUCacheWorkerLoRAManager.__init__: (
        "self",
        "vllm_config",
        "device",
        "embedding_modules",
        "...",
    ),
    LRUCacheWorkerLoRAManager._load_adapter: ("self", "lora_request"),
    LRUCacheWorkerLoRAManager.add_adapter: ("self", "lora_request"),
    LRUCacheWorkerLoRAManager.remove_adapter: ("self", "adapter_id"),
    LRUCacheLoRAModelManager._create_lora_modules: ("self",),
    LRUCacheLoRAModelManager.activate_adapter: ("self", "lora_id"),
    LRUCacheLoRAModelManager._add_adapter: ("self", "lora"),
    LRUCacheLoRAModelManager._set_adapter_mapping: ("self", "mapping"),
    LRUCacheLoRAModelManager._create_merged_loras_inplace: ("self", "lora_model"),
    LRUCacheLoRAModelManager.list_adapters: ("self",),
    GPUModelRunner._get_prompt_logprobs_dict: ("self", "hidden_states", "..."),
    GPUModelRunner.sync_and_gather_intermediate_tensors: ("self", "num_tokens", "..."),
    CpuPlatform.check_and_update_config.__func__: ("cls", "vllm_config"),
    VocabParallelEmbedding.forward: ("self", "input_"),
    RMSNorm.forward_native: ("self", "x", "residual"),
    GemmaRMSNorm.forward_native: ("self", "x", "residual"),
    LogitsProcessorWithLoRA._get_logits: (
        *("self", "hidden_states", "lm_head", "embedding_bias", "skip_gather"),
    ),
    OpenAIServingModels.load_lora_adapter: ("self", "request", "base_model_name"),
    OpenAIServingModels.unload_lora_adapter: ("self", "request"),
    OpenAIServingModels.resolve_lora: ("self", "lora_name"),
    OpenAIServingModels._check_load_lora_adapter_request: ("self", "request"),
    OpenAIServingModels._check_unload_lora_adapter_request: ("self", "request"),
    BaseServing._get_active_default_mm_loras: ("self", "request"),
    PoolingBaseServing._preprocessing: ("self", "io_processor", "ctx"),
    ServingStructuredDecisions.create_decision: ("self", "request", "raw_request"),
    AuthenticationMiddleware.__call__: ("self", "scope", "receive", "send"),
    AuthenticationMiddleware.verify_token: ("self", "headers"),
    assigned_from: ("root", "varname"),
    PrometheusStatLogger.record: ("self", "scheduler_stats", "..."),
    OnlineRenderer.preprocess_chat: (
        *("self", "request", "messages", "default_template", "default_template_content_format"),
        *("default_template_kwargs", "..."),
    ),
    SamplingParams.update_from_generation_config: ("self", "generation_config", "eos_token_id"),
    AsyncLLM.generate: ("self", "prompt", "sampling_params", "request_id", "..."),
    AsyncLLM.encode: ("self", "prompt", "pooling_params", "request_id", "lora_request", "..."),
    AsyncMPClient.call_utility_all_async: ("self", "method", "args"),
    host_register: ("ptr", "num_bytes"),
    host_unregister: ("ptr",),
    EngineCore.collective_rpc: ("self", "method", "timeout", "args", "kwargs"),
    PromptLogprobsWorker.compute_prompt_logprobs: ("self", "logits_fn", "hidden_states", "..."),
    PromptLogprobsWorker.compute_prompt_token_id_logprobs: (
        *("self", "logits_fn", "hidden_states", "..."),
    ),
    **{r.to_sampling_params: ("self", "...") for r in REQUESTS},
}
"""Functions that hooks replace or call, and their parameters; `...` stands for any further ones."""


def check() -> None:
    """Refuses a vLLM that the hooks were not written for.

    Raises:
        UnsupportedError: names the version or the function, what was expected and what was got.
    """
    check_version()
    for function, expected in SIGNATURES.items():
        got = tuple(inspect.signature(function).parameters)
        wanted = expected[:-1] if expected[-1] == "..." else expected
        if got[: len(wanted)] != wanted or (expected[-1] != "..." and got != wanted):
            raise UnsupportedError(
                f"vLLM {version()}: {function.__qualname__}: expected parameters {expected}, got {got}"
            )


def packed_modules(model: nn.Module) -> dict[str, list[str]]:
    """Names of fused modules → names of the checkpoint's tensors that they contain."""
    return process_packed_modules_mapping(model)  # pyright: ignore[reportArgumentType]


def renamer(model: nn.Module) -> Any:
    """A function from the name of a tensor in the checkpoint to vLLM's name for it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    mapper = mapper.get_rename_mapper()
    return lambda name: mapper._map_name(name)


def ties_head(config: Any) -> bool:
    """Whether the head of a model of this configuration uses the embedding's weight."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "tie_word_embeddings", False))


def tensor_parallel(module: nn.Module) -> tuple[int, int]:
    """(rank, size) of the group that shards a module."""
    rank, size = getattr(module, "tp_rank", None), getattr(module, "tp_size", None)
    if rank is None or size is None:
        return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return rank, size


def encoders(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the modules that encode anything but text, as a multimodal model declares them."""
    # Some models have the marks, some the mapping, and the marks name the last tower only.
    marked: list[str] = getattr(model, "_tower_model_names", [])
    prefixes = [f"{name}." for name in marked]
    if hasattr(model, "get_mm_mapping"):
        mapping: Any = model.get_mm_mapping()  # pyright: ignore[reportCallIssue]
        prefixes += [*mapping.tower_model, *mapping.connector, *mapping.generator]
    return tuple(prefixes)


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Routes calls of a class's method to a wrapper, which gets the method before their arguments.

    A method that was wrapped before is left as it is.
    """
    held = inspect.getattr_static(owner, name)
    original = held.__func__ if isinstance(held, classmethod) else held
    if hasattr(original, "_deltacome"):
        return

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    @functools.wraps(original)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await wrapper(original, *args, **kwargs)

    wrapped = awaited if inspect.iscoroutinefunction(original) else called
    wrapped._deltacome = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(owner, name, classmethod(wrapped) if isinstance(held, classmethod) else wrapped)


signature = functools.cache(inspect.signature)
"""The signature of a wrapped method, computed once, since that takes longer than a call."""


async def ask_workers(engine: Any, method: str, *args: Any) -> list[Any]:
    """The answers of all engines' workers; `collective_rpc` alone returns only the first engine's."""
    core = engine.engine_core
    answers = await core.call_utility_all_async("collective_rpc", method, None, args, None)
    return [answer for of_engine in answers for answer in of_engine]


def api_servers(vllm_config: Any) -> int:
    """How many API servers these engines have."""
    return vllm_config.parallel_config._api_process_count
