"""Rows of a batch, grouped by slot."""

import pytest
import torch
from ops_helpers import DEVICE, PLANS, filled, randn

from deltacome.ops.bands import band_rows, bands
from deltacome.ops.rows import Rows, chosen, group_all, group_one, group_rows, nobody, set_unused


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
def test_tiles_cover_each_row_once(tokens, slots, tile):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        slot_T = torch.randint(-1, slots, (tokens,), generator=generator)
        if seed == 0:
            slot_T.fill_(slots - 1)
        rows = group_rows(slot_T, slots, tile=tile)
        covered = []
        for slot, start, count in rows.tiles_M3.tolist():
            assert (count > 0) == (slot >= 0)
            assert count <= tile
            places = rows.order_T[start : start + count].tolist()
            assert all(slot_T[place] == slot for place in places)
            covered += places
        assert sorted(covered) == (slot_T >= 0).nonzero().view(-1).tolist()
        if tile > 1:  # a tenant's rows are adjacent, so all its tiles but one are full
            needed = sum(-(-int((slot_T == slot).sum()) // tile) for slot in range(slots))
            assert sum(slot >= 0 for slot, _, _ in rows.tiles_M3.tolist()) == needed


@pytest.mark.parametrize("tile", [1, 16, 64])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 300])
def test_rows_of_one_slot_need_no_sorting(tokens, tile):
    for slots in (1, 3):
        sorted_ = group_rows(torch.full((tokens,), slots - 1), slots, tile=tile)
        rows = group_one(torch.tensor([slots - 1], dtype=torch.int32), tokens, tile=tile)
        used = sorted_.tiles_M3[sorted_.tiles_M3[:, 0] >= 0]
        expected = sorted_.slot_T, sorted_.order_T, used
        for one, other in zip((rows.slot_T, rows.order_T, rows.tiles_M3), expected, strict=True):
            assert one.dtype == torch.int32
            assert torch.equal(one, other)


def test_rows_without_a_slot_move_nothing():
    """A padded batch has the same order and the same tiles, followed by more."""
    slots = [2, -1, 0, 2, 1]
    few = group_rows(torch.tensor(slots), 3, tile=4)
    many = group_rows(torch.tensor([*slots, *[-1] * 20]), 3, tile=4)
    live = sum(slot >= 0 for slot in slots)
    assert torch.equal(few.order_T[:live], many.order_T[:live])
    used = few.tiles_M3[few.tiles_M3[:, 0] >= 0]
    assert torch.equal(used, many.tiles_M3[: len(used)])
    assert (many.tiles_M3[len(used) :, 0] == -1).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the assertion ends the process")
@pytest.mark.parametrize("slots", [[0, 3], [-2, 0]])
def test_slots_out_of_range(slots):
    with pytest.raises(RuntimeError, match=r"slots: not in \[-1, 3\)"):
        group_rows(torch.tensor(slots), 3)


@pytest.mark.parametrize(
    ("tokens", "slots", "tile"),
    [(1, 1, 1), (2, 1, 16), (4, 8, 1), (5, 8, 16), (256, 8, 16), (257, 8, 64)],
)
def test_tiles_of_the_size_that_is_chosen(tokens, slots, tile):
    """In buffers that are larger than the batch and not cleared after its end."""
    slot_T = torch.randint(-1, slots, (tokens,), generator=torch.Generator().manual_seed(tokens))
    held = group_all(torch.cat([slot_T, torch.full((400,), -1)]), slots)
    got, of = chosen(held.tiles_M3, held.tile, tokens, slots)
    expected = group_rows(slot_T, slots, tile=tile)
    assert of == tile
    assert torch.equal(got, expected.tiles_M3)
    live = int((slot_T >= 0).sum())
    assert torch.equal(held.order_T[:live], expected.order_T[:live])
    assert chosen(held.tiles_M3, held.tile, tokens, slots, least=16)[1] == max(16, tile)
    assert chosen(expected.tiles_M3, tile, tokens, slots) == (expected.tiles_M3, tile)


def test_rows_that_are_said_to_be_the_bases():
    """Until told otherwise, an op on any part of the buffer does nothing, without reading it."""
    table, _ = filled(140, [140], PLANS)
    buffer_T = torch.zeros(9, dtype=torch.int32, device=DEVICE)
    rows = Rows(buffer_T[2:5], buffer_T, buffer_T, 1)
    others = group_rows(torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
    x_TI, ids_T = randn(3, 140), torch.arange(3, device=DEVICE)

    def added(rows):
        ys = torch.zeros(3, 140, device=DEVICE), torch.zeros(3, 140, device=DEVICE)
        bands(ys[0], x_TI, rows, table)
        band_rows(ys[1], ids_T, rows, table)
        return [bool(y.any()) for y in ys]

    set_unused(buffer_T, True)
    assert added(rows) == [False, False]
    assert added(others) == [True, True]
    set_unused(buffer_T, False)
    assert added(rows) == [True, True]
    set_unused(buffer_T, False)  # may be called twice


def test_another_buffer_at_the_same_address():
    """What was set for a buffer ends with it."""
    memory = torch.zeros(9, dtype=torch.int32, device=DEVICE)
    first = memory.view(9)
    set_unused(first, True)
    assert nobody(memory)
    del first
    assert not nobody(memory)
