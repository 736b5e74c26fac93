"""The two searches: on a cost that is known, and on a real pair."""

import json
import random
from dataclasses import replace

import families
import pytest
from tiny_pairs import copy_of

from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression import search
from deltacome.compression.calibration import Calibration
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
from deltacome.errors import (
    CalibrationError,
    CheckpointError,
    DeviceError,
    MismatchError,
    PlanError,
)
from deltacome.methods.template import PRECISIONS, parse_template
from deltacome.rows import Row

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
    rows = calibration_rows(Calibration(text, 6, 16, 0), tuned)
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


def test_plain_rounding_is_searched_as_it_rounds(linears):
    linears, fixed = [linears[3]], parse_template("2:*")
    rounded = _mean_error(linears, fixed, 8, nearest=True)
    assert rounded > 1.05 * _mean_error(linears, fixed, 8)
    assert search_template(linears, 8, nearest=True).tried[str(fixed)] == rounded


def test_transposed_matrices(text, tmp_path):
    base, tuned = families.make_pair("GPT2LMHeadModel", tmp_path)
    rows = calibration_rows(Calibration(text, 6, 16, 0), tuned)
    linears = sample_linears(Checkpoint(base), Checkpoint(tuned), rows, blocks=1)
    shapes = {linear.name: tuple(linear.delta_OI.shape) for linear in linears}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (192, 64)
    assert 0 < _mean_error(linears, parse_template("2:*"), 4) < 0.5


def test_sampled_blocks_are_spread_over_the_depth(text, tmp_path):
    base, tuned = families.make_pair("GPTJForCausalLM", tmp_path)  # of three blocks
    rows = calibration_rows(Calibration(text, 2, 8, 0), tuned)
    linears = sample_linears(Checkpoint(base), Checkpoint(tuned), rows, blocks=2)
    assert {linear.name.split(".")[2] for linear in linears} == {"0", "2"}


def test_errors_name_the_matrix(linears):
    first, other = linears[0], linears[6]
    assert first.delta_OI.shape[1] != other.delta_OI.shape[1]
    with pytest.raises(MismatchError, match=f"^{first.name}: .* columns"):
        _mean_error([replace(first, factor=other.factor)], parse_template("2:*"), 8)


def test_from_checkpoints(pairs, text):
    base, tuned = pairs["small"]
    options = {"source": text, "samples": 6, "seq_len": 12, "blocks": 1}
    found = find_template(base, tuned, 4, **options)
    assert 0 < found.error < 0.5
    with pytest.raises(PlanError, match="no linear of the sampled blocks differs"):
        find_template(base, base, 4, **options)
    with pytest.raises(CalibrationError, match="text to measure errors on"):
        find_template(base, tuned, 4, source="none")
    with pytest.raises(MismatchError, match="is this a fine-tune of this base"):
        find_template(pairs["llama"][0], tuned, 4, **options)


def test_tokens_that_the_model_lacks(pairs, tmp_path):
    base, tuned = pairs["small"]
    rows, match = [Row([1, 5, 300])], "gives token 300, but the embedding has 300 rows"
    with pytest.raises(CalibrationError, match=match):
        sample_linears(Checkpoint(base), Checkpoint(tuned), rows)


def test_what_is_refused_before_text_is_written(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "calibration_rows", None)
    base, tuned = pairs["small"]
    with pytest.raises(DeviceError, match="'gpu'"):
        find_template(base, tuned, 4, device="gpu")
    with pytest.raises(CalibrationError, match=r"seq_len: expected at most 256, .* got 257"):
        find_template(base, tuned, 4, seq_len=257)
    quantised = copy_of(tuned, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised by gptq"):
        find_template(base, quantised, 4)
