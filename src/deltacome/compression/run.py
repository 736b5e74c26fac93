"""What the steps of one compression share: its state, and what each tensor is so far.

A unit holds the records and packed entries of a finished block, or of what lies outside the blocks.
Base and unit together give back a tensor as the finished artifact will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltacome.arch.checkpoint import Checkpoint
from deltacome.arch.layout import Layout
from deltacome.compression.calibration import Calibration
from deltacome.compression.capture import Stream
from deltacome.compression.sensitivity import Weights, measured
from deltacome.errors import ArtifactError
from deltacome.format.codec import Packed, read_bands, read_signs
from deltacome.format.folder import atomic, disk_errors
from deltacome.format.manifest import Record
from deltacome.format.writer import Unit
from deltacome.methods.method import Method, Terms
from deltacome.rows import Row
from deltacome.skeleton import Target, set_part


class Progress(NamedTuple):
    """Where a run is: `done` of `total` steps of a phase, and what was just finished."""

    phase: str
    """`survey`, `search`, `calibration`, `sweep`, `blocks`, `distill`, `canary` or `write`."""
    done: int
    total: int
    detail: str = ""
    error: float | None = None
    """Mean relative error of the matrices so far."""


@dataclass
class Run:
    """What the steps of one compression share."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout
    model: torch.nn.Module
    where: dict[str, Target]
    """Where each tensor of the tuned checkpoint goes in the model."""
    names: dict[str, str]
    """Any name of a parameter → the stored tensor that holds all of it."""
    tied: bool
    """Whether the head is the input embedding."""
    records: dict[str, Record]
    plans: dict[str, Terms]
    method: Method
    calibration: Calibration
    device: str
    dtype: torch.dtype
    report: Callable[[Progress], None]
    errors: list[float] = field(default_factory=list)
    weights: Path | None = None
    """Folder that `sensitivity.keep` wrote, where the method asked for it."""


def stream_of(run: Run, rows: list[Row], **options: int) -> Stream:
    """A stream of rows at the first block of the model, which still has the tuned embedding."""
    return Stream(
        *(run.model, run.layout, lambda name: run.tuned.read(run.names[name]), rows),
        device=run.device,
        dtype=run.dtype,
        **options,
    )


def measured_weights(run: Run, name: str) -> Weights | None:
    """What a sweep measured of a matrix, or None where the method asked for none."""
    if run.weights is None:
        return None
    inputs, outputs = measured(run.weights, name)
    if outputs.ndim == 1:  # of more rows than the base has, where a vocabulary grew
        outputs = outputs[: run.records[name].bands_shape[0]]
    return Weights(inputs.to(run.device), outputs.to(run.device))


def load_block(run: Run, block: str, unit: Unit) -> None:
    """Loads a block's weights as compressed so far: base + terms, or the tuned value itself."""
    records = {record.name: record for record in unit.records}
    put_tensors(run, block, records, lambda name: restored(run, records[name], unit.entries))


def put_tensors(run: Run, block: str, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Loads those of some stored tensors that belong to a block, weights in the dtype of the passes.

    Saved buffers too, but unconverted: a router's correction decides which experts a token goes to.
    """
    there = run.layout.blocks[block].state_dict(prefix=f"{block}.", keep_vars=True)
    for name in names:
        target = run.where[name]
        if target.parameter not in there:
            continue  # another block's, or a table that old checkpoints store and the model computes
        value = read(name).to(run.device)
        is_weight = isinstance(there[target.parameter], nn.Parameter)
        set_part(run.model, target, value.to(run.dtype) if is_weight else value)


def restored(run: Run, record: Record, entries: dict[str, Tensor]) -> Tensor:
    """What the artifact gives back for a tensor of a block, float32 or the tuned dtype.

    A matrix that is not compressed yet has no terms in its record, so it is the base's.
    """
    if record.name not in run.plans:
        return run.tuned.read(record.name)
    assert record.base_name is not None
    base, delta = run.base.read(record.base_name).float(), stored_delta(record, entries)
    return base + delta.T if record.transposed else base[: len(delta)] + delta


def delta_of(run: Run, name: str) -> Tensor:
    """tuned − base in float32, over the rows that both have."""
    record = run.records[name]
    assert record.base_name is not None
    assert record.base_shape is not None
    rows = min(record.shape[0], record.base_shape[0])
    tuned = run.tuned.read(name)[:rows].to(run.device, torch.float32)
    delta = tuned - run.base.read(record.base_name)[:rows].to(run.device, torch.float32)
    return delta.T.contiguous() if record.transposed else delta


def stored_delta(record: Record, entries: dict[str, Tensor]) -> Tensor:
    """The delta that stored terms stand for, float32 (out, in)."""
    return (
        stored_terms(record, entries).dense() if record.packed else torch.zeros(record.bands_shape)
    )


def stored_terms(record: Record, entries: dict[str, Tensor]) -> Packed:
    """The terms of a matrix as its entries hold them."""
    shape, bands, signs = record.bands_shape, (), None
    if record.plan:
        bands = read_bands(entries[f"{record.name}.bands"], shape, record.plan)
    if record.sign_scales:
        signs = read_signs(entries[f"{record.name}.signs"], shape, record.sign_scales)
    return Packed(bands, signs)


def made_once(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that an interrupted run has made, or else makes them now and keeps them beside the units.

    Raises:
        ArtifactError: what is kept cannot be read.
    """
    if not file.exists():
        tensors = make()
        with disk_errors(file), atomic(file) as temporary:
            save_file(tensors, temporary)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file}: cannot be read: {error}; remove the folder to start anew"
        ) from error
