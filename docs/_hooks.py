"""For mkdocs: the page of the command line says what the commands say of themselves."""

from __future__ import annotations

from typing import Any

import typer
from typer.cli import get_docs_for_click

from deltacome.cli import app


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Appends to `reference/cli.md`; all other pages are as they are."""
    if page.file.src_uri != "reference/cli.md":
        return markdown
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="deltacome")
    said = get_docs_for_click(obj=command, ctx=context, name="deltacome", indent=1)
    return f"{markdown}\n{said}"
