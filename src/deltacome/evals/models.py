"""The models that are measured: dense ones, and what a delta makes of a base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from deltacome.device import pick_device, pick_dtype
from deltacome.errors import CheckpointError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.hub import split_name
from deltacome.runtime.base import Base


def load_model(
    source: str | Path, device: str | torch.device, dtype: str | torch.dtype = "auto"
) -> Any:
    """A dense model that reads text, from a folder or the Hub, ready for inference.

    A vision-language model is loaded whole, and answers questions without pictures too.

    Raises:
        DeviceError: there is no such device (`pick_device`).
        DeltaError: `dtype` is neither "auto" nor a torch dtype or its name.
        CheckpointError: transformers finds no language model there, or a weight is missing or has another
            shape.
    """
    device = pick_device(device)
    kind_of_weights = dtype if dtype == "auto" else pick_dtype(dtype)
    name, revision = split_name(source, None, CheckpointError)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        sees = _sees(config.architectures)
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        how = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        how |= {"trust_remote_code": False}  # None would prompt, and run the code on a yes
        model, found = kind.from_pretrained(name, revision=revision, dtype=kind_of_weights, **how)
    except Exception as error:  # a configuration runs through a library's code: any kind of error
        raise CheckpointError(f"{source}: expected a language model, got {error}") from error
    # transformers fills these with random numbers.
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{source}: {len(missing)} weights of {type(model).__name__} are missing, {missing[0]} first"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, got, expected = mismatched[0]
        raise CheckpointError(
            f"{source}: {key}: expected shape {tuple(expected)}, got {tuple(got)}"
        )
    return model.to(device).eval()


def check_base(base: str | Path, artifacts: Sequence[Artifact]) -> None:
    """Compares a base with what deltas were taken against, before hours are spent on it.

    A base in another format than safetensors is compared only when a delta is attached to it.

    Raises:
        MismatchError: names the delta and the tensor.
    """
    if not artifacts:
        return
    with contextlib.suppress(CheckpointError):
        known = Base(base)
        for artifact in artifacts:
            known.check(artifact)


@contextlib.contextmanager
def tuned_by(artifact: Artifact, base: str | Path, model: Any) -> Iterator[Any]:
    """The tuned model that a delta stands for, run from its packed codes.

    This is `model`, the base, with the delta attached. Where the tuned model is of another class (a
    vision-language model made from a text base), it is a model of that class instead, built from the
    base's weights and kept only while the context lasts.
    """
    from deltacome.runtime import attach, base_for

    named: Any = (artifact.json_file(TUNED_CONFIG_FILE) or {}).get("architectures")
    if _sees(named) and named[0] != type(model).__name__:
        dense: Any = base_for(base, artifact, dtype=model.dtype)
        model = dense.to(model.device).eval()
    with attach(model, artifact):
        yield model


def _sees(architectures: Any) -> bool:
    """Whether a configuration's `architectures`, which may be anything, name a vision-language model."""
    named = architectures[:1] if isinstance(architectures, list) else []
    return any(name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for name in named)
