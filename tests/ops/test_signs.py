"""`signs` against the dense deltas in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import (
    DEVICE,
    DTYPES,
    MIXED,
    MIXES,
    TILES,
    any_example,
    assert_added,
    assert_framed,
    expected_of,
    filled_signs,
    framed,
    randn,
    rows_of,
)

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops.rows import group_all
from deltacome.ops.signs import sign_rows, signs
from deltacome.ops.slots import Pool, SignTable


def check(slots, table, deltas, impl, tile, dtype, seed=0):
    x_TI = randn(len(slots), table.in_size, seed=seed, dtype=dtype)
    frame, y_TO = framed(randn(len(slots), sum(table.outs), seed=seed + 1, dtype=dtype))
    before = y_TO.clone()
    assert signs(y_TO, x_TI, rows_of(slots, table, tile), table, impl=impl) is None
    assert_added(y_TO, before, expected_of(x_TI, slots, deltas))
    assert_framed(frame, sum(table.outs))


@pytest.mark.parametrize(("slots", "tile"), MIXED, ids=str)
def test_tenant_mixes(impl, slots, tile):
    check(slots, *filled_signs(140, [70]), impl, tile, torch.float32)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "outs"), [(1, [1]), (65, [63]), (128, [128, 64, 64]), (200, [70, 1, 200])]
)
def test_shapes_and_dtypes(impl, size, outs, dtype, tile):
    check(MIXES[5], *filled_signs(size, outs), impl, tile, dtype)


@pytest.mark.parametrize("tile", TILES)
@any_example
@given(data=st.data(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_any_shape(impl, tile, data, seed, dtype):
    """Other shapes, tenants and numbers in each run."""
    outs = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3), "outs")
    size = data.draw(st.integers(1, 300), "in")
    slots = data.draw(st.lists(st.integers(-1, 3), max_size=8), "slots")
    table, deltas = filled_signs(size, outs, seed=seed)
    check(slots, table, deltas, impl, tile, dtype, seed)
    if len(outs) == 1:
        check_rows(slots, table, deltas, dtype, tile, seed=seed)


def test_many_rows_of_a_few(impl):
    check([2] * 3 + [1] * 70 + [-1] + [0] * 64, *filled_signs(140, [70]), impl, 64, torch.float32)


@pytest.mark.parametrize("tokens", [3, 9, 257])
def test_tiles_that_the_op_chooses(impl, tokens):
    slots = [2, 0, -1, 0, 1, 3, 2, 0, 1, *[0] * 140, *[1] * 108][:tokens]
    table, deltas = filled_signs(140, [70])
    x_TI, y_TO = randn(tokens, 140), torch.zeros(tokens, 70, device=DEVICE)
    rows = group_all(torch.tensor(slots, dtype=torch.int32, device=DEVICE), 4)
    signs(y_TO, x_TI, rows, table, impl=impl)
    assert_added(y_TO, torch.zeros(tokens, 70), expected_of(x_TI, slots, deltas))


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


def check_rows(slots, table, deltas, dtype, tile=16, scale=1.0, seed=0):
    """Checks `sign_rows` on outputs framed by NaN; rows that get nothing have ids that don't exist."""
    out = table.outs[0]
    ids_T = (torch.arange(len(slots)) * 7 + 3) % out
    empty = torch.tensor([slot < 0 or not deltas[slot].any() for slot in slots], dtype=torch.bool)
    ids_T[empty] = 10**9
    frame, y_TI = framed(randn(len(slots), table.in_size, seed=seed + 1, dtype=dtype))
    before = y_TI.clone()
    assert (
        sign_rows(y_TI, ids_T.to(DEVICE), rows_of(slots, table, tile), table, scale=scale) is None
    )
    nothing = torch.zeros(table.in_size, dtype=torch.float64)
    expected = [
        nothing if skip else scale * deltas[slot][i]
        for slot, i, skip in zip(slots, ids_T.tolist(), empty.tolist(), strict=True)
    ]
    expected = torch.stack(expected) if expected else torch.zeros(0, table.in_size).double()
    assert_added(y_TI, before, expected)
    assert_framed(frame, table.in_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slots", MIXES, ids=str)
def test_rows_of_an_embedding(slots, dtype):
    for out, size in ((1, 1), (63, 65), (70, 140), (9, 128)):
        check_rows(slots, *filled_signs(size, [out]), dtype)
        check_rows(slots, *filled_signs(size, [out]), dtype, scale=-7.5)


def test_rows_of_an_empty_pool():
    for nbytes in (0, 16):
        table = SignTable(Pool(2, nbytes, device=DEVICE), 700, [90])
        check_rows([0, -1, 1], table, [torch.zeros(90, 700)] * 2, torch.float32)


def test_rows_that_do_not_fit():
    table, _ = filled_signs(70, [80])
    rows, y_TI = rows_of([1, 0], table), torch.zeros(2, 70, device=DEVICE)
    for ids_T in (torch.zeros(3).long(), torch.zeros(1, 2).long(), torch.zeros(2)):
        with pytest.raises(MismatchError, match="ids"):
            sign_rows(y_TI, ids_T.to(DEVICE), rows, table)
    two, _ = filled_signs(70, [80, 80])
    with pytest.raises(MismatchError, match="one part"):
        sign_rows(y_TI, torch.zeros(2).long().to(DEVICE), rows, two)
    if DEVICE == "cpu":  # on a GPU the assertion ends the process
        for ids in ([0, 80], [-1, 0]):
            with pytest.raises(RuntimeError, match=r"\[0, 80\)"):
                sign_rows(y_TI, torch.tensor(ids), rows, table)
    assert not y_TI.any()


def test_rows_are_registered():
    table, _ = filled_signs(70, [80])
    rows, ids_T = rows_of([0, -1, 1], table), torch.tensor([0, 79, 3], device=DEVICE)
    arguments = (randn(3, 70), ids_T, rows.slot_T, table.pool.blobs_SN, table.fields_SPF, 80, 2.0)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.deltacome.sign_rows.default, arguments, test_utils=tests)
