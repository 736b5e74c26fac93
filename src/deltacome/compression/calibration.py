"""Which text a run calibrates on, and what of it is refused before any work is done for its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from deltacome.errors import CalibrationError, PlanError
from deltacome.methods.method import Method
from deltacome.skeleton import read_config


@dataclass(frozen=True)
class Calibration:
    """The rows of text that are asked for."""

    source: str
    """As `calibration_rows` takes it, or `none`."""
    samples: int
    """Rows at most."""
    seq_len: int
    """Tokens of a row at most."""
    seed: int

    def __post_init__(self) -> None:
        """Refuses less than a row of two tokens, and a seed beyond 64 bits, with CalibrationError."""
        for name, least in (("samples", 1), ("seq_len", 2)):
            if self.source != "none" and getattr(self, name) < least:
                raise CalibrationError(
                    f"{name}: expected at least {least}, got {getattr(self, name)}"
                )
        if self.source != "none" and not -(1 << 63) <= self.seed < 1 << 64:  # what torch takes
            raise CalibrationError(f"seed: expected a number of 64 bits, got {self.seed}")

    def options(self) -> dict[str, int]:
        """The options that choose rows of a source; empty without text, where they change nothing."""
        if self.source == "none":
            return {}
        return {"samples": self.samples, "seq_len": self.seq_len, "seed": self.seed}

    def identity(self) -> dict[str, Any]:
        """What identifies the text in a run; for a file, its content too.

        Raises:
            CalibrationError: the file cannot be read.
        """
        file, source = Path(self.source), self.source
        if file.is_file():
            try:
                source += f" {hashlib.sha256(file.read_bytes()).hexdigest()}"
            except OSError as error:
                raise CalibrationError(f"calibration {file}: cannot be read: {error}") from error
        return {"calibration": source, **self.options()}


def calibration_source(method: Method, source: str | None) -> str:
    """Where rows come from: by default from where the method needs them.

    Raises:
        PlanError: the method's options use no text and some is given, or need text and none is.
        CalibrationError: there is no such file.
    """
    distill, name = bool(method.options().get("distill")), method.options()["name"]
    wants_text = method.calibrates or distill
    if source is None:
        return "self" if wants_text else "none"
    if source != "none" and not wants_text:
        raise PlanError(f"calibration: {name} with these options uses no text, got {source!r}")
    if source == "none" and distill:
        raise PlanError(
            f"calibration: {name} fits its scales or singular values to text, and got none: give some, "
            "or distill 0"
        )
    if source not in ("self", "none"):
        check_source(source)
    return source


def check_source(source: str) -> None:
    """Refuses a file that is missing or of another kind, before any work is done for its rows.

    Raises:
        CalibrationError: names it.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(
            f"calibration {source}: expected a name that ends in .txt or .jsonl, got {path.name}"
        )
    if (path.suffix in (".txt", ".jsonl")) != path.is_file():
        raise CalibrationError(f"calibration {source}: expected a .txt or .jsonl file, found none")


def check_tokens(source: str, rows: Iterable[list[int]], size: int) -> None:
    """Refuses rows with tokens that have no row in an embedding of that many.

    Raises:
        CalibrationError: names the largest.
    """
    largest = max(max(ids) for ids in rows)
    if largest >= size:
        raise CalibrationError(
            f"calibration {source}: the tuned model's tokenizer gives token {largest}, but the embedding "
            f"has {size} rows"
        )


def check_length(seq_len: int, tuned: Path) -> None:
    """Refuses rows longer than a model has positions, where its configuration says how many.

    Raises:
        CalibrationError: says how many there are.
    """
    limit = positions_of(read_config(tuned))
    if limit is not None and seq_len > limit:
        raise CalibrationError(
            f"seq_len: expected at most {limit}, the positions of {tuned}, got {seq_len}"
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, or None where its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
