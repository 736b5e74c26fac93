"""Rows of a batch sorted by slot and cut into tiles, on the device and with sizes known beforehand.

A kernel works on a tile: up to `tile` rows of one slot, so that each packed byte is read once for
all of them. All layers share one grouping, which is made once a step. How many tiles a batch needs
depends on its data, and asking would stall the device; so there are as many as the worst batch of
this size needs, and those left over say so.

Legend: T tokens, S slots, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which rows belong to which slot; make it with `group_rows`."""

    slot_T: Tensor
    """int32 (T,), the slot of each row or −1."""
    order_T: Tensor
    """int32 (T,), row numbers sorted by slot, those without a slot last."""
    tiles_M3: Tensor
    """int32 (M, 3): slot (−1: nothing to do), first place in `order_T`, rows."""
    tile: int
    """Rows that a tile can hold."""


def nobody(slot_T: Tensor) -> bool:
    """Whether it is known that no row has a slot: on a CPU, where asking costs a microsecond.

    A graph that was compiled runs its ops for batches of the base alone too: checks and all would then
    cost a small model some percent.
    """
    return slot_T.device.type == "cpu" and slot_T.numel() > 0 and int(slot_T.max()) < 0


def group_rows(slot_T: Tensor, slots: int, *, tile: int = 16) -> Rows:
    """Groups the rows of a batch by slot. No host synchronisation; shapes depend on T alone.

    Args:
        slot_T: int32 or int64 (T,), the slot of each row in [0, slots), or −1 for the base alone.
            Another value fails an assertion on the device.
        slots: slots of the pool.
        tile: rows of a tile, 1, 16 or 64. With 1 a tenant's bytes are read for each of its rows, and
            nothing is computed in vain: for batches where most tenants have one. 16 reads them once
            for decoding with several rows each, 64 is for prefill.
    """
    tokens, device = slot_T.shape[0], slot_T.device
    known = ((slot_T >= -1) & (slot_T < slots)).all()
    torch.ops.aten._assert_async.msg(known, f"slots: not in [-1, {slots})")
    # Rows without a slot come last, so that more of them move no other row's place.
    sorted_T, order_T = torch.sort(torch.where(slot_T < 0, slots, slot_T), stable=True)
    slot_S = torch.arange(slots, device=device, dtype=slot_T.dtype)
    first_S = torch.searchsorted(sorted_T, slot_S)
    last_S = torch.searchsorted(sorted_T, slot_S, right=True)
    tiles_S = (last_S - first_S + tile - 1) // tile
    end_S = tiles_S.cumsum(0)

    # Each slot in use has at most one tile that is not full, and no tile is empty.
    tiles = min(tokens, min(slots, tokens) + tokens // tile)
    tile_M = torch.arange(tiles, device=device)
    found_M = torch.searchsorted(end_S, tile_M, right=True)
    used_M, slot_M = found_M < slots, found_M.clamp(max=slots - 1)
    start_M = first_S[slot_M] + (tile_M - (end_S - tiles_S)[slot_M]) * tile
    rows_M = (last_S[slot_M] - start_M).clamp(max=tile)
    # `where` with numbers: a small tensor from the host would break the capture of a graph.
    fields_M = (
        torch.where(used_M, slot_M, -1),
        torch.where(used_M, start_M, 0),
        torch.where(used_M, rows_M, 0),
    )
    tiles_M3 = torch.stack(fields_M, 1)
    return Rows(slot_T.int(), order_T.int(), tiles_M3.int(), tile)
