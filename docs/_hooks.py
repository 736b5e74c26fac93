"""For mkdocs: the page of the command line, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from deltacome.cli import app


def on_files(files: Any, config: Any) -> Any:
    """Adds `reference/cli.md`."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="deltacome")
    text = get_docs_for_click(obj=command, ctx=context, name="deltacome", title="Command line")
    files.append(File.generated(config, "reference/cli.md", content=text))
    return files
