"""What holds for every command: JSON, exit codes, tracebacks, colours, silence, completion."""

import importlib.metadata
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "compression"))
import typer
from tiny_pairs import make_pair

import deltacome
from deltacome.cli import EXIT_CODES, app, printing
from deltacome.evals.tasks import Question, write_questions

PROGRAM = Path(sys.executable).with_name("deltacome")
COMMANDS = typer.main.get_command(app).commands
QUICK = ["--ratio", "4", "--calibration", "none"]

RUNS = {
    "compress": lambda at: [at.base, at.tuned, "-o", at.new, *QUICK],
    "plan": lambda at: [at.base, at.tuned, "--no-probe", "--calibration", "none"],
    "capacity": lambda at: [at.base, "--gpu-gib", "0.05", "--delta", at.artifact],
    "inspect": lambda at: [at.artifact],
    "verify": lambda at: [at.artifact],
    "merge": lambda at: [at.base, at.artifact, "-o", at.new],
    "export": lambda at: [at.artifact, "-o", at.new, "--to", "peft-lora"],
    "report": lambda at: [at.artifact, "-o", at.new],
    "push": lambda at: [at.artifact, "org/name"],
    "generate": lambda at: [at.base, "one", "--delta", at.artifact, "--max-new-tokens", "2"],
    "eval": lambda at: [
        *(at.base, "--delta", at.artifact, "--task", at.task),
        *("-n", "2", "--max-new-tokens", "2", "--device", "cpu"),
    ],
    "serve": lambda at: [at.base, "--tenant", f"a={at.artifact}", "--dry-run"],
}


class At:
    """Where things are; `new` does not exist yet."""

    def __init__(self, folder):
        self.base, self.tuned = make_pair("small", folder)
        self.artifact = folder / "artifact"
        deltacome.compress(self.base, self.tuned, self.artifact, ratio=4, calibration="none")
        self.task = folder / "task.jsonl"
        write_questions(self.task, [Question("one plus", "two"), Question("two plus", "three")])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return At(tmp_path_factory.mktemp("manners"))


@pytest.fixture
def at(made, tmp_path):
    made.new = tmp_path / "new"
    return made


def child(*arguments, code=None, **environment):
    """Runs the program, or some code in its place, with pipes instead of a terminal."""
    command = [PROGRAM] if code is None else [sys.executable, "-c", code]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_json_of_every_command(cli, at, hub, name):
    code, out, err = cli(name, *RUNS[name](at), "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)  # a single object, nothing else


@pytest.mark.parametrize("name", ["merge", "push", "eval", "serve"])  # others: test_cli.py
def test_text_for_people(cli, at, hub, name, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "x")  # otherwise a server is warned that it is open
    code, out, err = cli(name, *RUNS[name](at))
    assert (code, err) == (0, "")
    assert not out.startswith("{")


def test_push_with_scores(cli, at, hub, tmp_path):
    _, out, _ = cli("eval", *RUNS["eval"](at), "--json")
    scores = tmp_path / "eval.json"
    scores.write_text(out)
    code, out, err = cli("push", at.artifact, "org/name", "--scores", scores, "--json")
    assert (code, err) == (0, "")
    commit = json.loads(out)["commit"].rpartition("/")[2]
    card = hub.repos["org/name"].commits[commit]["README.md"].decode()
    assert "| task.jsonl | exact match, 2 questions | 0 | – | 0 |" in card
    scores.write_text(scores.read_text().replace('"artifact": "', '"artifact": "0'))
    code, _, err = cli("push", at.artifact, "org/name", "--scores", scores)
    assert (code, err.count("\n")) == (1, 1)
    assert "expected scores of this artifact" in err
    scores.write_text("no JSON")
    assert cli("push", at.artifact, "org/name", "--scores", scores)[0] == 2
    assert cli("push", at.artifact, "org/name", "--scores", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("text", ["hello", "\xff", "[" * 10_000, str([1] * 10_000)])
def test_scores_that_are_none_are_named(cli, at, tmp_path, text):
    (tmp_path / "good.json").write_text("{}")
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    files = [word for name in ("good", "bad") for word in ("--scores", tmp_path / f"{name}.json")]
    code, _, err = cli("push", at.artifact, "org/name", *files)
    assert code == 2
    assert "bad.json" in err
    assert len(err) < 1000


def test_names_on_the_hub_instead_of_folders(cli, at, hub):
    artifact = deltacome.Artifact.open(at.artifact)
    commit = artifact.push_to_hub("org/delta", branch="v1").rpartition("/")[2]
    repo = hub.repos["org/delta"]
    repo.commit("main", {})  # holds no artifact
    folder = at.artifact
    for name in ("inspect", "verify", "merge", "export", "generate", "capacity", "eval", "serve"):
        at.artifact = "org/delta@v1"
        if at.new.exists():
            at.new = at.new.with_name(f"new-{name}")
        code, out, err = cli(name, *RUNS[name](at), "--json")
        assert (code, err) == (0, ""), name
        at.artifact = "org/delta"
        code, _, err = cli(name, *RUNS[name](at), "--json")
        at.artifact = folder
        assert code == 1, name
        assert "not an artifact" in err
    assert commit in out  # vLLM is given a folder
    with deltacome.attach(deltacome.base_for(at.base, "org/delta@v1"), "org/delta@v1"):
        pass


def test_export_reads_the_base_that_was_compressed_against(cli, at, hub, tmp_path):
    commit = hub.publish("org/base", at.base)
    artifact = deltacome.compress(
        "org/base", at.tuned, tmp_path / "delta", ratio=4, calibration="none"
    )
    assert artifact.manifest.base_revision == commit
    hub.publish("org/base", at.tuned)  # the branch moves on
    code, _, err = cli("export", artifact.path, "-o", at.new, "--to", "dense")
    assert code == 0, err


# --- exit codes, tracebacks, colours -------------------------------------------------------------

FAILING = """
import sys
import deltacome.cli as cli
from deltacome.errors import DeltaError
def fail(kind: str):
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise {"refused": DeltaError, "fault": ValueError}[kind]("because")
cli.app.command("fail")(fail)
cli.main()
"""


def test_exit_codes_are_documented(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    assert EXIT_CODES in " ".join(out.split())
    assert re.findall(r"\b\d+\b", EXIT_CODES) == ["0", "1", "2", "3", "130"]


def test_what_stdout_has_no_letters_for_is_escaped(at):
    plain = {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    shown = child("inspect", at.artifact, **plain)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert r"64\xd764" in shown.stdout
    merged = child("merge", at.base, at.artifact, "-o", at.new.with_name("café"), **plain)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.endswith("caf\\xe9: written\n")


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("refused", 1, "error: because\n"),
        ("fault", 3, "unexpected ValueError: because (for a traceback: deltacome --debug …)\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_one_line_without_a_traceback(kind, code, said):
    failed = child("fail", kind, code=FAILING)
    assert (failed.returncode, failed.stdout, failed.stderr) == (code, "", said)


@pytest.mark.parametrize("kind", ["refused", "fault"])
def test_a_traceback_with_debug(kind):
    failed = child("--debug", "fail", kind, code=FAILING)
    assert failed.returncode == 1  # Python's own
    assert "Traceback" in failed.stderr
    assert "because" in failed.stderr


def test_ctrl_c(tmp_path):
    waiting = tmp_path / "scores.json"
    os.mkfifo(waiting)
    command = [PROGRAM, "push", str(tmp_path), "org/name", "--scores", str(waiting)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with waiting.open("w"):  # waits until the program reads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def on_a_terminal(*arguments, code, **environment):
    """What a child writes to a terminal."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=clean | {"TERM": "xterm-256color"} | environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # the other end is closed
        pass
    process.wait()
    os.close(ours)
    return written.decode()


def test_colours_on_a_terminal_unless_unwanted():
    assert "\x1b[31m" in on_a_terminal("fail", "refused", code=FAILING)
    plain = on_a_terminal("fail", "refused", code=FAILING, NO_COLOR="1")
    assert plain == "error: because\r\n"


BARS = """
from types import SimpleNamespace
from deltacome.cli.printing import progress_bars
with progress_bars(quiet=False) as report:
    report(SimpleNamespace(phase="blocks", done=1, total=2, detail="layer 0", error=0.5))
"""


def test_progress_is_for_terminals():
    said = on_a_terminal(code=BARS)
    assert "blocks" in said
    assert "mean error 0.5" in said
    assert "\x1b[3" not in on_a_terminal(code=BARS, NO_COLOR="1").replace("\x1b[3A", "")
    assert on_a_terminal(code=BARS.replace("False", "True")) == ""
    silent = child(code=BARS)
    assert (silent.stdout, silent.stderr) == ("", "")  # it ended before a line was due


@pytest.mark.parametrize("quiet", ["False", "True"])  # as --json: stdout stays clean either way
def test_a_log_gets_a_line_now_and_then(quiet):
    always = "import deltacome.cli.printing as p; p.LINE_SECONDS = 0"
    logged = child(code=always + BARS.replace("False", quiet))
    assert logged.stdout == ""
    assert logged.stderr == "0 s: blocks 1/2, layer 0, mean error 0.5\n"


def test_lines_in_a_log_are_some_time_apart(monkeypatch):
    times, said = iter([0, 29, 31, 60, 62]), []
    monkeypatch.setattr(printing, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(printing, "say", said.append)
    report = printing._progress_lines()
    for done in range(1, 5):
        report(SimpleNamespace(phase="blocks", done=done, total=4, detail="", error=None))
    assert said == ["31 s: blocks 2/4", "62 s: blocks 4/4"]


def test_silence_where_nobody_watches(at, hub):
    deltacome.Artifact.open(at.artifact).push_to_hub("org/delta")
    fetched = child("verify", "org/delta", **hub.environment)
    assert (fetched.returncode, fetched.stderr) == (0, "")
    pushed = child("push", at.artifact, "org/other", **hub.environment)
    assert (pushed.returncode, pushed.stderr) == (0, "")
    assert hub.asked("PUT", "/lfs/")


def test_version(cli):
    code, out, _ = cli("--version")
    assert (code, out) == (0, importlib.metadata.version("deltacome") + "\n")


# --- completion ----------------------------------------------------------------------------------

NO_DETECTION = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
WORDS = {
    "bash": lambda line: {
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    },
    "zsh": lambda line: {"_TYPER_COMPLETE_ARGS": line},
    "fish": lambda line: {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    },
}


@pytest.mark.parametrize("shell", WORDS)
def test_completion(shell):
    script = child("--show-completion", shell, **NO_DETECTION)
    assert script.returncode == 0
    assert f"_DELTACOME_COMPLETE=complete_{shell}" in script.stdout

    def completed(line):
        return child(_DELTACOME_COMPLETE=f"complete_{shell}", **WORDS[shell](line)).stdout

    assert "compress" in completed("deltacome comp")
    assert "capacity" not in completed("deltacome comp")
    assert "--ratio" in completed("deltacome compress --ra")
    assert "delta-come" in completed("deltacome compress --method delta")


def test_completion_within_bash():
    script = child("--show-completion", "bash", **NO_DETECTION).stdout
    ask = "COMP_WORDS=(deltacome insp); COMP_CWORD=1; _deltacome_completion deltacome"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{ask}; echo "${{COMPREPLY[@]}}"', PROGRAM],
        env=os.environ | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["inspect"], done.stderr
