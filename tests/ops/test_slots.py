"""Pools and tables: where things lie, and what is refused."""

import pytest
import torch
from artifact_helpers import random_bands

from deltacome.errors import ArtifactError, MismatchError, PlanError
from deltacome.format.codec import write_bands
from deltacome.format.spec import Band, bands_nbytes
from deltacome.ops.slots import (
    FIRST,
    BandTable,
    PlacedBands,
    PlacedSigns,
    Pool,
    SignTable,
    arrange,
)

PLAN = (Band(3, 2), Band(2, 4))


def test_blobs_lie_one_behind_the_other():
    offsets, nbytes = arrange({"a": 16, "b": 5, "c": 0, "d": 33})
    assert offsets == {"a": 0, "b": 16, "c": 32, "d": 32}
    assert nbytes == 80
    assert arrange({}) == ({}, 0)


def test_bytes_are_those_of_the_blob():
    blob = write_bands(random_bands((70, 140), PLAN, 128))
    pool = Pool(3, len(blob) + 32)
    pool.load(1, 32, blob)
    assert torch.equal(pool.blobs_SN[1, 32 : 32 + len(blob)], blob)
    assert not pool.blobs_SN[[0, 2]].any()
    assert not pool.blobs_SN[1, :32].any()


def test_what_a_pool_refuses():
    pool, blob = Pool(2, 64), torch.zeros(48, dtype=torch.uint8)
    for slot in (-1, 2):
        with pytest.raises(MismatchError, match=r"\[0, 2\)"):
            pool.load(slot, 0, blob)
    for offset, wrong in ((32, blob), (8, blob[:8]), (0, blob.float()), (0, blob[None])):
        with pytest.raises(ArtifactError, match="at most 64 bytes"):
            pool.load(0, offset, wrong)
    for slots, nbytes in ((0, 64), (1, -1)):
        with pytest.raises(PlanError, match="at least one slot"):
            Pool(slots, nbytes)


def test_what_a_table_refuses():
    nbytes = bands_nbytes((70, 140), PLAN)
    pool = Pool(2, nbytes)
    table = BandTable(pool, 140, [70, 70], max_rank=9, max_bands=2)
    table.load(0, [PlacedBands(0, PLAN), None])
    for slot in (-1, 2):
        with pytest.raises(MismatchError, match=r"\[0, 2\)"):
            table.load(slot, [None, None])
        with pytest.raises(MismatchError, match=r"\[0, 2\)"):
            table.clear(slot)
    with pytest.raises(MismatchError, match="expected 2 parts, got 1"):
        table.load(0, [None])
    assert not table.fields_SPBF[0].any()  # the refused load left the slot empty
    with pytest.raises(PlanError, match="at most 2 bands"):
        table.load(0, [PlacedBands(0, (Band(1, 1),) * 3), None])
    with pytest.raises(PlanError, match="9 directions"):
        table.load(0, [PlacedBands(0, PLAN), PlacedBands(0, PLAN)])
    for offset in (16, 8):
        with pytest.raises(ArtifactError, match=f"within {nbytes} bytes"):
            table.load(1, [PlacedBands(offset, PLAN), None])
    with pytest.raises(PlanError, match="positive sizes"):
        BandTable(pool, 140, [70], max_bands=0)


def test_directions_are_counted_over_all_parts():
    pool = Pool(1, 2 * bands_nbytes((70, 140), PLAN))
    table = BandTable(pool, 140, [70, 70])
    second = bands_nbytes((70, 140), PLAN)
    table.load(0, [PlacedBands(0, PLAN), PlacedBands(second, PLAN)])
    assert table.fields_SPBF[0, :, :2, FIRST].tolist() == [[0, 2], [6, 8]]
    assert table.max_rank == 140  # as many as can exist
    with pytest.raises(
        ArtifactError, match="bytes at 8"
    ):  # there is room, but loads are of 16 bytes
        table.load(0, [PlacedBands(8, PLAN), None])


def test_what_a_table_of_signs_refuses():
    table = SignTable(Pool(2, 4096), 140, [70])
    table.load(0, [PlacedSigns(0, 70)])
    with pytest.raises(PlanError, match="1 or 70 scales, got 2"):
        table.load(0, [PlacedSigns(0, 2)])
    with pytest.raises(ArtifactError, match="within 4096 bytes"):
        table.load(0, [PlacedSigns(4080, 1)])
    with pytest.raises(ArtifactError, match="bytes at 8"):
        table.load(0, [PlacedSigns(8, 1)])
    with pytest.raises(MismatchError, match="expected 1 parts"):
        table.load(0, [])
    with pytest.raises(MismatchError, match=r"\[0, 2\)"):
        table.clear(2)
    with pytest.raises(PlanError, match="positive sizes"):
        SignTable(Pool(1, 16), 0, [1])
