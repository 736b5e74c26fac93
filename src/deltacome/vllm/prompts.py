"""Logprobs of prompts: the head sees runs of all tokens there, not one row for each request.

Both model runners of vLLM compute them, each in functions of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from deltacome.vllm import compat
from deltacome.vllm.step import Step


def install() -> None:
    """Tells the step of a tenant's head which rows it is asked for."""
    for owner, name in (
        (compat.GPUModelRunner, "_get_prompt_logprobs_dict"),
        (compat.PromptLogprobsWorker, "compute_prompt_logprobs"),
        (compat.PromptLogprobsWorker, "compute_prompt_token_id_logprobs"),
    ):
        original = getattr(owner, name)
        if not hasattr(original, "_deltacome"):
            setattr(owner, name, _with_rows(original))


def _with_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def with_rows(*args: Any, **kwargs: Any) -> Any:
        hidden_states = signature.bind(*args, **kwargs).arguments["hidden_states"]
        with Step.prompt_logits(hidden_states):
            return original(*args, **kwargs)

    with_rows._deltacome = True  # pyright: ignore[reportAttributeAccessIssue]
    return with_rows
