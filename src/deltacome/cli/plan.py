"""`deltacome plan`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from deltacome.cli.options import Json
from deltacome.cli.printing import quiet_libraries


def plan(
    base: Annotated[str, typer.Argument(help="Base checkpoint; config.json is enough.")],
    tuned: Annotated[str, typer.Argument(help="Full fine-tune; config.json is enough.")],
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Ratio; may be repeated. Default: 16, 8, 32, 64."),
    ] = None,
    calibration: Annotated[str, typer.Option(help="As for compress.")] = "self",
    samples: Annotated[int, typer.Option(min=1, help="Rows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 256,
    probe: Annotated[bool, typer.Option(help="--no-probe: do not time this machine.")] = True,
    as_json: Json = False,
) -> None:
    """Forecast what compressing TUNED with delta-come takes and gives, from headers and a short timing.

    Memory, disk and time are for the first ratio.
    """
    quiet_libraries()
    from deltacome.compression.forecast import RATIOS, forecast
    from deltacome.format.clip import clip

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
            f"stored exactly: {exact.count} tensors, {exact.nbytes:,} bytes, {clip(exact.first)} the "
            f"first: {exact.why}"
        )
    print(f"at ratio {said.sizes[0].ratio:g}, with calibration {said.calibration or 'none'}:")
    for phase, nbytes in said.memory.items():
        print(f"  memory, {phase}: {nbytes / 2**30:.1f} GiB")
    print(f"  disk: {said.disk:,} bytes while it runs")
    for phase, seconds in said.seconds.items():
        print(f"  time, {phase}: {seconds / 60:.1f} minutes")
