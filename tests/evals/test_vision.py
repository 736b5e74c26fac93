"""A vision-language model made from a text base, asked without pictures."""

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deltacome import compress
from deltacome.evals.run import answer_with, evaluate
from deltacome.evals.score import generate
from deltacome.evals.tasks import Question, write_questions

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
from families import load, make_vision

PROMPTS = [f"12 + {i} is" for i in range(6)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    base, tuned = make_vision(folder)
    return base, tuned, compress(base, tuned, folder / "delta", ratio=1.3, calibration="none").path


def test_it_is_measured_as_the_tuned_model_is(pair, tmp_path):
    base, tuned, delta = pair
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    said = generate(load(tuned), tokenizer, PROMPTS, max_new_tokens=4)
    questions = [Question(*q) for q in zip(PROMPTS, said, strict=True) if q[1].strip()]
    assert len(questions) > 3
    task = tmp_path / "questions.jsonl"
    write_questions(task, questions)
    sizes = {"n": len(questions), "max_new_tokens": 4, "device": "cpu"}
    result = evaluate(base, tuned=tuned, deltas=[delta], task=str(task), **sizes)
    of_base, of_tuned, of_delta = result["models"]
    assert of_tuned["score"] == 1
    assert of_base["score"] < 0.5 < of_delta["score"]
    assert 0 < of_delta["kl_task"] < 0.02 * of_base["kl_task"]


def test_it_answers(pair):
    base, tuned, delta = pair
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    (wanted,) = generate(load(tuned), tokenizer, PROMPTS[:1], max_new_tokens=4)
    assert answer_with(base, delta, PROMPTS[0], max_new_tokens=4, device="cpu") == wanted
