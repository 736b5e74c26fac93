"""Compresses a tuned model against its base.

Order of work: survey both checkpoints, plan every byte (`planning`), compress block by block (`blocks`),
fit scalars if the method asks for it (`polish`), record the canary, write.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from deltacome.arch.checkpoint import SIDE_FILES, Checkpoint, check_dense
from deltacome.compression.blocks import compress_side_by_side, compress_units
from deltacome.compression.calibration import Calibration, calibration_source, check_length
from deltacome.compression.canary import make_canary
from deltacome.compression.carried import carried_files, dropped_files
from deltacome.compression.planning import PLANS_FILE, kept_rows, plan_terms
from deltacome.compression.polish import distill_terms
from deltacome.compression.run import Progress, Run
from deltacome.compression.sensitivity import refuse_unreached
from deltacome.compression.survey import pair_models, survey
from deltacome.device import pick_device
from deltacome.errors import PlanError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.canary import CANARY_FILE, Canary
from deltacome.format.card import model_card
from deltacome.format.folder import RUN_FILE
from deltacome.format.manifest import Manifest
from deltacome.format.writer import ArtifactWriter, file_infos
from deltacome.methods.adaptive import Adaptive
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.method import Method, Terms
from deltacome.skeleton import is_causal, set_buffers


def compress(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    method: Method | None = None,
    ratio: float | Literal["auto"] | None = "auto",
    calibration: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 256,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    resume: bool = False,
    workers: int = 1,
    sweeps: str | Path | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Artifact:
    """Compresses a full fine-tune against its base into an artifact.

    `compress("base", "tuned", "delta")` is the paper's method at 1/16; the tuned model writes the text
    that it is calibrated on.

    Args:
        base: checkpoint folder (safetensors), or a repository on the Hub.
        tuned: the full fine-tune, likewise.
        output: folder of the artifact; must not exist.
        method: Delta-CoMe with triple precision by default.
        ratio: bytes of the tuned weights at 16 bit ÷ bytes of the artifact on disk, met within 2 %;
            None for what the method's options give, where they leave no choice. `auto` is 16, 12 for
            `Residual`, and None where there is no choice (`Method.default_ratio`).
        calibration: `self`, `none`, a .txt or .jsonl file, or a data set on the Hub. By default
            `self` if the method looks at inputs, else `none`.
        samples: rows of calibration text.
        seq_len: tokens of a row.
        seed: for these rows.
        device: `auto`, `cpu`, `cuda`…; it must have float64, in which grams are factored.
        dtype: of the calibration passes; `auto` is float32 on CPU and bfloat16 elsewhere.
        resume: continue an interrupted run; the result has the same bytes.
        workers: processes that compress blocks side by side; more than one only without calibration,
            where blocks are independent. With several GPUs (`cuda`) they are assigned in turn. They are
            spawned, so a script needs its `if __name__ == "__main__"`.
        sweeps: folder where the sweep of `adaptive`, which does not depend on the ratio, is kept for
            other runs with this text. It takes as much room as `Adaptive.diagonal` says, and so does what
            a run killed during its sweep leaves there.
        base_revision: of a base on the Hub: a branch, a tag or a commit.
        tuned_revision: of a fine-tune there, likewise.
        progress: called as the work proceeds.

    Returns:
        The artifact, opened.

    Raises:
        DeltaError: bad input, refused without leaving an artifact (see `errors`).
    """
    method = method or DeltaCome()
    if isinstance(method, type) or not hasattr(method, "default_ratio"):
        raise PlanError(f"method: expected one such as deltacome.DeltaCome(), got {method!r}")
    ratio = method.default_ratio if ratio == "auto" else ratio
    if isinstance(ratio, str):
        raise PlanError(f"ratio: expected a number, auto or None, got {ratio!r}")
    source, device, compute = check_options(
        method, calibration, device=device, dtype=dtype, workers=workers, sweeps=sweeps
    )
    text = Calibration(source, samples, seq_len, seed)
    before, after = Checkpoint(base, base_revision), Checkpoint(tuned, tuned_revision)
    if source != "none":
        check_length(seq_len, after.path)
    # BLAS splits its sums by thread, so bytes depend on how many there are; a worker has its share.
    threads = max(1, torch.get_num_threads() // workers)
    identity = {
        "base": _identity(before),
        "tuned": _identity(after),
        "method": method.options(),
        "ratio": ratio,
        **text.identity(),
        "device": device,
        "dtype": str(compute),
        "versions": _versions(),
        "threads": threads,
    }
    sweep_folder = None if sweeps is None else Path(sweeps) / _sweep_name(method, identity)
    writer = ArtifactWriter(output, identity, resume=resume)
    try:
        run = _prepare(before, after, method, text, device, compute, progress)
        path = _compress(run, writer, ratio, sweep_folder, threads, workers)
    except Exception:  # a bug too, but not an interrupt, after which the run can be resumed
        _forget_if_empty(writer.partial)
        raise
    finally:
        writer.close()
    progress(Progress("write", 1, 1))
    return Artifact.open(path)


def _compress(
    run: Run,
    writer: ArtifactWriter,
    ratio: float | None,
    sweep_folder: Path | None,
    threads: int,
    workers: int,
) -> Path:
    """Plans, compresses and writes; returns the folder of the artifact."""
    if run.calibration.source != "none":
        _check_streamed(run)
    carried = carried_files(run.base.path, run.tuned.path)
    carried[CANARY_FILE] = Canary.unknown().to_json()  # of the same size as the one to come
    manifest = _manifest(run, carried, threads)
    run.plans.update(plan_terms(run, writer, manifest, ratio, sweep_folder))
    rows = kept_rows(run, writer)
    if rows is not None:  # no more than asked for, the number that the byte count assumed
        manifest.provenance["calibration"]["samples"] = len(rows)
    # What a sweep has measured already is not measured again block by block.
    streams = run.method.calibrates and run.weights is None
    if workers > 1:
        compress_side_by_side(run, writer, workers)
    names = compress_units(run, writer, rows if streams else None)
    if rows is not None and (steps := run.method.options().get("distill")):
        distill_terms(run, writer, names, rows, steps)
    carried.pop(CANARY_FILE)
    if canary := make_canary(run, writer, names):
        carried[CANARY_FILE] = canary.to_json()
    run.report(Progress("write", 0, 1))
    return writer.finish(names, manifest, carried, lambda a: str(model_card(a)).encode())


def check_options(
    method: Method,
    calibration: str | Path | None,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    workers: int,
    sweeps: str | Path | None,
) -> tuple[str, str, torch.dtype]:
    """Checks what needs no models in `compress`; returns source of text, device and dtype of passes.

    Raises:
        DeltaError: names the option.
    """
    device = pick_device(device, doubles=True)
    source = calibration_source(method, None if calibration is None else str(calibration))
    compute = _pick_dtype(dtype, device)
    if workers < 1:
        raise PlanError(f"workers: expected at least 1, got {workers}")
    if workers > 1 and source != "none":
        raise PlanError(
            f"workers: blocks are independent only without calibration, got {workers} workers and "
            f"calibration {source}"
        )
    if sweeps is not None and not (isinstance(method, Adaptive) and source != "none"):
        name = method.options()["name"]
        raise PlanError(f"sweeps: expected adaptive and text, got {name} and calibration {source}")
    return source, device, compute


def _sweep_name(method: Method, identity: dict[str, Any]) -> str:
    """A name that identifies all that a sweep depends on; `plan_terms` adds the rows themselves."""
    assert isinstance(method, Adaptive)  # no other method has a sweep (`check_options`)
    of_sweep = identity | {"method": method.diagonal, "ratio": None}
    return hashlib.sha256(json.dumps(of_sweep).encode()).hexdigest()[:16]


def _forget_if_empty(partial: Path) -> None:
    """Removes the folder of a run that failed before anything was finished: nothing could be resumed."""
    if {file.name for file in partial.iterdir()} <= {RUN_FILE, PLANS_FILE, "lock"}:
        shutil.rmtree(partial)


def _prepare(
    base: Checkpoint,
    tuned: Checkpoint,
    method: Method,
    calibration: Calibration,
    device: str,
    dtype: torch.dtype,
    report: Callable[[Progress], None],
) -> Run:
    for checkpoint in (base, tuned):
        check_dense(checkpoint.path)
    found = pair_models(base, tuned, dtype)
    records, matrices = survey(base, tuned, found, report)
    set_buffers(found.model, found.where, tuned.read)
    return Run(
        base=base,
        tuned=tuned,
        layout=found.layout,
        model=found.model,
        where=found.where,
        names=found.names,
        tied=found.tied,
        records=records,
        plans=dict.fromkeys(sorted(matrices), Terms()),
        method=method,
        calibration=calibration,
        device=device,
        dtype=dtype,
        report=report,
    )


def _check_streamed(run: Run) -> None:
    """Refuses calibration where block-by-block passes would not be those of the model.

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
            "model, one after another, and this is not one: compress it with calibration none"
        )
    if isinstance(run.method, Adaptive):
        refuse_unreached(_without_inputs(run))  # before text is written and a sweep is run


def _manifest(run: Run, carried: dict[str, bytes], threads: int) -> Manifest:
    # A path on this machine is nobody's concern; a data set on the Hub is known by its full name.
    text, file = run.calibration, Path(run.calibration.source)
    said: dict[str, Any] = {"source": file.name if file.exists() else text.source, **text.options()}
    if text.source != "none" and (unreached := _without_inputs(run)):
        said["matrices_without_inputs"] = len(unreached)
    return Manifest(
        base_name_or_path=run.base.name_or_path,
        base_revision=run.base.revision,
        method=run.method.options(),
        provenance={"calibration": said, "threads": threads, "versions": _versions()},
        records=run.records,
        files=file_infos(carried),
        dropped_files=dropped_files(run.base.path, run.tuned.path),
    )


def _versions() -> dict[str, str]:
    """Versions of the packages that the bytes depend on."""
    # Not by an import statement: all that the package offers would count as imported here.
    ours = importlib.import_module("deltacome").__version__
    others = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"deltacome": ours} | others


def _without_inputs(run: Run) -> list[str]:
    """Matrices that calibration does not reach: experts, and what no text passes through."""
    inside = tuple(f"{name}." for name in run.layout.blocks)
    ends = {run.names.get(str(name)) for name in (run.layout.embedding, run.layout.head)}
    return [
        name
        for name in run.plans.keys() - ends
        if run.where[name].expert is not None or not run.where[name].parameter.startswith(inside)
    ]


def _identity(checkpoint: Checkpoint) -> list:
    """Which files a run reads: a changed file must not be mixed into a resumed run."""
    files = {info.file for info in checkpoint.tensors.values()}
    for pattern in ("*.json", *SIDE_FILES):
        files |= {file for file in checkpoint.path.glob(pattern) if file.is_file()}
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return [str(checkpoint.path.resolve()), stats]


def _pick_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    compute = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    return compute
