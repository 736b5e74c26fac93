"""The two searches: on a cost that is known, and on a real pair."""

import random

import pytest

from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression.data import calibration_rows
from deltacome.compression.search import (
    COUNTS,
    _genetic,
    _greedy,
    _mean_error,
    find_template,
    sample_linears,
    search_template,
)
from deltacome.errors import CalibrationError, PlanError
from deltacome.methods.template import PRECISIONS, parse_template

BEST = (3, 0, 5)


def bowl(genes):
    return sum((i - best) ** 2 for i, best in zip(genes, BEST, strict=True))


@pytest.mark.parametrize("search", [_greedy, lambda cost: _genetic(cost, random.Random(0))])
def test_the_bottom_of_a_bowl_is_found(search):
    assert search(bowl) == BEST


def test_greedy_tries_each_width_once():
    tried = []
    _greedy(lambda genes: (tried.append(genes), bowl(genes))[1])
    assert len(tried) == 3 * len(COUNTS)


@pytest.fixture(scope="module")
def linears(pairs, text):
    base, tuned = pairs["llama"]
    rows = calibration_rows(text, tuned, samples=6, seq_len=16, seed=0)
    return sample_linears(Checkpoint(base), Checkpoint(tuned), rows, blocks=2)


def test_searches_beat_what_is_set_beforehand(linears):
    assert len(linears) == 14
    linears = [linears[3], linears[11]]
    greedy, genetic = (search_template(linears, 8, way) for way in ("greedy", "genetic"))
    fixed = [_mean_error(linears, parse_template(text), 8) for text in PRECISIONS.values()]
    for found in (greedy, genetic):
        assert found.error == min(found.tried.values())
        assert found.error < min(fixed)
        assert found.template.has_hole
        assert parse_template(str(found.template)) == found.template
    assert genetic.error < 1.15 * greedy.error
    assert search_template(linears, 8, "genetic").template == genetic.template


def test_from_checkpoints(pairs, text):
    base, tuned = pairs["small"]
    options = {"source": text, "samples": 6, "seq_len": 12, "blocks": 1}
    found = find_template(base, tuned, 4, **options)
    assert 0 < found.error < 0.5
    with pytest.raises(PlanError, match="no linear of the sampled blocks differs"):
        find_template(base, base, 4, **options)
    with pytest.raises(CalibrationError, match="text to measure errors on"):
        find_template(base, tuned, 4, source="none")
