"""Questions with pictures: to a vision-language model, to its delta, and to those that do not see."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from deltacome import compress
from deltacome.errors import PictureError
from deltacome.evals.divergence import Compared, by_row, question_rows, record
from deltacome.evals.prompts import prompt_row
from deltacome.evals.run import answer_with, evaluate
from deltacome.evals.score import answers
from deltacome.evals.tasks import Question, read_questions, write_questions
from deltacome.pictures import load_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
from families import load
from seeing import CONFIGS, SIZE, TOKENS, made_by_hand, make_llava, make_pair

COLOURS = ["red", "green", "blue", "white"]
QUICK = {"max_new_tokens": 4, "device": "cpu", "dtype": "float32"}


class Digits:
    """Shows token ids of a model that has no tokenizer."""

    eos_token_id = None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request, tmp_path_factory):
    """A model, and rows with and without pictures."""
    tuned = make_pair(request.param, tmp_path_factory.mktemp("family"))[1]
    return load(tuned), made_by_hand(request.param)


def logits(model, row):
    """The logits of one row alone, at every position, without a cache."""
    with torch.inference_mode():
        ids = torch.tensor([row.ids])
        return model(input_ids=ids, use_cache=False, **row.seen).logits[0]


def slow(model, row, count):
    said = []
    for _ in range(count):
        said.append(int(logits(model, row.followed_by(said))[-1].argmax()))
    return said


def test_answers_are_those_without_cache_and_batch(family):
    model, rows = family
    wanted = [" ".join(map(str, slow(model, row, 5))) for row in rows]
    seen = [i for i, row in enumerate(rows) if row.seen]
    order = [*range(len(rows)), *seen, *seen]  # so that some share a pass
    found = answers(model, Digits(), [rows[i] for i in order], batch_size=3, max_new_tokens=5)
    assert found == [wanted[i] for i in order]
    assert len(set(wanted)) > 3


def test_divergence_is_that_of_each_row_alone(family):
    model, rows = family
    twice = [Compared(row, first=len(row) - 3) for row in [*rows, rows[-1]]]
    reference = record(model, twice, batch_size=4)
    assert all(kl < 1e-5 and n == 3 for kl, n in by_row(model, reference))
    with torch.no_grad():
        model.get_output_embeddings().weight[::2] *= 1.5
    log_p = torch.from_numpy(reference.log_probs_PV).split(3)
    for one, p, (kl, _) in zip(twice, log_p, by_row(model, reference), strict=True):
        q = torch.log_softmax(logits(model, one.row)[-3:].float(), -1)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
        assert kl > 1e-5


# --- a LLaVA with its processor ------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A text base, a vision-language model made from it, and the delta."""
    folder = tmp_path_factory.mktemp("vision")
    base, tuned = make_llava(folder)
    return base, tuned, compress(base, tuned, folder / "delta", ratio=1.3, calibration="none").path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (SIZE + i, SIZE), colour).save(folder / f"{colour}.png")
    return folder


@pytest.fixture(scope="module")
def task(vision, pictures):
    """A task file of what the tuned model says of one picture, of two, and without any."""
    _, tuned, _ = vision
    model, processor = load(tuned), load_processor(tuned)
    files = [pictures / f"{colour}.png" for colour in COLOURS]
    asked = [(f"1 + {i}", (file,)) for i, file in enumerate(files)]
    asked += [("which", tuple(files[:2])), ("which", tuple(files[2:])), ("3 + 4", ())]
    rows = [prompt_row(processor.tokenizer, Question(p, "", f), processor) for p, f in asked]
    said = answers(model, processor.tokenizer, rows, batch_size=4, max_new_tokens=4)
    right = [Question(p, s, f) for (p, f), s in zip(asked, said, strict=True) if s.strip()]
    assert len(right) > 4
    assert len({q.answer for q in right}) > 3
    write_questions(pictures / "task.jsonl", right)
    return pictures / "task.jsonl"


def test_a_delta_is_measured_as_the_tuned_model_is(vision, task):
    base, tuned, delta = vision
    result = evaluate(base, tuned=tuned, deltas=[delta], task=str(task), **QUICK)
    of_base, of_tuned, of_delta = result["models"]
    assert of_tuned["score"] == 1
    assert of_base["score"] is of_base["kl_task"] is None  # it takes no pictures
    assert of_base["kl_text"] > 0
    assert of_delta["score"] > 0.5
    assert 0 < of_delta["kl_task"] < 0.05
    alone = evaluate(base, deltas=[delta], task=str(task), **QUICK)
    assert alone["models"][1]["score"] == of_delta["score"]


def test_what_is_compared_is_the_answer_behind_the_picture(vision, task):
    processor = load_processor(vision[1])
    questions = read_questions(task)
    rows = question_rows(processor.tokenizer, questions, processor)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for question, one in zip(questions, rows, strict=True):
        assert one.row.ids.count(token) == TOKENS * len(question.pictures)
        behind = processor.tokenizer.decode(one.row.ids[one.first + 1 :])
        assert behind == question.answer


def test_it_answers(vision, task, cli):
    base, tuned, delta = vision
    questions = read_questions(task)
    for asked in questions:
        said = answer_with(tuned, None, asked.prompt, pictures=asked.pictures, **QUICK)
        assert said == asked.answer
    asked = next(q for q in questions if len(q.pictures) == 2)
    said = answer_with(base, delta, asked.prompt, pictures=asked.pictures, **QUICK)
    shown = [word for file in asked.pictures for word in ("--image", file)]
    sizes = "--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32", "--json"
    code, out, err = cli("generate", base, asked.prompt, "--delta", delta, *shown, *sizes)
    assert code == 0, err
    assert json.loads(out) == {"prompt": asked.prompt, "answer": said}


def test_paths_are_relative_to_the_file(pictures):
    lines = [{"image": "red.png", "images": None, "prompt": "what", "answer": "red"}]
    lines += [{"images": ["red.png", str(pictures / "blue.png")], "prompt": "a", "answer": "b"}]
    file = pictures / "relative.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [q.pictures for q in read_questions(file)] == [
        (pictures / "red.png",), (pictures / "red.png", pictures / "blue.png")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("none.png", r"q\.jsonl:1: expected a picture at .*none\.png, found none"),
        (7, r"q\.jsonl:1: expected the path of a picture, got 7"),
        (["red.png", None], r"q\.jsonl:1: expected the path of a picture, got None"),
    ],
)
def test_a_picture_that_is_not_there_is_an_error_that_names_the_line(pictures, image, reason):
    file = pictures / "q.jsonl"
    file.write_text(json.dumps({"image": image, "prompt": "what", "answer": "that"}))
    with pytest.raises(PictureError, match=reason):
        read_questions(file)


def test_a_model_without_eyes_is_an_error(vision, pictures, tmp_path):
    base, tuned, delta = vision
    file = pictures / "red.png"
    with pytest.raises(PictureError, match=r"expected a processor for pictures, got .*Tokenizer"):
        answer_with(base, None, "what", pictures=[file], **QUICK)
    blind = shutil.copytree(base, tmp_path / "blind")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(tuned / name, blind / name)
    with pytest.raises(PictureError, match=r"red\.png: LlamaForCausalLM has no input for pictures"):
        answer_with(blind, None, "what", pictures=[file], **QUICK)
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    with pytest.raises(PictureError, match=r"broken\.png: the processor refuses it"):
        answer_with(base, delta, "what", pictures=[broken], **QUICK)
