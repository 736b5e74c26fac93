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

    said = run(Artifact.from_pretrained(artifact), base)
    if as_json:
        print(json.dumps(dataclasses.asdict(said)))
        return
    print(f"artifact: whole, {said.tensors} tensors in {said.nbytes:,} bytes")
    if base is None:
        print("base: not compared (give --base)")
    else:
        print(f"base: the right one, {said.base_tensors} tensors in {said.base_nbytes:,} bytes")
