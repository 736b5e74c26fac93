"""Compresses a tuned model block by block.

Order of work: survey both checkpoints, plan every byte, get calibration rows, then for each decoder
block: linears in the order of their calls, those with one input together; each group sees the inputs
that the model *compressed so far* gives it (GPTQ's true-sequential order, and section 3.3 of
Delta-CoMe, arXiv 2406.08903), within the block too; hidden states advance once per block.

Embedding and head come last, when the inputs of the head are known; until then hidden states start
from the tuned embedding. A tied embedding is one matrix with two uses: it is compressed for its use
as head, against the grams of the last hidden states. An untied input embedding is compressed as if
its inputs were white, which one-hot rows of equal frequency are.

Each block is a unit of the writer: resuming replays finished blocks from their stored bytes, so the
hidden states, and with them every later byte, are those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltacome.arch.checkpoint import Checkpoint, pair_tensors
from deltacome.arch.layout import Layout, find_layout
from deltacome.compression.budget import make_plans
from deltacome.compression.capture import Stream, drop_weights
from deltacome.compression.carried import carried_files
from deltacome.compression.data import answers_from, calibration_rows
from deltacome.compression.distill import Trained, distill, divergence, squared_distance
from deltacome.compression.sensitivity import Weights, measure, measured, sweep
from deltacome.compression.survey import survey
from deltacome.compression.workers import side_by_side
from deltacome.errors import (
    CalibrationError,
    CheckpointError,
    DeltaError,
    PlanError,
    UnsupportedError,
)
from deltacome.format.artifact import Artifact, ArtifactWriter, Unit, file_infos
from deltacome.format.canary import CANARY_FILE, Canary, canary_ids
from deltacome.format.card import model_card
from deltacome.format.codec import Packed, read_bands, read_signs
from deltacome.format.folder import disk_errors, write_atomic
from deltacome.format.manifest import Manifest, Record
from deltacome.format.spec import Band
from deltacome.methods.adaptive import Adaptive
from deltacome.methods.bitdelta import BitDelta
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.method import Matrix, Method, Terms
from deltacome.numerics.gram import relative_error
from deltacome.skeleton import (
    Target,
    check_names,
    ignored,
    is_causal,
    make_skeleton,
    parameter_names,
    read_config,
    set_part,
    targets,
)

DEFAULT_RATIO = 16.0
SWEEP_TOKENS = 1024
"""Tokens of a batch whose logits are held at once, with what is differentiated of them."""


class Progress(NamedTuple):
    """Where a run is: `done` of `total` steps of a phase, and what was just finished."""

    phase: str
    """`survey`, `calibration`, `blocks`, `distill`, `canary` or `write`."""
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
    """Any name of a parameter → the tensor that is all of it."""
    tied: bool
    """Whether the head is the input embedding."""
    records: dict[str, Record]
    plans: dict[str, Terms]
    method: Method
    device: str
    dtype: torch.dtype
    report: Callable[[Progress], None]
    errors: list[float]
    weights: Path | None = None
    """Folder of what `sensitivity.measure` kept, where the method asked for it."""


def compress(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    method: Method | None = None,
    ratio: float | None = DEFAULT_RATIO,
    calibration: str | None = None,
    samples: int = 128,
    seq_len: int = 256,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    workers: int = 1,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Artifact:
    """Compresses a full fine-tune against its base into an artifact.

    Args:
        base: checkpoint folder (safetensors), or a repository on the Hub.
        tuned: the full fine-tune, likewise.
        output: folder of the artifact; must not exist.
        method: Delta-CoMe with triple precision by default.
        ratio: bytes of the tuned weights at 16 bit ÷ bytes of the artifact on disk, met within 2 %.
            None where the method's options leave no choice.
        calibration: `self`, `none`, a .txt or .jsonl file, or a data set on the Hub. By default
            `self` if the method looks at inputs, else `none`.
        samples: rows of calibration text.
        seq_len: tokens of a row.
        seed: of these rows.
        device: `auto`, `cpu`, `cuda`…
        dtype: of the calibration passes; `auto` is float32 on CPU and bfloat16 elsewhere.
        resume: continue an interrupted run; the result has the same bytes.
        workers: processes that compress blocks side by side; more than one only without calibration,
            where blocks are independent. On several GPUs (`cuda`) each has one in turn. They are spawned:
            a script needs its `if __name__ == "__main__"`.
        progress: called as the work goes on.

    Returns:
        The artifact, opened.

    Raises:
        DeltaError: bad input, refused before or without leaving an artifact (see `errors`).
    """
    method = method or DeltaCome()
    calibration = _calibration_source(method, calibration)
    device = pick_device(device)
    compute = _pick_dtype(dtype, device)
    base_checkpoint, tuned_checkpoint = (
        Checkpoint(base, base_revision),
        Checkpoint(tuned, tuned_revision),
    )
    if workers < 1 or (workers > 1 and calibration != "none"):
        raise PlanError(
            f"workers: blocks are independent only without calibration, got {workers} workers and "
            f"calibration {calibration}"
        )
    # BLAS splits its sums by thread, so bytes depend on how many there are; a worker has its share.
    threads = max(1, torch.get_num_threads() // workers)
    identity = {
        "base": _identity(base_checkpoint),
        "tuned": _identity(tuned_checkpoint),
        "method": method.options(),
        "ratio": ratio,
        "calibration": _source_identity(calibration),
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "device": device,
        "dtype": str(compute),
        "torch": torch.__version__,
        "threads": threads,
    }
    writer = ArtifactWriter(output, identity, resume=resume)
    try:
        run = _prepare(base_checkpoint, tuned_checkpoint, method, device, compute, progress)
        if calibration != "none":
            _check_streamed(run)
        carried = carried_files(base_checkpoint.path, tuned_checkpoint.path)
        carried[CANARY_FILE] = Canary.unknown().to_json()  # as long as the one to come
        manifest = replace(
            _manifest(run, calibration, samples, seq_len, seed, threads), files=file_infos(carried)
        )

        def text() -> list[list[int]] | None:
            if calibration == "none":
                return None
            return _calibration(run, writer, calibration, samples, seq_len, seed)

        run.plans.update(_plans(run, writer, manifest, ratio, text, seed))
        rows = text()
        # What a sweep has measured already is not measured again block by block.
        streams = method.calibrates and run.weights is None
        if workers > 1:
            _compress_side_by_side(run, writer, workers)
        names = _compress_units(run, writer, rows if streams else None)
        if rows is not None and (steps := method.options().get("distill")):
            _distill(run, writer, names, rows, steps, seed)
        carried.pop(CANARY_FILE)
        if canary := _canary(run, writer, names):
            carried[CANARY_FILE] = canary.to_json()
        progress(Progress("write", 0, 1))
        path = writer.finish(names, manifest, carried, lambda a: str(model_card(a)).encode())
        progress(Progress("write", 1, 1))
    except DeltaError:
        _forget_if_empty(writer.partial)
        raise
    finally:
        writer.close()
    return Artifact.open(path)


def _forget_if_empty(partial: Path) -> None:
    """A run that is refused before anything was finished leaves nothing that could be resumed."""
    if {file.name for file in partial.iterdir()} <= {"run.json", "plans.json", "lock"}:
        shutil.rmtree(partial)


def _prepare(
    base: Checkpoint,
    tuned: Checkpoint,
    method: Method,
    device: str,
    dtype: torch.dtype,
    report: Callable[[Progress], None],
) -> Run:
    for checkpoint in (base, tuned):
        checkpoint.check_dense()
    model = make_skeleton(read_config(tuned.path), dtype, tuned.path)
    layout = find_layout(model)
    where = targets(model, tuned.tensors)
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
    done = 0

    def on_tensor(name: str) -> None:
        nonlocal done
        done += 1
        report(Progress("survey", done, len(pairs), name))

    records, matrices = survey(base, tuned, pairs, layout, where, on_tensor)
    return Run(
        base,
        tuned,
        layout,
        model,
        where,
        names,
        tied,
        records,
        dict.fromkeys(sorted(matrices), Terms()),
        method,
        device,
        dtype,
        report,
        [],
    )


def _check_streamed(run: Run) -> None:
    """Refuses calibration where passes block by block would not be those of the model.

    Raises:
        UnsupportedError: says what the model is and how to go on.
    """
    for name in run.plans if run.method.options().get("distill") else ():
        if run.where[name].expert is not None:
            raise UnsupportedError(
                f"{name}: {type(run.model).__name__} holds it stacked with others, and its terms cannot "
                "be distilled there: compress it without distillation, or with calibration none"
            )
    if not is_causal(run.model):
        raise UnsupportedError(
            f"{type(run.model).__name__}: calibration runs through the blocks of a causal language "
            "model, one after another, and this is none: compress it with calibration none"
        )


def _units(run: Run) -> dict[str, list[str]]:
    """Names of tensors by block, in the order of their bytes; what is outside of blocks comes last."""
    blocks = [*run.layout.blocks, *run.layout.side_blocks]
    names: dict[str, list[str]] = {block: [] for block in blocks} | {"": []}
    for name, target in run.where.items():
        inside = (block for block in blocks if target.parameter.startswith(f"{block}."))
        names[next(inside, "")].append(name)
    return names


def _compress_side_by_side(run: Run, writer: ArtifactWriter, workers: int) -> None:
    """Leaves all units on disk, for `_compress_units` to find there."""
    units = {f"unit-{number:05}": names for number, names in enumerate(_units(run).values())}
    todo = {name: names for name, names in units.items() if not writer.has(name)}
    # Processes get no model: its modules say nothing that matters without inputs.
    nothing = Layout({}, {}, None, None, frozenset(), frozenset())
    bare = replace(run, model=torch.nn.Module(), layout=nothing, report=_say_nothing)
    done = len(units) - len(todo)

    def on_unit(name: str) -> None:
        nonlocal done
        done += 1
        run.report(Progress("blocks", done, len(units), name))

    side_by_side(partial(_make_unit, bare), todo, writer.partial, workers, run.device, on_unit)


def _make_unit(run: Run, names: list[str], device: str) -> Unit:
    return _compress_block(replace(run, device=device), "", names, None)


def _say_nothing(progress: Progress) -> None:
    pass


def _compress_units(run: Run, writer: ArtifactWriter, rows: list[list[int]] | None) -> list[str]:
    """Every tensor ends up in exactly one unit; returns the units in the order of their bytes."""
    stream = None
    if rows is not None:
        stream = _stream(run, rows)
    tensors = _units(run)
    outside = tensors.pop("")
    blocks = list(tensors)
    total = len(blocks) + 1
    names = []
    for number, (block, inside) in enumerate(tensors.items()):
        name = f"unit-{number:05}"
        unit = writer.load(name)
        streamed = stream if block in run.layout.blocks else None
        if unit is None:
            unit = _compress_block(run, block, inside, streamed)  # and its weights stay loaded
            writer.save(name, unit)
        elif streamed is not None:
            _load_block(run, block, unit)
        if streamed is not None:
            streamed.advance(block)
            drop_weights(run.layout.blocks[block])
        names.append(name)
        _note(run, unit, Progress("blocks", number + 1, total, block))
    name = f"unit-{len(blocks):05}"
    unit = writer.load(name)
    if unit is None:
        unit = _compress_outside(run, outside, stream)
        writer.save(name, unit)
    _note(run, unit, Progress("blocks", total, total, "embedding and head"))
    return [*names, name]


def _compress_block(run: Run, block: str, names: list[str], stream: Stream | None) -> Unit:
    """One block: group after group, each against the inputs that reach it.

    Without a stream, and for experts, whose inputs depend on the router, inputs are taken as white.
    """
    records, entries = {}, {}
    groups: list[tuple[str | None, list[str]]] = []
    if stream is not None:
        _load_block(run, block, Unit(tuple(run.records[name] for name in names), {}))
        for linears in stream.groups(block):
            members = [run.names[f"{linear}.weight"] for linear in linears]
            groups.append((linears[0], [name for name in members if name in run.plans]))
    grouped = {name for _, members in groups for name in members}
    groups += [(None, [name]) for name in names if name in run.plans and name not in grouped]
    for linear, members in groups:
        if not members:
            continue
        gram = None
        if stream is not None and linear is not None:
            gram = stream.gram(block, linear)
        with _naming(members):
            finished, packed = _compress_group(run, members, gram)
        for record in finished:
            records[record.name] = record
            if stream is not None:
                value = _restored(run, record, packed).to(run.device, run.dtype)
                set_part(run.model, run.where[record.name], value)
        entries |= packed
    for name in names:
        if name not in records:
            records[name] = run.records[name]
        entries |= _exact_entry(run, name)
    return Unit(tuple(records[name] for name in names), entries)


def _compress_outside(run: Run, names: list[str], stream: Stream | None) -> Unit:
    """Embedding, head, and what else lies outside of the blocks."""
    records, entries = {}, {}
    # Some models store a head that their configuration ties all the same.
    heads = {run.names.get(str(run.layout.head))}
    if run.tied:
        heads.add(run.names.get(str(run.layout.embedding)))
    for name in names:
        records[name] = run.records[name]
        if name in run.plans:
            gram = stream.head_gram() if name in heads and stream is not None else None
            with _naming([name]):
                (records[name],), packed = _compress_group(run, [name], gram)
            entries |= packed
        entries |= _exact_entry(run, name)
    return Unit(tuple(records[name] for name in names), entries)


def _compress_group(
    run: Run, names: list[str], gram: Tensor | None
) -> tuple[list[Record], dict[str, Tensor]]:
    """Bands of matrices that share an input, with the error measured on the stored bytes."""
    deltas = {name: _delta(run, name) for name in names}
    plans = {name: run.plans[name] for name in names}
    records, entries = [], {}
    if isinstance(run.method, Adaptive) and run.weights is not None:
        (name,) = names
        gram, outputs = _of_common_rows(run, name, measured(run.weights, name))
        found = {name: run.method.pack(deltas[name], plans[name], gram, outputs)}
    else:
        found = run.method.compress(deltas, plans, gram)
    for name, packed in found.items():
        terms = {"plan": plans[name].bands, "sign_scales": plans[name].sign_scales}
        record = replace(run.records[name], **terms)
        blobs = {f"{name}.{kind}": blob for kind, blob in packed.blobs().items()}
        delta_hat = _stored_delta(record, blobs).to(run.device)
        records.append(replace(record, error=relative_error(deltas[name], delta_hat, gram)))
        entries |= blobs
    return records, entries


def _distill(
    run: Run, writer: ArtifactWriter, names: list[str], rows: list[list[int]], steps: int, seed: int
) -> None:
    """Replaces the scalars of all terms; found once, so that a run cut off while writing them goes on."""
    units = {name: unit for name in names if (unit := writer.load(name)) is not None}
    records = {r.name: r for unit in units.values() for r in unit.records if r.packed}
    if not records:
        return  # nothing was changed, or nothing pays for its bytes
    entries = {k: blob for unit in units.values() for k, blob in unit.entries.items()}
    terms = {
        run.where[name].parameter: Trained(
            _stored_terms(record, entries), partial(_base_rows, run, record), record.transposed
        )
        for name, record in records.items()
    }
    if isinstance(run.method, BitDelta):
        how = {"loss": squared_distance, "rate": 0.01, "batch": 4}
    else:
        first = answers_from(run.tuned.path)
        how = {"loss": divergence, "rate": 0.02, "batch": 16, "first": first}

    def found() -> dict[str, Tensor]:
        distilled = distill(
            partial(_load_whole, run),
            terms,
            rows,
            steps=steps,
            seed=seed,
            device=run.device,
            on_step=lambda done, total: run.report(Progress("distill", done, total)),
            **how,
        )
        return {
            f"{name}.{kind}": blob
            for name in records
            for kind, blob in distilled[run.where[name].parameter].blobs().items()
        }

    blobs = _kept(writer.partial / "distilled.safetensors", found)
    for unit_name, unit in units.items():
        changed = []
        for record in unit.records:
            if record.name in records:
                gram = None
                if run.weights is not None:
                    gram = _of_common_rows(
                        run, record.name, measured(run.weights, record.name)
                    ).inputs
                delta_hat = _stored_delta(record, blobs).to(run.device)
                error = relative_error(_delta(run, record.name), delta_hat, gram)
                record = replace(record, error=error)
            changed.append(record)
        kept = {name: blobs.get(name, blob) for name, blob in unit.entries.items()}
        writer.save(unit_name, Unit(tuple(changed), kept))


def _load_whole(run: Run) -> torch.nn.Module:
    kind: Any = type(run.model)
    try:
        return kind.from_pretrained(run.tuned.path, dtype=run.dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run.tuned.path}: expected a {kind.__name__}: {error}") from error


def _base_rows(run: Run, record: Record) -> Tensor:
    """What the base has of a matrix, (out, in): the rows that its terms cover."""
    assert record.base_name is not None
    base = run.base.read(record.base_name)
    base_OI = base.T if record.transposed else base
    return base_OI[: record.bands_shape[0]]


def _canary(run: Run, writer: ArtifactWriter, names: list[str]) -> Canary | None:
    """What the finished artifact's model says to a few tokens: every block is read once more.

    The pass that compresses cannot tell, as it begins with the tuned embedding. None, with a warning,
    for a model that cannot be run block by block.
    """
    layout, outside = run.layout, {}
    for unit in (_unit(writer, name) for name in names[len(run.layout.blocks) :]):
        outside |= {record.name: (record, unit.entries) for record in unit.records}

    def read(parameter: str) -> Tensor:
        if (stored := run.names.get(parameter)) not in outside:
            raise UnsupportedError(f"{parameter}: no tensor of the checkpoint is all of it")
        record, entries = outside[stored]
        value = _restored(run, record, entries)
        if record.exact_rows is None or record.replaced:
            return value
        rest = run.tuned.read(record.name)[record.exact_rows[0] :]
        return torch.cat([value, rest.to(value.dtype)])

    try:
        if not is_causal(run.model) or layout.embedding is None or layout.head is None:
            raise UnsupportedError(f"{type(run.model).__name__} is no causal language model")
        embedding = run.records[run.names[layout.embedding]]
        ids = canary_ids(min(embedding.shape[0], (embedding.base_shape or embedding.shape)[0]))
        stream = Stream(*(run.model, layout, read, [ids]), device=run.device, dtype=run.dtype)
        for number, (block, name) in enumerate(zip(layout.blocks, names, strict=False)):
            _load_block(run, block, _unit(writer, name))
            stream.advance(block)
            drop_weights(layout.blocks[block])
            run.report(Progress("canary", number + 1, len(layout.blocks), block))
        head = layout.embedding if run.tied else layout.head
        with stream.outside_weights(head), torch.no_grad():
            logits_LV = stream.answer(stream.batches[0])[0]
    except UnsupportedError as error:
        warnings.warn(f"the artifact carries no canary: {error}", stacklevel=2)
        return None
    said_LV = logits_LV.float().log_softmax(-1)
    return Canary(tuple(ids), tuple(float(said_LV[i, id]) for i, id in enumerate(ids[1:])))


def _unit(writer: ArtifactWriter, name: str) -> Unit:
    unit = writer.load(name)
    assert unit is not None, name
    return unit


def _kept(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that an interrupted run made already, or makes now and keeps beside the units."""
    if not file.exists():
        tensors = make()
        with disk_errors(file):
            save_file(tensors, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    return load_file(file)


def _delta(run: Run, name: str) -> Tensor:
    """tuned − base in float32, over the rows that both have."""
    record = run.records[name]
    assert record.base_name is not None
    assert record.base_shape is not None
    rows = min(record.shape[0], record.base_shape[0])
    tuned = run.tuned.read(name)[:rows].to(run.device, torch.float32)
    delta = tuned - run.base.read(record.base_name)[:rows].to(run.device, torch.float32)
    return delta.T.contiguous() if record.transposed else delta


def _stored_delta(record: Record, entries: dict[str, Tensor]) -> Tensor:
    """The delta that stored terms stand for, float32 (out, in)."""
    return (
        _stored_terms(record, entries).dense() if record.packed else torch.zeros(record.bands_shape)
    )


def _stored_terms(record: Record, entries: dict[str, Tensor]) -> Packed:
    shape, bands, signs = record.bands_shape, (), None
    if record.plan:
        bands = read_bands(entries[f"{record.name}.bands"], shape, record.plan)
    if record.sign_scales:
        signs = read_signs(entries[f"{record.name}.signs"], shape, record.sign_scales)
    return Packed(bands, signs)


def _restored(run: Run, record: Record, entries: dict[str, Tensor]) -> Tensor:
    """What the artifact gives back for a tensor of a block, float32 or the tuned dtype.

    A matrix that was not compressed yet has no terms in its record: it is the base's.
    """
    if record.name not in run.plans:
        return run.tuned.read(record.name)
    assert record.base_name is not None
    base, delta = run.base.read(record.base_name).float(), _stored_delta(record, entries)
    return base + delta.T if record.transposed else base[: len(delta)] + delta


def _load_block(run: Run, block: str, unit: Unit) -> None:
    """Loads the compressed-so-far weights of a block: base + terms, or the tuned value itself."""
    parameters = {f"{block}.{name}" for name, _ in run.layout.blocks[block].named_parameters()}
    for record in unit.records:
        target = run.where[record.name]
        if target.parameter not in parameters:
            continue  # a buffer that the checkpoint stores; the skeleton has its own
        value = _restored(run, record, unit.entries)
        set_part(run.model, target, value.to(run.device, run.dtype))


def _exact_entry(run: Run, name: str) -> dict[str, Tensor]:
    record = run.records[name]
    if record.exact_rows is None:
        return {}
    value = run.tuned.read(name)
    if record.shape:
        value = value[record.exact_rows[0] : record.exact_rows[1]].contiguous()
    return {f"{name}.exact": value}


def _note(run: Run, unit: Unit, progress: Progress) -> None:
    run.errors += [record.error for record in unit.records if record.error is not None]
    mean = sum(run.errors) / len(run.errors) if run.errors else None
    run.report(progress._replace(error=mean))


@contextlib.contextmanager
def _naming(names: list[str]) -> Iterator[None]:
    """Errors of the numerics, which know no names, get those of the tensors at hand."""
    try:
        yield
    except DeltaError as error:
        raise type(error)(f"{', '.join(names)}: {error}") from error


# --- plans, inputs, and what is said of them -----------------------------------------------------


def _plans(
    run: Run,
    writer: ArtifactWriter,
    manifest: Manifest,
    ratio: float | None,
    text: Callable[[], list[list[int]] | None],
    seed: int,
) -> dict[str, Terms]:
    """Plans, kept beside the units: a resumed run need not measure what they were made from."""
    file = writer.partial / "plans.json"
    spectra: dict[str, Tensor] = {}
    if isinstance(run.method, Adaptive) and (rows := text()) is not None:
        run.weights = writer.partial / "weights"
        if not file.exists():
            spectra = _spectra(run, run.method, run.weights, rows, seed)
    if not file.exists():

        def matrix(name: str) -> Matrix:
            shape = run.records[name].bands_shape
            return Matrix(shape, lambda: _delta(run, name), spectra.get(name))

        plans = make_plans(manifest, run.method, {n: matrix(n) for n in run.plans}, ratio)
        with disk_errors(file):
            write_atomic(file, json.dumps({name: astuple(terms) for name, terms in plans.items()}))
    return {
        name: Terms(tuple(Band(*band) for band in bands), scales)
        for name, (bands, scales) in json.loads(file.read_text()).items()
    }


def _spectra(
    run: Run, method: Adaptive, folder: Path, rows: list[list[int]], seed: int
) -> dict[str, Tensor]:
    """What the directions of each matrix are worth, by a sweep through the tuned model.

    Raises:
        UnsupportedError: a matrix that the sweep does not reach (experts, a vision tower).
    """
    steps, total = itertools.count(1), 2 * len(run.layout.blocks)

    def load(block: str) -> None:
        for name, target in run.where.items():
            if target.parameter.startswith(f"{block}.") and name in run.records:
                value = run.tuned.read(name).to(run.device, run.dtype)
                set_part(run.model, target, value)

    def spectrum(name: str, weights: Weights) -> Tensor | None:
        if name not in run.plans:
            return None
        return method.spectrum(_delta(run, name), *_of_common_rows(run, name, weights))

    weights = sweep(
        _stream(run, rows, batch_tokens=SWEEP_TOKENS),
        load,
        seed=seed,
        diagonal=method.diagonal,
        tied=run.tied,
        first=answers_from(run.tuned.path),
        on_step=lambda: run.report(Progress("sweep", next(steps), total)),
    )
    with disk_errors(folder):
        spectra = measure(
            folder, ({run.names[n]: w for n, w in one.items()} for one in weights), spectrum
        )
    if missing := sorted(run.plans.keys() - spectra.keys()):
        raise UnsupportedError(
            f"adaptive: {len(missing)} matrices are not reached by text that runs through the decoder's "
            f"blocks, {missing[0]} the first: use another method, or calibration none"
        )
    return spectra


def _stream(run: Run, rows: list[list[int]], **options: int) -> Stream:
    return Stream(
        *(run.model, run.layout, lambda name: run.tuned.read(run.names[name]), rows),
        device=run.device,
        dtype=run.dtype,
        **options,
    )


def _of_common_rows(run: Run, name: str, weights: Weights) -> Weights:
    """Weights for the rows that base and tuned have in common: vocabularies grow."""
    outputs = weights.outputs
    if outputs.ndim == 1:
        outputs = outputs[: run.records[name].bands_shape[0]]
    return Weights(weights.inputs.to(run.device), outputs.to(run.device))


def _calibration(
    run: Run, writer: ArtifactWriter, source: str, samples: int, seq_len: int, seed: int
) -> list[list[int]]:
    """Calibration rows, kept beside the units so that a resumed run has the same."""

    def make() -> dict[str, Tensor]:
        rows = calibration_rows(
            source,
            run.tuned.path,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=run.device,
            on_step=lambda done, total: run.report(Progress("calibration", done, total)),
        )
        embedding = run.names[str(run.layout.embedding)]
        largest, size = max(map(max, rows)), run.records[embedding].shape[0]
        if largest >= size:
            raise CalibrationError(
                f"calibration {source}: the tuned model's tokenizer gives token {largest}, "
                f"but {embedding} has {size} rows"
            )
        return {f"{i:06}": torch.tensor(row) for i, row in enumerate(rows)}

    kept = _kept(writer.partial / "calibration.safetensors", make)
    return [row.tolist() for _, row in sorted(kept.items())]


def _calibration_source(method: Method, source: str | None) -> str:
    distill, name = bool(method.options().get("distill")), method.options()["name"]
    wants_text = method.calibrates or distill
    if source is None:
        return "self" if wants_text else "none"
    if source != "none" and not wants_text:
        raise PlanError(f"calibration: {name} with these options looks at no text, got {source!r}")
    if source == "none" and distill:
        raise PlanError(
            f"calibration: {name} needs text to distil its scalars on, got none: distill 0 goes without"
        )
    return source


def _manifest(
    run: Run, calibration: str, samples: int, seq_len: int, seed: int, threads: int
) -> Manifest:
    source = calibration if calibration in ("self", "none") else Path(calibration).name
    said: dict[str, Any] = {"source": source}
    if calibration != "none":
        said |= {"samples": samples, "seq_len": seq_len, "seed": seed}
        said |= _without_inputs(run)
    versions = {
        name: importlib.metadata.version(name) for name in ("deltacome", "torch", "transformers")
    }
    return Manifest(
        base_name_or_path=run.base.name_or_path,
        base_revision=run.base.revision,
        method=run.method.options(),
        provenance={"calibration": said, "threads": threads, "versions": versions},
        records=run.records,
    )


def _without_inputs(run: Run) -> dict[str, int]:
    """How many matrices calibration does not reach, if any: experts, and what no text passes."""
    inside = tuple(f"{name}." for name in run.layout.blocks)
    ends = {run.names.get(str(name)) for name in (run.layout.embedding, run.layout.head)}
    count = 0
    for name in run.plans.keys() - ends:
        target = run.where[name]
        count += target.expert is not None or not target.parameter.startswith(inside)
    return {"matrices_without_inputs": count} if count else {}


def _identity(checkpoint: Checkpoint) -> list:
    """Which files a run reads: a changed file must not be mixed into a resumed run."""
    files = {info.file for info in checkpoint.tensors.values()}
    files |= {file for file in checkpoint.path.glob("*.json") if file.is_file()}
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return [str(checkpoint.path.resolve()), stats]


def _source_identity(calibration: str) -> str:
    file = Path(calibration)
    if not file.is_file():
        return calibration
    return f"{calibration} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def pick_device(device: str) -> str:
    """ "auto" is the GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    compute = getattr(torch, dtype, None)
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    return compute
