"""Workarounds for faults of vLLM on a CPU that would reach tenants.

- The kernels of ordinary adapters read slot −1, no adapter, as the last slot. So there is one slot more
  than vLLM uses, and it stays empty.
- Heads gather low-rank pairs for the rows of the batch. The logprobs of prompts are computed from other
  rows, and the engine stops. So heads are given the slots of the rows that they get.
- vLLM does not compile a model with adapters. With tenants alone it can be compiled, since their ops are
  made for it.
- With adapters, a pipeline's stage other than the first has no buffer for what the stage before it sends:
  only a warm-up makes one, and there is none. So the buffer is made when it is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from deltacome.vllm import compat
from deltacome.vllm.settings import Settings
from deltacome.vllm.step import Step


@contextlib.contextmanager
def one_more_slot(lora_config: Any) -> Iterator[None]:
    """While open, buffers are made with one more slot."""
    lora_config.max_loras += 1
    try:
        yield
    finally:
        lora_config.max_loras -= 1


def mend_heads(model: nn.Module) -> None:
    """Makes each head use the slots of the rows that it is given."""
    for module in model.modules():
        if isinstance(module, compat.LogitsProcessorWithLoRA):
            _mend(module)


def _mend(module: Any) -> None:
    with_adapters = module._get_logits

    def get_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        punica = module.punica_wrapper
        if punica.no_lora:
            return module.base_layer._get_logits(hidden_states, *args, **kwargs)
        first = Step.first_row(hidden_states)
        if first is None:
            return with_adapters(hidden_states, *args, **kwargs)
        before, rows = punica._sampler_indices, len(hidden_states)
        length = punica.indices_len[1]
        punica._sampler_indices = punica._token_lora_indices[first : first + rows]
        punica.indices_len[1] = rows
        try:
            return with_adapters(hidden_states, *args, **kwargs)
        finally:
            punica._sampler_indices, punica.indices_len[1] = before, length

    module._get_logits = get_logits


def install() -> None:
    """Lets pipeline stages make their buffers, and models with tenants alone be compiled."""
    compat.wrap(compat.GPUModelRunner, "sync_and_gather_intermediate_tensors", _with_room)
    compat.wrap(compat.CpuPlatform, "check_and_update_config", _compiled)


def _compiled(original: Callable[..., None], cls: type, vllm_config: Any) -> None:
    adapters = vllm_config.lora_config
    if not Settings.parse(vllm_config.additional_config).lora:
        vllm_config.lora_config = None
    try:
        original(cls, vllm_config)
    finally:
        vllm_config.lora_config = adapters


def _with_room(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return original(self, *args, **kwargs)
