"""`deltacome compress`: the options of every method, checked before anything is imported."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import deltacome
from deltacome.cli.options import Base, Device, Json
from deltacome.cli.printing import progress_bars, quiet_libraries, say, summary
from deltacome.errors import DeltaError


def compress(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="Full fine-tune of that base.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the artifact.")],
    method: Annotated[
        str,
        typer.Option(
            help="delta-come, low-rank, bitdelta, residual, prinmix or adaptive.",
            autocompletion=lambda: list(_TAKES),
        ),
    ] = "delta-come",
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Tuned bytes ÷ bytes on disk, met within 2 %: 16 for a sixteenth. Default: 16, or 12 "
            "for residual; bitdelta's follows from its one bit."
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Bands as bits:count, e.g. 8:2,3:32,2:* (*: what fits).")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="single, double or triple (the default): the paper's plans.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="greedy or genetic: search for the plan on a few blocks.")
    ] = None,
    gptq: Annotated[
        bool | None,
        typer.Option("--gptq/--no-gptq", help="--no-gptq: round to nearest (ablation)."),
    ] = None,
    directions: Annotated[
        int | None, typer.Option(min=1, help="low-rank: its rank. Default: what the ratio allows.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="Scales of signs: one per matrix (matrix) or per row (rows).")
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps that fit scales or singular values to the tuned logits; needs four times "
            "TUNED in memory. Default for adaptive: 100.",
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="--no-refit: prinmix keeps U (ablation)."),
    ] = None,
    diagonal: Annotated[
        bool | None, typer.Option("--diagonal", help="adaptive: use less disk; see its docs.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self, none, FILE.txt, FILE.jsonl, or a Hub data set. "
            "Default: self if the method uses text."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="Rows of calibration text, if any; adaptive gains from a thousand."
        ),
    ] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 256,
    seed: Annotated[int, typer.Option(help="Which calibration text is drawn or written.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the calibration passes: auto, float32, bfloat16, float16.")
    ] = "auto",
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; more than one only with --calibration none.")
    ] = 1,
    sweeps: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep adaptive's sweep in, for other ratios of this tuned model."
        ),
    ] = None,
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
    if ratio is not None and not ratio >= 1:
        raise typer.BadParameter(
            f"expected how many times smaller, 16 for a sixteenth, got {ratio:g}",
            param_hint="--ratio",
        )
    ratio = chosen.default_ratio if ratio is None else ratio
    if search is not None and (method != "delta-come" or plan or precision or not ratio):
        raise typer.BadParameter(
            "needs --method delta-come, a --ratio, and no plan", param_hint="--search"
        )
    if search not in (None, "greedy", "genetic"):
        raise typer.BadParameter(
            f"expected greedy or genetic, got {search!r}", param_hint="--search"
        )
    quiet_libraries()
    from deltacome.compression import compress
    from deltacome.compression.budget import TOLERANCE

    start = time.monotonic()
    text = {"samples": samples, "seq_len": seq_len, "seed": seed}
    options: dict[str, Any] = {"device": device, "dtype": dtype, "workers": workers}
    options["sweeps"] = sweeps
    if search is not None and ratio is not None:
        from deltacome.compression.pipeline import check_options
        from deltacome.compression.search import find_template
        from deltacome.format.folder import check_output

        check_output(output, resume=resume)
        source, _, compute = check_options(chosen, calibration, **options)
        how = {"source": source, "device": device, "dtype": compute, "nearest": not chosen.gptq}
        with progress_bars(quiet=as_json) as report:
            found = find_template(base, tuned, ratio, search, **text, **how, progress=report)
        chosen = dataclasses.replace(chosen, template=found.template)
    try:
        with progress_bars(quiet=as_json) as report:
            artifact = compress(
                base,
                tuned,
                output,
                method=chosen,
                ratio=ratio,
                calibration=calibration,
                resume=resume,
                progress=report,
                **text,
                **options,
            )
    except KeyboardInterrupt:
        say("finished blocks are kept; continue with --resume")
        raise
    seconds = time.monotonic() - start
    peak = _peak_rss()
    of_worker = _peak_rss(of_children=True) if workers > 1 else None
    result = artifact.describe() | {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "peak_rss_bytes_of_largest_worker": of_worker,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(summary(result))
    if ratio is not None and result["ratio"] > (1 + TOLERANCE) * ratio:
        print(
            f"smaller than the ratio of {ratio:g} asks for: there are no more directions to store"
        )
    memory = f"peak memory {peak / 2**30:.2f} GiB"
    if of_worker is not None:
        memory += f", of the largest worker {of_worker / 2**30:.2f} GiB"
    print(f"{output}: written in {seconds:.0f} s, {memory}")


def _peak_rss(*, of_children: bool = False) -> int:
    """Peak resident bytes of this process, or of the largest of its finished children."""
    import resource  # Windows lacks it, but help must work there too

    whose = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    # Linux counts a child from its fork on, so at least what its parent held then.
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_TAKES = {
    "delta-come": ("DeltaCome", {"plan", "precision", "gptq", "distill"}),
    "low-rank": ("LowRank", {"directions"}),
    "bitdelta": ("BitDelta", {"scales", "distill"}),
    "residual": ("Residual", {"plan", "scales"}),
    "prinmix": ("PrinMix", {"refit", "distill"}),
    "adaptive": ("Adaptive", {"diagonal", "distill"}),
}
"""Method → its class, and the options that it takes."""


def _method(name: str, **options: Any) -> Any:
    """The named method with the given options; options that it does not take are refused."""
    if name not in _TAKES:
        expected = ", ".join(_TAKES)
        raise typer.BadParameter(f"expected one of {expected}, got {name!r}", param_hint="--method")
    given = {key: value for key, value in options.items() if value is not None}
    kind, takes = _TAKES[name]
    for key in given.keys() - takes:
        raise typer.BadParameter(f"{name} has no such option", param_hint=f"--{key}")
    if given.get("scales", "rows") not in ("matrix", "rows"):
        raise typer.BadParameter(
            f"expected matrix or rows, got {given['scales']!r}", param_hint="--scales"
        )
    plan, precision = given.pop("plan", None), given.pop("precision", None)
    template = _template(plan, precision)
    given |= {} if template is None else {"template": template}
    return getattr(deltacome, kind)(**given)


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
