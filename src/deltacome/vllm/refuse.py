"""What vLLM can be told with which tenants would get other tokens than theirs: refused at the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltacome.errors import UnsupportedError
from deltacome.vllm.places import Place

NORM_BEHIND = ("MiMoForCausalLM", "Step3p5ForCausalLM")
"""Whose `compute_logits` has a norm before the head."""


def refuse_options(vllm_config: Any) -> None:
    """Refuses options under which rows or bytes of tenants are not where they are looked for.

    Raises:
        UnsupportedError: names the option, and the way out.
    """
    model_config = vllm_config.model_config
    if model_config.using_transformers_backend():
        raise UnsupportedError(
            f"--model-impl: {model_config.architecture}: on vLLM's Transformers backend tokens lie along "
            "another axis, and tenants' norms would be the first one's: expected a model of vLLM's own"
        )
    if model_config.architecture in NORM_BEHIND:
        raise UnsupportedError(
            f"{model_config.architecture}: vLLM takes its last norm of the rows that are sampled, where "
            "tenants' norms would be those of other rows: expected another architecture"
        )
    if _head_from_tokens(model_config):
        raise UnsupportedError(
            "classifier_from_token: a head of scores that is made of the base's head when the engine "
            "starts would be the base's for all tenants: expected a checkpoint with a head of its own"
        )
    if vllm_config.lora_config.enable_tower_connector_lora:
        raise UnsupportedError(
            "--enable-tower-connector-lora: not beside tenants, whose images are encoded by the base's "
            "towers: start without it, or set VLLM_PLUGINS without deltacome"
        )
    if model_config.enable_sleep_mode:
        raise UnsupportedError(
            "--enable-sleep-mode: at level 2 what tenants have on the GPU is thrown away with the "
            "weights, and weights that come instead may be another base: expected it off"
        )
    if vllm_config.speculative_config is not None and vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "--speculative-config: vLLM's V2 model runner does not say whose the rows are that the head "
            "gets of drafted tokens: expected none, or VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise UnsupportedError(
            "--enable-batch-sharded-sampling: gives the head its rows in another order: expected it off"
        )


def _head_from_tokens(model_config: Any) -> bool:
    """Whether vLLM makes a head of scores of some rows of the head (`as_seq_cls_model`)."""
    if model_config.runner_type != "pooling":
        return False
    configs = (model_config.hf_config, model_config.hf_config.get_text_config())
    names = ("classifier_from_token", "method")
    return any(getattr(config, name, None) is not None for config in configs for name in names)


def refuse_heads(model_config: Any, places: Sequence[Place]) -> None:
    """Refuses a head that computes in another dtype than the model, which passes by where it is hooked.

    Raises:
        UnsupportedError: names the head and both dtypes.
    """
    for place in places:
        if place.kind == "head" and model_config.head_dtype != model_config.dtype:
            raise UnsupportedError(
                f"{place.name}: head_dtype: expected the model's, {model_config.dtype}, got "
                f"{model_config.head_dtype}: in another dtype tenants' heads would be the base's"
            )
