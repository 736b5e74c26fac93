"""Text of others, such as tensors' names, in a line of a log or of a terminal."""

from __future__ import annotations

LENGTH = 1000


def one_line(text: object) -> str:
    """What can be printed of a text, in one line of at most `LENGTH` characters."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return line if len(line) <= LENGTH else f"{line[: LENGTH - 1]}…"
