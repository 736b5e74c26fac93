"""Rows: what a model is given, one or several together.

Legend: B rows, L positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Row:
    """Token ids, and what a model that sees is given besides. Equal rows are one object."""

    ids: list[int]
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of an input → its value: what this row's pictures are, along dimension 0, or (1, L) where the
    model wants something for each token."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def kind(self) -> tuple:
        """Rows of one kind can share a batch: names and shapes of their other inputs are equal."""
        shapes = {n: None if self.by_token(n) else tuple(v.shape[1:]) for n, v in self.seen.items()}
        return tuple((name, shape or ()) for name, shape in sorted(shapes.items()))

    def followed_by(self, ids: Sequence[int]) -> Row:
        """The row with more token ids behind it, none of them a picture's."""
        seen = {n: pad(v, (0, len(ids))) if self.by_token(n) else v for n, v in self.seen.items()}
        return Row([*self.ids, *ids], seen)

    def by_token(self, name: str) -> bool:
        """Whether an input has a value for each token."""
        return tuple(self.seen[name].shape) == (1, len(self.ids))


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows as a batch: ids (B, L) int64, a mask (B, L) that is False at padding, and their other inputs.

    Rows are padded on the right, where a causal model looks at nothing.
    """
    shape = len(rows), max(map(len, rows))
    ids_BL, valid_BL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = torch.tensor(row.ids)
        valid_BL[i, : len(row)] = True
    seen = {}
    for name in rows[0].seen:
        values = [row.seen[name] for row in rows]
        if rows[0].by_token(name):
            values = [pad(v, (0, shape[1] - v.shape[1])) for v in values]
        seen[name] = torch.cat(values)
    return ids_BL, valid_BL, seen


def row_shares(counts_BL: Tensor) -> Tensor:
    """What each token that counts weighs, (T,), so that every row weighs 1 in all."""
    in_row_B1 = counts_BL.sum(1, keepdim=True)
    return (1.0 / in_row_B1).expand(counts_BL.shape)[counts_BL]


def seen_hash(rows: Sequence[Row]) -> str:
    """Of what rows have besides token ids; empty where that is nothing."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.seen.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if any(row.seen for row in rows) else ""


def model_inputs(
    ids_BL: Tensor, seen: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What a model is called with: its other inputs too, pixels in its own precision."""
    return {"input_ids": ids_BL.to(device), "use_cache": False, **to_device(seen, device, dtype)}


def to_device(
    seen: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Other inputs than token ids on a model's device, pixels in its own precision."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in seen.items()
    }


def alike(rows: Sequence[Row], slots: int, least: float = 0.0) -> Iterator[list[Row]]:
    """Runs of sorted rows that may go together.

    Args:
        rows: sorted by kind, then by length, up or down.
        slots: rows of a run times the longest of them are at most so many, or it is one row.
        least: the shortest row of a run is longer than this share of the longest.
    """
    run: list[Row] = []
    for row in rows:
        shortest, longest = sorted((len(run[0] if run else row), len(row)))
        fits = (len(run) + 1) * longest <= slots and shortest >= least * longest
        if run and not (fits and row.kind == run[0].kind):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
