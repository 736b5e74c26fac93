"""Rows of a batch sorted by slot and cut into tiles, on the device and with sizes known beforehand.

A kernel works on a tile: up to `tile` rows of one slot, so that each packed byte is read once for
all of them. All layers share one grouping, which is made once per step. How many tiles a batch needs
depends on its data, and asking would stall the device; so there are as many as the worst batch of
this size needs, and those left over are marked as empty.

A compiler that traces a model for batches of any size cannot ask how many rows there are. So `Rows` can
hold tiles of every size, and an op chooses when it runs, or is captured in a graph.

Legend: T tokens, S slots, M tiles, K tile sizes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

TILES = (1, 16, 64)
"""Rows of a tile, for `group_all`."""
ALONE = 4
"""Rows of a batch up to which each is a tile of its own. If all are one tenant's, its bytes are unpacked
that many times; a captured graph does not know whose rows it will get, so the number is small."""
PREFILL = 256
"""Batches of more rows than this have the largest tiles."""


@dataclass(frozen=True)
class Rows:
    """Which rows belong to which slot; make it with `group_rows`, `group_one` or `group_all`."""

    slot_T: Tensor
    """int32 (T,), the slot of each row or −1."""
    order_T: Tensor
    """int32 (T,) or more, row numbers sorted by slot, those without a slot last."""
    tiles_M3: Tensor
    """int32 (M, 3): slot (−1: nothing to do), first place in `order_T`, number of rows. Or (K, M, 3),
    one for each of `TILES`."""
    tile: int
    """Rows that a tile can hold; 0: an op chooses one of `TILES` when it runs."""


_unused: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Buffers declared by `set_unused`, by address; weakly held, as others may come to lie there."""


def set_unused(slot_T: Tensor, unused: bool) -> None:
    """Declares whether all rows of a buffer of slots are the base's, until the next call for it.

    If so, ops on its rows return at once and launch nothing. A graph captured meanwhile is therefore one
    for batches of the base alone, and the buffer's owner makes sure that it runs for no others.
    """
    address = slot_T.untyped_storage().data_ptr()
    if unused:
        _unused[address] = slot_T
    else:
        _unused.pop(address, None)


def nobody(slot_T: Tensor) -> bool:
    """Whether it is known that no row has a slot: declared, or, on a CPU, seen in a microsecond.

    A compiled graph runs its ops for batches of the base alone too, where their checks and the rest would
    cost a small model some percent.
    """
    if len(_unused) and slot_T.untyped_storage().data_ptr() in _unused:
        return True
    return slot_T.device.type == "cpu" and slot_T.numel() > 0 and int(slot_T.max()) < 0


def tile_for(tokens: int, slots: int, *, least: int = 1) -> int:
    """Rows of a tile, for a batch of that many rows: one where each can be another tenant's.

    Args:
        tokens: rows of the batch.
        slots: slots of the pool.
        least: the smallest tile that a kernel works on.
    """
    tile = 1 if tokens <= min(ALONE, slots) else 16 if tokens <= PREFILL else 64
    return max(tile, least)


def chosen(
    tiles: Tensor, tile: int, tokens: int, slots: int, *, least: int = 1
) -> tuple[Tensor, int]:
    """The tiles (M, 3) that an op works on, and their rows: as given, or of a size that suits the batch.

    Arguments are as in `Rows` and `tile_for`.
    """
    if tile:
        return tiles, tile
    tile = tile_for(tokens, slots, least=least)
    return tiles[TILES.index(tile), : tile_count(tokens, slots, tile)], tile


def tile_count(tokens: int, slots: int, tile: int) -> int:
    """Tiles that a batch can need: each slot in use has at most one that is not full, and none empty."""
    return min(tokens, min(slots, tokens) + tokens // tile)


def group_rows(slot_T: Tensor, slots: int, *, tile: int = 16) -> Rows:
    """Groups the rows of a batch by slot. No host synchronisation; shapes depend on T alone.

    Args:
        slot_T: int32 or int64 (T,), the slot of each row in [0, slots), or −1 for the base alone.
            Any other value fails an assertion on the device.
        slots: slots of the pool.
        tile: rows of a tile, 1, 16 or 64. With 1 a tenant's bytes are read for each of its rows, and
            nothing is computed in vain: for batches where most tenants have one row. 16 reads the bytes
            once for decoding with several rows per tenant; 64 is for prefill.
    """
    order_T, first_S, last_S = _sorted(slot_T, slots)
    tiles_M3 = _tiles(first_S, last_S, slot_T.shape[0], tile)
    return Rows(slot_T.int(), order_T, tiles_M3, tile)


def group_one(slot_1: Tensor, tokens: int, *, tile: int = 16) -> Rows:
    """Groups a batch whose rows all have one slot, int32 (1,) and not −1: there is nothing to sort."""
    order_T = torch.arange(tokens, dtype=torch.int32, device=slot_1.device)
    start_M = order_T[::tile]
    fields_M = (slot_1.expand(len(start_M)), start_M, (tokens - start_M).clamp(max=tile))
    return Rows(slot_1.repeat(tokens), order_T, torch.stack(fields_M, 1), tile)


def group_all(slot_T: Tensor, slots: int) -> Rows:
    """Groups the rows of a batch into tiles of each size, as `group_rows` does."""
    tokens = slot_T.shape[0]
    order_T, first_S, last_S = _sorted(slot_T, slots)
    shape = (len(TILES), tokens, 3)
    tiles_KM3 = torch.full(shape, -1, dtype=torch.int32, device=slot_T.device)
    for k, tile in enumerate(TILES):
        tiles_KM3[k, : tile_count(tokens, slots, tile)] = _tiles(first_S, last_S, tokens, tile)
    return Rows(slot_T.int(), order_T, tiles_KM3, 0)


def _sorted(slot_T: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers sorted by slot, int32 (T,), and where among them each slot's begin and end, (S,)."""
    known = ((slot_T >= -1) & (slot_T < slots)).all()
    torch.ops.aten._assert_async.msg(known, f"slots: not in [-1, {slots})")
    # Rows without a slot come last, so that more of them would move no other row.
    sorted_T, order_T = torch.sort(torch.where(slot_T < 0, slots, slot_T), stable=True)
    slot_S = torch.arange(slots, device=slot_T.device, dtype=slot_T.dtype)
    first_S = torch.searchsorted(sorted_T, slot_S)
    last_S = torch.searchsorted(sorted_T, slot_S, right=True)
    return order_T.int(), first_S, last_S


def _tiles(first_S: Tensor, last_S: Tensor, tokens: int, tile: int) -> Tensor:
    """Tiles of `tile` rows at most, int32 (M, 3), as in `Rows`."""
    slots = first_S.shape[0]
    tiles_S = (last_S - first_S + tile - 1) // tile
    end_S = tiles_S.cumsum(0)
    tile_M = torch.arange(tile_count(tokens, slots, tile), device=first_S.device)
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
    return torch.stack(fields_M, 1).int()
