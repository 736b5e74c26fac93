"""Distillation looks only at tokens that count: they get the logits that the whole model gives them."""

from functools import partial

import families
import pytest
import tiny_pairs
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from deltacome.compression.distill import (
    Trained,
    _inputs,
    _picking,
    _Tuned,
    distill,
    squared_distance,
)
from deltacome.format.codec import Packed
from deltacome.methods.bitdelta import signs_of
from deltacome.rows import Row

ROWS = [Row([5, 9, 33, 7]), Row([8, 4, 6, 21, 90, 3, 17]), Row([2, 40, 41, 42, 43])]
STREAMED = families.STREAMED


def first(row):
    return len(row) // 2


@pytest.fixture(params=[*tiny_pairs.FAMILIES, *STREAMED])
def model(request, tmp_path):
    """Each causal family, with its own scales, caps and windows on the way to its logits."""
    if request.param in STREAMED:
        config = families.FAMILIES[request.param]()
        return families.load(families.make(request.param, config, tmp_path / "model"))
    tiny_pairs.make_base(request.param, tmp_path / "model", torch.float32)
    load = AutoModelForCausalLM.from_pretrained
    return load(tmp_path / "model", dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_of_tokens_that_count(model):
    rows = [row.ids for row in ROWS]
    wanted = [model(input_ids=torch.tensor([row])).logits[0, first(row) :] for row in rows]
    close = {"rtol": 1e-4, "atol": 1e-4}
    inputs, counts_BL = _inputs(model, ROWS, first)
    with _picking(model, counts_BL):
        got = functional_call(model, dict(model.named_parameters()), (), inputs).logits[0]
    torch.testing.assert_close(got, torch.cat(wanted), **close)
    tuned = _Tuned(model, first)
    torch.testing.assert_close(tuned.logits(ROWS[:2]), torch.cat(wanted[:2]), **close)
    # One row that is kept and one that is new, in another order.
    torch.testing.assert_close(tuned.logits(ROWS[2:0:-1]), torch.cat(wanted[2:0:-1]), **close)
    # The model is as it was.
    torch.testing.assert_close(
        model(input_ids=inputs["input_ids"]).logits[counts_BL], torch.cat(wanted), **close
    )


def test_a_row_runs_through_the_blocks_once(tmp_path):
    tiny_pairs.make_base("llama-tied", tmp_path / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    runs = []
    model.base_model.layers[0].register_forward_pre_hook(lambda *args: runs.append(1))
    tuned = _Tuned(model, first)
    before = tuned.logits(ROWS)
    assert torch.equal(tuned.logits(ROWS), before)
    assert len(runs) == 1


def test_tokens_of_answers_weigh_alike(tmp_path):
    """However long an answer is; a text weighs as much as an answer of the mean length."""
    tiny_pairs.make_base("llama-tied", tmp_path / "model", torch.float32)
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "model", dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load().get_parameter(name).detach()
    terms = {name: Trained(Packed(signs=signs_of(weight, "matrix")), lambda: weight)}
    begins = {len(ROWS[0]): 0, len(ROWS[1]): 1, len(ROWS[2]): 1}  # a text of 4, answers of 6 and 4
    weighed = []

    def loss(got_TV, wanted_TV):
        costs_T = squared_distance(got_TV, wanted_TV)
        costs_T.register_hook(lambda grad_T: weighed.extend(grad_T.tolist()))
        return costs_T

    how = {"loss": loss, "rate": 0.1, "batch": 3, "steps": 1, "seed": 0}
    distill(load, terms, ROWS, first=lambda row: begins[len(row)], **how)
    assert sorted(weighed) == pytest.approx([1 / 5 / 3] * (6 + 4) + [1 / 4 / 3] * 4)
