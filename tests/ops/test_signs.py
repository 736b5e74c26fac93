"""`signs` against the dense deltas in float64."""

import pytest
import torch
from ops_helpers import (
    DEVICE,
    INTERPRETED,
    MIXES,
    TILES,
    assert_added,
    assert_framed,
    expected_of,
    filled_signs,
    framed,
    randn,
    rows_of,
)

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops.signs import signs

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)


def check(slots, table, deltas, impl, tile, dtype):
    x_TI = randn(len(slots), table.in_size, dtype=dtype)
    frame, y_TO = framed(randn(len(slots), sum(table.outs), seed=1, dtype=dtype))
    before = y_TO.clone()
    assert signs(y_TO, x_TI, rows_of(slots, table, tile), table, impl=impl) is None
    assert_added(y_TO, before, expected_of(x_TI, slots, deltas))
    assert_framed(frame, sum(table.outs))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("slots", MIXES, ids=str)
def test_tenant_mixes(impl, slots, tile):
    check(slots, *filled_signs(140, [70]), impl, tile, torch.float32)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "outs"), [(1, [1]), (65, [63]), (128, [128, 64, 64]), (200, [70, 1, 200])]
)
def test_shapes_and_dtypes(impl, size, outs, dtype, tile):
    check(MIXES[5], *filled_signs(size, outs), impl, tile, dtype)


def test_many_rows_of_a_few(impl):
    check([2] * 3 + [1] * 70 + [-1] + [0] * 64, *filled_signs(140, [70]), impl, 64, torch.float32)


def test_strides_are_free(impl):
    table, deltas = filled_signs(140, [70])
    x_TI, whole = randn(140, 3).T, randn(3, 200, seed=1)
    for y_TO in (whole[:, 5:75], whole[:, 1:141:2]):
        before = y_TO.clone()
        signs(y_TO, x_TI, rows_of([2, -1, 0], table), table, impl=impl)
        assert_added(y_TO, before, expected_of(x_TI, [2, -1, 0], deltas))


def test_a_slot_that_was_cleared(impl):
    table, deltas = filled_signs(140, [70])
    table.clear(0)
    check([0, 1], table, [torch.zeros_like(deltas[0]), *deltas[1:]], impl, 16, torch.float32)


def test_what_does_not_fit(impl):
    table, _ = filled_signs(140, [70])
    rows = rows_of([0, 1], table)
    y_TO, x_TI = torch.zeros(2, 70, device=DEVICE), randn(2, 140)
    with pytest.raises(MismatchError, match="signs: expected"):
        signs(y_TO[:, :69], x_TI, rows, table, impl=impl)
    with pytest.raises(MismatchError, match="signs: expected"):
        signs(y_TO, x_TI.long(), rows, table, impl=impl)
    with pytest.raises(UnsupportedError, match="'fast'"):
        signs(y_TO, x_TI, rows, table, impl="fast")
    with pytest.raises(UnsupportedError, match="inference"):
        signs(y_TO, x_TI.requires_grad_(), rows, table, impl=impl)
    assert not y_TO.any()


def test_registration(impl):
    table, _ = filled_signs(70, [80])
    rows = rows_of([0, -1, 1], table)
    arguments = (
        *(randn(3, 80), randn(3, 70), rows.slot_T, rows.order_T, rows.tiles_M3),
        *(table.pool.blobs_SN, table.fields_SPF, table.outs, rows.tile, impl),
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.deltacome.signs.default, arguments, test_utils=tests)
