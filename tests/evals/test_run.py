import json
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evals_helpers import make_model, make_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file

from deltacome.errors import CheckpointError, DeltaError, MismatchError
from deltacome.evals.models import load_model, tuned_by
from deltacome.evals.report import table
from deltacome.evals.run import delta_tokenizer, evaluate, names, shared_tokenizer
from deltacome.evals.tasks import Question, write_questions

HOW = ("seed", "task_args", "dtype", "max_new_tokens", "text")
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def save(folder, *, seed, template=None, extra=()):
    tokenizer = make_tokenizer(extra)
    tokenizer.chat_template = template
    model = make_model(len(tokenizer), seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(tmp_path, *answers):
    path = tmp_path / "questions.jsonl"
    write_questions(path, [Question(f"Sum: 1 + {i}", a) for i, a in enumerate(answers)])
    return str(path)


@pytest.fixture
def _attach_swaps_weights(monkeypatch):
    """A delta here is a folder that names a dense checkpoint to load in its place."""

    @contextmanager
    def attach(model, artifact):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        source = (artifact.path / "source").read_text()
        model.load_state_dict(type(model).from_pretrained(source).state_dict())
        try:
            yield model
        finally:
            model.load_state_dict(before)

    runtime = SimpleNamespace(attach=attach, base_for=None)
    monkeypatch.setitem(sys.modules, "deltacome.runtime", runtime)
    monkeypatch.setattr("deltacome.evals.run.opened", opened)


def opened(path):
    carried = {file.name: None for file in path.iterdir() if file.name != "source"}
    manifest = SimpleNamespace(method={"name": "swap"}, files=carried, dropped_files=(), records={})
    return SimpleNamespace(
        path=path,
        manifest=manifest,
        digest="abc",
        bytes_on_disk=lambda: 1000,
        ratio=lambda: 16.0,
        json_file=lambda _: None,
        file=lambda name: (path / name).read_bytes(),
    )


def delta(folder, source):
    folder.mkdir(parents=True)
    (folder / "source").write_text(str(source))
    return folder


def run(base, task, **more):
    return evaluate(base, task=task, device="cpu", max_new_tokens=6, batch_size=2, **more)


@pytest.mark.usefixtures("_attach_swaps_weights")
def test_table_of_base_tuned_and_deltas(tmp_path):
    base = save(tmp_path / "base", seed=0)
    tuned = save(tmp_path / "tuned", seed=1, template=TEMPLATE)
    far = save(tmp_path / "far", seed=2)
    deltas = [delta(tmp_path / "same", tuned), delta(tmp_path / "other", far)]
    task = questions(tmp_path, "1", "2", "3")
    result = run(base, task, tuned=tuned, deltas=deltas, n=3)

    assert list(result) == ["task", "n", *HOW, "models"]
    assert (result["task"], result["n"]) == (task, 3)
    rows = {m["name"]: m for m in result["models"]}
    assert list(rows) == ["base", "tuned", "same", "other"]
    kls = ["kl_task", "kl_task_error", "kl_text", "kl_text_error"]
    figures = ["score", "score_low", "score_high", *kls]
    for name, row in rows.items():
        size = [] if name in ("base", "tuned") else ["artifact", "method", "bytes", "ratio"]
        assert list(row) == ["name", *size, *figures]
        assert 0 <= row["score_low"] <= row["score"] <= row["score_high"] <= 1
    for kl in ("kl_task", "kl_text"):
        assert rows["tuned"][kl] == 0.0
        assert rows["same"][kl] == pytest.approx(0.0, abs=1e-8)
        assert rows["base"][kl] > 0.01
        assert rows["other"][kl] > 0.01
        assert 0 < rows["other"][f"{kl}_error"] < rows["other"][kl]
    said = [rows["other"][key] for key in ("artifact", "method", "bytes", "ratio")]
    assert said == ["abc", "swap", 1000, 16.0]
    # The base runs before the deltas and must not be affected by them, nor the last delta by the first.
    alone = run(base, task, tuned=tuned, n=3)["models"]
    assert alone == [rows["base"], rows["tuned"]]
    reverse = run(base, task, tuned=tuned, deltas=deltas[::-1], n=3)["models"]
    assert reverse[2:] == [rows["other"], rows["same"]]


def test_score_counts_what_the_model_really_says(tmp_path):
    base = save(tmp_path / "base", seed=0)
    from deltacome.evals.score import generate

    said = generate(
        make_model(len(make_tokenizer()), seed=0), make_tokenizer(),
        [f"Sum: 1 + {i}" for i in range(3)], max_new_tokens=6,
    )  # fmt: skip
    assert all(s.strip() for s in said)
    task = questions(tmp_path, said[0].strip().splitlines()[0], "no", "never")
    (row,) = run(base, task, n=3)["models"]
    assert row["score"] == pytest.approx(1 / 3)
    assert row["kl_task"] is None
    assert row["kl_text"] is None


def test_base_cannot_be_compared_on_tokens_that_it_lacks(tmp_path):
    base = save(tmp_path / "base", seed=0)
    tuned = save(tmp_path / "tuned", seed=1, extra=("<answer>",))
    task = questions(tmp_path, "<answer>1", "<answer>2")
    row, of_tuned = run(base, task, tuned=tuned, n=2)["models"]
    assert row["kl_task"] is None
    assert row["kl_text"] > 0.01
    assert row["score"] == 0.0
    assert of_tuned["kl_task"] == 0.0

    prompted = save(tmp_path / "chat", seed=1, extra=("<user>",), template="<user>" + TEMPLATE)
    row, of_tuned = run(base, task, tuned=prompted, n=2)["models"]
    assert (row["score"], row["score_low"], row["kl_task"]) == (None, None, None)
    assert of_tuned["score"] is not None


def test_delta_brings_the_files_that_differ(tmp_path):
    base = save(tmp_path / "base", seed=0, template="of the base")
    plain = delta(tmp_path / "plain", base)
    assert delta_tokenizer(base, opened(plain)).chat_template == "of the base"
    chat = delta(tmp_path / "chat", base)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    assert delta_tokenizer(base, opened(chat)).chat_template == TEMPLATE
    assert len(delta_tokenizer(base, opened(chat))) == len(make_tokenizer())
    grown = delta(tmp_path / "grown", base)
    make_tokenizer(("<answer>",)).save_pretrained(grown)
    assert len(delta_tokenizer(base, opened(grown))) == len(make_tokenizer()) + 1

    inside = delta(tmp_path / "inside", base)
    make_tokenizer().save_pretrained(inside)
    file = inside / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    fine_tune = opened(inside)
    fine_tune.manifest.dropped_files = ("chat_template.jinja",)
    assert delta_tokenizer(base, fine_tune).chat_template == TEMPLATE

    assert shared_tokenizer(base, None, [opened(chat)]).chat_template == TEMPLATE
    assert (
        shared_tokenizer(base, base, [opened(chat), opened(plain)]).chat_template == "of the base"
    )
    with pytest.raises(MismatchError, match=r"plain.*chat template"):
        shared_tokenizer(base, None, [opened(chat), opened(plain)])


def test_names_are_folders_unless_they_clash():
    assert names([Path("x/a"), "y/b/"]) == ["a", "b"]
    assert names(["x/a", "y/a"]) == ["x/a", "y/a"]


def test_bad_models_and_dtypes_are_named(tmp_path):
    task = questions(tmp_path, "1")
    base = save(tmp_path / "base", seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        run(tmp_path / "empty", task)
    for key, value in {
        "hidden_act": "nonesuch",
        "quantization_config": {"quant_method": "gptq"},
    }.items():
        shutil.copytree(base, bad := tmp_path / key)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=f"{key}: expected a language model"):
            run(bad, task)
    refusing = save(tmp_path / "refusing", seed=0, template="{{ raise_exception('no') }}")
    with pytest.raises(DeltaError, match=r"chat template: it refuses 'Sum: 1 . 0': no"):
        run(refusing, task)
    with pytest.raises(DeltaError, match="float99"):
        run(base, task, dtype="float99")


def test_dtype_is_used(tmp_path):
    base = save(tmp_path / "base", seed=0)
    task = questions(tmp_path, "1", "2")
    tuned = save(tmp_path / "tuned", seed=0)
    text = tmp_path / "t.txt"
    text.write_text("0123456789" * 200)
    found = run(base, task, tuned=tuned, dtype=torch.float32, text=str(text))
    assert (found["dtype"], found["text"]) == ("float32", str(text))
    assert found["models"][0]["kl_text"] == pytest.approx(0.0, abs=1e-8)
    from deltacome.evals.models import load_model

    for dtype in ("bfloat16", torch.bfloat16):
        assert next(load_model(base, "cpu", dtype).parameters()).dtype == torch.bfloat16


def test_text_is_read_before_a_model_is_loaded(tmp_path, monkeypatch):
    base, task = save(tmp_path / "base", seed=0), questions(tmp_path, "1")
    monkeypatch.setattr("deltacome.evals.run.load_model", None)
    with pytest.raises(DeltaError, match=r"none\.txt: expected a readable text file"):
        run(base, task, tuned=base, text=tmp_path / "none.txt")
    with pytest.raises(DeltaError, match=r"none\.txt: .* tuned model: .*, got none"):
        run(base, task, text=tmp_path / "none.txt")


def test_report_shows_every_figure():
    result = {
        "task": "sums",
        "n": 4,
        "models": [
            {"name": "base", "score": None, "score_low": None, "score_high": None}
            | {"kl_task": None, "kl_text": 0.25},
            {"name": "small", "score": 0.5, "score_low": 0.15, "score_high": 0.85}
            | {"kl_task": 0.0, "kl_task_error": 2e-9, "kl_text": 0.00123, "kl_text_error": 0.00004}
            | {"bytes": 16_900_000, "ratio": 15.9},
            {"name": "near", "score": 0.5, "score_low": 0.15, "score_high": 0.85}
            | {"kl_task": 0.0, "kl_text": 0.000116, "kl_text_error": 0.000004},
        ],
    }
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result))
    text = console.export_text()
    for shown in (
        "sums, 4 questions",
        "50.0",
        "15.0 to 85.0",
        "0 ± 2e-09",
        "0.00123 ± 0.00004",
        "0.00012 ± 4e-06",
        "16.9",
        "15.9",
    ):
        assert shown in text
    del result["models"][1:]
    assert "MB" not in [column.header for column in table(result).columns]


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    folder = save(tmp_path / "base", seed=0)
    file = folder / "model.safetensors"
    weights = load_file(file)
    dropped = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 weights .* missing, model\.layers\.1\.mlp\.up_proj"
    ):
        load_model(folder, "cpu")
    weights["model.layers.1.mlp.up_proj.weight"] = dropped[:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: expected shape \(96, 64\), got \(95"
    ):
        load_model(folder, "cpu")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"base: expected a language model"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("named", [5, {"a": 1}, [5], "LlavaForConditionalGeneration"])
def test_a_delta_that_names_no_class(monkeypatch, named):
    """Its configuration may say anything; what is run is then the base's class."""
    runtime = SimpleNamespace(attach=lambda model, artifact: nullcontext(), base_for=None)
    monkeypatch.setitem(sys.modules, "deltacome.runtime", runtime)
    artifact = SimpleNamespace(json_file=lambda _: {"architectures": named})
    with tuned_by(artifact, "base", "the base") as running:
        assert running == "the base"
