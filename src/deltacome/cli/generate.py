"""`deltacome generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltacome.cli.options import Base, Device, Json
from deltacome.cli.printing import quiet_libraries


def generate(
    base: Base,
    prompt: Annotated[str, typer.Argument(help="One user message.")],
    delta: Annotated[str | None, typer.Option(help="Artifact to run over the base.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="Picture to put before PROMPT; may be repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens that the answer can have.")
    ] = 128,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the base's weights: auto, float32, bfloat16, …")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt with BASE, or with the fine-tune that --delta stands for."""
    quiet_libraries()
    from deltacome.evals.run import answer_with

    said = answer_with(
        base,
        delta,
        prompt,
        pictures=image or (),
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    print(json.dumps({"prompt": prompt, "answer": said}) if as_json else said)
