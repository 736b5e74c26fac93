"""Runs every code block of README and docs, with a tiny random pair in place of the folders it names.

A page is run from top to bottom in a folder of its own. What is real and what is not:

- `python`: run as it stands, with little calibration text.
- `bash`: a command of ours is run in this process, `compress` with little calibration text, `serve` with
  `--dry-run`, a page that names `org/name` against a stand-in of the Hub. A script of the repository
  parses its arguments and stops there, `python -c` is compiled. The extras and pins of `pip install` and
  the target of `make` must exist. tests/vllm/test_command_lines.py has vLLM parse its own commands. What
  a shell does itself (SHELL) is taken on trust, and any other command fails.
- `text` is output; `hex` and `json` are the example of format.md, for tests/format/test_format_doc.py.
- A block after `<!-- skip: next "reason" -->` is not run. NOT_RUN counts these; our commands in them are
  still parsed.
"""

import argparse
import contextlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from unittest import SkipTest

import pytest
import typer
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
from tiny_pairs import make_pair, text_lines, write_jsonl

import deltacome
import deltacome.cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
)
BASE, TUNED, DELTA, QUESTIONS = "base", "tuned", "delta", "questions"
STANDS_IN = {
    "README.md": dict(
        BASE=BASE,
        TUNED=TUNED,
        base=BASE,
        tuned=TUNED,
        **{"code-delta": DELTA, "questions.jsonl": QUESTIONS, "training.jsonl": QUESTIONS},
    ),
    "docs/compress.md": {"BASE": BASE, "TUNED": TUNED, "questions.jsonl": QUESTIONS},
    "docs/methods.md": {"base": BASE, "tuned": TUNED},
    "docs/reading.md": {"delta": DELTA},
    "docs/report.md": {"BASE": BASE, "TUNED": TUNED, "DELTA": DELTA, "questions.jsonl": QUESTIONS},
    "docs/serving.md": {"BASE": BASE, "DIR": DELTA},
    "docs/share.md": {
        "BASE": BASE,
        "TUNED": TUNED,
        "DELTA": DELTA,
        "questions.jsonl": QUESTIONS,
    },
    "docs/tutorial.md": {
        "work/base": BASE,
        "work/tuned": TUNED,
        "work/tuned/heldout.jsonl": QUESTIONS,
    },
    "examples/tenants/README.md": {
        "work/base": BASE,
        "work/sums": TUNED,
        "work/sums/heldout.jsonl": QUESTIONS,
    },
}
"""What stands in for the folders and files that a page names but does not make."""
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "docs/compress.md": 1,
    "docs/serving.md": 2,
    "docs/tutorial.md": 1,
    "examples/deploy/README.md": 3,
}
"""The number of blocks skipped with a reason, by page."""
LANGUAGES = {"bash", "python", "text"}
OF_THE_FORMAT = {"hex", "json delta", "json tuned", "json header", "json manifest"}
QUICK = {"samples": 4, "seq_len": 16}
SHELL = ("python3 -m venv ", ". ", "source ", "cd ", "export ")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The pair, a delta of it, and questions."""
    folder = tmp_path_factory.mktemp("docs")
    base, tuned = make_pair("llama", folder)
    deltacome.compress(base, tuned, folder / DELTA, ratio=8, calibration="none")
    write_jsonl(
        folder / QUESTIONS,
        [{"prompt": line, "answer": line.split()[0]} for line in text_lines(4)],
    )
    return folder


@pytest.fixture
def stage(kept, tmp_path, monkeypatch):
    """Makes the folder in which a page is run, and enters it."""

    def enter(page):
        for name, kind in STANDS_IN.get(page, {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (kept / kind).is_dir() else shutil.copy
            copy(kept / kind, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(
            deltacome.compress, "__kwdefaults__", deltacome.compress.__kwdefaults__ | QUICK
        )

    return enter


def blocks_of(page, run):
    """The blocks of a page, and the markers that skip some; `run` takes the text of a `bash` block."""
    parsers = [SkipParser(), PythonCodeBlockParser()]
    parsers.append(CodeBlockParser("bash", lambda example: run(example.parsed)))
    return list(Sybil(parsers).parse(ROOT / page).examples())


def commands(block):
    """The command lines of a `bash` block, split into words, without comments and variables."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("page", PAGES)
def test_page(page, stage, monkeypatch, request):
    stage(page)
    if "org/name" in (ROOT / page).read_text():
        request.getfixturevalue("hub")
    skipped = []

    def run(block):
        for words in commands(block):
            run_command(words, monkeypatch)

    for example in blocks_of(page, run):
        try:
            example.evaluate()
        except SkipTest as reason:
            skipped.append(str(reason))
            for words in commands(example.parsed):
                parse_command(words)
    assert len(skipped) == NOT_RUN.get(page, 0), skipped
    assert all(skipped), "expected a reason"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_of_a_kind_that_nothing_looks_at(page):
    fences = re.findall(r"^ *```(.*)$", (ROOT / page).read_text(), re.M)
    assert len(fences) % 2 == 0
    known = LANGUAGES | OF_THE_FORMAT if page == "docs/format.md" else LANGUAGES
    assert set(fences[::2]) <= known


def test_what_is_not_run_is_a_page():
    assert NOT_RUN.keys() | STANDS_IN.keys() <= set(PAGES)


def run_command(words, monkeypatch):
    line = shlex.join(words)
    if words[0] == "deltacome":
        run_ours(words[1:], monkeypatch)
    elif words[0] == "python" and words[1].endswith(".py"):
        parse_script(ROOT / words[1], words[2:], monkeypatch)
    elif words[0] == "pip":
        check_pip(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif words[:2] == ["python", "-c"]:
        compile(words[2], line, "exec")
    elif words[:2] != ["vllm", "serve"]:  # tests/vllm/test_command_lines.py parses these
        assert f"{line} ".startswith(SHELL), f"{line}: nothing here knows how to check this"


def run_ours(arguments, monkeypatch):
    if ">" in arguments:
        with open(arguments[-1], "w") as file, contextlib.redirect_stdout(file):
            return run_ours(arguments[: arguments.index(">")], monkeypatch)
    if arguments[0] == "serve":
        arguments = ["serve", "--dry-run", *arguments[1:]]
    if arguments[0] == "compress":
        quick = QUICK | ({"distill": 4} if "adaptive" in arguments else {})
        arguments += [f"--{key.replace('_', '-')}={value}" for key, value in quick.items()]
    monkeypatch.setattr(sys, "argv", ["deltacome", *arguments])
    try:
        deltacome.cli.main()
    except SystemExit as leaving:
        if leaving.code:
            pytest.fail(f"{shlex.join(arguments)}: exit code {leaving.code}")


def parse_command(words):
    """Parses a command of ours without running it."""
    if words[0] == "deltacome":
        command = typer.main.get_command(deltacome.cli.app)
        with command.make_context("deltacome", words[1:]) as context:
            name, found, rest = command.resolve_command(context, words[1:])
            found.make_context(name, rest, parent=context)


class Parsed(Exception):
    """The arguments were parsed."""


def parse_script(script, arguments, monkeypatch):
    """Runs a script until it has parsed its arguments; one that takes none only has to exist."""
    if "ArgumentParser" not in script.read_text():
        assert not arguments
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse(self, *given)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def check_pip(arguments):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    options = iter(arguments[1:])
    assert arguments[0] == "install"
    for word in options:
        if word == "-c":
            assert (ROOT / next(options)).is_file()
        elif word not in ("--no-deps", "-e"):
            name, _, extras = word.rstrip("]").partition("[")
            assert name in {".", "deltacome"} | pins, word
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "line",
    [
        "deltacome compress BASE TUNED",
        "deltacome inspect NOTHING",
        "pip install '.[nothing]'",
        "make nothing",
        "rm -rf work",
        "python examples/tenants/base.py",
        "python -c 'print('",
    ],
)
def test_a_command_can_fail(line, stage, monkeypatch):
    stage("README.md")
    (words,) = commands(line)
    with pytest.raises((AssertionError, SystemExit, SyntaxError, pytest.fail.Exception)):
        run_command(words, monkeypatch)
