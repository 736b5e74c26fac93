"""`deltacome merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltacome.cli.options import Base, Delta, Json


def merge(
    base: Base,
    artifact: Delta,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the dense checkpoint.")],
    as_json: Json = False,
) -> None:
    """Write the dense tuned model as a normal checkpoint."""
    from deltacome.format.artifact import Artifact
    from deltacome.runtime.merge import merge as run

    path = run(base, Artifact.from_pretrained(artifact), output)
    print(json.dumps({"output": str(path)}) if as_json else f"{path}: written")
