"""Text of others, such as names in an artifact, where it is shown: in a terminal, a log, a page."""

from __future__ import annotations


def clip(text: object, length: int = 1000) -> str:
    """What can be printed of a text, in one line of at most `length` characters."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return line if len(line) <= length else f"{line[: length - 1]}…"
