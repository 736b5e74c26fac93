"""`deltacome push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltacome.cli.options import Delta, Json, parse_json


def push(
    artifact: Delta,
    repository: Annotated[str, typer.Argument(help="org/name; created if missing.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Output of eval --json for it; may be repeated.",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility, if the repository is created."),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Created if missing. Default: main.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Upload an artifact to the Hub, with a model card that has its sizes, errors and scores."""
    results = [parse_json(file.read_bytes(), f"--scores {file}") for file in scores or []]
    from deltacome.format.artifact import Artifact

    opened = Artifact.from_pretrained(artifact)
    more = {} if message is None else {"commit_message": message}
    commit = opened.push_to_hub(repository, scores=results, private=private, branch=branch, **more)
    if as_json:
        print(json.dumps({"repository": repository, "commit": str(commit)}))
        return
    print(f"{repository}: {opened.bytes_on_disk():,} bytes in {commit}")
