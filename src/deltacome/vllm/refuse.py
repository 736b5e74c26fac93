"""Refuses, at the start, models and options of vLLM with which tenants would get wrong tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from vllm import envs

from deltacome.errors import UnsupportedError
from deltacome.vllm.places import Place

NORM_BEHIND = ("MiMoForCausalLM", "Step3p5ForCausalLM")
"""Architectures whose `compute_logits` has a norm before the head."""
EMBEDS_AHEAD = ("Molmo2ForConditionalGeneration",)
"""Architectures that embed text while they encode images."""


def refuse_options(vllm_config: Any) -> None:
    """Refuses models and options with which rows or bytes of tenants are not where they are expected.

    Raises:
        UnsupportedError: names the model or the option, and the way out.
    """
    models = _models(vllm_config.model_config)
    for why in chain(models, _inputs(vllm_config), _options(vllm_config)):
        raise UnsupportedError(why)


def refuse_any_name() -> None:
    """Refuses to serve tenants where the base answers for every name that is not loaded.

    Raises:
        UnsupportedError: names the variable.
    """
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise UnsupportedError(
            "VLLM_SKIP_MODEL_NAME_VALIDATION: the base would answer in the place of tenants that are "
            "unloaded or not found yet: expected it unset"
        )


def _models(config: Any) -> Iterator[str]:
    """Why a model is refused."""
    name = config.architecture
    if config.using_transformers_backend():
        yield (
            f"--model-impl: {name}: on vLLM's Transformers backend tokens lie along another axis, so all "
            "would get the norms of the first one's tenant: expected a model of vLLM's own"
        )
    if name in NORM_BEHIND:
        yield (
            f"{name}: vLLM takes its last norm of the sampled rows alone, which would get the norms of "
            "other rows' tenants: expected another architecture"
        )
    if name in EMBEDS_AHEAD:
        yield (
            f"{name}: embeds text while it encodes images, and the text would get the embeddings of "
            "whichever tenants are in the step: expected another architecture"
        )
    if config.is_encoder_decoder:
        yield (
            f"{name}: the rows of an encoder are not the tokens of a step, and would be taken for other "
            "tenants' rows: expected a model without one"
        )
    if _head_from_tokens(config):
        yield (
            "classifier_from_token: the classifier's head is made of the base's head when the engine "
            "starts, and would be the base's for all tenants: expected a checkpoint with a head of its "
            "own"
        )


def _inputs(vllm_config: Any) -> Iterator[str]:
    """Why a way to make the model's inputs is refused."""
    config = vllm_config.model_config
    if vllm_config.lora_config.enable_tower_connector_lora:
        yield (
            "--enable-tower-connector-lora: does not work with tenants, whose images the base's towers "
            "encode: start without it, or set VLLM_PLUGINS without deltacome"
        )
    if config.multimodal_config and config.multimodal_config.is_multimodal_pruning_enabled():
        yield (
            "--video-pruning-rate: text is embedded while a video is encoded, and would get the "
            "embeddings of whichever tenants are in the step: expected it off"
        )
    if config.enable_prompt_embeds and not vllm_config.use_v2_model_runner:
        yield (
            "--enable-prompt-embeds: vLLM's V1 model runner looks up only the rows that are not "
            "embeddings yet, which would be taken for the step's first rows: expected it off, or "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _options(vllm_config: Any) -> Iterator[str]:
    """Why a way to run the model is refused."""
    parallel = vllm_config.parallel_config
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield (
            "--kv-sharing-fast-prefill: layers that share another's cache get only the sampled rows, "
            "which would be taken for the step's first rows: expected it off"
        )
    if parallel.use_ubatching:
        yield (
            "--enable-dbo, --ubatch-size: the second part of a batch would get the tenants of the first: "
            "expected them off"
        )
    if vllm_config.model_config.enable_sleep_mode:
        yield (
            "--enable-sleep-mode: level 2 throws away what tenants have on the GPU along with the "
            "weights, and the weights that replace them may be another base: expected it off"
        )
    if vllm_config.speculative_config is not None and vllm_config.use_v2_model_runner:
        yield (
            "--speculative-config: vLLM's V2 model runner does not say whose rows the head gets for "
            "drafted tokens: expected none, or VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if parallel.enable_batch_sharded_sampling:
        yield (
            "--enable-batch-sharded-sampling: gives the head its rows in another order: expected it off"
        )


def _head_from_tokens(model_config: Any) -> bool:
    """Whether vLLM makes a classifier's head of some rows of the head (`as_seq_cls_model`)."""
    if model_config.runner_type != "pooling":
        return False
    configs = (model_config.hf_config, model_config.hf_config.get_text_config())
    names = ("classifier_from_token", "method")
    return any(getattr(config, name, None) is not None for config in configs for name in names)


def refuse_heads(model_config: Any, places: Sequence[Place]) -> None:
    """Refuses a head that computes in another dtype than the model, which bypasses its hook.

    Raises:
        UnsupportedError: names the head and both dtypes.
    """
    for place in places:
        if place.kind == "head" and model_config.head_dtype != model_config.dtype:
            raise UnsupportedError(
                f"{place.name}: head_dtype: expected the model's, {model_config.dtype}, got "
                f"{model_config.head_dtype}: in another dtype tenants' heads would be the base's"
            )


def refuse_impl(impl: str, device: torch.device, model_config: Any) -> None:
    """Refuses to capture graphs of ops that wait for the GPU, before torch does in other words.

    Raises:
        UnsupportedError: says what to set.
    """
    if impl == "reference" and device.type == "cuda" and not model_config.enforce_eager:
        raise UnsupportedError(
            f"{device}: impl: expected 'triton', which needs Triton and an NVIDIA GPU of compute "
            "capability 8.0 or newer, got 'reference', which cannot be captured in graphs: set "
            "--enforce-eager"
        )
