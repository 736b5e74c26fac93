"""What vLLM can be told with which tenants would get other tokens than theirs: refused at the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltacome.errors import UnsupportedError
from deltacome.vllm.places import Place


def refuse_options(vllm_config: Any) -> None:
    """Refuses options under which rows or bytes of tenants are not where they are looked for.

    Raises:
        UnsupportedError: names the option, and the way out.
    """
    if vllm_config.lora_config.enable_tower_connector_lora:
        raise UnsupportedError(
            "--enable-tower-connector-lora: not beside tenants, whose images are encoded by the base's "
            "towers: start without it, or set VLLM_PLUGINS without deltacome"
        )
    if vllm_config.model_config.enable_sleep_mode:
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
