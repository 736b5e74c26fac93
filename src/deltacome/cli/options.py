"""Arguments and options shared by several commands."""

import json
from typing import Annotated, Any

import typer

Base = Annotated[str, typer.Argument(help="Base checkpoint: a folder or a Hub repository.")]
Delta = Annotated[str, typer.Argument(help="Artifact: a folder or a Hub repository.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def parse_json(text: str | bytes, option: str) -> dict[str, Any]:
    """The JSON object given to an option, or in a file; anything else is wrong usage.

    Args:
        text: the JSON.
        option: what an error names.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected an object, got {value!r:.80}", param_hint=option)
    return value
