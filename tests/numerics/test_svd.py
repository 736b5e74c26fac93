import pytest
import torch

from deltacome.errors import CheckpointError, PlanError
from deltacome.numerics.svd import svd


def long_tailed(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """A small copy of a fine-tune's delta: a decaying part, and the rounding noise of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, inputs)
    left = torch.randn(out, k, generator=generator) / torch.arange(1, k + 1)
    base = 0.02 * torch.randn(out, inputs, generator=generator).bfloat16().float()
    change = 1e-4 * left @ torch.randn(k, inputs, generator=generator)
    return (base + change).bfloat16().float() - base


SHAPES = [(64, 64), (200, 40), (40, 200), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_truncates_as_well_as_the_exact_svd(shape):
    a = long_tailed(*shape)
    exact_s = torch.linalg.svdvals(a.double())
    for rank in {1, -(-min(shape) // 4), min(shape)}:
        u, s, v = svd(a, rank)
        assert u.shape == (rank, shape[0])
        assert v.shape == (rank, shape[1])
        assert {u.dtype, s.dtype, v.dtype} == {torch.float32}
        torch.testing.assert_close(s.double(), exact_s[:rank], rtol=1e-5, atol=0)
        rest = (a.double() - (u.double().T * s) @ v.double()).square().sum()
        best = exact_s[rank:].square().sum()
        assert rest <= best * (1 + 1e-4) + 1e-12 * exact_s.square().sum()


@pytest.mark.parametrize("fall", [2, 8, 30])
def test_a_steep_fall_is_followed_to_its_end(fall):
    generator = torch.Generator().manual_seed(3)
    q = [torch.linalg.qr(torch.randn(200, 200, generator=generator).double())[0] for _ in "uv"]
    s = torch.exp(-torch.arange(200).double() / fall)
    a = ((q[0] * s) @ q[1]).float()
    rank = int(6 * fall)  # leaves out exp(−12) of the squares
    u, s, v = svd(a, rank)
    best = torch.linalg.svdvals(a.double())[rank:].square().sum()
    rest = (a.double() - (u.double().T * s) @ v.double()).square().sum()
    assert rest <= best * (1 + 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_vectors_are_orthonormal(shape):
    u, _, v = svd(long_tailed(*shape), min(shape))
    for q in (u, v):
        torch.testing.assert_close(q @ q.T, torch.eye(len(q)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_vectors_are_those_of_lapack_up_to_sign(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = svd(a, 5)
    left, _, right = torch.linalg.svd(a)
    cos_u = (u * left.T[:5]).sum(1)
    cos_v = (v * right[:5]).sum(1)
    torch.testing.assert_close(cos_u.abs(), torch.ones(5))
    torch.testing.assert_close(cos_u, cos_v)  # both are flipped, or neither is


def test_the_sign_makes_the_peak_of_v_positive():
    _, _, v = svd(long_tailed(60, 30), 20)
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_missing_rank_gives_zero_values_and_whole_vectors(shape):
    generator = torch.Generator().manual_seed(2)
    one = torch.outer(*(torch.randn(n, generator=generator) for n in shape))
    for a, nonzero in ((one, 1), (torch.zeros(shape), 0)):
        u, s, v = svd(a, 4)
        assert (s[nonzero:] <= 1e-6 * a.norm()).all()
        torch.testing.assert_close((u.T * s) @ v, a)
        for q in (u, v):
            torch.testing.assert_close(q @ q.T, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**120])
def test_the_scale_of_a_delta_does_not_matter(scale):
    a = long_tailed(20, 30)
    u, s, v = svd(a * scale, 5)
    u1, s1, v1 = svd(a, 5)
    assert torch.equal(s / scale, s1)
    assert torch.equal(u, u1)
    assert torch.equal(v, v1)


def test_strides_and_repetition_change_nothing():
    a = long_tailed(40, 30)
    before = a.clone()
    first = svd(a, 8)
    assert torch.equal(a, before)
    for other in (a.T.contiguous().T, torch.stack([a, a], -1)[..., 0]):
        for x, y in zip(first, svd(other, 8), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(first, svd(a, 8), strict=True))
    assert all(x.is_contiguous() for x in first)


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_a_rank_that_is_not_there_is_refused(rank):
    with pytest.raises(PlanError, match=rf"rank {rank} .*\(4, 6\)"):
        svd(torch.ones(4, 6), rank)


def test_a_delta_that_is_not_finite_is_refused():
    a = torch.ones(4, 6)
    a[0, 1] = float("nan")
    a[3, 1] = float("inf")
    with pytest.raises(CheckpointError, match="2 NaN or Inf"):
        svd(a, 2)
