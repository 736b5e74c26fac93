"""What `deltacome serve` has to know of the arguments that go to vLLM: what they say of settings, of
workers, and of who may reach the server.

They are vLLM's, and go to it as they are. Only `--additional-config` does not: vLLM takes the last one,
which would leave nothing of what was computed from the artifacts, so it is read and merged.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome.errors import UnsupportedError

OPTION = "--additional-config"


@dataclass(frozen=True)
class Arguments:
    """Arguments of vLLM."""

    rest: list[str]
    """All but the additional configuration."""
    additional: dict[str, Any]
    """The additional configuration."""
    tensor: int
    """Workers that share each layer."""
    pipeline: int
    """Workers, or groups of them, that have different layers."""
    open: bool
    """Whether anybody can reach the server, and nobody said so."""


def read_arguments(more: Sequence[str]) -> Arguments:
    """Reads what follows `--`, in any of the spellings that vLLM takes.

    Raises:
        UnsupportedError: an additional configuration that is no JSON object, or that is not merged: with
            dots, or in a file.
    """
    words = [_dashed(word) for word in more]
    for word in words:
        if word.startswith(f"{OPTION}."):
            raise UnsupportedError(
                f"{word}: would replace what is computed from the artifacts: write "
                f'{OPTION} \'{{"deltacome": {{"canary": null}}}}\', which is merged with it'
            )
    ours = argparse.ArgumentParser(add_help=False)
    ours.add_argument(OPTION)
    given, rest = ours.parse_known_args(words)
    theirs = argparse.ArgumentParser(add_help=False)
    theirs.add_argument("--tensor-parallel-size", "-tp", default="1")
    theirs.add_argument("--pipeline-parallel-size", "-pp", default="1")
    for option in ("--host", "--uds", "--api-key", "--config"):
        theirs.add_argument(option)
    said, _ = theirs.parse_known_args(rest)
    _check_file(said.config)
    guarded = said.host or said.uds or said.api_key or said.config or os.environ.get("VLLM_API_KEY")
    return Arguments(
        rest,
        _parsed(given.additional_config),
        _count(said.tensor_parallel_size),
        _count(said.pipeline_parallel_size),
        not guarded,
    )


def _dashed(word: str) -> str:
    """A word with dashes in its option's name, where vLLM takes underscores too."""
    if not word.startswith("--"):
        return word
    name = re.match(r"[^.=]*", word)
    assert name is not None
    return name[0].replace("_", "-") + word[name.end() :]


def _count(text: str) -> int:
    """A number of workers; vLLM says what is wrong with one that is none."""
    return max(1, int(text)) if text.isdecimal() else 1


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UnsupportedError(f"{OPTION}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedError(f"{OPTION}: expected an object, got {text}")
    return value


def _check_file(config: str | None) -> None:
    """Refuses vLLM's file of arguments if it has an additional configuration, which would be lost."""
    file = Path(config or "")
    if file.is_file() and re.search(r"^additional[-_]config", file.read_text(), re.M):
        raise UnsupportedError(
            f"{file}: additional-config: would be replaced by what is computed from the artifacts: give "
            f"{OPTION} on the command line, where it is merged"
        )
