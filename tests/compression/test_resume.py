"""An interrupted run is continued to the same bytes, or refused; nothing is mixed silently."""

import errno
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_pairs import copy_of, tree

import deltacome
from deltacome import Adaptive, DeltaCome, DeltaError, compress, merge
from deltacome.compression import planning
from deltacome.errors import ArtifactError, OutputError, PlanError
from deltacome.format.folder import new_folder
from deltacome.methods.template import parse_template
from deltacome.rows import Row

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = {"ratio": 4, "samples": 6, "seq_len": 12}


class Killed(Exception):
    """Not an error of the package: stands for an interrupt or a fault."""


def stop_at(phase, done, detail=None):
    def progress(step):
        if (step.phase, step.done) == (phase, done):
            raise Killed

    return progress


@pytest.fixture(scope="module")
def whole(pairs, text, tmp_path_factory):
    """Source of calibration → files of an uninterrupted run."""
    files = {}
    for source in ("self", text, "none"):
        out = tmp_path_factory.mktemp("whole") / "a"
        files[source] = tree(compress(*pairs["small"], out, calibration=source, **QUICK).path)
    return files


POINTS = [
    ("survey", 5),
    ("calibration", 6),  # the rows are written, and not yet stored
    ("blocks", 1),
    ("blocks", 2),
    ("blocks", 3),
    ("write", 0),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[1]}")
def test_a_continued_run_gives_the_same_bytes(pairs, whole, point, tmp_path):
    out = tmp_path / "a"
    with pytest.raises(Killed):
        compress(*pairs["small"], out, calibration="self", progress=stop_at(*point), **QUICK)
    assert not out.exists()
    steps = []
    compress(*pairs["small"], out, calibration="self", resume=True, progress=steps.append, **QUICK)
    assert tree(out) == whole["self"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]
    finished_before = point[0] in ("blocks", "write")
    assert finished_before == ("calibration" not in {step.phase for step in steps})


def test_fewer_rows_than_were_asked_for(pairs, monkeypatch, tmp_path):
    options = QUICK | {"calibration": "org/data", "samples": 128}
    rows = [Row([1, 5, 9, 60]), Row([1, 7, 8])]
    monkeypatch.setattr(planning, "calibration_rows", lambda *args, **options: rows)
    with pytest.warns(UserWarning, match=r"^calibration org/data: it gives 2 of 128 rows$"):
        artifact = compress(*pairs["small"], tmp_path / "a", **options)
    said = artifact.manifest.provenance["calibration"]
    assert said == {"source": "org/data", "samples": 2, "seq_len": 12, "seed": 0}
    assert artifact.ratio() == pytest.approx(4, rel=0.02)
    with pytest.raises(Killed), pytest.warns(UserWarning, match="2 of 128"):
        compress(*pairs["small"], tmp_path / "b", progress=stop_at("blocks", 1), **options)
    rows = None  # those of the interrupted run are kept
    again = compress(*pairs["small"], tmp_path / "b", resume=True, **options)
    assert tree(again.path) == tree(artifact.path)


def test_adaptive_on_text_of_the_model_itself(pairs, tmp_path):
    options = QUICK | {"calibration": "self", "method": Adaptive(distill=0)}
    with pytest.warns(UserWarning, match="^calibration self: adaptive keeps what its text shows"):
        compress(*pairs["small"], tmp_path / "a", **options)


@pytest.mark.parametrize("source", ["text", "none"])
def test_a_run_that_is_stopped_after_every_block(pairs, whole, text, source, tmp_path):
    source = text if source == "text" else source
    out = tmp_path / "a"
    for done in (1, 2, 3):
        with pytest.raises(Killed):
            compress(
                *pairs["small"],
                out,
                calibration=source,
                resume=True,
                progress=stop_at("blocks", done),
                **QUICK,
            )
    compress(*pairs["small"], out, calibration=source, resume=True, **QUICK)
    assert tree(out) == whole[source]


def test_a_finished_block_is_not_made_again(pairs, monkeypatch, tmp_path):
    out = tmp_path / "a"
    with pytest.raises(Killed):
        compress(*pairs["small"], out, calibration="none", progress=stop_at("blocks", 2), **QUICK)
    groups = []
    real = DeltaCome.compress

    def note(self, deltas, plans, gram):
        groups.append(list(deltas))
        return real(self, deltas, plans, gram)

    monkeypatch.setattr(DeltaCome, "compress", note)
    # Without text it does not matter which rows would be taken.
    compress(*pairs["small"], out, calibration="none", resume=True, ratio=4, samples=99, seed=1)
    assert sorted(name for group in groups for name in group) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


@pytest.fixture
def unfinished(pairs, text, tmp_path):
    """An output folder with one finished block beside it."""
    out = tmp_path / "a"
    with pytest.raises(Killed):
        compress(*pairs["small"], out, calibration=text, progress=stop_at("blocks", 1), **QUICK)
    return out


def test_an_unfinished_run_is_not_started_over_in_silence(pairs, text, unfinished):
    before = tree(unfinished.with_name("a.partial"))
    with pytest.raises(OutputError, match=r"a\.partial: holds an unfinished run.*--resume"):
        compress(*pairs["small"], unfinished, calibration=text, **QUICK)
    assert tree(unfinished.with_name("a.partial")) == before
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 5),
        ("samples", 7),
        ("seq_len", 13),
        ("seed", 1),
        ("dtype", "bfloat16"),
        ("calibration", "none"),
        ("method", DeltaCome(parse_template("2:*"))),
        ("method", DeltaCome(gptq=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_option_is_refused_by_name(pairs, text, unfinished, name, value):
    options = {"calibration": text, **QUICK, name: value}
    with pytest.raises(OutputError, match=f"cannot be resumed: {name} was .*, is now ") as refused:
        compress(*pairs["small"], unfinished, resume=True, **options)
    assert "remove the folder" in str(refused.value)
    assert not unfinished.exists()


def test_another_number_of_threads_is_refused(pairs, text, unfinished, monkeypatch):
    # Not really set: the tests after this one would run with them.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(OutputError, match="cannot be resumed: threads was 1, is now 2"):
        compress(*pairs["small"], unfinished, resume=True, calibration=text, **QUICK)


@pytest.mark.parametrize("package", ["deltacome", "torch", "transformers"])
def test_another_version_is_refused(pairs, text, unfinished, monkeypatch, package):
    real = importlib.metadata.version
    other = {package: "0.0.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or real(name))
    monkeypatch.setattr(deltacome, "__version__", other.get("deltacome", deltacome.__version__))
    with pytest.raises(OutputError, match=r"cannot be resumed: versions was .*0\.0\.1"):
        compress(*pairs["small"], unfinished, resume=True, calibration=text, **QUICK)


@pytest.mark.parametrize("which", ["tuned", "text", "config", "template"])
def test_a_changed_input_is_refused(pairs, text, which, tmp_path):
    base = pairs["small"][0]
    tuned = copy_of(pairs["small"][1], tmp_path / "tuned")
    source = tmp_path / "c.txt"
    source.write_text(Path(text).read_text())
    out = tmp_path / "a"
    options = {"calibration": str(source), **QUICK}
    with pytest.raises(Killed):
        compress(base, tuned, out, progress=stop_at("blocks", 1), **options)
    file = {
        "tuned": tuned / "model.safetensors",
        "text": source,
        "config": tuned / "config.json",
        "template": tuned / "chat_template.jinja",
    }[which]
    file.write_bytes(file.read_bytes() + b" " * (which != "tuned"))
    os.utime(file, ns=(1, 1))
    name = "calibration" if which == "text" else "tuned"
    with pytest.raises(OutputError, match=f"cannot be resumed: {name} was"):
        compress(base, tuned, out, resume=True, **options)


def test_a_damaged_unit_is_refused(pairs, text, unfinished):
    file = unfinished.with_name("a.partial") / "unit-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DeltaError, match="unit-00000"):
        compress(*pairs["small"], unfinished, calibration=text, resume=True, **QUICK)
    assert not unfinished.exists()


def test_a_finished_output_is_not_replaced(pairs, tmp_path):
    out = tmp_path / "a"
    compress(*pairs["small"], out, calibration="none", **QUICK)
    before = tree(tmp_path)
    for again in (False, True):
        with pytest.raises(OutputError, match="the output exists already"):
            compress(*pairs["small"], out, calibration="none", resume=again, **QUICK)
    assert tree(tmp_path) == before


def test_two_writers(pairs, tmp_path):
    out = tmp_path / "a"
    refused = []

    def second(step):
        if (step.phase, step.done) == ("blocks", 1):
            for again in (False, True):
                with pytest.raises(OutputError) as error:
                    compress(*pairs["small"], out, calibration="none", resume=again, **QUICK)
                refused.append(str(error.value))

    compress(*pairs["small"], out, calibration="none", progress=second, **QUICK)
    assert len(refused) == 2
    assert "another process is writing here" in refused[1]
    assert (out / "delta_config.json").is_file()


def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(OutputError, match=r"lock: cannot be locked: .*No locks available"),
        new_folder(tmp_path / "a"),
    ):
        pass


@pytest.mark.parametrize("file", ["calibration", "distilled"])
def test_damaged_rows_and_scalars_are_refused(pairs, text, file, tmp_path):
    options = {"calibration": text, "method": DeltaCome(distill=2), **QUICK}
    out = tmp_path / "a"
    with pytest.raises(Killed):
        compress(*pairs["small"], out, progress=stop_at("write", 0), **options)
    kept = tmp_path / "a.partial" / f"{file}.safetensors"
    kept.write_bytes(kept.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=rf"{file}\.safetensors: cannot be read.*start anew"):
        compress(*pairs["small"], out, resume=True, **options)


def test_kills_at_random_moments(pairs, text, tmp_path):
    """A few of the fifty kills of benchmarks/resume.py, in a separate process because it forks."""
    options = ["--kills", "3", "--scratch", tmp_path]
    options += ["--compress", json.dumps({"calibration": text, **QUICK})]
    command = [sys.executable, BENCHMARKS / "resume.py", *pairs["small"], *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for said in json.loads(done.stdout).values():
        assert said["kills"] >= 3  # the last trial may be killed twice
        assert said["wrong"] == []
    assert not list(tmp_path.iterdir())


def test_blocks_side_by_side(pairs, whole, text, tmp_path):
    out, steps = tmp_path / "a", []
    options = {"calibration": "none", "workers": 2, **QUICK}
    compress(*pairs["small"], out, progress=steps.append, **options)
    assert tree(out) == whole["none"]
    assert {step.detail for step in steps if step.phase == "blocks"} >= {
        *("unit-00000", "unit-00001", "unit-00002")
    }
    with pytest.raises(PlanError, match="independent only without calibration, got 2 workers"):
        compress(*pairs["small"], tmp_path / "b", **options | {"calibration": text})


def test_an_error_in_one_of_several_processes(pairs, tmp_path, monkeypatch):
    base, tuned = (copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])

    def spoil(step):
        if (step.phase, step.done) == ("survey", 21):  # the survey is over, the work begins
            file = tuned / "model.safetensors"
            file.write_bytes(file.read_bytes()[:5000])

    with pytest.raises(DeltaError, match="cannot be read"):
        compress(
            *(base, tuned, tmp_path / "a"),
            calibration="none",
            workers=2,
            progress=spoil,
            **QUICK,
        )
    assert not (tmp_path / "a").exists()


def test_two_merges_into_one_folder(pairs, tmp_path):
    delta = compress(*pairs["small"], tmp_path / "a", calibration="none", **QUICK)
    out = tmp_path / "dense"
    with new_folder(out) as folder:
        (folder / "half").touch()
        with pytest.raises(OutputError, match="another process is writing here"):
            merge(pairs["small"][0], delta, out)
        (folder / "half").unlink()
        (folder / "mine").touch()
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert {file.name for file in tmp_path.iterdir()} == {"a", "dense"}


def test_a_merge_does_not_throw_an_unfinished_compression_away(pairs, text, unfinished, tmp_path):
    delta = compress(*pairs["small"], tmp_path / "other", calibration="none", **QUICK)
    before = tree(unfinished.with_name("a.partial"))
    with pytest.raises(OutputError, match="holds an unfinished run of compress"):
        merge(pairs["small"][0], delta, unfinished)
    assert tree(unfinished.with_name("a.partial")) == before


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.9])
def test_files_that_may_not_grow_further(pairs, text, whole, share, tmp_path):
    """A real system limit, hit at different files: refused, and continued once there is room."""
    out = tmp_path / "a"
    limit = int(share * max(map(len, whole[text].values())))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            compress(*pairs["small"], out, calibration=text, **QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    compress(*pairs["small"], out, calibration=text, resume=True, **QUICK)
    assert tree(out) == whole[text]


CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
from deltacome import compress
base, tuned, out, text, options, marker = sys.argv[1:]

def progress(step):
    if (step.phase, step.done) == ("blocks", 1):
        open(marker, "w").close()
        time.sleep(60)

compress(base, tuned, out, calibration=text, progress=progress, **json.loads(options))
"""


def test_a_process_that_is_killed(pairs, text, whole, tmp_path):
    out, marker = tmp_path / "a", tmp_path / "marker"
    arguments = [*map(str, pairs["small"]), str(out), text, json.dumps(QUICK), str(marker)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not marker.exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(OutputError, match="another process is writing here"):
            compress(*pairs["small"], out, calibration=text, resume=True, **QUICK)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists()
    assert torch.get_num_threads() == 1
    compress(*pairs["small"], out, calibration=text, resume=True, **QUICK)
    assert tree(out) == whole[text]
