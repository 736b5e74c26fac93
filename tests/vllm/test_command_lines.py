"""vLLM accepts the arguments that README, docs and deployments give it; test_blocks.py runs the rest."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from vllm_helpers import vllm_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from deploy_helpers import serve_commands

ROOT = Path(__file__).parents[2]


def command_lines():
    """vLLM's arguments in each `vllm serve …` and after the `--` of each `deltacome serve …`."""
    for words in serve_commands().values():
        yield words[words.index("--") + 1 :]
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md"):
        for page in ROOT.glob(pattern):
            text = page.read_text().replace("\\\n", " ")
            for line in re.findall(r"^(?:vllm|deltacome) serve .*$", text, re.M):
                words = shlex.split(line, comments=True)
                if words[0] == "vllm":
                    yield ["--model", *words[2:]]
                elif "--" in words:
                    yield words[words.index("--") + 1 :]


@pytest.fixture(scope="module")
def parser():
    return vllm_parser()


@pytest.mark.parametrize("arguments", list(command_lines()), ids=shlex.join)
def test_vllm_takes(arguments, parser):
    parser.parse_args(arguments)


def test_vllm_does_not_take_everything(parser):
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such-option"])
