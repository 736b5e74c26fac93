"""From calibration text and a ratio to plans for all matrices.

Text and plans are kept beside the units, so that a resumed run uses what the interrupted one used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import warnings
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltacome.compression.answers import First, answers_from
from deltacome.compression.budget import make_plans
from deltacome.compression.calibration import check_tokens
from deltacome.compression.data import calibration_rows
from deltacome.compression.garble import half_garbled, special_tokens
from deltacome.compression.run import (
    Progress,
    Run,
    delta_of,
    made_once,
    measured_weights,
    put_tensors,
    stream_of,
)
from deltacome.compression.sensitivity import Weights, keep, sweep
from deltacome.errors import naming
from deltacome.format.folder import disk_errors, write_atomic
from deltacome.format.manifest import Manifest
from deltacome.format.spec import Band
from deltacome.format.writer import ArtifactWriter
from deltacome.methods.adaptive import Adaptive
from deltacome.methods.method import Matrix, Terms
from deltacome.rows import Row, seen_hash
from deltacome.skeleton import picture_token

PLANS_FILE = "plans.json"
SWEEP_TOKENS = 1024
"""Tokens of a batch, whose logits and all that is differentiated of them are held at once."""


def plan_terms(
    run: Run,
    writer: ArtifactWriter,
    manifest: Manifest,
    ratio: float | None,
    sweep_folder: Path | None,
) -> dict[str, Terms]:
    """Plans, kept beside the units: a resumed run need not measure again what they were made from."""
    file = writer.partial / PLANS_FILE
    method = run.method
    if isinstance(method, Adaptive) and not file.exists():
        _check_least(run, manifest, ratio)
    if isinstance(method, Adaptive) and (rows := kept_rows(run, writer)) is not None:
        first, spared = answers_from(run.tuned.path), special_tokens(run.tuned.path)
        # Another seed than the last step's, which should not only see what the sweep saw.
        rows = half_garbled(rows, first, spared, run.calibration.seed + 1)
        if sweep_folder:  # other machines write other rows, and a file only names its pictures
            sweep_folder = sweep_folder.with_name(f"{sweep_folder.name}-{_rows_hash(rows)}")
        run.weights = sweep_folder or writer.partial / "sweep"
        if not run.weights.exists():
            for killed in writer.partial.glob("sweep.*"):  # of this run, and as large as a model
                shutil.rmtree(killed)
            _sweep(run, method, run.weights, rows, first)
    if not file.exists():

        def matrix(name: str) -> Matrix:
            shape, spectrum = run.records[name].bands_shape, None
            if isinstance(method, Adaptive) and (weights := measured_weights(run, name)):
                with naming([name]):
                    spectrum = method.spectrum(delta_of(run, name), *weights).cpu()
            return Matrix(shape, lambda: delta_of(run, name), spectrum)

        plans = make_plans(manifest, run.method, {n: matrix(n) for n in run.plans}, ratio)
        with disk_errors(file):
            write_atomic(file, json.dumps({name: astuple(terms) for name, terms in plans.items()}))
    return {
        name: Terms(tuple(Band(*band) for band in bands), scales)
        for name, (bands, scales) in json.loads(file.read_text()).items()
    }


def _check_least(run: Run, manifest: Manifest, ratio: float | None) -> None:
    """Refuses a ratio that no plans meet, before text is written and a sweep is run for it.

    Raises:
        PlanError: as `make_plans`.
    """
    worthless = torch.zeros(1)  # what is worth nothing is not stored
    least = {
        name: Matrix(run.records[name].bands_shape, partial(delta_of, run, name), worthless)
        for name in run.plans
    }
    make_plans(manifest, run.method, least, ratio)


def _sweep(run: Run, method: Adaptive, folder: Path, rows: list[Row], first: First) -> None:
    """Measures what an error in each matrix costs, by a sweep through the tuned model.

    Raises:
        UnsupportedError: a matrix that the sweep does not reach (experts, a vision tower).
    """
    steps, total = itertools.count(1), 2 * len(run.layout.blocks)

    weights = sweep(
        stream_of(run, rows, batch_tokens=SWEEP_TOKENS),
        lambda block: put_tensors(run, block, run.where, run.tuned.read),
        seed=run.calibration.seed,
        diagonal=method.diagonal,
        tied=run.tied,
        first=first,
        on_step=lambda: run.report(Progress("sweep", next(steps), total)),
    )
    with disk_errors(folder):
        keep(folder, (_by_tensor(run, found) for found in weights), run.plans)


def _by_tensor(run: Run, found: dict[str, Weights]) -> dict[str, Weights]:
    """What a sweep found, by stored tensor; also for a tied head, which some models store again."""
    by = {run.names[name]: weights for name, weights in found.items()}
    if run.tied and (weights := found.get(str(run.layout.embedding))):
        by[run.names[str(run.layout.head)]] = weights
    return by


def kept_rows(run: Run, writer: ArtifactWriter) -> list[Row] | None:
    """Calibration rows, kept beside the units so that a resumed run has the same; None without text."""
    if run.calibration.source == "none":
        return None

    def make() -> dict[str, Tensor]:
        kept = {}
        for i, row in enumerate(_draw_rows(run)):
            kept[f"{i:06}"] = torch.tensor(row.ids)
            kept |= {f"{i:06}.{name}": value.contiguous() for name, value in row.seen.items()}
        return kept

    kept = made_once(writer.partial / "calibration.safetensors", make)
    seen: dict[str, dict[str, Tensor]] = {}
    for name, value in kept.items():
        row, _, of = name.partition(".")
        seen.setdefault(row, {})[of] = value
    return [Row(inputs.pop("").tolist(), inputs) for _, inputs in sorted(seen.items())]


def _draw_rows(run: Run) -> list[Row]:
    """Calibration rows; warns of what they lack.

    Raises:
        CalibrationError: as `calibration_rows`, or a token has no row in the embedding.
    """
    asked, source = run.calibration, run.calibration.source
    rows = calibration_rows(
        asked,
        run.tuned.path,
        device=run.device,
        on_step=lambda done, total: run.report(Progress("calibration", done, total)),
    )
    embedding = run.names[str(run.layout.embedding)]
    check_tokens(source, (row.ids for row in rows), run.records[embedding].shape[0])
    if len(rows) < asked.samples:
        warnings.warn(
            f"calibration {source}: it gives {len(rows)} of {asked.samples} rows", stacklevel=2
        )
    if source == "self" and isinstance(run.method, Adaptive):
        warnings.warn(
            "calibration self: adaptive keeps what its text shows, and text that the tuned model wrote "
            "itself shows little: give prompts of its task, which it answers itself, or use delta-come",
            stacklevel=2,
        )
    if picture_token(run.model) is not None and not any(row.seen for row in rows):
        warnings.warn(
            f"calibration {source}: {type(run.model).__name__} takes pictures, and none of "
            f"{len(rows)} rows has one: what it needs for those is not measured",
            stacklevel=2,
        )
    return rows


def _rows_hash(rows: list[Row]) -> str:
    content = f"{[row.ids for row in rows]} {seen_hash(rows)}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
