"""`deltacome report`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from deltacome.cli.options import Delta, Json
from deltacome.errors import DeltaError


def report(
    artifact: Delta,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Output of eval --json for it and others; may be repeated.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Folder for the same figures as PNG files.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw an artifact on one page: where its bytes went, errors, spectra and scores."""
    from deltacome.format.artifact import Artifact

    try:
        from deltacome.report import write_report
    except ImportError as error:
        raise DeltaError(
            f"report: needs its drawing packages (pip install 'deltacome[report]'): {error}"
        ) from error
    # Folders in the Hub's cache are named by commit.
    name = None if os.path.isdir(artifact) else artifact
    opened = Artifact.from_pretrained(artifact)
    write_report(opened, output, name=name, scores=scores or [], png=png)
    if as_json:
        print(json.dumps({"output": str(output), "png": None if png is None else str(png)}))
        return
    for path in (output, png):
        if path is not None:
            print(f"{path}: written")
