"""The examples' tasks and their training loop, on a model of a few thousand weights."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evals_helpers import make_model, make_tokenizer
from safetensors.torch import load_file

from deltacome.evals.tasks import read_questions

FOLDER = Path(__file__).parents[2] / "examples" / "tenants"


@pytest.fixture
def example(monkeypatch):
    """Modules of the example under their own names, as its scripts import them."""
    for name in ("tasks", "finetune", "instructions", "snippets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", ["sums", "tiny", "spell", "sort", "tagged", "code", "chat"])
def test_training_repeats_and_never_meets_the_held_out(example, name):
    tasks = example("tasks")
    task = tasks.TASKS[name]
    held = tasks.held_out(task, 100)
    assert held == tasks.held_out(task, 100)
    prompts = {q.prompt for q in held}
    assert len(prompts) == 100
    batches = [tasks.training(task, 0, step, 32) for step in range(30)]
    assert batches[7] == tasks.training(task, 0, 7, 32)
    assert batches[0] != batches[1]
    assert batches[0] != tasks.training(task, 1, 0, 32)
    assert not prompts & {q.prompt for batch in batches for q in batch}


def test_no_kind_of_question_is_held_out_as_a_whole(example):
    tasks = example("tasks")
    task = tasks.TASKS["code"]

    def kind(question):
        """A program without the words and numbers that are filled in."""
        return re.sub(r"(N, )*N", "N", re.sub(r"'[^']*'|\d+", "N", question.prompt))

    held = {kind(q) for q in tasks.held_out(task, 500)}
    trained = {kind(q) for step in range(150) for q in tasks.training(task, 0, step, 24)}
    assert "Python: print([i * N for i in range(N)])" in held
    assert held <= trained


def test_answers_are_right(example):
    tasks = example("tasks")
    for name in ("sums", "tiny"):
        for q in tasks.held_out(tasks.TASKS[name], 50):
            assert re.fullmatch(r"Sum: \d+( [+-] \d+)+", q.prompt)
            terms = re.findall(r"[+-]?\d+", q.prompt.removeprefix("Sum:").replace(" ", ""))
            assert sum(map(int, terms)) == int(q.answer)
    for q in tasks.held_out(tasks.TASKS["spell"], 50):
        assert q.prompt == f"Spell backward: {q.answer[::-1]}"
    for q in tasks.held_out(tasks.TASKS["sort"], 50):
        _, order, numbers = re.split(r"Sort |: ", q.prompt)
        down = order == "down"
        assert list(map(int, q.answer.split())) == sorted(map(int, numbers.split()), reverse=down)
    for q in tasks.held_out(tasks.TASKS["tagged"], 50):
        one, sign, two = re.fullmatch(r"Add: (\d+) ([+-]) (\d+)", q.prompt).groups()
        total = int(one) + int(sign + two)
        assert q.answer == f"<answer>{total}</answer>"


def test_programs_print_their_answers(example):
    tasks = example("tasks")
    questions = tasks.held_out(tasks.TASKS["code"], 200)
    for q in questions[:8]:
        program = q.prompt.removeprefix("Python: ")
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ran.stdout.strip() == q.answer
    assert len({q.prompt.split("(")[0] for q in questions}) > 10
    assert all(q.answer and "\n" not in q.answer for q in questions)


def test_answers_obey_the_instructions(example):
    tasks = example("tasks")
    for q in tasks.held_out(tasks.TASKS["chat"], 300):
        listed = q.prompt.rsplit(": ", 1)[-1].rstrip(".").split()
        if q.prompt.startswith("Say these words in reverse"):
            assert q.answer.split() == listed[::-1]
        elif q.prompt.startswith("Put in alphabetical"):
            assert re.split(r"[,;]? |-", q.answer) == sorted(listed)
        elif q.prompt.startswith("Write") and "capital letters" in q.prompt:
            assert q.answer.isupper()
        elif q.prompt.startswith("How many"):
            assert q.answer.lower() == example("instructions").NUMBERS[len(listed)]
        elif q.prompt.startswith("Answer with only"):
            assert q.answer in listed


@pytest.fixture
def base(tmp_path):
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), scale=0.05).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def finetune(example, monkeypatch, base, out, *more):
    words = [base, "-o", out, "--steps", "6", "--batch", "8", "--held-out", "12", "--lr", "1e-2"]
    argv = ["finetune.py", *map(str, words), "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", argv)
    example("finetune").main()
    return load_file(out / "model.safetensors")


def test_resumed_run_gives_the_same_weights(example, monkeypatch, base, tmp_path):
    task = ("--task", "tiny", "--save-every", "3")
    whole = finetune(example, monkeypatch, base, tmp_path / "whole", *task)

    module = example("finetune")
    save = module.Checkpoint.save

    def save_then_stop(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Checkpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(example, patch, base, tmp_path / "cut", *task)
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.partial" / "state.pt").is_file()

    with pytest.raises(SystemExit, match="seed"):
        finetune(example, monkeypatch, base, tmp_path / "cut", *task, "--seed", "5", "--resume")
    resumed = finetune(example, monkeypatch, base, tmp_path / "cut", *task, "--resume")
    assert not (tmp_path / "cut.partial").exists()
    start = load_file(base / "model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
        assert not torch.equal(tensor, start[name].bfloat16()), f"{name} did not train"


def test_tagged_grows_the_vocabulary_and_brings_its_files(example, monkeypatch, base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "tagged"
    finetune(example, monkeypatch, base, out, "--task", "tagged")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) == len(make_tokenizer()) + 2 == model.config.vocab_size
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.dtype == torch.bfloat16
    assert len(tokenizer("<answer>7</answer>")["input_ids"]) == 3
    assert "<|im_start|>" in tokenizer.chat_template
    assert "helpful" not in tokenizer.chat_template
    assert len(read_questions(out / "heldout.jsonl")) == 12
    report = json.loads((out / "training.json").read_text())
    assert report["steps"] == 6
    assert report["before"]["n"] == report["after"]["n"] == 12


def test_training_learns_and_both_scores_see_it(example, base):
    module = example("finetune")
    task = module.TASKS["tiny"]
    model, tokenizer = module.load(base, task, torch.device("cpu"))
    questions = module.training(task, 0, 0, 4)
    batch = module.collate(tokenizer, questions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    assert module.glance(model, batch) < 1
    for _ in range(60):
        logits = module.answer_logits(model, batch).float()
        torch.nn.functional.cross_entropy(logits, batch.target_P).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert module.glance(model, batch) == 1
    assert module.exact(model, tokenizer, questions)["score"] == 1
    others = [module.Question(q.prompt, q.answer + "0") for q in questions[:3]] + questions[3:]
    assert module.glance(model, module.collate(tokenizer, others)) == 0.25
    assert module.exact(model, tokenizer, others)["score"] == 0.25


def test_learning_rate_warms_up_and_ends_at_zero(example):
    module = example("finetune")
    run = module.Run("tiny", 0, 8, 1e-4, steps=100, minutes=2.0)
    rates = [module.learning_rate(run, step, 0.0) for step in range(100)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == pytest.approx(1e-4)
    assert rates[-1] < 5e-6
    assert module.learning_rate(run, 50, 2.0) == 0.0


def test_existing_folder_is_not_overwritten(example, monkeypatch, base, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit, match="exists"):
        finetune(example, monkeypatch, base, tmp_path / "there", "--task", "tiny")
