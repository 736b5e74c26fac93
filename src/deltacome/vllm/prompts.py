"""Logprobs of prompts, for which the head sees runs of all tokens, not one row for each request.

Both model runners of vLLM compute them, each in functions of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltacome.vllm import compat
from deltacome.vllm.step import Step


def install() -> None:
    """Tells the step of a tenant's head which rows it is asked for."""
    compat.wrap(compat.GPUModelRunner, "_get_prompt_logprobs_dict", _with_rows)
    compat.wrap(compat.PromptLogprobsWorker, "compute_prompt_logprobs", _with_rows)
    compat.wrap(compat.PromptLogprobsWorker, "compute_prompt_token_id_logprobs", _with_rows)


def _with_rows(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = compat.signature(original).bind(*args, **kwargs)
    with Step.prompt_logits(call.arguments["hidden_states"]):
        return original(*args, **kwargs)
