"""GPTQ against two references that share none of its code.

They are the greedy step of Optimal Brain Quantization, with the inverse updated column by column, and a
search of all codes.
"""

import itertools

import pytest
import torch
from torch import Tensor

from deltacome.errors import CalibrationError, MismatchError, PlanError, UnsupportedError
from deltacome.format.codec import dequantize
from deltacome.numerics import gptq
from deltacome.numerics.gptq import factor_gram, quantize_u, quantize_v
from deltacome.numerics.grid import min_max_grid, round_to_grid


@pytest.fixture(autouse=True)
def poison():
    """Makes torch.empty give NaN, so that an output that was never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(n: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """The gram of inputs with a decaying spectrum and a few loud channels, like a transformer's."""
    x = draw(tokens or 4 * n, n, seed=seed) / torch.arange(1, n + 1).sqrt()
    x = x @ torch.linalg.qr(draw(n, n, seed=seed + 1))[0]
    x[:, :: max(n // 4, 1)] *= 5
    return x.T @ x


def energy(error_RN: Tensor, gram_NN: Tensor) -> Tensor:
    """e C eᵀ of each row e, in float64."""
    e, c = error_RN.double(), gram_NN.double()
    return ((e @ c) * e).sum(1)


def values(q: gptq.Quantized, group_size: int = 128) -> Tensor:
    return dequantize(q.codes, q.scale, q.zero, group_size)


def sweep_order(gram: Tensor, act_order: bool) -> list[int]:
    diagonal = gram.diagonal().tolist()
    return sorted(range(len(diagonal)), key=lambda i: -diagonal[i] if act_order else i)


def textbook(w_RN: Tensor, gram: Tensor, order: list[int], nearest, damping: float = 0.01) -> None:
    """Optimal Brain Quantization in a fixed order.

    It is equation 2 of the GPTQ paper, with equation 3 for the inverse. `nearest(column, target)` gives
    the column's values.
    """
    w = w_RN.double().clone()
    h = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram)).double()
    inverse = torch.linalg.inv(h)
    for j in order:
        error = (w[:, j] - nearest(j, w[:, j])) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def textbook_v(v: Tensor, gram: Tensor, bits, group: int, act_order: bool) -> Tensor:
    scale, zero = min_max_grid(v, bits, group)
    top = 2 ** torch.as_tensor(bits).double().expand(len(v)) - 1
    codes = torch.full(v.shape, 255, dtype=torch.uint8)

    def nearest(j: int, target: Tensor) -> Tensor:
        s, z = scale[:, j // group].double(), zero[:, j // group].double()
        code = (target / s + z).round().clamp(min=0).minimum(top)
        codes[:, j] = code.to(torch.uint8)
        return (code - z) * s

    textbook(v, gram, sweep_order(gram, act_order), nearest)
    return codes


def textbook_u(u: Tensor, gram: Tensor, bits: int, group: int, act_order: bool) -> Tensor:
    codes = torch.full(u.shape, 255, dtype=torch.uint8)

    def nearest(j: int, target: Tensor) -> Tensor:
        grid = min_max_grid(target.float()[None], bits, group)
        codes[j] = round_to_grid(target.float()[None], *grid, bits, group)[0]
        return dequantize(codes[j][None], *grid, group)[0].double()

    textbook(u.T, gram, sweep_order(gram, act_order), nearest)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("r", "n", "group"), [(6, 40, 128), (1, 130, 32), (9, 128, 128), (5, 300, 128), (4, 257, 100)]
)
def test_v_takes_the_codes_of_the_textbook(r, n, group, act_order):
    v, gram = draw(r, n, seed=n), correlated_gram(n)
    bits = torch.tensor([8, 4, 3, 2, 1])[torch.arange(r) % 5]
    got = quantize_v(v, factor_gram(gram, act_order=act_order), bits, group_size=group)
    assert torch.equal(got.codes, textbook_v(v, gram, bits, group, act_order))
    for stored, expected in zip(got[1:], min_max_grid(v, bits, group), strict=True):
        assert torch.equal(stored, expected)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("r", "o", "bits", "group"),
    [(12, 50, 3, 128), (1, 40, 2, 16), (150, 70, 2, 32), (130, 129, 4, 128), (20, 9, 8, 4)],
)
def test_u_takes_the_codes_of_the_textbook(r, o, bits, group, act_order):
    u, gram = draw(r, o, seed=o), correlated_gram(r)
    got = quantize_u(u, factor_gram(gram, act_order=act_order), bits, group_size=group)
    assert got.scale.shape == got.zero.shape == (r, -(-o // group))
    assert torch.equal(got.codes, textbook_u(u, gram, bits, group, act_order))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_block_size_changes_nothing(block, monkeypatch):
    v, gram = draw(6, 200), correlated_gram(200)
    u, small = draw(150, 40), correlated_gram(150)
    factors = factor_gram(gram), factor_gram(small)
    before = quantize_v(v, factors[0], 2), quantize_u(u, factors[1], 2)
    monkeypatch.setattr(gptq, "BLOCK", block)
    after = quantize_v(v, factors[0], 2), quantize_u(u, factors[1], 2)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.codes, new.codes)


def test_no_codes_are_better_than_the_best_of_all_codes():
    n, rows, bits = 5, 60, 2
    v, gram = draw(rows, n), correlated_gram(n, seed=3)
    got = quantize_v(v, factor_gram(gram), bits)
    grid = got.scale, got.zero
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=n)), dtype=torch.uint8)
    optimum = torch.stack(
        [
            energy(dequantize(every, s.expand(len(every), 1), z.expand(len(every), 1)) - row, gram)
            for row, s, z in zip(v, *grid, strict=True)
        ]
    ).amin(1)
    plain = energy(dequantize(round_to_grid(v, *grid, bits), *grid) - v, gram)
    greedy = energy(values(got) - v, gram)
    assert (greedy >= optimum * (1 - 1e-9)).all()
    assert optimum.sum() < greedy.sum() < 0.9 * plain.sum()
    # Greedy finds the optimum for many rows, but not for all.
    found = int((greedy <= optimum * (1 + 1e-6)).sum())
    assert rows / 4 < found < rows


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_inputs_make_gptq_better_than_rounding(bits):
    v, gram = draw(40, 256), correlated_gram(256)
    got = quantize_v(v, factor_gram(gram), bits)
    plain = dequantize(round_to_grid(v, got.scale, got.zero, bits), got.scale, got.zero)
    assert energy(values(got) - v, gram).sum() < 0.6 * energy(plain - v, gram).sum()

    u, small = draw(100, 300), correlated_gram(100)
    grid = min_max_grid(u, bits)
    plain = dequantize(round_to_grid(u, *grid, bits), *grid)
    error = values(quantize_u(u, factor_gram(small), bits)) - u
    assert energy(error.T, small).sum() < 0.6 * energy((plain - u).T, small).sum()


def test_activation_order_helps_where_inputs_differ_in_loudness():
    v, gram = draw(40, 256), correlated_gram(256)
    factors = {act_order: factor_gram(gram, act_order=act_order) for act_order in (True, False)}
    loss = {
        act_order: energy(values(quantize_v(v, factor, 2)) - v, gram).sum()
        for act_order, factor in factors.items()
    }
    assert loss[True] < loss[False]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (7, 259)])
def test_the_identity_gram_gives_plain_rounding(shape, act_order):
    v = draw(*shape)
    bits = torch.tensor([1, 2, 3, 4, 8, 2, 3])[: shape[0]]
    got = quantize_v(v, factor_gram(3 * torch.eye(shape[1]), act_order=act_order), bits)
    assert torch.equal(got.codes, round_to_grid(v, got.scale, got.zero, bits))

    got = quantize_u(v, factor_gram(torch.eye(shape[0]), act_order=act_order), 3)
    assert torch.equal(got.codes, round_to_grid(v, *min_max_grid(v, 3), 3))


def test_dead_inputs_get_plain_rounding_and_disturb_no_other():
    alive = torch.arange(100) % 3 > 0
    v, gram = draw(5, 100), torch.zeros(100, 100)
    gram[torch.outer(alive, alive)] = correlated_gram(int(alive.sum())).flatten()
    # One group per column, so that leaving out the dead columns does not change the grids.
    got = quantize_v(v, factor_gram(gram), 2, group_size=1)
    plain = round_to_grid(v, got.scale, got.zero, 2, 1)
    assert torch.equal(got.codes[:, ~alive], plain[:, ~alive])
    # The damping is relative to the mean diagonal, which the dead inputs lower.
    share = alive.double().mean().item()
    factor = factor_gram(gram[alive][:, alive], 0.01 * share)
    living = quantize_v(v[:, alive], factor, 2, group_size=1)
    assert torch.equal(got.codes[:, alive], living.codes)


def test_a_singular_gram_works_through_its_damping():
    v, gram = draw(8, 60), correlated_gram(60, tokens=10)
    assert torch.linalg.matrix_rank(gram) == 10
    got = quantize_v(v, factor_gram(gram), 3)
    plain = dequantize(round_to_grid(v, got.scale, got.zero, 3), got.scale, got.zero)
    assert energy(values(got) - v, gram).sum() < 0.2 * energy(plain - v, gram).sum()


def test_rows_and_bands_do_not_know_of_each_other():
    v, gram = draw(30, 150), correlated_gram(150)
    bits = torch.tensor([8] * 2 + [3] * 8 + [2] * 20)
    factor = factor_gram(gram)
    together = quantize_v(v, factor, bits)
    for band in (slice(0, 2), slice(2, 10), slice(10, 30)):
        alone = quantize_v(v[band], factor, int(bits[band][0]))
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[band], y)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12, 1e28])
def test_the_scale_of_the_gram_does_not_matter(scale):
    v, gram = draw(4, 50), correlated_gram(50)
    plain, scaled = (quantize_v(v, factor_gram(gram * factor), 3) for factor in (1, scale))
    assert torch.equal(plain.codes, scaled.codes)


def test_nothing_of_the_caller_is_changed():
    v, gram, bits = draw(10, 140), correlated_gram(140), torch.tensor([2] * 9 + [8])
    u, small = draw(10, 40), correlated_gram(10)
    tensors = (v, gram, bits, u, small)
    before = [x.clone() for x in tensors]
    for act_order in (True, False):
        quantize_u(u, factor_gram(small, act_order=act_order), 2)
        factor = factor_gram(gram, act_order=act_order)
        ratio = factor.ratio_NN.clone()
        quantize_v(v, factor, bits)
        assert torch.equal(factor.ratio_NN, ratio)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_strides_and_repetition_change_nothing():
    v, factor = draw(10, 140), factor_gram(correlated_gram(140))
    expected = quantize_v(v, factor, 2)
    for other in (v.T.contiguous().T, torch.stack([v, v], -1)[..., 1], v):
        got = quantize_v(other, factor, 2)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert all(x.is_contiguous() for x in got)
    u, factor = draw(10, 30), factor_gram(correlated_gram(10))
    assert torch.equal(
        quantize_u(u.T.contiguous().T, factor, 2).codes, quantize_u(u, factor, 2).codes
    )


def test_the_order_breaks_ties_by_position():
    assert factor_gram(torch.eye(50)).order_N.tolist() == list(range(50))


class TestGramsThatCannotBeUsed:
    def test_zero(self):
        with pytest.raises(CalibrationError, match=r"size 4 .* not all zeros; .* trace is 0"):
            factor_gram(torch.zeros(4, 4))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        gram = torch.eye(4)
        gram[1, 2] = bad
        with pytest.raises(CalibrationError, match="size 4 holds 1 NaN or Inf"):
            factor_gram(gram)

    def test_not_positive_definite(self):
        gram = torch.eye(4)
        gram[1, 2] = gram[2, 1] = -2
        with pytest.raises(
            CalibrationError, match=r"size 4 is not positive definite .* from 1 to 1.* trace is 4"
        ):
            factor_gram(gram)

    def test_a_negative_diagonal(self):
        with pytest.raises(CalibrationError, match="from -1 to 1, its trace is 2"):
            factor_gram(torch.diag(torch.tensor([1.0, 1, -1, 1])))

    def test_not_square(self):
        with pytest.raises(CalibrationError, match=r"square, got shape \(3, 4\)"):
            factor_gram(torch.ones(3, 4))

    def test_of_another_size(self):
        w, factor = draw(3, 4), factor_gram(torch.eye(5))
        for quantize, directions in ((quantize_v, w), (quantize_u, w.T)):
            with pytest.raises(MismatchError, match=r"4 columns .* got 5"):
                quantize(directions, factor, 2)

    def test_no_damping_for_a_singular_one(self):
        with pytest.raises(CalibrationError, match="not positive definite after 0 damping"):
            factor_gram(torch.ones(4, 4), damping=0)


def test_directions_that_are_not_finite_are_refused():
    w = draw(3, 4)
    w[1, 2] = float("nan")
    with pytest.raises(UnsupportedError, match="row 1"):
        quantize_v(w, factor_gram(torch.eye(4)), 2)
    with pytest.raises(CalibrationError, match="hold NaN or Inf"):
        quantize_u(w, factor_gram(torch.eye(3)), 2)


@pytest.mark.parametrize("bits", [0, 5, 16])
def test_a_width_without_a_grid_is_refused(bits):
    with pytest.raises(PlanError, match=f"got .{bits}"):
        quantize_v(draw(3, 4), factor_gram(torch.eye(4)), bits)
    with pytest.raises(PlanError, match=f"got .{bits}"):
        quantize_u(draw(3, 4), factor_gram(torch.eye(3)), bits)
