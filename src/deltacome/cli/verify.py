"""`deltacome verify`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from deltacome.cli.options import Delta, Json


def verify(
    artifact: Delta,
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
