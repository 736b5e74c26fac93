"""First look at a pair of checkpoints: what changed, what it is, and whether it can be used at all.

One pass over both models, tensor by tensor. It costs reading both once more. In return, bad input (NaN,
another base, a huge exact part) is refused in seconds instead of after hours, and every size is known
before the first byte is written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from deltacome.arch.checkpoint import Checkpoint, check_finite, full_digest, sample_digest
from deltacome.arch.layout import Layout, find_layout
from deltacome.arch.pairing import HasTensors, Pair, pair_tensors
from deltacome.compression.run import Progress
from deltacome.errors import CheckpointError, MismatchError, UnsupportedError
from deltacome.format.manifest import Record
from deltacome.format.tensors import DTYPES, dtype_name
from deltacome.skeleton import (
    Target,
    check_names,
    ignored,
    make_skeleton,
    parameter_names,
    read_config,
    targets,
)

CHUNK = 1024
"""Rows that are compared at a time."""


class Paired(NamedTuple):
    """A tuned checkpoint in its model, tensor by tensor, and the base's beside it."""

    model: PreTrainedModel
    """Without weights."""
    layout: Layout
    where: dict[str, Target]
    """Where each tensor of the tuned checkpoint goes in the model."""
    names: dict[str, str]
    """`skeleton.parameter_names`."""
    tied: bool
    """Whether the head is the input embedding."""
    pairs: list[Pair]


def pair_models(base: HasTensors, tuned: HasTensors, dtype: torch.dtype) -> Paired:
    """Pairs the tensors of two checkpoints by their names and shapes.

    Args:
        base, tuned: the checkpoints.
        dtype: that of the model's passes (`make_skeleton`).

    Raises:
        CheckpointError: no model can be made from the tuned checkpoint's configuration.
        MismatchError: the tuned checkpoint does not fit its model, or the base is not of its kind.
        UnsupportedError: as `find_layout` and `targets`.
    """
    model = make_skeleton(read_config(tuned.path), dtype, tuned.path)
    layout, where = find_layout(model), targets(model, tuned.tensors)
    check_names(model, {name: info.shape for name, info in tuned.tensors.items()}, where)
    names = parameter_names(model, where)
    head, embedding = (names.get(name or "") for name in (layout.head, layout.embedding))
    tied = head is not None and model.get_parameter(str(layout.head)) is model.get_parameter(
        str(layout.embedding)
    )
    pairs = pair_tensors(
        *(base, tuned, layout.head if tied else head, embedding),
        ignored=lambda name: ignored(model, name),
    )
    return Paired(model, layout, where, names, tied, pairs)


def survey(
    base: Checkpoint, tuned: Checkpoint, found: Paired, report: Callable[[Progress], None]
) -> tuple[dict[str, Record], set[str]]:
    """Reads every pair once.

    Args:
        base, tuned: the checkpoints.
        found: how they are paired.
        report: called after each tensor.

    Returns:
        Records without plans (what is the same as the base, which rows will be exact), and the
        names of the matrices that are to be compressed.

    Raises:
        CheckpointError: a tensor cannot be read, holds NaN or Inf, or differs from the base's by so much
            that squares overflow.
        MismatchError: most of the changed matrices differ by more than the base's own size; or the tuned
            configuration ties what the weights hold apart.
    """
    _check_tie(tuned, found)
    records, matrices = {}, set()
    far: list[str] = []
    for done, pair in enumerate(found.pairs, 1):
        target, tuned_tensor = found.where[pair.name], tuned.read(pair.name)
        check_finite(pair.name, tuned_tensor, "tuned model")
        base_tensor, same, moved, size = None, False, 0.0, 0.0
        if pair.base_name is not None:
            base_tensor = base.read(pair.base_name)
            check_finite(pair.base_name, base_tensor, "base")
            same, moved, size = _compare(base_tensor, tuned_tensor)
        record = account(pair, dtype_name(tuned_tensor.dtype), found.layout, target, same)
        if base_tensor is not None:
            record = replace(
                record,
                base_sample=sample_digest(base_tensor),
                base_digest=full_digest(base_tensor),
            )
            if packable(record, found.layout, target) and not same:
                if not math.isfinite(moved):
                    _refuse_overflow(pair.name, base_tensor, tuned_tensor)
                matrices.add(pair.name)
                if moved > size:
                    far.append(pair.name)
        records[pair.name] = record
        report(Progress("survey", done, len(found.pairs), pair.name))
    if not matrices and all(record.kind == "same" for record in records.values()):
        warnings.warn(f"{tuned.path}: every tensor equals that of {base.path}", stacklevel=2)
    if far and len(far) > len(matrices) / 2:
        raise MismatchError(
            f"{tuned.path}: in {len(far)} of {len(matrices)} changed matrices, {far[0]} the first, "
            f"the difference to {base.path} is larger than the base itself: this is not a "
            "fine-tune of this base"
        )
    return records, matrices


def _check_tie(tuned: Checkpoint, found: Paired) -> None:
    """Refuses a head that the configuration ties to an embedding of other values.

    transformers does not tie such a head, so it runs another model than the one that is surveyed here.
    """
    if not found.tied:
        return
    head, embedding = (found.names[str(n)] for n in (found.layout.head, found.layout.embedding))
    if head != embedding and not torch.equal(tuned.read(head), tuned.read(embedding)):
        raise MismatchError(
            f"{tuned.path}: tie_word_embeddings: its configuration ties {head} to {embedding}, and its "
            "weights hold other values for the two: set it to false in config.json if the head is its own"
        )


def account(pair: Pair, dtype: str, layout: Layout, target: Target, same: bool) -> Record:
    """The record of a tensor before there are plans: which rows of it will be stored exactly.

    Args:
        pair: with the base's tensor.
        dtype: of the tuned tensor.
        layout: of the tuned model.
        target: where the tensor goes in it.
        same: whether it holds the base's values, in the rows that both have.

    Returns:
        The record, without fingerprints.

    Raises:
        UnsupportedError: an artifact has no such dtype.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"{pair.name}: expected a dtype of {', '.join(DTYPES)}, got {dtype}")
    rows = pair.shape[0] if pair.shape else 1
    record = Record(pair.name, pair.shape, dtype, pair.base_name, pair.base_shape, None, None)
    if pair.base_shape is None:
        return replace(record, exact_rows=(0, rows) if rows else None)
    compressible = packable(record, layout, target)
    common = min(rows, pair.base_shape[0]) if pair.shape else 1
    start = common if same or compressible else 0
    return replace(
        record,
        exact_rows=(start, rows) if start < rows else None,
        transposed=compressible and not same and target.parameter in layout.transposed,
    )


def packable(record: Record, layout: Layout, target: Target) -> bool:
    """Whether a tensor can have packed terms: a matrix that the base has and a layer multiplies by."""
    known = target.parameter in layout.matrices or target.expert is not None
    # Rows of a transposed matrix are inputs: additional ones are not words that were added.
    resized = record.shape != record.base_shape
    fixed = target.parameter in layout.transposed and resized
    floating = DTYPES[record.dtype].is_floating_point
    return (
        record.base_shape is not None
        and known
        and len(record.shape) == 2
        and floating
        and not fixed
    )


def _refuse_overflow(name: str, base: torch.Tensor, tuned: torch.Tensor) -> None:
    """Refuses a delta that no method can work with: one damaged bit of an exponent makes one.

    Raises:
        CheckpointError: names the tensor and the largest difference.
    """
    rows = min(len(base), len(tuned))
    largest = float((tuned[:rows].float() - base[:rows].float()).abs().max())
    raise CheckpointError(
        f"{name}: expected a difference to the base whose squares fit float32, got one of up to "
        f"{largest:g}: is a checkpoint damaged?"
    )


def _compare(base: torch.Tensor, tuned: torch.Tensor) -> tuple[bool, float, float]:
    """Whether the common rows hold the same numbers; ‖tuned − base‖² and ‖base‖² over them.

    A base of a wider dtype that merely rounds to the tuned value is not the same. Rows are taken by the
    thousand: three copies of an embedding in float32 would be the memory peak of the whole run.
    """
    if not base.ndim:
        return bool(base.double() == tuned.double()), 0.0, 0.0
    same, moved, size = True, 0.0, 0.0
    rows = min(len(base), len(tuned))
    for before, after in zip(base[:rows].split(CHUNK), tuned[:rows].split(CHUNK), strict=True):
        if same and before.dtype == after.dtype and before.dtype.itemsize > 1:
            same = torch.equal(before, after)
        elif same:
            same = torch.equal(before.double(), after.double())
        if before.is_floating_point():
            size += float(before.float().square().sum(dtype=torch.float64))
            moved += float((after.float() - before.float()).square().sum(dtype=torch.float64))
    return same, moved, size
