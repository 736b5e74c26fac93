"""Files that go along with the weights: tokenizer, template, configuration."""

from __future__ import annotations

import warnings
from pathlib import Path

from deltacome.arch.checkpoint import SIDE_FILES
from deltacome.format.artifact import TUNED_CONFIG_FILE
from deltacome.format.manifest import CARRIED_NAME

TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Side files: without any of these there is no tokenizer."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers saves templates for other uses (tools, say)."""


def carried_files(base: Path, tuned: Path) -> dict[str, bytes]:
    """Content of the tuned model's side files, except those that equal the base's.

    The tuned `config.json` is always carried, under a name that no loader mistakes for a model.
    """
    if more := sorted(file.name for file in (tuned / MORE_TEMPLATES).glob("*.jinja")):
        warnings.warn(
            f"{tuned}: an artifact holds one chat template; left out are those of {MORE_TEMPLATES}: "
            f"{', '.join(more)}",
            stacklevel=2,
        )
    files = {TUNED_CONFIG_FILE: (tuned / "config.json").read_bytes()}
    left = []
    for name in sorted(_names(tuned, SIDE_FILES)):
        content, twin = (tuned / name).read_bytes(), base / name
        if twin.is_file() and twin.read_bytes() == content:
            continue
        if CARRIED_NAME.fullmatch(name):
            files[name] = content
        else:
            left.append(name)
    if left:
        warnings.warn(
            f"{tuned}: an artifact holds files of known kinds alone; left out: {', '.join(left)}",
            stacklevel=2,
        )
    return files


def dropped_files(base: Path, tuned: Path) -> tuple[str, ...]:
    """Names of the base's side files that the tuned model lacks.

    Otherwise a template in the base's folder would win over the one in the tuned `tokenizer_config.json`.
    A model that was saved without a tokenizer is taken to use the base's, with all that goes with it.
    """
    lacking = _names(base, SIDE_FILES) - _names(tuned, SIDE_FILES)
    if lacking & _names(base, TOKENIZER) and not _names(tuned, TOKENIZER):
        warnings.warn(
            f"{tuned}: it has no tokenizer file, so the base's are taken: {', '.join(sorted(lacking))}",
            stacklevel=2,
        )
        return ()
    return tuple(sorted(lacking))


def _names(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {f.name for pattern in patterns for f in folder.glob(pattern) if f.is_file()}
