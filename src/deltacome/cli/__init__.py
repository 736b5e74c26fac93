"""The command line: parse, call, print. One file per command; all are listed here.

A command imports what is slow to import only when it runs, so that help and completion are
immediate.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from deltacome import __version__
from deltacome.cli import (
    capacity,
    compress,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    plan,
    push,
    report,
    serve,
    verify,
)
from deltacome.cli.printing import say, stderr
from deltacome.errors import DeltaError

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 3 a fault of deltacome "
    "itself; 130 interrupted."
)

app = typer.Typer(
    add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Compress full fine-tunes into small deltas against their base, and run them."""
    global _debug
    _debug = debug
    if not stderr.is_terminal:  # libraries read these on import, so set them by now
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


app.command("compress")(compress.compress)
app.command("plan")(plan.plan)
app.command("capacity")(capacity.capacity)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("verify")(verify.verify)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)


def main() -> None:
    """Entry point: an exception becomes one line on stderr and an exit code (`EXIT_CODES`)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that its encoding lacks would otherwise throw away the result of hours.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except DeltaError as error:
        if _debug:
            raise
        say(f"error: {error}", "red")
        sys.exit(1)
    except Exception as error:
        if _debug:
            raise
        say(
            f"unexpected {type(error).__name__}: {error} (for a traceback: deltacome --debug …)",
            "red",
        )
        sys.exit(3)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer has turned Ctrl-C into this
            say("interrupted", "red")
        raise
