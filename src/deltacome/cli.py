"""The command line: parse, call, print. What takes time to import is imported when it is needed.

Exit codes: 0 done, 1 refused with a reason on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deltacome.errors import DeltaError

app = typer.Typer(
    add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
stderr = Console(stderr=True)
_debug = False

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Compress full fine-tunes to small deltas of their base, and run them."""
    global _debug
    _debug = debug


@app.command("compress")
def compress_command(
    base: Annotated[str, typer.Argument(help="Base checkpoint: a folder or a Hub repository.")],
    tuned: Annotated[str, typer.Argument(help="Full fine-tune of that base.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    method: Annotated[
        str, typer.Option(help="delta-come, low-rank, bitdelta, residual, prinmix or adaptive.")
    ] = "delta-come",
    ratio: Annotated[
        float | None, typer.Option(help="Tuned bytes ÷ bytes on disk, met within 2 %. Default 16.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Bands as bits:count, e.g. 8:2,3:32,2:* (*: what fits).")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="single, double or triple: the paper's plans.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="greedy or genetic: find the plan on a few blocks.")
    ] = None,
    gptq: Annotated[
        bool | None, typer.Option("--gptq/--no-gptq", help="Off: round to nearest (ablation).")
    ] = None,
    directions: Annotated[
        int | None, typer.Option(min=1, help="Rank of low-rank. Default: what the ratio allows.")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Of signs: matrix (one each) or rows.")] = None,
    distill: Annotated[
        int | None, typer.Option(min=0, help="Steps that fit bitdelta's scales to the logits.")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Off: prinmix keeps U (ablation).")
    ] = None,
    diagonal: Annotated[
        bool | None, typer.Option("--diagonal", help="adaptive with less disk: see its docs.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self, none, FILE.txt, FILE.jsonl, or a Hub data set. "
            "Default: self if the method looks at text."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    seed: int = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the calibration passes.")] = "auto",
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; more than one only with --calibration none.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Compress TUNED against BASE."""
    chosen = _method(
        method,
        plan=plan,
        precision=precision,
        gptq=gptq,
        directions=directions,
        scales=scales,
        distill=distill,
        refit=refit,
        diagonal=diagonal,
    )
    if ratio is not None and ratio <= 0:
        raise typer.BadParameter(f"expected a ratio above 0, got {ratio}", param_hint="--ratio")
    if ratio is None and chosen.adapts:
        ratio = 16.0
    if search is not None and (method != "delta-come" or plan or precision or not ratio):
        raise typer.BadParameter(
            "needs --method delta-come, a --ratio, and no plan", param_hint="--search"
        )
    if search not in (None, "greedy", "genetic"):
        raise typer.BadParameter(
            f"expected greedy or genetic, got {search!r}", param_hint="--search"
        )
    _quiet_libraries()
    from deltacome.compression import compress

    start = time.monotonic()
    if search is not None and ratio is not None:
        from deltacome.compression.search import find_template

        text = {"source": calibration or "self", "samples": samples, "seq_len": seq_len}
        found = find_template(base, tuned, ratio, search, **text, seed=seed, device=device)
        chosen = dataclasses.replace(chosen, template=found.template)
    with _progress(quiet=as_json) as report:
        artifact = compress(
            base,
            tuned,
            output,
            method=chosen,
            ratio=ratio,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            resume=resume,
            workers=workers,
            progress=report,
        )
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    result = artifact.describe() | {"seconds": seconds, "peak_rss_bytes": peak}
    if as_json:
        print(json.dumps(result))
        return
    print(_summary(result))
    if ratio is not None and result["ratio"] > 1.02 * ratio:
        print(
            f"smaller than the ratio of {ratio:g} asks for: there are no more directions to store"
        )
    print(f"{output}: written in {seconds:.0f} s, peak memory {peak / 2**30:.2f} GiB")


@app.command()
def plan(
    base: Annotated[str, typer.Argument(help="Base checkpoint; its configuration will do.")],
    tuned: Annotated[str, typer.Argument(help="Full fine-tune; its configuration will do.")],
    ratio: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: 8, 16, 32, 64.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="As compress takes it.")] = "self",
    samples: Annotated[int, typer.Option(min=1, help="Rows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    probe: Annotated[bool, typer.Option(help="Off: do not measure this machine.")] = True,
    as_json: Json = False,
) -> None:
    """Say what compressing TUNED would need and give, from headers and a short measurement."""
    _quiet_libraries()
    from deltacome.compression.forecast import RATIOS, forecast

    said = forecast(
        base,
        tuned,
        ratios=tuple(ratio) if ratio else RATIOS,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        probe=probe,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(said)))
        return
    print(
        f"tensors: {said.tensors}, {said.matrices} of them matrices to compress; tuned bytes at 16 bit: "
        f"{said.tuned_nbytes:,}"
    )
    for size in said.sizes:
        nbytes = "cannot be met" if size.nbytes is None else f"{size.nbytes:,} bytes"
        print(f"  ratio {size.ratio:g}: {nbytes}")
    print(f"  the largest ratio that can be met is about {said.largest_ratio:.1f}")
    for exact in said.exact:
        print(
            f"stored exactly: {exact.count} tensors, {exact.nbytes:,} bytes, {exact.first} the first: "
            f"{exact.why}"
        )
    print(f"calibration: {said.calibration or 'none'}")
    for phase, nbytes in said.memory.items():
        print(f"memory, {phase}: {nbytes / 2**30:.1f} GiB")
    print(f"disk: {said.disk:,} bytes while it runs")
    for phase, seconds in said.seconds.items():
        print(f"time, {phase}: {seconds / 60:.1f} minutes")


@app.command()
def capacity(
    base: Annotated[str, typer.Argument(help="Base checkpoint; its configuration will do.")],
    gpu_gib: Annotated[float, typer.Option(help="Memory of the device, GiB.")],
    delta: Annotated[
        list[str] | None, typer.Option(help="Artifact; may be repeated: the largest counts.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="In place of an artifact, one that is yet to be made.")
    ] = None,
    kv_gib: Annotated[float, typer.Option(help="KV cache, GiB.")] = 0,
    kv_tokens: Annotated[int, typer.Option(help="KV cache, tokens at 16 bits.")] = 0,
    utilization: Annotated[float, typer.Option(help="Share of the memory to be used.")] = 0.9,
    check: Annotated[
        bool, typer.Option("--check", help="Allocate all of it for real, and measure.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say how many tenants fit beside BASE and a KV cache."""
    import torch

    _quiet_libraries()
    from deltacome.runtime.capacity import allocate
    from deltacome.runtime.capacity import capacity as count

    found = count(
        base,
        delta or [],
        ratio=ratio,
        device_bytes=int(gpu_gib * 2**30),
        utilization=utilization,
        kv_bytes=int(kv_gib * 2**30),
        kv_tokens=kv_tokens,
    )
    result = dataclasses.asdict(found)
    if check:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with allocate(found, device) as nbytes:
            result["allocated"] = nbytes
    if as_json:
        print(json.dumps(result))
        return
    print("\n".join(f"{key.replace('_', ' ')}: {value:,}" for key, value in result.items()))


@app.command()
def inspect(
    artifact: Annotated[str, typer.Argument(help="Artifact: a folder or a Hub repository.")],
    as_json: Json = False,
) -> None:
    """Show what an artifact holds, tensor by tensor."""
    from deltacome.format.artifact import Artifact

    result = Artifact.from_pretrained(artifact).describe()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("tensor", "shape", "kind", "plan", "bytes", "error", box=None, pad_edge=False)
    for column in table.columns[4:]:
        column.justify = "right"
    for tensor in result["tensors"]:
        plan = ",".join(f"{bits}:{count}" for bits, count in tensor["plan"])
        error = "" if tensor["error"] is None else f"{tensor['error']:.4g}"
        shape = "×".join(map(str, tensor["shape"]))
        table.add_row(tensor["name"], shape, tensor["kind"], plan, f"{tensor['bytes']:,}", error)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(_summary(result))


@app.command()
def verify(
    artifact: Annotated[str, typer.Argument(help="Artifact: a folder or a Hub repository.")],
    base: Annotated[
        str | None, typer.Option(help="Check the fingerprints of this base too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of an artifact, and that BASE is the one it was made from."""
    from deltacome.format.artifact import Artifact
    from deltacome.runtime.verify import verify as run

    result = dataclasses.asdict(run(Artifact.from_pretrained(artifact), base))
    print(json.dumps(result) if as_json else "\n".join(f"{k}: {v}" for k, v in result.items()))


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base checkpoint.")],
    artifact: Annotated[str, typer.Argument(help="Artifact.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the dense checkpoint.")],
    as_json: Json = False,
) -> None:
    """Write the dense model back, as a normal checkpoint."""
    from deltacome.format.artifact import Artifact
    from deltacome.runtime.merge import merge as run

    path = run(base, Artifact.from_pretrained(artifact), output)
    print(json.dumps({"output": str(path)}) if as_json else f"{path}: written")


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(help="Artifact: a folder or a Hub repository.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    to: Annotated[str, typer.Option(help="peft-lora, or dense: a whole checkpoint.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Directions of a matrix. Default: all there are.")
    ] = None,
    lora_only: Annotated[
        bool,
        typer.Option("--lora-only", help="Leave out norms, biases and so on, as vLLM wants it."),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base checkpoint. Default: the one that the artifact names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a delta for stacks that do not read artifacts: a PEFT LoRA, or the dense model."""
    from deltacome.format.artifact import Artifact

    if to not in ("peft-lora", "dense"):
        raise typer.BadParameter(f"expected peft-lora or dense, got {to!r}", param_hint="--to")
    if to == "dense" and (rank is not None or lora_only):
        raise typer.BadParameter("--rank and --lora-only are for peft-lora", param_hint="--to")
    _quiet_libraries()
    from deltacome.runtime import export_lora
    from deltacome.runtime import merge as run

    opened = Artifact.from_pretrained(artifact)
    if to == "dense":
        path = run(base or opened.manifest.base_name_or_path, opened, output)
        print(json.dumps({"output": str(path)}) if as_json else f"{path}: written")
        return
    said = export_lora(opened, output, rank=rank, lora_only=lora_only, base=base)
    if as_json:
        print(json.dumps(dataclasses.asdict(said) | {"path": str(said.path)}))
        return
    errors = list(said.errors.values()) or [0.0]
    print(
        f"rank: {max(said.ranks.values(), default=0)}; bytes: {said.nbytes:,}, those of the artifact: "
        f"{opened.bytes_on_disk():,}"
    )
    print(
        f"relative error of a matrix against the delta: {sum(errors) / len(errors):.4g} on average, "
        f"{max(errors):.4g} at most"
    )
    print(
        f"saved whole: {len(said.saved)} modules and biases; left out: "
        f"{', '.join(said.left_out) or 'nothing'}"
    )
    print(f"{said.path}: written")


@app.command()
def generate(
    base: Annotated[str, typer.Argument(help="Base checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="One user message.")],
    delta: Annotated[str | None, typer.Option(help="Artifact to run over the base.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    device: Device = "auto",
    dtype: str = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt with BASE, or with the fine-tune that --delta stands for."""
    _quiet_libraries()
    from deltacome.evals.run import answer_with

    said = answer_with(
        base, delta, prompt, max_new_tokens=max_new_tokens, device=device, dtype=dtype
    )
    print(json.dumps({"prompt": prompt, "answer": said}) if as_json else said)


@app.command("eval")
def eval_command(
    base: Annotated[str, typer.Argument(help="Base checkpoint.")],
    task: Annotated[
        str | None, typer.Option(help="A reasoning-gym data set, or FILE.jsonl.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead, e.g. gsm8k,humaneval."),
    ] = None,
    tuned: Annotated[str | None, typer.Option(help="The dense fine-tune, for KL.")] = None,
    delta: Annotated[list[str] | None, typer.Option(help="Artifact; may be repeated.")] = None,
    task_args: Annotated[str, typer.Option(help="Arguments of the data set, JSON.")] = "{}",
    n: Annotated[int, typer.Option("-n", min=1, help="Questions.")] = 200,
    seed: int = 0,
    text: Annotated[Path | None, typer.Option(help="General text for KL.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 saves memory, but its own noise hides a good delta's KL.")
    ] = "float32",
    shots: Annotated[int | None, typer.Option(min=0, help="--lm-eval: few-shot examples.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--lm-eval: examples a task.")] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="--lm-eval: a folder with task files of your own.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="--lm-eval: prompts through the template.")] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="--lm-eval: execute what the model writes, here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score base, tuned and deltas on held-out questions; compare each with the tuned model."""
    if (task is None) == (lm_eval is None):
        raise typer.BadParameter("give one of --task and --lm-eval", param_hint="--task")
    if lm_eval is not None:
        _quiet_libraries()
        from deltacome.evals.harness import run_harness
        from deltacome.evals.report import harness_table

        found = run_harness(
            base,
            [name for name in lm_eval.split(",") if name],
            tuned=tuned,
            deltas=delta or [],
            folder=tasks_folder,
            shots=shots,
            limit=limit,
            chat=chat,
            run_code=run_code,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        if as_json:
            print(json.dumps(found))
        else:
            Console(width=None if sys.stdout.isatty() else 120).print(harness_table(found))
        return
    assert task is not None
    args = _parse_json(task_args, "--task-args")
    _quiet_libraries()
    from deltacome.evals.report import table
    from deltacome.evals.run import evaluate, names
    from deltacome.format.artifact import Artifact

    deltas = delta or []
    sizes = {}
    for name, path in zip(names(deltas), deltas, strict=True):
        artifact = Artifact.open(path)
        sizes[name] = (artifact.bytes_on_disk(), artifact.ratio())
    result = evaluate(
        base,
        tuned=tuned,
        deltas=deltas,
        task=task,
        task_args=args,
        n=n,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        text=text,
    )
    if as_json:
        print(json.dumps(result))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(result, sizes))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base checkpoint: a folder or a Hub repository.")],
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", help="NAME=ARTIFACT; may be repeated.")
    ] = None,
    tenants: Annotated[
        str | None, typer.Option(help="Where tenants are found by name: a folder, s3://…, hf://…")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Tenants in one batch. Default: all, at most 16.")
    ] = None,
    slot_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of a slot. Default: the largest tenant's.")
    ] = None,
    lora: Annotated[bool, typer.Option(help="Serve ordinary LoRA adapters too.")] = False,
    port: int = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command.")] = False,
) -> None:
    """Serve BASE and its tenants with vLLM; what follows -- are arguments of vLLM."""
    from deltacome.vllm.launch import plan_launch

    named = {}
    for text in tenant or []:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"expected NAME=ARTIFACT, got {text!r}", param_hint="--tenant")
        if name in named:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint="--tenant")
        named[name] = path
    launch = plan_launch(
        base,
        named,
        folder=tenants,
        slots=slots,
        slot_bytes=slot_bytes,
        lora=lora,
        port=port,
        more=context.args,
    )
    if dry_run:
        print(launch)
        return
    launch.run()


def main() -> None:
    """Entry point: errors of our own tree become one line and exit code 1."""
    try:
        app()
    except DeltaError as error:
        if _debug:
            raise
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer has turned Ctrl-C into this
            stderr.print("interrupted; finished blocks are kept, continue with --resume")
        raise


_TAKES = {
    "delta-come": {"plan", "precision", "gptq"},
    "low-rank": {"directions"},
    "bitdelta": {"scales", "distill"},
    "residual": {"plan", "scales"},
    "prinmix": {"refit"},
    "adaptive": {"diagonal"},
}


def _method(name: str, **options: Any) -> Any:
    """The method of a name, with the options that were given; others are refused."""
    if name not in _TAKES:
        expected = ", ".join(_TAKES)
        raise typer.BadParameter(f"expected one of {expected}, got {name!r}", param_hint="--method")
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - _TAKES[name]:
        raise typer.BadParameter(f"{name} has no such option", param_hint=f"--{key}")
    if given.get("scales", "rows") not in ("matrix", "rows"):
        raise typer.BadParameter(
            f"expected matrix or rows, got {given['scales']!r}", param_hint="--scales"
        )
    plan, precision = given.pop("plan", None), given.pop("precision", None)
    template = _template(plan, precision)
    given |= {} if template is None else {"template": template}
    if name == "delta-come":
        from deltacome.methods.delta_come import DeltaCome

        return DeltaCome(**given)
    if name == "low-rank":
        from deltacome.methods.low_rank import LowRank

        return LowRank(**given)
    if name == "bitdelta":
        from deltacome.methods.bitdelta import BitDelta

        return BitDelta(**given)
    if name == "residual":
        from deltacome.methods.residual import Residual

        return Residual(**given)
    if name == "prinmix":
        from deltacome.methods.prinmix import PrinMix

        return PrinMix(**given)
    from deltacome.methods.adaptive import Adaptive

    return Adaptive(**given)


def _template(plan: str | None, precision: str | None) -> Any:
    from deltacome.methods.template import PRECISIONS, parse_template

    if plan is not None and precision is not None:
        raise typer.BadParameter("give --plan or --precision, not both", param_hint="--plan")
    if precision is not None and precision not in PRECISIONS:
        raise typer.BadParameter(
            f"expected one of {', '.join(PRECISIONS)}, got {precision!r}", param_hint="--precision"
        )
    if plan is None and precision is None:
        return None
    try:
        return parse_template(plan or PRECISIONS[precision or "triple"])
    except DeltaError as error:
        raise typer.BadParameter(str(error), param_hint="--plan") from error


def _parse_json(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected an object, got {text}", param_hint=option)
    return value


def _summary(result: dict[str, Any]) -> str:
    nominal = result["nominal_ratio"]
    counts: dict[str, list[int]] = {}
    for tensor in result["tensors"]:
        counts.setdefault(tensor["kind"], []).append(tensor["bytes"])
    kinds = ", ".join(
        f"{len(sizes)} {kind} ({sum(sizes):,} bytes)" for kind, sizes in counts.items()
    )
    return "\n".join(
        [
            f"method: {result['method']}; base: {result['base']['name_or_path']}",
            f"tensors: {kinds}",
            f"bytes on disk: {result['bytes_on_disk']:,} of {result['tuned_bytes']:,}; "
            f"ratio {result['ratio']:.2f}, nominal (codes only) "
            + ("–" if nominal is None else f"{nominal:.2f}"),
        ]
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A bar per phase on stderr, with time left and the error so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    if quiet or not stderr.is_terminal:
        yield lambda progress: None
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bars(*columns, console=stderr) as bars:
        tasks: dict[str, Any] = {}

        def report(progress: Any) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bars.add_task(progress.phase, detail="")
            error = "" if progress.error is None else f"  mean error {progress.error:.4g}"
            bars.update(
                tasks[progress.phase],
                completed=progress.done,
                total=progress.total,
                detail=progress.detail + error,
            )

        yield report


def _quiet_libraries() -> None:
    """Loading bars and hints of transformers would drown our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
