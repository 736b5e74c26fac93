"""What `deltacome serve` reads from vLLM's arguments: settings, workers, who may reach the server.

The arguments are passed on to vLLM as they are, except for `--additional-config` and `--lora-modules`:
vLLM uses only the last one given, which would discard everything computed from the artifacts, and the
tenants themselves. So they are read here and merged.
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

OPTION, MODULES = "--additional-config", "--lora-modules"


@dataclass(frozen=True)
class Arguments:
    """What is read from vLLM's arguments."""

    rest: list[str]
    """All of them except the additional configuration and the modules."""
    additional: dict[str, Any]
    """The additional configuration."""
    modules: list[str]
    """Adapters to be loaded at the start, as vLLM reads them."""
    tensor: int
    """Number of workers that share each layer."""
    pipeline: int
    """Number of workers, or groups of workers, that have different layers."""
    open: bool
    """Whether anybody can reach the server because no argument says who may."""


def read_arguments(more: Sequence[str]) -> Arguments:
    """Reads what follows `--`, in any spelling that vLLM accepts.

    Raises:
        UnsupportedError: the additional configuration is not a JSON object, or has a form that cannot be
            merged: with dots, or in a file.
    """
    words = [_dashed(word) for word in more]
    for word in words:
        if word.startswith(f"{OPTION}."):
            raise UnsupportedError(
                f"{word}: would replace the settings computed from the artifacts: write "
                f'{OPTION} \'{{"deltacome": {{"canary": null}}}}\', which is merged with it'
            )
    ours = argparse.ArgumentParser(add_help=False)
    ours.add_argument(OPTION)
    ours.add_argument(MODULES, nargs="*", action="extend", default=[])
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
        given.lora_modules,
        _count(said.tensor_parallel_size),
        _count(said.pipeline_parallel_size),
        not guarded,
    )


def _dashed(word: str) -> str:
    """Replaces underscores in an option's name by dashes; vLLM accepts both."""
    if not word.startswith("--"):
        return word
    name = re.match(r"[^.=]*", word)
    assert name is not None
    return name[0].replace("_", "-") + word[name.end() :]


def _count(text: str) -> int:
    """Parses a number of workers; 1 if it is not a number, which vLLM reports itself."""
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
    """Refuses a file of vLLM's arguments that has any of those that are merged: it would be lost."""
    file = Path(config or "")
    said = file.read_text().replace("_", "-") if file.is_file() else ""
    for option in (OPTION, MODULES):
        name = option.removeprefix("--")
        if re.search(rf"^{name}\b", said, re.M):
            raise UnsupportedError(
                f"{file}: {name}: would be replaced by what the tenants need: give {option} on the "
                "command line, where it is merged"
            )
