"""Where the packed bands of several tenants lie, and the table that says what lies where.

One uint8 tensor holds a slot for each tenant and one int64 table holds what a kernel must know of
it: widths, counts and byte offsets. Both live on the device and keep their addresses, so a captured
CUDA graph serves whatever is loaded later; a plan that went in as Python integers would be frozen
into the graph. A slot has a fixed size, which wastes what a small tenant does not fill: an allocator
of pages would need a second level of offsets in every kernel.

Legend: S slots, B bands of a slot (at most), F fields of a band, O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltacome.errors import ArtifactError, MismatchError, PlanError
from deltacome.format.spec import ALIGN, GROUP, Plan, band_sections, format_plan, rank

BITS, COUNT, FIRST = 0, 1, 2
"""Fields of a band: its width, its directions (0: no band), and the directions before it."""
V, U = 3, 7
"""First of the four fields of a factor: byte offsets in the slot of its low plane (or 16-bit values),
its high plane (three bits only), its scales and its zero points."""
S = 11
"""Field: byte offset of the singular values."""
FIELDS = 12


@dataclass(frozen=True)
class SlotPool:
    """Packed bands of one matrix for several tenants; make it with `create`."""

    shape: tuple[int, int]
    """(out, in) of the matrix."""
    max_rank: int
    """Directions that a slot can hold, over all of its bands."""
    group_size: int
    blobs_SN: Tensor
    """uint8 (S, N), N bytes of a slot, a multiple of 16."""
    table_SBF: Tensor
    """int64 (S, B, F)."""

    @classmethod
    def create(
        cls,
        shape: tuple[int, int],
        slots: int,
        *,
        slot_bytes: int,
        max_rank: int,
        max_bands: int = 4,
        group_size: int = GROUP,
        device: torch.device | str = "cpu",
    ) -> SlotPool:
        """An empty pool. Its sizes are fixed for good, as graphs are captured over them.

        Args:
            shape: (out, in) of the matrix.
            slots: tenants that can be resident at once.
            slot_bytes: bytes of the largest blob, below 2**31; `bands_nbytes` of the largest plan.
            max_rank: directions of the largest plan.
            max_bands: bands of the longest plan.
            group_size: entries of a direction that share a scale, the same for all slots.
            device: where the pool lies.

        Raises:
            PlanError: a size is not positive, or a slot too large for 32-bit offsets.
        """
        sizes = (*shape, slots, slot_bytes, max_rank, max_bands, group_size)
        if min(sizes) < 1 or slot_bytes > 2**31 - ALIGN:
            raise PlanError(
                "slot pool: expected positive sizes and slots below 2**31 bytes, got "
                f"shape {shape}, {slots} slots of {slot_bytes} bytes, rank {max_rank}, "
                f"{max_bands} bands, groups of {group_size}"
            )
        nbytes = -(-slot_bytes // ALIGN) * ALIGN
        blobs_SN = torch.zeros(slots, nbytes, dtype=torch.uint8, device=device)
        table_SBF = torch.zeros(slots, max_bands, FIELDS, dtype=torch.int64, device=device)
        return cls(shape, max_rank, group_size, blobs_SN, table_SBF)

    def load(self, slot: int, blob: Tensor, plan: Plan) -> None:
        """Copies a tenant's blob into a slot; rows of this slot get its delta from then on.

        Ordered with the kernels of the current stream. The slot is empty until all bytes are there,
        so a load that fails leaves an empty slot and never half a tenant. An empty slot adds
        nothing: the caller must not send it rows of a tenant whose load has failed.

        Args:
            slot: its number.
            blob: uint8 (nbytes,), as the artifact stores it, on any device.
            plan: the bands that the blob holds.

        Raises:
            MismatchError: there is no such slot.
            PlanError: the plan has too many bands or directions for this pool.
            ArtifactError: the blob is larger than a slot, or its size is not what the plan asks for.
        """
        self.clear(slot)
        nbytes = self.blobs_SN.shape[1]
        max_bands = self.table_SBF.shape[1]
        if not plan or len(plan) > max_bands or rank(plan) > self.max_rank:
            raise PlanError(
                f"slot {slot}: expected 1 to {max_bands} bands of at most {self.max_rank} "
                f"directions, got {format_plan(plan)!r}"
            )
        layout, expected = band_sections(self.shape, plan, self.group_size)
        if blob.dtype != torch.uint8 or blob.shape != (expected,) or expected > nbytes:
            raise ArtifactError(
                f"slot {slot}: expected {expected} bytes of uint8 for {format_plan(plan)!r} in a "
                f"slot of {nbytes}, got {tuple(blob.shape)} of {blob.dtype}"
            )
        fields_BF = torch.zeros(max_bands, FIELDS, dtype=torch.int64)
        first = 0
        for row_F, band, sections in zip(fields_BF, plan, layout, strict=False):
            offsets = {section.name: section.offset for section in sections}
            row_F[:V] = torch.tensor([band.bits, band.count, first])
            row_F[V : V + 4] = torch.tensor(_factor_offsets("v", band.bits, offsets))
            row_F[U : U + 4] = torch.tensor(_factor_offsets("u", band.bits, offsets))
            row_F[S] = offsets["s"]
            first += band.count
        self.blobs_SN[slot, :expected].copy_(blob)
        self.table_SBF[slot].copy_(fields_BF)

    def clear(self, slot: int) -> None:
        """Empties a slot: its rows get nothing from then on.

        Raises:
            MismatchError: there is no such slot.
        """
        slots = len(self.table_SBF)
        if not 0 <= slot < slots:
            raise MismatchError(f"slot pool: expected a slot in [0, {slots}), got {slot}")
        self.table_SBF[slot].zero_()


def _factor_offsets(side: str, bits: int, offsets: dict[str, int]) -> list[int]:
    if bits == 16:
        return [offsets[f"{side}.values"], 0, 0, 0]
    low = offsets[f"{side}.codes{2 if bits == 3 else bits}"]
    high = offsets[f"{side}.codes1"] if bits == 3 else 0
    return [low, high, offsets[f"{side}.scale"], offsets[f"{side}.zero"]]
