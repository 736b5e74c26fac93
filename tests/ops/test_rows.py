"""Rows of a batch, grouped by slot."""

import pytest
import torch
from ops_helpers import DEVICE

from deltacome.ops.rows import group_rows


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
        if tile > 1:  # rows of one tenant are together: its tiles are full but for one
            needed = sum(-(-int((slot_T == slot).sum()) // tile) for slot in range(slots))
            assert sum(slot >= 0 for slot, _, _ in rows.tiles_M3.tolist()) == needed


def test_rows_without_a_slot_move_nothing():
    """A batch that is padded has the same order and the same tiles, and then more."""
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
