"""Text that others wrote, such as names in an artifact, made fit to show in a terminal, log or page."""

from __future__ import annotations


def clip(text: object, length: int = 1000) -> str:
    """A text in one line of at most `length` characters, with unprintable ones replaced."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return line if len(line) <= length else f"{line[: length - 1]}…"
