"""`norm` against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import DEVICE, DTYPES, MIXES, any_example, assert_framed, framed, randn

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops.norm import norm
from deltacome.ops.rows import group_rows


def rows_of(slots):
    return group_rows(torch.tensor(slots, dtype=torch.int64, device=DEVICE), 4)


def check(slots, size, dtype, impl, seed=0):
    x_TH = 3 * randn(len(slots), size, seed=seed, dtype=dtype)
    weights_SH = randn(4, size, seed=seed + 2)
    frame, y_TH = framed(randn(len(slots), size, seed=seed + 1, dtype=dtype))
    before = y_TH.clone()
    assert norm(y_TH, x_TH, rows_of(slots), weights_SH, 1e-5, impl=impl) is None
    assert_framed(frame, size)
    x = x_TH.double()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y_TH[row], before[row])
            continue
        expected = normed[row] * weights_SH[slot].double()
        eps = torch.finfo(dtype).eps
        bound = (0.51 * eps if eps > 1e-6 else 1e-6) * expected.abs() + 1e-6
        assert ((y_TH[row].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", MIXES, ids=str)
def test_tenants_have_their_own_weight(impl, slots, dtype):
    for size in (1, 63, 576, 1100):
        check(slots, size, dtype, impl)


@any_example
@given(data=st.data(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_any_shape(impl, data, seed, dtype):
    """Other sizes, tenants and numbers in each run."""
    slots = data.draw(st.lists(st.integers(-1, 3), max_size=8), "slots")
    check(slots, data.draw(st.integers(1, 700), "size"), dtype, impl, seed)


def test_strides_are_free_and_inputs_stay(impl):
    x_TH, whole, weights_SH = randn(70, 3).T, randn(3, 200, seed=1), randn(4, 70, seed=2)
    copy = x_TH.clone()
    for y_TH in (whole[:, 5:75], whole[:, 1:141:2]):
        norm(y_TH, x_TH, rows_of([2, -1, 0]), weights_SH, 1e-5, impl=impl)
        expected = torch.nn.functional.rms_norm(x_TH, (70,), eps=1e-5)[[0, 2]] * weights_SH[[2, 0]]
        torch.testing.assert_close(y_TH[[0, 2]], expected)
        assert torch.equal(x_TH, copy)


@pytest.mark.parametrize("slots", [[2, -1, 0], []], ids=str)
def test_heads_of_a_token_share_its_weight(impl, slots):
    x_THN, y_THN = randn(len(slots), 5, 70), randn(len(slots), 5, 70, seed=1)
    weights_SN, before = randn(4, 70, seed=2), y_THN.clone()
    norm(
        y_THN,
        x_THN.transpose(1, 2).contiguous().transpose(1, 2),
        rows_of(slots),
        weights_SN,
        1e-5,
        impl=impl,
    )
    for row, slot in enumerate(slots):
        expected = torch.nn.functional.rms_norm(x_THN[row], (70,), eps=1e-5) * weights_SN[slot]
        torch.testing.assert_close(y_THN[row], before[row] if slot < 0 else expected)


def test_what_does_not_fit(impl):
    y_TH, x_TH, weights_SH = torch.zeros(2, 70, device=DEVICE), randn(2, 70), randn(4, 70)
    rows = rows_of([0, 1])
    for arguments in (
        (y_TH[:, :69], x_TH, rows, weights_SH),
        (y_TH, x_TH[:1], rows, weights_SH),
        (y_TH, x_TH, rows_of([0]), weights_SH),
        (y_TH, x_TH, rows, weights_SH[:, :69]),
        (y_TH, x_TH, rows, weights_SH.half()),
        (y_TH.view(2, 2, 35), x_TH.view(2, 2, 35), rows, weights_SH),
        (y_TH.view(2, 2, 35), x_TH, rows, weights_SH[:, :35]),
        (y_TH.view(2, 2, 35), x_TH.view(2, 2, 35), rows_of([0]), weights_SH[:, :35]),
    ):
        with pytest.raises(MismatchError, match="norm: expected"):
            norm(*arguments, 1e-5, impl=impl)
    with pytest.raises(UnsupportedError, match="'fast'"):
        norm(y_TH, x_TH, rows, weights_SH, 1e-5, impl="fast")
    with pytest.raises(UnsupportedError, match="inference"):
        norm(y_TH, x_TH.requires_grad_(), rows, weights_SH, 1e-5, impl=impl)
    assert not y_TH.any()


def test_registration(impl):
    rows = rows_of([0, -1, 1])
    arguments = (randn(3, 70), randn(3, 70), rows.slot_T, randn(4, 70), 1e-5, impl)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.deltacome.norm.default, arguments, test_utils=tests)
    heads = (randn(3, 2, 70), randn(3, 2, 70), *arguments[2:])
    torch.library.opcheck(torch.ops.deltacome.norm.default, heads, test_utils=tests)
