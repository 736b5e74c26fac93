import math

import pytest
import torch

from deltacome.errors import CalibrationError, MismatchError
from deltacome.numerics.gram import Gram, output_energy, relative_error


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sum_is_over_all_tokens(dtype):
    gram = Gram("q", 7)
    batches = [draw(t, 7, seed=t).to(dtype) for t in (5, 1, 30)]
    for x in batches:
        gram.add(x)
    x = torch.cat(batches).double()
    assert gram.tokens == 36
    assert gram.value.dtype == torch.float32
    # Half precision is added exactly as it is, so nothing is lost but float32 rounding.
    torch.testing.assert_close(gram.value.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_adds_nothing():
    gram = Gram("q", 3)
    gram.add(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="reached q"):
        _ = gram.value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_are_refused_by_name_and_not_added(bad):
    gram = Gram("model.layers.3.mlp.down_proj", 4)
    good = draw(6, 4)
    gram.add(good)
    before = gram.value.clone()
    x = draw(5, 4)
    x[1, 2] = x[1, 3] = x[4, 0] = bad
    with pytest.raises(CalibrationError, match=r"layers\.3\.mlp\.down_proj .* 2 of 5 tokens"):
        gram.add(x)
    assert torch.equal(gram.value, before)
    assert gram.tokens == 6


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 3, 4)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(CalibrationError, match=r"q must have shape \(tokens, 4\)"):
        Gram("q", 4).add(torch.zeros(shape))


def test_a_sum_that_overflows_is_refused():
    gram = Gram("q", 2)
    gram.add(torch.full((1, 2), 1e30))
    with pytest.raises(CalibrationError, match="gram of q overflowed"):
        _ = gram.value


def test_relative_error_is_that_of_the_outputs():
    x, delta, noise = draw(50, 9), draw(6, 9, seed=1), 0.1 * draw(6, 9, seed=2)
    outputs, errors = x.double() @ delta.double().T, x.double() @ noise.double().T
    expected = float(errors.square().sum() / outputs.square().sum())
    assert relative_error(delta, delta + noise, x.T @ x) == pytest.approx(expected, rel=1e-5)
    assert relative_error(delta, delta, x.T @ x) == 0
    assert relative_error(delta, torch.zeros_like(delta), x.T @ x) == pytest.approx(1)


def test_an_error_that_avoids_a_loud_direction_is_not_drowned():
    loud = torch.nn.functional.normalize(draw(40), dim=0)
    gram = 1e4 * torch.outer(loud, loud) + torch.eye(40)
    error = draw(3, 40)
    error -= torch.outer(error @ loud, loud)
    assert output_energy(error, gram) == pytest.approx(float(error.square().sum()), rel=1e-3)


def test_an_error_that_avoids_all_inputs_is_not_below_zero():
    """Rounding alone is left of it, of either sign, and a manifest takes no error below 0."""
    energies = []
    for seed in range(8):
        x, error = 1e3 * draw(3, 40, seed=seed), draw(5, 40, seed=seed + 8)
        error -= error @ torch.linalg.pinv(x) @ x
        energies.append(output_energy(error, x.T @ x))
    assert min(energies) == 0 < max(energies)


def test_relative_error_of_nothing():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_error(zero, zero, torch.eye(3)) == 0
    assert relative_error(zero, one, torch.eye(3)) == math.inf
    assert relative_error(one, one, torch.zeros(3, 3)) == 0


def test_a_gram_of_another_size_is_refused():
    with pytest.raises(MismatchError, match=r"\(2, 3\)"):
        relative_error(torch.ones(2, 3), torch.ones(2, 3), torch.eye(2))
