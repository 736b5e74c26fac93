"""After the blocks: the scalars of all terms, fitted with the whole model at once (`distill`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltacome.compression.answers import answers_from
from deltacome.compression.distill import Trained, distill, divergence, squared_distance
from deltacome.compression.garble import garbled, special_tokens
from deltacome.compression.run import (
    Progress,
    Run,
    delta_of,
    made_once,
    measured_weights,
    stored_delta,
    stored_terms,
)
from deltacome.errors import CheckpointError
from deltacome.format.manifest import Record
from deltacome.format.writer import ArtifactWriter, Unit
from deltacome.methods.bitdelta import BitDelta
from deltacome.numerics.gram import relative_error
from deltacome.rows import Row


def distill_terms(
    run: Run, writer: ArtifactWriter, names: list[str], rows: list[Row], steps: int
) -> None:
    """Replaces the scalars of all terms, found once, so that a run cut off while writing can resume."""
    units = {name: writer.load(name) for name in names}
    records = {r.name: r for unit in units.values() for r in unit.records if r.packed}
    if not records:
        return  # nothing was changed, or nothing is worth its bytes
    entries = {k: blob for unit in units.values() for k, blob in unit.entries.items()}
    terms = {
        run.where[name].parameter: Trained(
            stored_terms(record, entries), partial(_base_rows, run, record), record.transposed
        )
        for name, record in records.items()
    }
    rate = run.method.rate if isinstance(run.method, BitDelta) else 0.02
    if isinstance(run.method, BitDelta) and run.method.loss == "logits":
        how = {"loss": squared_distance, "rate": rate, "batch": 4}
    else:
        first = answers_from(run.tuned.path)
        spared = special_tokens(run.tuned.path)
        rows = [*rows, *garbled(rows, first, spared, run.calibration.seed)]
        how = {"loss": divergence, "rate": rate, "batch": 16, "first": first}

    twin = _tied_twin(run, records, entries)

    def found() -> dict[str, Tensor]:
        distilled = distill(
            partial(_load_whole, run),
            terms,
            rows,
            steps=steps,
            seed=run.calibration.seed,
            device=run.device,
            on_step=lambda done, total: run.report(Progress("distill", done, total)),
            **how,
        )
        return {
            f"{name}.{kind}": blob
            for name in records
            for kind, blob in distilled[run.where[twin.get(name, name)].parameter].blobs().items()
        }

    blobs = made_once(writer.partial / "distilled.safetensors", found)
    for unit_name, unit in units.items():
        changed = []
        for record in unit.records:
            if record.name in records:
                weights = measured_weights(run, record.name)
                delta_hat = stored_delta(record, blobs).to(run.device)
                error = relative_error(
                    delta_of(run, record.name), delta_hat, weights and weights.inputs
                )
                record = replace(record, error=error)
            changed.append(record)
        kept = {name: blobs.get(name, blob) for name, blob in unit.entries.items()}
        writer.save(unit_name, Unit(tuple(changed), kept))


def _tied_twin(run: Run, records: dict[str, Record], entries: dict[str, Tensor]) -> dict[str, str]:
    """A tied head that is stored nevertheless → the embedding, if both have the same terms.

    The model has one weight for both, so scalars are found for the embedding alone.
    """
    if not run.tied:
        return {}
    embedding, head = (run.names[str(name)] for name in (run.layout.embedding, run.layout.head))
    if embedding == head or not {embedding, head} <= records.keys():
        return {}
    one, other = records[embedding], records[head]
    alike = (one.plan, one.sign_scales) == (other.plan, other.sign_scales)
    for kind in ("bands", "signs"):
        blobs = (entries.get(f"{name}.{kind}", torch.empty(0)) for name in (embedding, head))
        alike = alike and torch.equal(*blobs)
    return {head: embedding} if alike else {}


def _load_whole(run: Run) -> torch.nn.Module:
    kind: Any = type(run.model)
    try:
        return kind.from_pretrained(run.tuned.path, dtype=run.dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run.tuned.path}: expected a {kind.__name__}: {error}") from error


def _base_rows(run: Run, record: Record) -> Tensor:
    """The base's rows of a matrix that its terms cover, (out, in)."""
    assert record.base_name is not None
    base = run.base.read(record.base_name)
    base_OI = base.T if record.transposed else base
    return base_OI[: record.bands_shape[0]]
