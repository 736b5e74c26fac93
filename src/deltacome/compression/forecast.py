"""What a compression will need and produce, before anything runs.

Sizes follow from shapes to the byte, as they do in the run itself. Shapes come from the headers of
weight files, or from a configuration alone: of a repository on the Hub only JSON files are fetched.
Whether a tensor equals the base's is not known without reading both; here every tensor counts as changed.

Memory is the sum of what is alive at once, checked by `benchmarks/scale.py`. Time is that of a probe, one
matrix of a few thousand rows compressed now, on this machine and under its load, scaled by the arithmetic
of each shape. How far off it was has been measured too (`docs/results/scale.md`): a factor of about two.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from deltacome.arch.checkpoint import check_dense, check_finite, full_digest
from deltacome.arch.layout import Layout
from deltacome.compression.budget import make_plans, total_nbytes
from deltacome.compression.calibration import check_length, check_source
from deltacome.compression.survey import account, packable, pair_models
from deltacome.errors import CheckpointError, PlanError
from deltacome.format.manifest import Manifest, Record
from deltacome.format.tensors import DTYPES
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.method import Matrix
from deltacome.numerics.gram import relative_error
from deltacome.outline import outline
from deltacome.skeleton import Target, is_causal

RATIOS = (16.0, 8.0, 32.0, 64.0)
PROBE = 2048
"""Rows and columns of the matrix that is compressed to measure this machine."""
PASSES = 3.2
"""Forward passes of a block that computing its grams and its output takes in all."""


@dataclass(frozen=True)
class Size:
    """What a ratio means in bytes."""

    ratio: float
    nbytes: int | None
    """Of the artifact's weight files, index and manifest; None if the ratio cannot be met."""


@dataclass(frozen=True)
class Exact:
    """Tensors that will be stored exactly, for one reason."""

    why: str
    count: int
    nbytes: int
    first: str


@dataclass(frozen=True)
class Forecast:
    """The whole forecast, in bytes and seconds."""

    tensors: int
    matrices: int
    tuned_nbytes: int
    """At 16 bits."""
    largest_ratio: float
    sizes: list[Size]
    exact: list[Exact]
    calibration: str | None
    """None: calibration is not possible, or was not asked for."""
    memory: dict[str, int]
    """Peak of the process in each phase."""
    disk: int
    """Bytes that OUT and what it is made from take together at the end of the run, at the first ratio."""
    seconds: dict[str, float]
    """By phase; empty without a probe."""


def forecast(
    base: str | Path,
    tuned: str | Path,
    *,
    ratios: tuple[float, ...] = RATIOS,
    calibration: str = "none",
    samples: int = 128,
    seq_len: int = 256,
    probe: bool = True,
) -> Forecast:
    """Forecasts `compress(base, tuned, …)` with Delta-CoMe.

    Args:
        base: checkpoint folder, a folder with a configuration alone, or a repository on the Hub.
        tuned: likewise.
        ratios: those to forecast; memory, disk and time are for the first.
        calibration: as `compress` takes it.
        samples: rows of calibration text.
        seq_len: tokens of a row.
        probe: whether to measure this machine, to forecast the time.

    Raises:
        CheckpointError: a configuration or header cannot be read.
        MismatchError: the two do not belong together.
        PlanError: no ratios, or one that is not above 0.
        CalibrationError: as `compress`, for a file that is not there or rows that are too long.
    """
    if not ratios:
        raise PlanError("forecast: expected at least one ratio, got none")
    for ratio in ratios:
        if not ratio > 0:
            raise PlanError(f"ratio: expected a number above 0, got {ratio}")
    if calibration not in ("self", "none"):
        check_source(calibration)
    beside, there = outline(base), outline(tuned)
    for side in (beside, there):
        check_dense(side.path)
        if side.stacked:
            raise CheckpointError(
                f"{side.path}: expected weight files: a configuration alone does not say how a "
                f"checkpoint stores the experts that {side.stacked} stacks; their headers do"
            )
    found = pair_models(beside, there, torch.float32)
    layout, where = found.layout, found.where
    records, matrices = {}, {}
    for pair in found.pairs:
        target = where[pair.name]
        record = account(pair, there.tensors[pair.name].dtype, layout, target, same=False)
        if record.base_name is not None:  # with fingerprints, as the manifest's bytes count too
            record = replace(record, base_sample="0" * 16, base_digest="0" * 32)
        records[pair.name] = record
        if packable(record, layout, target):
            matrices[pair.name] = Matrix(record.bands_shape, _no_delta)
    if calibration != "none" and not is_causal(found.model):
        calibration = "none"
    if calibration != "none":
        check_length(seq_len, there.path)
    manifest = Manifest("base", None, DeltaCome().options(), {}, records)
    sizes, largest = _sizes(manifest, matrices, ratios)
    tokens = states = 0
    if calibration != "none":
        tokens = samples * seq_len
        states = tokens * records[found.names[str(layout.embedding)]].shape[-1]
    inside = _blocks(layout, where)
    return Forecast(
        tensors=len(records),
        matrices=len(matrices),
        tuned_nbytes=manifest.tuned_nbytes(),
        largest_ratio=largest,
        sizes=sizes,
        exact=_exact(records, layout, where),
        calibration=calibration if calibration != "none" else None,
        memory=_memory(records, matrices, inside, states, calibration),
        # Units and the artifact made of them exist together; with calibration, so do its rows.
        disk=2 * (sizes[0].nbytes or math.ceil(manifest.tuned_nbytes() / largest)),
        seconds=_seconds(records, matrices, inside, tokens, ratios[0]) if probe else {},
    )


# --- sizes ---------------------------------------------------------------------------------------


def _no_delta() -> Tensor:
    raise AssertionError("a forecast reads no weights")


def _sizes(
    manifest: Manifest, matrices: dict[str, Matrix], ratios: tuple[float, ...]
) -> tuple[list[Size], float]:
    """What each ratio means in bytes, and roughly the largest that can be met."""

    def nbytes(ratio: float) -> int | None:
        try:
            plans = make_plans(manifest, DeltaCome(), matrices, ratio)
        except PlanError:
            return None
        # Not what the ratio allows: all directions together may need less.
        return total_nbytes(manifest, plans)

    sizes = [Size(ratio, nbytes(ratio)) for ratio in ratios]
    low, high = 0.0, 12.0  # of the base-2 logarithm
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if nbytes(2**middle) is None else (middle, high)
    return sizes, 2**low


def _exact(records: dict[str, Record], layout: Layout, where: Mapping[str, Target]) -> list[Exact]:
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, record in records.items():
        if not record.exact_rows:
            continue
        if record.base_shape is None:
            why = "the base lacks it"
        elif not DTYPES[record.dtype].is_floating_point:
            why = "not floating point"
        elif packable(record, layout, where[name]):
            why = "rows added to the vocabulary"
        elif len(record.shape) < 2:
            why = "a vector: norm, bias"
        elif len(record.shape) > 2:
            why = "more than two dimensions"
        else:
            why = "a matrix that is not the weight of a linear or an embedding"
        counts[why] += 1
        nbytes[why] += record.nbytes()
        first.setdefault(why, name)
    return [Exact(why, counts[why], nbytes[why], first[why]) for why, _ in nbytes.most_common()]


# --- memory --------------------------------------------------------------------------------------


def _blocks(layout: Layout, where: Mapping[str, Target]) -> dict[str, list[str]]:
    """Names of the stored tensors of each block that calibration passes."""
    return {
        block: [name for name, target in where.items() if target.parameter.startswith(f"{block}.")]
        for block in layout.blocks
    }


def _memory(
    records: dict[str, Record],
    matrices: dict[str, Matrix],
    blocks: dict[str, list[str]],
    states: int,
    calibration: str,
) -> dict[str, int]:
    """Peaks, including what the process holds now (mostly libraries).

    `states` is the number of entries that the hidden states of all calibration tokens have.
    """
    now = psutil.Process().memory_info().rss
    entries = {name: math.prod(record.shape) for name, record in records.items()}
    size = {name: DTYPES[record.dtype].itemsize for name, record in records.items()}
    largest = max(entries, key=lambda name: entries[name])
    said = {"survey": now + 3 * entries[largest] * size[largest]}
    rest = 0
    if states:
        block = max(blocks.values(), key=lambda names: sum(entries[name] for name in names))
        inputs = max((matrices[name].shape[1] for name in block if name in matrices), default=0)
        # Hidden states twice while a block advances, its weights in float32, one gram and its factor.
        rest = 4 * (2 * states + sum(entries[name] for name in block)) + 28 * inputs**2
    said["blocks"] = now + rest + max((_working(m.shape) for m in matrices.values()), default=0)
    if calibration == "self":
        said["calibration text (the tuned model writes it)"] = now + 4 * sum(entries.values())
    return said


def _working(shape: tuple[int, int]) -> int:
    """Bytes alive while one matrix is compressed.

    Counts the delta, its scaled copy and product in float32, the smaller gram with its eigenvectors and
    LAPACK's workspace, factors and their codes.
    """
    out_size, in_size = shape
    smaller = min(shape)
    return 4 * (4 * out_size * in_size + 6 * smaller**2) + 6 * (smaller // 4) * sum(shape)


# --- time ----------------------------------------------------------------------------------------


def _seconds(
    records: dict[str, Record],
    matrices: dict[str, Matrix],
    blocks: dict[str, list[str]],
    tokens: int,
    ratio: float,
) -> dict[str, float]:
    side = min(PROBE, max((min(m.shape) for m in matrices.values()), default=256))
    rates = measure(side, ratio)
    nbytes = sum(2 * math.prod(r.shape) * DTYPES[r.dtype].itemsize for r in records.values())
    said = {"survey": nbytes / rates.survey}
    work = sum(arithmetic(m.shape, ratio) for m in matrices.values())
    said["blocks"] = work / rates.compress
    if tokens:
        inside = (name for names in blocks.values() for name in names)
        shapes = [matrices[name].shape for name in inside if name in matrices]
        passes = PASSES * 2 * tokens * sum(o * i for o, i in shapes)
        grams = sum(2 * tokens * i**2 + i**3 for _, i in shapes) / 2
        said["passes and grams"] = (passes + grams) / rates.multiply
    return said


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    survey: float
    """Bytes checked and fingerprinted."""
    compress: float
    """Operations, as `arithmetic` counts them."""
    multiply: float
    """Floating-point operations of a product in float32."""


def measure(side: int, ratio: float = 16.0) -> Rates:
    """Times compressing one matrix (side, side), what a survey does with it, and a product."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(side, 64, generator=generator) * torch.arange(1, 65).pow(-0.7)
    delta = left @ torch.randn(64, side, generator=generator)
    delta += 0.5 * torch.randn(side, side, generator=generator)
    plan = DeltaCome().planner({"m": Matrix((side, side), _no_delta)})(2 * side * side / ratio)
    start = time.perf_counter()
    packed = DeltaCome().compress({"m": delta}, plan, None)
    relative_error(delta, packed["m"].dense(), None)
    compress = arithmetic((side, side), ratio) / (time.perf_counter() - start)
    weight = delta.to(torch.bfloat16).repeat(4, 1)
    start = time.perf_counter()
    check_finite("m", weight, "probe")
    full_digest(weight)
    (weight.float() - 1).square().sum(dtype=torch.float64)
    survey = weight.nbytes / (time.perf_counter() - start)
    start = time.perf_counter()
    torch.mm(delta, delta)
    return Rates(survey, compress, 2 * side**3 / (time.perf_counter() - start))


def arithmetic(shape: tuple[int, int], ratio: float) -> float:
    """Operations of compressing a matrix without calibration, up to a factor.

    Counts the gram of its smaller side, its eigenvectors, the long vectors and their orthogonalisation,
    and the product whose error is measured.
    """
    smaller, longer = min(shape), max(shape)
    rank = min(smaller, 16 / ratio * smaller / 3)
    own = 2 * longer * smaller**2 + 9 * smaller**3
    return own + 4 * longer * smaller * rank + 8 * longer * rank**2
