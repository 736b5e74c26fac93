"""Where the packed bytes of several tenants lie, and the tables that say what lies where.

One uint8 tensor holds a slot for each tenant: all packed terms of its artifact, one after the other,
so that making a tenant resident is one copy. Each layer has an int64 table of what it must know about
each slot: widths, counts and byte offsets. Both live on the device and keep their addresses, so a
captured CUDA graph serves whatever is loaded later; a plan passed in as Python integers would be frozen
into the graph.

A slot has a fixed size, which wastes what a small tenant does not fill; allocating in pages would need
a second level of offsets in every kernel.

A layer can be several matrices with one input, their outputs side by side: q, k and v, or gate and up,
which engines multiply at once. They are the *parts* of its table.

Legend: S slots, N bytes of a slot, P parts, B bands of a part (at most), F fields.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from deltacome.errors import ArtifactError, MismatchError, PlanError
from deltacome.format.spec import (
    ALIGN,
    GROUP,
    Plan,
    aligned,
    band_sections,
    format_plan,
    rank,
    sign_sections,
)

BITS, COUNT, FIRST = 0, 1, 2
"""Fields of a band: its width, its number of directions (0: no band), and the number of directions
before it in its slot, over all parts."""
V, U = 3, 7
"""First of the four fields of a factor: byte offsets in the slot of its low plane (or 16-bit values),
its high plane (three bits only), its scales and its zero points."""
S = 11
"""Field: byte offset of the singular values."""
FIELDS = 12

WORDS, SCALES, SCALE_COUNT = 0, 1, 2
"""Fields of a signs term: byte offsets of its words and its scales, and how many scales there are (one
for the matrix or one for each row; 0: no term)."""
SIGN_FIELDS = 3


class Pool:
    """Packed bytes of several tenants.

    Attributes:
        blobs_SN: uint8 (S, N), N a multiple of 16.
    """

    def __init__(self, slots: int, slot_bytes: int, *, device: torch.device | str = "cpu") -> None:
        """An empty pool. Its sizes are fixed for good, as graphs are captured over them.

        Args:
            slots: tenants that can be resident at once.
            slot_bytes: bytes of the largest tenant, as `arrange` counts them.
            device: where the pool lies.

        Raises:
            PlanError: a size is negative, or there is no slot.
        """
        if slots < 1 or slot_bytes < 0:
            raise PlanError(
                f"slot pool: expected at least one slot, got {slots} of {slot_bytes} bytes"
            )
        nbytes = aligned(slot_bytes)
        self.blobs_SN = torch.zeros(slots, nbytes, dtype=torch.uint8, device=device)

    def load(self, slot: int, offset: int, blob: Tensor) -> None:
        """Copies bytes into a slot, ordered with the kernels of the current stream.

        Tables say which of the bytes are used: clear them before, and load them after.

        Args:
            slot: its number.
            offset: where in the slot, a multiple of 16.
            blob: uint8 (nbytes,), on any device.

        Raises:
            MismatchError: there is no such slot.
            ArtifactError: the bytes do not fit.
        """
        slots, nbytes = self.blobs_SN.shape
        check_slot(slot, slots)
        stop = offset + blob.numel()
        if blob.dtype != torch.uint8 or blob.dim() != 1 or offset % ALIGN or not stop <= nbytes:
            raise ArtifactError(
                f"slot {slot}: expected at most {nbytes} bytes of uint8 at a multiple of {ALIGN}, "
                f"got {tuple(blob.shape)} of {blob.dtype} at {offset}"
            )
        self.blobs_SN[slot, offset:stop].copy_(blob, non_blocking=True)


Name = TypeVar("Name", bound=Hashable)


def arrange(sizes: Mapping[Name, int]) -> tuple[dict[Name, int], int]:
    """Places blobs one after the other: their offsets in a slot, and the bytes that they take.

    Args:
        sizes: bytes of each blob, by name.
    """
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += aligned(nbytes)
    return offsets, end


@dataclass(frozen=True)
class PlacedBands:
    """A bands term in a slot."""

    offset: int
    """Of its blob in the slot, in bytes."""
    plan: Plan


class BandTable:
    """What each slot of a pool holds for one layer's bands; make it along with the pool.

    Attributes:
        pool: where the bytes lie.
        in_size: inputs of the layer (columns of its matrices).
        outs: rows of each part.
        max_rank: directions that a slot can hold, over all bands of all parts.
        group_size: entries of a direction that share a scale, the same for all slots.
        fields_SPBF: int64 (S, P, B, F).
    """

    def __init__(
        self,
        pool: Pool,
        in_size: int,
        outs: Sequence[int],
        *,
        max_rank: int | None = None,
        max_bands: int = 4,
        group_size: int = GROUP,
    ) -> None:
        """An empty table.

        Args:
            pool: where the bytes lie.
            in_size: inputs of the layer.
            outs: rows of each part.
            max_rank: directions of the largest tenant; by default as many as there can be.
            max_bands: bands of the longest plan.
            group_size: entries of a direction that share a scale.

        Raises:
            PlanError: a size is not positive.
        """
        if max_rank is None:
            max_rank = sum(min(out, in_size) for out in outs)
        if min(in_size, *outs, max_rank, max_bands, group_size) < 1:
            raise PlanError(
                f"band table: expected positive sizes, got {in_size} inputs, outputs {list(outs)}, "
                f"rank {max_rank}, {max_bands} bands, groups of {group_size}"
            )
        self.pool = pool
        self.in_size = in_size
        self.outs = list(outs)
        self.max_rank = max_rank
        self.group_size = group_size
        slots, device = len(pool.blobs_SN), pool.blobs_SN.device
        shape = (slots, len(self.outs), max_bands, FIELDS)
        self.fields_SPBF = torch.zeros(shape, dtype=torch.int64, device=device)

    def load(self, slot: int, parts: Sequence[PlacedBands | None]) -> None:
        """Records what a slot holds; rows of this slot get its delta from then on.

        Args:
            slot: its number.
            parts: for each part its term, or None for a part that stays as in the base.

        Raises:
            MismatchError: there is no such slot or part.
            PlanError: a plan has too many bands or directions for this table.
            ArtifactError: a term reaches past the end of the slot.
        """
        self.clear(slot)
        self.fields_SPBF[slot].copy_(self.fields(slot, parts))

    def fields(self, slot: int, parts: Sequence[PlacedBands | None]) -> Tensor:
        """The entries that `load` writes, int64 (P, B, F) on the CPU; errors as `load`."""
        nbytes = self.pool.blobs_SN.shape[1]
        fields_PBF = torch.zeros(self.fields_SPBF.shape[1:], dtype=torch.int64, device="cpu")
        if len(parts) != len(self.outs):
            raise MismatchError(f"slot {slot}: expected {len(self.outs)} parts, got {len(parts)}")
        first, max_bands = 0, fields_PBF.shape[1]
        for fields_BF, out, part in zip(fields_PBF, self.outs, parts, strict=True):
            if part is None:
                continue
            first += rank(part.plan)
            if len(part.plan) > max_bands or first > self.max_rank:
                raise PlanError(
                    f"slot {slot}: expected at most {max_bands} bands a matrix and "
                    f"{self.max_rank} directions in a layer, got {format_plan(part.plan)!r} "
                    f"and {first} directions"
                )
            shape = (out, self.in_size)
            layout, expected = band_sections(shape, part.plan, self.group_size)
            if part.offset % ALIGN or part.offset + expected > nbytes:
                raise ArtifactError(
                    f"slot {slot}: expected {format_plan(part.plan)!r} within {nbytes} bytes, got "
                    f"{expected} bytes at {part.offset}"
                )
            row = first - rank(part.plan)
            for fields_F, band, sections in zip(fields_BF, part.plan, layout, strict=False):
                at = {section.name: part.offset + section.offset for section in sections}
                numbers = [band.bits, band.count, row, *_factor("v", band.bits, at)]
                numbers += [*_factor("u", band.bits, at), at["s"]]
                fields_F.copy_(torch.tensor(numbers, device="cpu"))
                row += band.count
        return fields_PBF

    def clear(self, slot: int) -> None:
        """Empties a slot: its rows get nothing from then on.

        Raises:
            MismatchError: there is no such slot.
        """
        check_slot(slot, len(self.fields_SPBF))
        self.fields_SPBF[slot].zero_()


@dataclass(frozen=True)
class PlacedSigns:
    """A signs term in a slot."""

    offset: int
    """Of its blob in the slot, in bytes."""
    scales: int
    """One for the matrix, or one for each row."""


class SignTable:
    """What each slot of a pool holds for one layer's signs.

    Attributes:
        pool: where the bytes lie.
        in_size: inputs of the layer.
        outs: rows of each part.
        fields_SPF: int64 (S, P, F).
    """

    def __init__(self, pool: Pool, in_size: int, outs: Sequence[int]) -> None:
        if min(in_size, *outs) < 1:
            raise PlanError(f"sign table: expected positive sizes, got {in_size} and {list(outs)}")
        self.pool = pool
        self.in_size = in_size
        self.outs = list(outs)
        shape = (len(pool.blobs_SN), len(self.outs), SIGN_FIELDS)
        self.fields_SPF = torch.zeros(shape, dtype=torch.int64, device=pool.blobs_SN.device)

    def load(self, slot: int, parts: Sequence[PlacedSigns | None]) -> None:
        """Records what a slot holds; arguments and errors as in `BandTable.load`."""
        self.clear(slot)
        self.fields_SPF[slot].copy_(self.fields(slot, parts))

    def fields(self, slot: int, parts: Sequence[PlacedSigns | None]) -> Tensor:
        """The entries that `load` writes, int64 (P, F) on the CPU; errors as `load`."""
        nbytes = self.pool.blobs_SN.shape[1]
        fields_PF = torch.zeros(self.fields_SPF.shape[1:], dtype=torch.int64, device="cpu")
        if len(parts) != len(self.outs):
            raise MismatchError(f"slot {slot}: expected {len(self.outs)} parts, got {len(parts)}")
        for fields_F, out, part in zip(fields_PF, self.outs, parts, strict=True):
            if part is None:
                continue
            words, scales, expected = sign_sections((out, self.in_size), part.scales)
            if part.offset % ALIGN or part.offset + expected > nbytes:
                raise ArtifactError(
                    f"slot {slot}: expected signs within {nbytes} bytes, got {expected} bytes at "
                    f"{part.offset}"
                )
            numbers = [part.offset + words, part.offset + scales, part.scales]
            fields_F.copy_(torch.tensor(numbers, device="cpu"))
        return fields_PF

    def clear(self, slot: int) -> None:
        """Empties a slot; errors as `BandTable.clear`."""
        check_slot(slot, len(self.fields_SPF))
        self.fields_SPF[slot].zero_()


def check_slot(slot: int, slots: int) -> None:
    """Raises MismatchError unless there is such a slot."""
    if not 0 <= slot < slots:
        raise MismatchError(f"slot pool: expected a slot in [0, {slots}), got {slot}")


def _factor(side: str, bits: int, offsets: Mapping[str, int]) -> list[int]:
    if bits == 16:
        return [offsets[f"{side}.values"], 0, 0, 0]
    low = offsets[f"{side}.codes{2 if bits == 3 else bits}"]
    high = offsets[f"{side}.codes1"] if bits == 3 else 0
    return [low, high, offsets[f"{side}.scale"], offsets[f"{side}.zero"]]
