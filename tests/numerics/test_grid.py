import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome.errors import MismatchError, PlanError, UnsupportedError
from deltacome.format.codec import dequantize
from deltacome.numerics.grid import min_max_grid, round_to_grid

WIDTHS = (1, 2, 3, 4, 8)


def draw(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    n=st.integers(1, 40),
    group=st.integers(1, 24),
    bits=st.sampled_from(WIDTHS),
    exponent=st.integers(-46, 4),
    offset=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_values_come_back_within_a_step(rows, n, group, bits, exponent, offset, seed):
    w = (draw(rows, n, seed) + offset) * torch.tensor(10.0**exponent)
    scale, zero = min_max_grid(w, bits, group)
    assert scale.shape == zero.shape == (rows, -(-n // group))
    assert (scale.dtype, zero.dtype) == (torch.float16, torch.uint8)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    codes = round_to_grid(w, scale, zero, bits, group)
    levels = 2**bits - 1
    assert int(zero.max()) <= levels
    assert int(codes.max()) <= levels
    error = (dequantize(codes, scale, zero, group) - w).abs()
    step = scale.float().repeat_interleave(group, 1)[:, :n]
    # Half a step, plus what rounding a scale to float16 can take off the ends of the range.
    within = step * (0.5 + levels / 2**11) * (1 + 1e-5)
    # A step that underflows float32 makes the group one of zeros.
    assert (error <= within).all() or (w.abs() < 2.0**-120).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_its_own_nearest(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    scale, zero = torch.tensor([[0.25]]).half(), torch.tensor([[2 ** (bits - 1)]]).to(torch.uint8)
    values = dequantize(codes, scale, zero, 256)
    assert torch.equal(round_to_grid(values, scale, zero, bits, 256), codes)
    recovered = min_max_grid(values, bits, 256)
    assert torch.equal(torch.stack([x.float() for x in recovered]), torch.stack([scale, zero]))


def test_the_worked_example_of_a_group():
    # 3 levels above the lowest: steps of (2 + 1) / 3 = 1, and −1 is one step below zero.
    scale, zero = min_max_grid(torch.tensor([[-1.0, 2.0, 0.4]]), 2)
    assert scale.item() == 1
    assert zero.item() == 1
    assert round_to_grid(torch.tensor([[-1.0, 2.0, 0.4]]), scale, zero, 2).tolist() == [[0, 3, 1]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_is_always_exact(bits):
    w = draw(3, 50)
    w[:, ::7] = 0
    scale, zero = min_max_grid(w, bits, 16)
    assert not dequantize(round_to_grid(w, scale, zero, bits, 16), scale, zero, 16)[:, ::7].any()


def test_a_group_of_zeros_has_scale_one():
    scale, zero = min_max_grid(torch.zeros(2, 5), 3, 2)
    assert (scale == 1).all()
    assert not zero.any()
    assert not round_to_grid(torch.zeros(2, 5), scale, zero, 3, 2).any()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_group_of_one_sign_reaches_from_zero(sign):
    w = sign * torch.linspace(1, 2, 9)[None]
    scale, zero = min_max_grid(w, 2)
    assert zero.item() == (3 if sign < 0 else 0)
    assert scale.item() == pytest.approx(2 / 3, rel=2**-10)


def test_rows_may_differ_in_width():
    w = draw(5, 33)
    bits = torch.tensor(WIDTHS)
    scale, zero = min_max_grid(w, bits, 8)
    codes = round_to_grid(w, scale, zero, bits, 8)
    for r, width in enumerate(WIDTHS):
        row = slice(r, r + 1)
        assert all(
            torch.equal(together[row], alone)
            for together, alone in zip((scale, zero), min_max_grid(w[row], width, 8), strict=True)
        )
        alone = round_to_grid(w[row], scale[row], zero[row], width, 8)
        assert torch.equal(codes[row], alone)


def test_weights_outside_the_grid_take_its_ends():
    scale, zero = torch.ones(1, 1).half(), torch.ones(1, 1, dtype=torch.uint8)
    w = torch.tensor([[-3.4e38, -9.0, 9.0, 3.4e38]])
    assert round_to_grid(w, scale, zero, 2).tolist() == [[0, 0, 3, 3]]


def test_steps_below_half_precision_are_rounded_up():
    w = torch.tensor([[0.0, 3 * 1.4 * 2.0**-24], [0.0, 1e-12]])
    scale, zero = min_max_grid(w, 2)
    assert scale.flatten().tolist() == [2.0**-23, 2.0**-24]
    codes = round_to_grid(w, scale, zero, 2)
    assert ((dequantize(codes, scale, zero) - w).abs() <= 2.0**-24).all()


def test_the_zero_point_answers_to_the_stored_scale():
    # The step 1.4 · 2⁻²⁴ is stored as 2 · 2⁻²⁴, of which −4.2 · 2⁻²⁴ is two below zero, not three.
    scale, zero = min_max_grid(torch.tensor([[-4.2 * 2.0**-24, 0.0]]), 2)
    assert scale.item() == 2.0**-23
    assert zero.item() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, -3e7])
def test_what_has_no_step_is_refused(value):
    w = torch.zeros(3, 10)
    w[1, 7] = value
    with pytest.raises(UnsupportedError, match="group 3 of row 1"):
        min_max_grid(w, 8, 2)


def test_a_range_whose_width_overflows_is_refused():
    with pytest.raises(UnsupportedError, match="group 0 of row 0"):
        min_max_grid(torch.tensor([[-3e38, 3e38]]), 8)


@pytest.mark.parametrize("bits", [0, 5, 16, torch.tensor([2, 7])])
def test_unknown_widths_are_refused(bits):
    with pytest.raises(PlanError, match="got"):
        min_max_grid(torch.ones(2, 4), bits)


def test_shapes_that_do_not_fit_are_refused():
    w = torch.ones(2, 9)
    with pytest.raises(MismatchError, match="2 rows"):
        min_max_grid(w, torch.tensor([2, 2, 2]))
    scale, zero = min_max_grid(w, 2, 4)
    with pytest.raises(MismatchError, match=r"\(2, 5\)"):
        round_to_grid(w, scale, zero, 2, 2)


def test_input_is_untouched():
    w = draw(3, 20)
    before = w.clone()
    scale, zero = min_max_grid(w, 4, 8)
    round_to_grid(w, scale, zero, 4, 8)
    assert torch.equal(w, before)
