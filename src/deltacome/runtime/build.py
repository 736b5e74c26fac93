"""Puts the base's weights into a model of the tuned class, for fine-tunes that change the class.

A vision-language model that was made from a text model has that model's weights under other names, and
more of its own. `attach` changes weights, not code, so it needs a model of the tuned class to run on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltacome.arch.checkpoint import Checkpoint
from deltacome.device import pick_dtype
from deltacome.errors import ArtifactError, MismatchError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.format.manifest import Record
from deltacome.format.tensors import DTYPES
from deltacome.skeleton import check_names, make_skeleton, parse_config, set_part, targets


def base_for(
    base: str | Path, artifact: Artifact | str | Path, *, dtype: str | torch.dtype | None = None
) -> PreTrainedModel:
    """A model of the tuned class with the base's weights, ready for `attach`.

    What the base lacks (a projector, a tower) already has its tuned values, as the artifact stores them.

    Args:
        base: the base's folder, or its repository on the Hub.
        artifact: opened, or its folder or name on the Hub.
        dtype: dtype of the weights, torch's or its name; by default the tuned model's.

    Raises:
        CheckpointError: transformers does not know the tuned model, or the base cannot be read.
        MismatchError: the base lacks a tensor that the delta was taken against.
        ArtifactError: the artifact cannot be read, or carries no configuration.
    """
    named = None if dtype is None else pick_dtype(dtype)
    artifact = opened(artifact)
    document = artifact.json_file(TUNED_CONFIG_FILE)
    if document is None:
        raise ArtifactError(f"{artifact.path}: expected {TUNED_CONFIG_FILE}, found none")
    records = artifact.manifest.records
    kind = named or DTYPES[max(records.values(), key=Record.tuned_nbytes).dtype]
    model = make_skeleton(parse_config(document), kind, artifact.path)
    where = targets(model, records)
    check_names(model, {name: record.shape for name, record in records.items()}, where)
    checkpoint = Checkpoint(base)
    there = model.state_dict(keep_vars=True)
    for name, record in records.items():
        place = there.get(where[name].parameter)
        if place is not None:
            value = _value(checkpoint, artifact, record)
            is_weight = isinstance(place, torch.nn.Parameter) and value.is_floating_point()
            set_part(model, where[name], value.to(kind) if is_weight else value)
    model.tie_weights()
    _say_rows(model)
    return model


def _value(base: Checkpoint, artifact: Artifact, record: Record) -> Tensor:
    if record.base_name is None:
        return artifact.exact(record.name).clone()
    if record.base_name not in base.tensors:
        raise MismatchError(f"{base.path}: wrong base: it has no tensor {record.base_name}")
    return base.read(record.base_name)


def _say_rows(model: PreTrainedModel) -> None:
    """Sets the sizes that embeddings and linears state to the rows that their weights have."""
    for module in model.modules():
        rows = getattr(getattr(module, "weight", None), "shape", [0])[0]
        if isinstance(module, torch.nn.Embedding):
            module.num_embeddings = rows
        elif isinstance(module, torch.nn.Linear):
            module.out_features = rows
