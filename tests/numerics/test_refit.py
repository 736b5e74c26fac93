"""The refitted factor against the normal equations, and what it buys."""

import pytest
import torch

from deltacome.errors import CalibrationError, MismatchError
from deltacome.numerics.gram import relative_error
from deltacome.numerics.refit import WHITE, refit_u
from deltacome.numerics.svd import svd

O, I, R = 24, 40, 6  # noqa: E741


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(O, I, generator=generator) * torch.logspace(0, -2, I)
    x = torch.randn(200, I, generator=generator) * torch.logspace(0.5, -1, I)
    u, s, v = svd(delta, R)
    rough = (v * 4).round() / 4  # turns the directions, as rounding does
    return delta, s[:, None] * rough, u, x.T @ x


@pytest.mark.parametrize("calibrated", [True, False])
def test_no_left_factor_is_closer(problem, calibrated):
    delta, a, before, gram = problem
    gram = gram if calibrated else None
    best = refit_u(delta, a, gram, damping=1e-9)
    error = relative_error(delta, best.T @ a, gram)
    assert error < 0.9 * relative_error(delta, before.T @ a, gram)
    for seed in range(5):
        step = 1e-2 * torch.randn(R, O, generator=torch.Generator().manual_seed(seed))
        assert relative_error(delta, (best + step).T @ a, gram) > error


def test_it_solves_the_normal_equations(problem):
    delta, a, _, gram = (tensor.double() for tensor in problem)
    gram_w = gram + WHITE * gram.diagonal().mean() * torch.eye(I)
    expected = torch.linalg.lstsq(a @ gram_w @ a.T, a @ gram_w @ delta.T).solution
    got = refit_u(delta.float(), a.float(), gram.float(), damping=0.0)
    torch.testing.assert_close(got, expected.float(), rtol=1e-3, atol=1e-4)


def test_damping_is_relative_to_each_direction(problem):
    delta, a, _, gram = problem
    scale = torch.logspace(0, -5, R)[:, None]
    one, two = refit_u(delta, a, gram), refit_u(delta, a * scale, gram) * scale
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_parallel_directions_share_what_there_is(problem):
    delta, a, _, gram = problem
    twice = torch.cat([a, a[:1]])
    u = refit_u(delta, twice, gram)
    assert u.isfinite().all()
    alone, together = (
        relative_error(delta, refit_u(delta, m, gram).T @ m, gram) for m in (a, twice)
    )
    assert together == pytest.approx(alone, rel=1e-2)


def test_a_direction_that_nothing_reaches_is_zero(problem):
    delta, a, _, gram = problem
    a[2] = 0
    u = refit_u(delta, a, gram)
    assert not u[2].any()
    assert u[3].any()


def test_what_few_inputs_leave_open_is_not_filled(problem):
    """With fewer inputs than directions, there is a left factor without any error on them."""
    delta, _, _, _ = problem
    generator = torch.Generator().manual_seed(5)
    x_TI = torch.randn(3, I, generator=generator)
    a_RI = torch.randn(12, I, generator=generator) + 4 * torch.randn(1, I, generator=generator)
    gram_II = x_TI.T @ x_TI
    u_RO = refit_u(delta, a_RI, gram_II)
    assert relative_error(delta, u_RO.T @ a_RI, gram_II) < 1e-3
    best_RO = refit_u(delta, a_RI)
    assert u_RO.norm() < 2 * best_RO.norm()
    assert relative_error(delta, u_RO.T @ a_RI, torch.eye(I)) < 1.5


def test_directions_that_few_inputs_hardly_reach(problem):
    delta, _, _, _ = problem
    generator = torch.Generator().manual_seed(5)
    x_TI = 1e3 * torch.randn(3, I, generator=generator)
    a_RI = torch.randn(30, I, generator=generator)
    a_RI -= (1 - 1e-5) * a_RI @ torch.linalg.pinv(x_TI) @ x_TI
    gram_II = x_TI.T @ x_TI
    normal_RR = (a_RI @ gram_II).double() @ a_RI.double().T
    size_R = normal_RR.diagonal().abs().sqrt()
    smallest = torch.linalg.eigvalsh(normal_RR / size_R / size_R[:, None])[0]
    assert smallest < -1e-4  # from float32's rounding alone
    u_RO = refit_u(delta, a_RI, gram_II)
    assert u_RO.isfinite().all()
    assert relative_error(delta, u_RO.T @ a_RI, gram_II) <= 1


def test_refusals(problem):
    delta, a, _, gram = problem
    with pytest.raises(MismatchError, match="40 inputs"):
        refit_u(delta, a[:, 1:], gram)
    with pytest.raises(MismatchError, match="40 inputs"):
        refit_u(delta, a, gram[1:, 1:])
    with pytest.raises(CalibrationError, match="cannot be refitted"):
        refit_u(delta, a, -gram - 5 * gram.trace() * torch.ones(I, I) / I)
