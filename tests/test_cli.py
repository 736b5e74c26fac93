"""The command line: exit codes, where things are printed, and the keys of its JSON."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artifact_helpers import write_artifact

sys.path.insert(0, str(Path(__file__).parent / "compression"))
from tiny_pairs import make_pair, text_lines, tree, weights_of

import deltacome.compression
from deltacome.cli.printing import summary
from deltacome.format.manifest import Record
from deltacome.methods.delta_come import DeltaCome

OVERVIEW = {"method", "base", "bytes_on_disk", "tuned_bytes", "ratio", "nominal_ratio"}
OVERVIEW |= {"canary", "tensors"}
COST = {"seconds", "peak_rss_bytes", "peak_rss_bytes_of_largest_worker"}
TENSOR = {"name", "shape", "kind", "plan", "sign_scales", "bytes", "error"}
QUICK = ["--ratio", "4", "--calibration", "none"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, tuned = make_pair("small", tmp_path_factory.mktemp("cli"))
    return str(base), str(tuned)


@pytest.fixture(scope="module")
def artifact(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "a"
    deltacome.compress(*pair, out, ratio=4, calibration="none")
    return out


def check_overview(said, folder):
    files = [f for f in folder.iterdir() if f.name.startswith("delta")]
    assert said["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    assert said["ratio"] == said["tuned_bytes"] / said["bytes_on_disk"]
    assert said["nominal_ratio"] > said["ratio"]
    assert said["method"] == "delta-come"
    assert said["base"].keys() == {"name_or_path", "revision"}
    names = []
    for tensor in said["tensors"]:
        assert tensor.keys() == TENSOR
        names.append(tensor["name"])
        assert tensor["kind"] in ("bands", "exact", "same")
        assert (tensor["error"] is None) == (not tensor["plan"]) == (tensor["kind"] != "bands")
        assert tensor["bytes"] > 0
    return names


def test_compress_as_json(cli, pair, tmp_path):
    calibration = tmp_path / "c.txt"
    calibration.write_text("\n".join(text_lines(9)))
    options = ["--ratio", "4", "--calibration", calibration, "--samples", "4", "--seq-len", "12"]
    code, out, err = cli("compress", *pair, "-o", tmp_path / "a", *options, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)  # a single object, nothing else
    assert said.keys() == OVERVIEW | COST
    assert said["peak_rss_bytes_of_largest_worker"] is None
    assert said["base"] == {"name_or_path": pair[0], "revision": None}
    assert said["ratio"] == pytest.approx(4, rel=0.02)
    assert 0 < said["seconds"] < 600
    assert 1 << 27 < said["peak_rss_bytes"] < 1 << 37
    names = check_overview(said, tmp_path / "a")
    assert sorted(names) == sorted(weights_of(Path(pair[1])))
    code, out, err = cli("inspect", tmp_path / "a", "--json")
    assert (code, err) == (0, "")
    again = json.loads(out)
    assert again.keys() == OVERVIEW
    assert again == {key: said[key] for key in OVERVIEW}


def test_compress_for_people(cli, pair, tmp_path):
    code, out, err = cli("compress", *pair, "-o", tmp_path / "a", *QUICK)
    assert (code, err) == (0, "")
    assert "ratio 4.0" in out
    assert f"{tmp_path / 'a'}: written" in out
    assert "worker" not in out


def test_the_memory_of_workers(cli, pair, artifact, monkeypatch):
    def compress(*args, **options):
        subprocess.run([sys.executable, "-c", ""], check=True)  # a worker
        return deltacome.Artifact.open(artifact)

    monkeypatch.setattr(sys.modules["deltacome.compression"], "compress", compress)
    code, out, _ = cli("compress", *pair, "-o", "a", *QUICK, "--workers", "2")
    assert code == 0
    assert re.search(r"peak memory [\d.]+ GiB, of the largest worker (?!0\.0)[\d.]+ GiB$", out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "low-rank", "--ratio", "4"], {"name": "low-rank", "directions": None}),
        (["--method", "low-rank", "--directions", "3"], {"name": "low-rank", "directions": 3}),
        (
            ["--method", "bitdelta", "--scales", "rows"],
            {"name": "bitdelta", "scales": "rows", "distill": 0, "rate": 0.1, "loss": "logits"},
        ),
        (
            ["--method", "residual", "--plan", "8:1,2:4"],
            {"name": "residual", "template": "8:1,2:4", "scales": "matrix"},
        ),
        (
            ["--method", "prinmix", "--no-refit", "--ratio", "4", "--calibration", "none"],
            {"name": "prinmix", "damping": 0.01, "refit": False, "distill": 0},
        ),
    ],
)
def test_methods(cli, pair, options, said, tmp_path):
    code, out, _ = cli("compress", *pair, "-o", tmp_path / "a", *options, "--json")
    assert code == 0
    assert json.loads(out)["method"] == said["name"]
    assert json.loads((tmp_path / "a" / "delta_config.json").read_text())["method"] == said


@pytest.mark.parametrize(
    ("method", "ratio"), [("delta-come", 16), ("residual", 12), ("bitdelta", None)]
)
def test_the_ratio_where_none_is_asked_for(cli, pair, artifact, monkeypatch, method, ratio):
    asked = []

    def compress(*args, **options):
        asked.append(options["ratio"])
        return deltacome.Artifact.open(artifact)

    monkeypatch.setattr(sys.modules["deltacome.compression"], "compress", compress)
    code, _, _ = cli("compress", *pair, "-o", "a", "--method", method)
    assert (code, asked) == (0, [ratio])


def test_a_searched_plan(cli, pair, tmp_path, monkeypatch):
    text = tmp_path / "c.txt"
    text.write_text("\n".join(text_lines(9)))
    options = ["--search", "greedy", "--ratio", "4", "--calibration", text, "--samples", "4"]
    monkeypatch.setattr("deltacome.cli.printing.LINE_SECONDS", -1)
    code, _, err = cli("compress", *pair, "-o", tmp_path / "a", *options, "--seq-len", "12")
    assert code == 0
    assert re.search(r"search \d+/24, .*2:\*, mean error", err)
    assert "blocks 2/2, model.layers.1\n" in err
    method = json.loads((tmp_path / "a" / "delta_config.json").read_text())["method"]
    assert method["template"].endswith(",2:*")


def test_an_output_is_refused_before_a_search(cli, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("deltacome.compression.search.find_template", None)
    search = ["--search", "greedy", "--ratio", "4"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "run.json").touch()
    for name, said in (("a", "the output exists already"), ("b", "continue it with --resume")):
        assert_refused(cli("compress", *pair, "-o", tmp_path / name, *search), said)
    for option, value in (("workers", 4), ("sweeps", "s"), ("dtype", "floaty"), ("device", "gpu")):
        result = cli("compress", *pair, "-o", tmp_path / "c", *search, f"--{option}", value)
        assert_refused(result, f"error: {option}: ", "expected" if option != "workers" else "got 4")


def test_a_plan_is_searched_as_it_will_be_used(cli, pair, artifact, monkeypatch):
    asked = []

    def find_template(*args, **options):
        asked.append(options)
        return SimpleNamespace(template=DeltaCome().template)

    monkeypatch.setattr("deltacome.compression.search.find_template", find_template)
    made = deltacome.Artifact.open(artifact)
    monkeypatch.setattr(sys.modules["deltacome.compression"], "compress", lambda *_, **__: made)
    more = ["--no-gptq", "--dtype", "bfloat16", "--ratio", "4"]
    assert cli("compress", *pair, "-o", "a", "--search", "greedy", *more)[0] == 0
    assert (asked[0]["dtype"], asked[0]["source"]) == (torch.bfloat16, "self")
    assert asked[0]["nearest"]


@pytest.mark.parametrize("plan", [["--plan", "8:1,2:9"], ["--precision", "single"], ["--no-gptq"]])
def test_options_of_the_method(cli, pair, plan, tmp_path):
    more = [] if "--plan" in plan else ["--ratio", "4"]
    options = ["--calibration", "none", *more, *plan]
    code, out, _ = cli("compress", *pair, "-o", tmp_path / "a", *options, "--json")
    assert code == 0
    said = json.loads((tmp_path / "a" / "delta_config.json").read_text())["method"]
    if "--plan" in plan:
        assert said["template"] == "8:1,2:9"
        plans = {str(tensor["plan"]) for tensor in json.loads(out)["tensors"]}
        assert plans == {"[[8, 1], [2, 9]]", "[]"}
    elif "--precision" in plan:
        assert said["template"] == "2:*"
    else:
        assert said["gptq"] is False


def test_inspect_for_people(cli, artifact):
    code, out, _ = cli("inspect", artifact)
    assert code == 0
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert f"{(artifact / 'delta-00001-of-00001.safetensors').stat().st_size:,}" not in out
    assert "bytes on disk" in out


def test_names_of_strangers_are_no_markup_and_no_commands(cli, tmp_path):
    name = "[/x] [bold]y\x1b[31m\u202e"
    record = Record(name, (3,), "float32", None, None, None, None, exact_rows=(0, 3))
    write_artifact(tmp_path / "a", [record], {f"{name}.exact": torch.zeros(3)}, config={})
    code, out, err = cli("inspect", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "[/x] [bold]y�[31m�" in out
    said = {"method": "m\x1b", "base": {"name_or_path": "b\x1b[2J\n"}, "tensors": []}
    sizes = {"bytes_on_disk": 1, "tuned_bytes": 1, "ratio": 1.0, "nominal_ratio": None}
    assert summary(said | sizes).startswith("method: m�; base: b�[2J�\ntensors:")
    code, out, err = cli("verify", tmp_path / name)  # an error names what was not found
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "[/x] [bold]y�[31m�" in err


def test_verify_and_merge(cli, artifact, pair, tmp_path):
    code, out, err = cli("verify", artifact, "--base", pair[0], "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)
    code, out, _ = cli("verify", artifact, "--base", pair[0])
    assert (code, out.count("\n")) == (0, 2)
    assert out.startswith("artifact: whole, ")
    assert "base: the right one, " in out
    assert "base: not compared" in cli("verify", artifact)[1]
    code, out, err = cli("merge", pair[0], artifact, "-o", tmp_path / "dense", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"output": str(tmp_path / "dense")}
    assert weights_of(tmp_path / "dense").keys() == weights_of(Path(pair[1])).keys()


def test_plan_and_capacity(cli, artifact, pair):
    code, out, err = cli("plan", *pair, "--calibration", "none", "--ratio", "4", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    allowed = said["tuned_nbytes"] / 4
    assert said["sizes"] == [{"ratio": 4, "nbytes": pytest.approx(allowed, rel=0.01)}]
    assert set(said["seconds"]) == {"survey", "blocks"}
    code, out, _ = cli("plan", *pair, "--no-probe")
    assert code == 0
    assert "ratio 64: cannot be met" in out
    assert "a vector: norm, bias" in out
    size = ["--delta", artifact, "--gpu-gib", "0.05", "--kv-tokens", "100"]
    code, out, err = cli("capacity", pair[0], *size, "--check", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["tenants"] > 10
    assert said["allocated"] == pytest.approx(said["usable"], rel=0.2)
    code, out, err = cli("capacity", pair[0], *size)
    assert (code, err) == (0, "")
    assert f"tenants: {said['tenants']:,}" in out


def test_a_share_in_percent_is_wrong_usage(cli, artifact, pair):
    size = ["--delta", artifact, "--gpu-gib", "0.05", "--utilization", "90"]
    code, _, err = cli("capacity", pair[0], *size)
    assert code == 2
    assert "--utilization" in err


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "1e300"])
@pytest.mark.parametrize("option", ["--gpu-gib", "--kv-gib"])
def test_a_size_that_no_memory_has_is_wrong_usage(cli, pair, option, size):
    sizes = {"--gpu-gib": "1", option: size}
    words = [f"{name}={value}" for name, value in sizes.items()]
    code, out, err = cli("capacity", pair[0], "--ratio", "16", *words)
    assert (code, out) == (2, "")
    assert option in err
    assert "Traceback" not in err


def test_a_server_without_its_engine_is_refused_first(cli, monkeypatch):
    monkeypatch.setattr("deltacome.vllm.version.importlib.metadata.version", missing_version)
    assert_refused(cli("serve", "/no/base"), "pip install 'deltacome[vllm]'")
    # A dry run prints a command to run elsewhere.
    assert_refused(cli("serve", "/no/base", "--dry-run"), "/no/base")
    for tenants, reason in ((["a=x", "a=y"], "'a' is named twice"), (["a"], "NAME=ARTIFACT")):
        named = [word for tenant in tenants for word in ("--tenant", tenant)]
        code, out, err = cli("serve", "/no/base", "--dry-run", *named)
        assert (code, out) == (2, "")
        assert reason in err


def missing_version(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_server_without_a_cache_is_warned_of(cli, pair):
    code, out, err = cli("capacity", pair[0], "--ratio", "4", "--gpu-gib", "0.05")
    assert code == 0
    assert "kv cache: 0" in out
    assert "no KV cache" in err


def test_export(cli, artifact, pair, tmp_path):
    code, out, err = cli("export", artifact, "-o", tmp_path / "lora", "--to", "peft-lora", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said.keys() == {"path", "ranks", "errors", "saved", "left_out", "nbytes"}
    assert said["left_out"] == []
    small = ["-o", tmp_path / "small", "--to", "peft-lora", "--rank", "2", "--lora-only"]
    code, out, _ = cli("export", artifact, *small)
    assert code == 0
    assert "rank: 2;" in out
    assert "left out: model.layers.0.input_layernorm.weight," in out
    code, _, _ = cli("export", artifact, "-o", tmp_path / "dense", "--to", "dense")
    assert code == 0
    assert weights_of(tmp_path / "dense").keys() == weights_of(Path(pair[1])).keys()
    dense = ["--to", "dense"]
    for wrong in (["--to", "gguf"], [*dense, "--rank", "3"], [*dense, "--lora-only"], []):
        assert cli("export", artifact, "-o", tmp_path / "x", *wrong)[0] == 2
    assert_refused(
        cli("export", tmp_path, "-o", tmp_path / "x", "--to", "dense"), "not an artifact"
    )


# --- refusals ------------------------------------------------------------------------------------


def assert_refused(result, *words):
    code, out, err = result
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err


def test_refusals_are_one_message_on_stderr(cli, pair, artifact, tmp_path):
    before = tree(tmp_path)
    out = ["-o", tmp_path / "out"]
    none = tmp_path / "none"
    assert_refused(cli("compress", none, pair[1], *out, *QUICK), none, "found none")
    assert_refused(cli("compress", *pair, "-o", artifact, *QUICK), "the output exists already")
    high = ["--ratio", "9999", "--calibration", "none", "--json"]
    assert_refused(cli("compress", *pair, *out, *high), "ratio 9999 cannot be met", "target")
    csv = ["--calibration", tmp_path / "c.jsonl"]
    assert_refused(cli("compress", *pair, *out, "--ratio", "4", *csv), "c.jsonl")
    assert_refused(cli("inspect", none), none)
    assert_refused(cli("inspect", pair[0]), "not an artifact", "delta_config.json")
    assert_refused(cli("verify", pair[0]), "not an artifact")
    assert_refused(cli("compress", __file__, pair[1], *out), "expected a folder, got a file")
    assert_refused(cli("merge", pair[1], artifact, *out), "wrong base")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(cli, pair, device, tmp_path):
    for command in (
        ["compress", *pair, "-o", tmp_path / "out", *QUICK],
        ["generate", pair[0], "one"],
        ["capacity", pair[0], "--gpu-gib", "0.05", "--ratio", "4", "--check"],
    ):
        assert_refused(cli(*command, "--device", device), "device: expected auto", device)
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_it_was_refused(cli, pair, tmp_path):
    arguments = ["--debug", "compress", *pair, "-o", tmp_path, *QUICK]
    with pytest.raises(deltacome.DeltaError, match="exists already"):
        cli(*arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method", "none"], "--method"),
        (["--method", "low-rank", "--precision", "single"], "--precision"),
        (["--method", "bitdelta", "--plan", "2:*"], "--plan"),
        (["--method", "bitdelta", "--scales", "columns"], "--scales"),
        (["--method", "residual", "--distill", "5"], "--distill"),
        (["--search", "greedy", "--plan", "2:*"], "--search"),
        (["--search", "best"], "--search"),
        (["--plan", "7:1"], "--plan"),
        (["--plan", "2:*,8:1"], "--plan"),
        (["--precision", "quadruple"], "--precision"),
        (["--plan", "2:*", "--precision", "single"], "not both"),
        (["--ratio", "-3"], "--ratio"),
        (["--ratio", "0.0625"], "--ratio"),
        (["--ratio", "many"], "--ratio"),
        (["--samples", "0"], "--samples"),
        (["--seq-len", "1"], "--seq-len"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_usage(cli, pair, arguments, reason, tmp_path):
    code, out, err = cli("compress", *pair, "-o", tmp_path / "a", *arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--task", "sums", "--lm-eval", "gsm8k"]])
def test_eval_wants_one_kind_of_task(cli, pair, arguments):
    code, out, err = cli("eval", pair[0], *arguments)
    assert (code, out) == (2, "")
    assert "one of --task and --lm-eval" in err


@pytest.mark.parametrize(
    ("mode", "others"),
    [
        (
            ["--task", "none.jsonl"],
            ["--shots 3", "--limit 5", "--tasks-folder .", "--chat", "--run-code"],
        ),
        (
            ["--lm-eval", "gsm8k"],
            ["--task-args {}", "-n 2", "--seed 0", "--text none.txt", "--max-new-tokens 9"],
        ),
    ],
)
def test_eval_refuses_options_of_the_other_kind_of_task(cli, pair, mode, others):
    for option in others:
        code, out, err = cli("eval", pair[0], *mode, *option.split())
        assert (code, out) == (2, ""), option
        assert f"{mode[0]} has no such option" in " ".join(err.split())
        assert option.split()[0] in err


@pytest.mark.parametrize("arguments", [["compress"], ["compress", "a", "b"], ["none"], ["inspect"]])
def test_missing_arguments(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_an_interrupt_says_how_to_go_on(cli, pair, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["deltacome.compression"], "compress", interrupted)
    code, out, err = cli("compress", *pair, "-o", tmp_path / "a", *QUICK)
    assert (code, out) == (130, "")
    assert "--resume" in err


def test_the_installed_program(pair, tmp_path):
    program = Path(sys.executable).with_name("deltacome")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    compressed = run("compress", *pair, "-o", str(tmp_path / "a"), *QUICK, "--json")
    assert compressed.returncode == 0, compressed.stderr
    assert json.loads(compressed.stdout).keys() == OVERVIEW | COST
