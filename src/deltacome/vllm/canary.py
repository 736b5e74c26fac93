"""Asks a tenant that was just loaded its canary, as one more request of the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.sampling_params import RequestOutputKind

from deltacome.errors import MismatchError
from deltacome.format.canary import Canary
from deltacome.vllm import compat
from deltacome.vllm.request import artifact_path


async def check_canary(
    generate: Callable[..., Any], request: Any, tolerance: float | None
) -> float | None:
    """Compares what the engine computes for a tenant with what was recorded when it was made.

    Args:
        generate: the engine's.
        request: of the tenant, which the workers hold.
        tolerance: in nats; None: nothing is asked.

    Returns:
        The distance, or None where nothing was compared.

    Raises:
        ArtifactError: the recorded file cannot be read.
        MismatchError: they differ by more than the tolerance.
    """
    folder = artifact_path(request.lora_path)
    canary = await asyncio.to_thread(Canary.read, Path(folder))
    if canary is None or tolerance is None:
        return None
    parameters = compat.SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = {"prompt_token_ids": list(canary.ids)}
    name = f"canary-{uuid.uuid4().hex}"
    (output,) = [o async for o in generate(prompt, parameters, name, lora_request=request)]
    got = [
        said[id].logprob
        for id, said in zip(canary.ids, output.prompt_logprobs, strict=True)
        if said
    ]
    distance = canary.distance(got)
    if not distance <= tolerance:
        raise MismatchError(
            f"{folder}: canary: the engine's logprobs are {distance:.3g} nats from those recorded when "
            f"the artifact was made, expected at most {tolerance:g}: this engine does not compute what "
            "the artifact says (canary in additional_config's deltacome sets the tolerance)"
        )
    return distance
