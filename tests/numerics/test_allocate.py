"""One price for all directions: best for its bytes, within the budget, wide bands first."""

import itertools

import pytest
import torch

from deltacome.numerics.allocate import allocate

DISTORTION = {2: 0.16, 3: 0.045, 8: 0.0002}
SIZE = {"a": 10.0, "b": 35.0}


def cost(name, bits):
    return SIZE[name] * bits


def nbytes(counts):
    return sum(cost(name, b) * n for name, of in counts.items() for b, n in of.items())


def error(weights, counts):
    total = 0.0
    for name, w in weights.items():
        widths = [b for b, n in counts[name].items() for _ in range(n)]
        widths += [0] * (len(w) - len(widths))
        total += sum(float(x) * (DISTORTION[b] if b else 1) for x, b in zip(w, widths, strict=True))
    return total


def test_nothing_of_the_same_bytes_is_better():
    weights = {"a": torch.tensor([9.0, 1.0, 0.2]), "b": torch.tensor([4.0, 3.0, 0.1])}
    every = list(itertools.product((0, 2, 3, 8), repeat=3))
    for budget in (60, 200, 400, 700):
        got = allocate(weights, cost, DISTORTION, nbytes, budget)
        spent = nbytes(got)
        assert spent <= budget
        for first, second in itertools.product(every, every):
            sides = {"a": first, "b": second}
            if sum(cost(n, b) for n, side in sides.items() for b in side if b) > spent:
                continue
            other = sum(
                float(w) * (DISTORTION[b] if b else 1)
                for n, side in sides.items()
                for w, b in zip(weights[n], side, strict=True)
            )
            assert error(weights, got) <= other + 1e-9


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_spends_what_it_may_whatever_the_unit(scale):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: scale * torch.rand(50, generator=generator).sort(descending=True).values ** 4
        for name in SIZE
    }
    got = allocate(weights, cost, DISTORTION, nbytes, 2000)
    assert 0.9 * 2000 < nbytes(got) <= 2000
    assert all(list(of) == sorted(of, reverse=True) for of in got.values())
    assert all(n > 0 for of in got.values() for n in of.values())


def test_no_bytes_no_directions_and_bytes_for_all():
    weights = {"a": torch.ones(4), "b": torch.ones(4)}
    assert allocate(weights, cost, DISTORTION, nbytes, 5) == {"a": {}, "b": {}}
    assert allocate(weights, cost, DISTORTION, nbytes, 1e9) == {"a": {8: 4}, "b": {8: 4}}


def test_a_matrix_that_hardly_matters_gets_hardly_any_bytes():
    weights = {"a": torch.full((20,), 1e-6), "b": torch.ones(20)}
    got = allocate(weights, cost, DISTORTION, nbytes, 35 * 3 * 20)
    assert not got["a"]
    assert sum(got["b"].values()) == 20
