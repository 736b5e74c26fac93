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
    """Token ids, and what else a vision-language model is given. Rows are equal only to themselves."""

    ids: list[int]
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of an input → its value: that of this row's pictures, along dimension 0, or (1, L) where the
    model wants a value for each token."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def kind(self) -> tuple:
        """Rows of one kind can share a batch: names and shapes of their other inputs are equal."""
        shapes = {n: () if self.by_token(n) else tuple(v.shape[1:]) for n, v in self.seen.items()}
        return tuple(sorted(shapes.items()))

    def followed_by(self, ids: Sequence[int]) -> Row:
        """The row followed by more token ids, none of them a picture's."""
        seen = {n: pad(v, (0, len(ids))) if self.by_token(n) else v for n, v in self.seen.items()}
        return Row([*self.ids, *ids], seen)

    def by_token(self, name: str) -> bool:
        """Whether an input has a value for each token."""
        return tuple(self.seen[name].shape) == (1, len(self.ids))


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows as a batch: ids (B, L) int64, a mask (B, L) that is False at padding, and their other inputs.

    Rows are padded on the right, where a causal model's tokens do not look.
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


def token_shares(counts_BL: Tensor, answers_B: Tensor, one: float) -> Tensor:
    """The weight of each token that counts, (T,): a row of text weighs 1, an answer goes by its length.

    Args:
        counts_BL: which tokens count, bool.
        answers_B: which rows are answers, bool.
        one: how many tokens of an answer weigh 1 together.
    """
    in_row_B1 = counts_BL.sum(1, keepdim=True).float()
    share_B1 = torch.where(answers_B[:, None], 1 / one, 1 / in_row_B1)
    return share_B1.expand(counts_BL.shape)[counts_BL]


def seen_hash(rows: Sequence[Row]) -> str:
    """A hash of what rows have besides token ids; empty if they have nothing else."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.seen.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if any(row.seen for row in rows) else ""


def model_inputs(
    ids_BL: Tensor, seen: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What a model is called with: token ids and its other inputs, pixels in its own precision."""
    return {"input_ids": ids_BL.to(device), "use_cache": False, **to_device(seen, device, dtype)}


def to_device(
    seen: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs other than token ids on a model's device, pixels in the model's own precision."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in seen.items()
    }


def alike(rows: Sequence[Row], slots: int, least: float = 0.0) -> Iterator[list[Row]]:
    """Runs of sorted rows that can share a batch.

    Args:
        rows: sorted by kind, then by length, up or down.
        slots: limit for a run's number of rows times its longest row; a single row may exceed it.
        least: the shortest row of a run has at least this share of the length of the longest.
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
