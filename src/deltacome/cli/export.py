"""`deltacome export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from deltacome.cli.options import Delta, Json
from deltacome.cli.printing import quiet_libraries


def export(
    artifact: Delta,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    to: Annotated[str, typer.Option(help="peft-lora, or dense for a whole checkpoint.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Directions kept of each matrix. Default: all.")
    ] = None,
    lora_only: Annotated[
        bool,
        typer.Option("--lora-only", help="Leave out norms, biases and so on, as vLLM requires."),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base checkpoint. Default: the one that the artifact names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a delta for stacks that do not read artifacts, as a PEFT LoRA or the dense model."""
    from deltacome.format.artifact import Artifact
    from deltacome.format.clip import clip

    if to not in ("peft-lora", "dense"):
        raise typer.BadParameter(f"expected peft-lora or dense, got {to!r}", param_hint="--to")
    if to == "dense" and (rank is not None or lora_only):
        raise typer.BadParameter("--rank and --lora-only are for peft-lora", param_hint="--to")
    quiet_libraries()
    from deltacome.runtime import export_lora
    from deltacome.runtime import merge as run

    opened = Artifact.from_pretrained(artifact)
    if to == "dense":
        path = run(base or opened.manifest.base_source, opened, output)
        print(json.dumps({"output": str(path)}) if as_json else f"{path}: written")
        return
    said = export_lora(opened, output, rank=rank, lora_only=lora_only, base=base)
    if as_json:
        print(json.dumps(dataclasses.asdict(said) | {"path": str(said.path)}))
        return
    errors = list(said.errors.values()) or [0.0]
    print(
        f"rank: {max(said.ranks.values(), default=0)}; bytes: {said.nbytes:,}, of the artifact: "
        f"{opened.bytes_on_disk():,}"
    )
    print(
        f"relative error of a matrix against the delta: {sum(errors) / len(errors):.4g} on average, "
        f"{max(errors):.4g} at most"
    )
    print(
        f"saved whole: {len(said.saved)} modules and biases; left out: "
        f"{', '.join(map(clip, said.left_out)) or 'nothing'}"
    )
    print(f"{said.path}: written")
