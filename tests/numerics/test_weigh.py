"""Triples under weights: the best approximation in the norm that the weights define."""

import pytest
import torch

from deltacome.errors import CalibrationError, MismatchError
from deltacome.numerics.svd import svd
from deltacome.numerics.weigh import weighted_spectrum, weighted_svd


def gram(size, seed, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) * torch.logspace(0, -2, size)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return turn @ x.T @ x @ turn.T


def delta(out_size=24, in_size=40, seed=0):
    return torch.randn(out_size, in_size, generator=torch.Generator().manual_seed(seed))


def weighted_error(error, inputs, outputs):
    inputs = torch.eye(error.shape[1]) if inputs is None else inputs
    outputs = torch.eye(error.shape[0]) if outputs is None else outputs
    outputs = outputs.diag() if outputs.ndim == 1 else outputs
    return float((outputs.double() @ error.double() @ inputs.double() * error.double()).sum())


WEIGHTS = {
    "both": (gram(40, 1), gram(24, 2)),
    "inputs": (gram(40, 1), None),
    "outputs": (None, gram(24, 2)),
    "diagonal": (gram(40, 1), torch.linspace(0.01, 2, 24)),
    "none": (None, None),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_what_is_left_out_is_what_the_singular_values_say(weights, rank):
    inputs, outputs = WEIGHTS[weights]
    d = delta()
    u, s, v = weighted_svd(d, rank, inputs, outputs, damping=0.0)
    _, every, _ = weighted_svd(d, 24, inputs, outputs, damping=0.0)
    left_out = float(every[rank:].double().square().sum())
    error = weighted_error(u.T @ (s[:, None] * v) - d, inputs, outputs)
    assert error == pytest.approx(left_out, rel=1e-3, abs=1e-5 * float(every[0]) ** 2)


def test_no_other_matrix_of_that_rank_is_closer():
    inputs, outputs = WEIGHTS["both"]
    d = delta()
    u, s, v = weighted_svd(d, 5, inputs, outputs, damping=0.0)
    best = weighted_error(u.T @ (s[:, None] * v) - d, inputs, outputs)
    plain = svd(d, 5)
    one_side = weighted_svd(d, 5, inputs, None, damping=0.0)
    for u, s, v in (plain, one_side):
        assert best < 0.9 * weighted_error(u.T @ (s[:, None] * v) - d, inputs, outputs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_spectrum_is_that_of_the_triples(weights, shape):
    inputs, outputs = WEIGHTS[weights]
    d = delta()
    if shape == (40, 24):  # and the weights of its sides with it
        d, inputs, outputs = d.T, outputs, inputs
        inputs = inputs.diag() if inputs is not None and inputs.ndim == 1 else inputs
    _, s, _ = weighted_svd(d, 24, inputs, outputs)
    found = weighted_spectrum(d, inputs, outputs)
    assert found.dtype == torch.float32
    assert (found[:-1] >= found[1:]).all()
    torch.testing.assert_close(found, s.square(), rtol=1e-3, atol=1e-6 * float(s[0]) ** 2)


def test_white_weights_change_nothing():
    d = delta()
    u, s, v = weighted_svd(d, 6, torch.eye(40), torch.ones(24), damping=0.0)
    u0, s0, v0 = svd(d, 6)
    torch.testing.assert_close(s, s0)
    torch.testing.assert_close(u.T @ (s[:, None] * v), u0.T @ (s0[:, None] * v0))


def test_damping_lets_unseen_inputs_count():
    inputs = torch.zeros(40, 40)
    inputs[:20, :20] = torch.eye(20)
    u, s, v = weighted_svd(delta(), 24, inputs, None, damping=0.01)
    assert torch.isfinite(v).all()
    torch.testing.assert_close(u.T @ (s[:, None] * v), delta(), atol=1e-3, rtol=1e-3)
    with pytest.raises(CalibrationError, match="weights of inputs: not positive definite"):
        weighted_svd(delta(), 3, inputs, None, damping=0.0)
    with pytest.raises(CalibrationError, match="weights of outputs"):
        weighted_svd(delta(), 3, None, torch.zeros(24), damping=0.0)


def test_a_diagonal_is_damped_as_the_whole_is():
    outputs = torch.linspace(0, 2, 24)
    alone, whole = (weighted_spectrum(delta(), None, w, 0.1) for w in (outputs, outputs.diag()))
    torch.testing.assert_close(alone, whole)


def test_sizes_must_fit():
    with pytest.raises(MismatchError, match="weights of 40 inputs"):
        weighted_svd(delta(), 3, torch.eye(24), None)
    with pytest.raises(MismatchError, match="weights of 24 outputs"):
        weighted_svd(delta(), 3, None, torch.ones(40))
