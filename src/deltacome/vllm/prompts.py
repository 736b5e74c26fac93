"""Logprobs of prompts: the head sees a run of all tokens there, not one row for each request."""

from __future__ import annotations

from typing import Any

from deltacome.vllm import compat
from deltacome.vllm.manager import ModelManager


def install() -> None:
    """Tells the step of a tenant's head which rows it is asked for."""
    original = compat.GPUModelRunner._get_prompt_logprobs_dict
    if hasattr(original, "_deltacome"):
        return

    def with_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = getattr(self, "lora_manager", None)
        manager = getattr(worker, "_adapter_manager", None)
        if not isinstance(manager, ModelManager):
            return original(self, *args, **kwargs)
        with manager.step.prompt_logits():
            return original(self, *args, **kwargs)

    with_rows._deltacome = True  # pyright: ignore[reportFunctionMemberAccess]
    compat.GPUModelRunner._get_prompt_logprobs_dict = with_rows  # pyright: ignore
