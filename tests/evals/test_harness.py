"""lm-eval through the attached model, on tasks that are defined here and need no network."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from evals_helpers import make_model, make_tokenizer
from rich.console import Console

import deltacome
from deltacome.errors import DeltaError, MismatchError
from deltacome.evals.harness import run_harness
from deltacome.evals.hflm import wrapped
from deltacome.evals.models import load_model
from deltacome.evals.report import harness_table
from deltacome.evals.score import greedy
from deltacome.methods.low_rank import LowRank
from deltacome.rows import Row

TASKS = {
    "local_answers": """
output_type: generate_until
doc_to_text: "Q: {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "local_choices": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}"
doc_to_choice: ["a", "b", "7"]
doc_to_target: "{{choice}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: median, higher_is_better: true}
""",
}
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base, tuned, and a delta of full rank in half precision: it does what the tuned model does."""
    return pair(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The same with a fine-tune that pads with a token of its own, and takes longer prompts."""
    return pair(tmp_path_factory.mktemp("grown"), "<pad>", 64)


def pair(folder, pad=None, positions=2048):
    """Folders of base, tuned and delta; `positions` are the base's."""
    known = make_tokenizer()
    tokenizer = make_tokenizer((pad,) if pad else ())
    base, tuned = (make_model(len(known), seed=0) for _ in range(2))
    base.config.max_position_embeddings = positions
    if pad:
        tokenizer.pad_token = pad
        tuned.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, model, words in (("base", base, known), ("tuned", tuned, tokenizer)):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    delta = folder / "delta"
    deltacome.compress(folder / "base", folder / "tuned", delta, method=LowRank(64), ratio=None)
    return folder / "base", folder / "tuned", delta


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    # The harness's own tasks are thousands of files: only the command's test has them listed.
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"question": f"{i} + {i}", "answer": "ab", "choice": i % 3} for i in range(24)]
    file = tmp_path / "data.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, file=file) + text)
    return folder


def test_a_delta_gets_what_the_tuned_model_gets(models, tasks):
    base, tuned, delta = models
    result = run_harness(
        base, list(TASKS), tuned=tuned, deltas=[delta], folder=tasks, device="cpu", dtype="float32"
    )
    assert [model["name"] for model in result["models"]] == ["base", "tuned", "delta"]
    of_base, of_tuned, of_delta = (model["results"] for model in result["models"])
    assert set(of_base) == set(TASKS)
    choices = [figures["local_choices"]["acc,none"] for figures in (of_base, of_tuned, of_delta)]
    assert choices[1] == choices[2] != choices[0]
    share, errors = choices[0], of_base["local_choices"]
    assert errors["acc_stderr,none"] == pytest.approx((share * (1 - share) / 23) ** 0.5)
    assert errors["acc_norm_stderr,none"] >= 0  # by resampling, about which it prints
    assert of_delta["local_answers"] == of_tuned["local_answers"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(harness_table(result))
    assert "local_choices, acc" in console.export_text()


def test_right_answers_count(models, tasks):
    # The harness must find the answers of our own greedy decoding right.
    base, tokenizer = models[0], make_tokenizer()
    model = load_model(base, "cpu", "float32")
    lines = []
    for i in range(6):
        said = greedy(model, [Row(tokenizer(f"Q: {i}")["input_ids"])], [1], 3)[0]
        answer = tokenizer.decode(said).split("\n")[0]
        lines.append({"question": str(i), "answer": answer, "choice": 0})
    (tasks.parent / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_harness(base, ["local_answers"], folder=tasks, device="cpu", dtype="float32")
    assert result["models"][0]["results"]["local_answers"]["exact_match,none"] == 1.0


def test_the_command_prints_its_object_and_nothing_else(models, tasks):
    program = Path(sys.executable).with_name("deltacome")
    base, _, delta = models
    options = ["--lm-eval", ",".join(TASKS), "--tasks-folder", tasks, "--delta", delta, "--json"]
    done = subprocess.run(
        [program, "eval", base, *options, "--limit", "2"],
        env=os.environ | {"HF_HOME": str(tasks.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert set(done.stderr.splitlines()) <= {"bootstrapping for stddev: median"}
    (row,) = (m for m in json.loads(done.stdout)["models"] if "artifact" in m)
    assert row["artifact"] == deltacome.Artifact.open(delta).digest
    assert row["results"].keys() == TASKS.keys()


def test_a_delta_has_the_tokens_and_the_length_of_its_fine_tune(grown, tasks, caplog, monkeypatch):
    """The base lacks the token that pads, and its prompts are cut off, which is said once."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    lines = [{"question": f"{i}" * (90 + i), "answer": "ab", "choice": i % 3} for i in range(24)]
    (tasks.parent / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base, tuned, delta = grown
    result = run_harness(
        base, list(TASKS), tuned=tuned, deltas=[delta], folder=tasks, device="cpu", dtype="float32"
    )
    of_base, of_tuned, of_delta = (model["results"] for model in result["models"])
    assert of_tuned == of_delta
    assert of_base["local_choices"]["acc,none"] != of_tuned["local_choices"]["acc,none"]
    said = [record.getMessage() for record in caplog.records if "runcat" in record.getMessage()]
    assert 1 <= len(said) <= 3, said


def test_what_the_harness_would_ignore_or_refuse_late_is_refused(models, tasks, monkeypatch):
    monkeypatch.setattr("deltacome.evals.harness.load_model", None)  # before a model is loaded
    (tasks / "none.yaml").write_text(
        HEAD.format(name="takes_none", file=tasks.parent / "data.json")
        + TASKS["local_answers"]
        + "num_fewshot: 0\n"
    )
    (tasks / "code.yaml").write_text(
        HEAD.format(name="runs_code", file=tasks.parent / "data.json")
        + TASKS["local_answers"]
        + "unsafe_code: true\n"
    )
    for task, options, why in (
        ("takes_none", {"shots": 5}, "takes_none: expected no --shots, .* got 5"),
        ("runs_code", {}, "runs_code: expected --run-code"),
        ("local_answers", {"chat": True}, "--chat: expected a tokenizer with a chat template"),
    ):
        with pytest.raises(DeltaError, match=why):
            run_harness(models[0], [task], folder=tasks, **options)
    with pytest.raises(MismatchError, match="wrong base"):
        run_harness(models[1], ["local_answers"], folder=tasks, deltas=[models[2]])


def test_chats_are_written_as_the_other_tasks_write_them(models):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for part in m.content if part.type is defined %}{{ part.text }}{% endfor %}{% endfor %}<a>"
    )
    lm = wrapped(load_model(models[0], "cpu", "float32"), tokenizer, 2, None)
    assert lm.apply_chat_template([{"role": "user", "content": "1 + 1"}]) == "<user>1 + 1<a>"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DeltaError, match="chat template refuses a prompt: no"):
        lm.apply_chat_template([{"role": "user", "content": "1 + 1"}])


def test_a_base_without_the_template_s_tokens_is_left_out(grown, tasks, tmp_path):
    base, tuned, _ = grown
    shutil.copytree(tuned, tmp_path / "tuned")
    words = make_tokenizer(("<pad>",))
    words.chat_template = "<pad>{{ messages[0].content }}"
    words.save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="is left out: it lacks tokens"):
        result = run_harness(
            base, ["local_choices"], tuned=tmp_path / "tuned", folder=tasks, chat=True, limit=2,
            device="cpu", dtype="float32",
        )  # fmt: skip
    assert [model["name"] for model in result["models"]] == ["tuned"]


def test_unknown_tasks_are_refused(models, tasks):
    with pytest.raises(DeltaError, match="no_such_task"):
        run_harness(models[0], ["no_such_task"], folder=tasks)
    with pytest.raises(DeltaError, match="got none"):
        run_harness(models[0], [], folder=tasks)
