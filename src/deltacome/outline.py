"""What a checkpoint holds, without its weights: names, shapes and types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from deltacome.arch.checkpoint import Checkpoint, TensorInfo, json_folder
from deltacome.skeleton import first_stack, make_skeleton, read_config


@dataclass(frozen=True)
class Outline:
    """What is known about a checkpoint without its weights."""

    path: Path
    tensors: dict[str, TensorInfo]
    stacked: str | None = None
    """A tensor that a checkpoint may store as many, if there is one and only a configuration is known."""


def outline(name_or_path: str | Path) -> Outline:
    """The tensors of a checkpoint, from its weight files' headers or else from its configuration.

    From a repository on the Hub only the JSON files are fetched.

    Raises:
        CheckpointError: there is neither, or a header cannot be read.
    """
    folder = json_folder(name_or_path)
    if list(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        return Outline(folder, Checkpoint(folder).tensors)
    config = read_config(folder)
    # Read before the model is built, which writes the model's own dtype into the configuration.
    dtype = str(getattr(config, "dtype", None) or torch.bfloat16).removeprefix("torch.")
    model = make_skeleton(config, torch.float32, folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors = {name: TensorInfo(folder, shape, dtype) for name, shape in shapes.items()}
    return Outline(folder, tensors, first_stack(model))
