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
        str | None, typer.Option(help="Also check the fingerprints of this base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of an artifact and, with --base, that it was made from that base."""
    from deltacome.format.artifact import Artifact
    from deltacome.runtime.verify import verify as run

    result = dataclasses.asdict(run(Artifact.from_pretrained(artifact), base))
    print(json.dumps(result) if as_json else "\n".join(f"{k}: {v}" for k, v in result.items()))
