"""Checks the canary of a tenant that was just loaded, with one more request to the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import RequestOutputKind

from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.canary import CANARY_FILE, MAX_NBYTES, Canary
from deltacome.vllm import compat, metrics


def tolerance(wanted: float | None, model_config: Any) -> float | None:
    """The tolerance for `check_canary`; None where an engine computes no logprobs at all.

    Raises:
        UnsupportedError: where others are asked for, the engine gives logits.
    """
    if model_config.runner_type == "pooling":
        metrics.logger.info("No canary is compared: an engine of embeddings has no logprobs")
        return None
    if wanted is not None and "logits" in model_config.logprobs_mode:
        raise UnsupportedError(
            f"--logprobs-mode: a canary needs logprobs, got {model_config.logprobs_mode}: serve without "
            "canaries, with canary null in additional_config's deltacome"
        )
    return wanted


async def check_canary(
    generate: Callable[..., Any],
    artifact: Artifact,
    request: Any,
    tolerance: float | None,
    vocabulary: int,
) -> float | None:
    """Compares what the engine computes for a tenant with what was recorded when its artifact was made.

    Args:
        generate: the engine's method.
        artifact: the artifact whose canary is checked.
        request: the engine's LoRA request for its tenant, which the workers hold already.
        tolerance: in nats; None: nothing is checked.
        vocabulary: number of tokens of the engine's model.

    Returns:
        The distance, or None where nothing was compared.

    Raises:
        ArtifactError: the recorded file cannot be read, or has tokens that the model lacks.
        MismatchError: the distance is above the tolerance.
    """
    content = await asyncio.to_thread(artifact.file, CANARY_FILE, MAX_NBYTES)
    if content is None or tolerance is None:
        return None
    canary = Canary.from_json(content)
    if max(canary.ids) >= vocabulary:
        raise ArtifactError(
            f"{artifact.path}: {CANARY_FILE}: expected ids below {vocabulary}, got {max(canary.ids)}"
        )
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
            f"{artifact.path}: canary: the engine's logprobs are {distance:.3g} nats from those "
            f"recorded, expected at most {tolerance:g}: it does not compute what the artifact was "
            "made to compute (canary in additional_config's deltacome sets the tolerance)"
        )
    return distance
