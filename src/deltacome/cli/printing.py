"""Printing that commands share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

stderr = Console(stderr=True)

LINE_SECONDS = 30
"""Between two lines of progress in a log."""


def say(text: str, style: str | None = None) -> None:
    """Print a message on stderr. Names in it may be untrusted: no markup, no terminal controls."""
    from deltacome.format.clip import clip

    lines = [clip(line, 20_000) for line in text.split("\n")]  # some list every tensor of a model
    stderr.print("\n".join(lines), style=style, markup=False, highlight=False, soft_wrap=True)


def show(table: RenderableType, width: int) -> None:
    """Print a table on stdout, as wide as the terminal, or `width` columns where there is none."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


def summary(result: dict[str, Any]) -> str:
    """What `Artifact.describe` says, in three lines."""
    from deltacome.format.clip import clip

    nominal = result["nominal_ratio"]
    counts: dict[str, list[int]] = {}
    for tensor in result["tensors"]:
        counts.setdefault(tensor["kind"], []).append(tensor["bytes"])
    kinds = ", ".join(
        f"{len(sizes)} {kind} ({sum(sizes):,} bytes)" for kind, sizes in counts.items()
    )
    return "\n".join(
        [
            f"method: {clip(result['method'], 200)}; base: "
            f"{clip(result['base']['name_or_path'], 200)}",
            f"tensors: {kinds}",
            f"bytes on disk: {result['bytes_on_disk']:,} of {result['tuned_bytes']:,}; "
            f"ratio {result['ratio']:.2f}, nominal (codes only) "
            + ("–" if nominal is None else f"{nominal:.2f}"),
        ]
    )


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A bar per phase on stderr, with time left and the error so far.

    Where stderr is not a terminal, a line is printed now and then instead.

    Args:
        quiet: no bars on a terminal, where they would mix with what stdout prints.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from deltacome.format.clip import clip

    if not stderr.is_terminal:
        yield _progress_lines()
        return
    if quiet:
        yield lambda progress: None
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Bars(*columns, console=stderr) as bars:
        tasks: dict[str, Any] = {}

        def report(progress: Any) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bars.add_task(progress.phase, detail="")
            error = "" if progress.error is None else f"  mean error {progress.error:.4g}"
            bars.update(
                tasks[progress.phase],
                completed=progress.done,
                total=progress.total,
                detail=clip(progress.detail + error),
            )

        yield report


def _progress_lines() -> Callable[[Any], None]:
    """For a log: says what was just finished, at most once in `LINE_SECONDS`."""
    start = last = time.monotonic()

    def report(progress: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        line = f"{now - start:.0f} s: {progress.phase} {progress.done}/{progress.total}"
        if progress.detail:
            line += f", {progress.detail}"
        if progress.error is not None:
            line += f", mean error {progress.error:.4g}"
        say(line)

    return report


def quiet_libraries() -> None:
    """Silence transformers' loading bars and hints, which would drown our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
