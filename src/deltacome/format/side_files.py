"""Files beside the weights: the base's, overlaid with those that an artifact carries."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltacome.errors import ArtifactError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.canary import CANARY_FILE

CODE = ("auto_map", "custom_pipelines")
"""Keys of a configuration that name Python code, which transformers runs for those who trust it."""


def write_side_files(folder: Path, base: Path, artifact: Artifact, patterns: Iterable[str]) -> None:
    """Makes a folder's tokenizer, template and configurations those of the tuned model.

    Code comes only from the base: a carried configuration that names other code gets the base's instead.

    Args:
        folder: where to write them.
        base: folder of the base.
        artifact: says which of the base's files the tuned model lacks, and carries those that differ.
        patterns: which of the base's files to copy.

    Raises:
        ArtifactError: a carried file is not what the manifest says, or a configuration is not JSON.
    """
    for pattern in patterns:
        for file in base.glob(pattern):
            if file.is_file() and file.name not in artifact.manifest.dropped_files:
                shutil.copyfile(file, folder / file.name)
    for name in artifact.manifest.files.keys() - {CANARY_FILE}:
        called = "config.json" if name == TUNED_CONFIG_FILE else name
        content = artifact.file(name)
        assert content is not None
        if name.endswith("config.json"):
            content = _trusted(artifact, name, content, base / called)
        (folder / called).write_bytes(content)


def _trusted(artifact: Artifact, name: str, content: bytes, of_base: Path) -> bytes:
    """A carried configuration, with the code that the base's file names."""
    try:
        ours = artifact.json_file(name)
        trusted = _with_code_of(_json(of_base), ours)
    except RecursionError as error:
        raise ArtifactError(f"{artifact.path / name}: expected a configuration: {error}") from error
    if trusted == ours:
        return content
    warnings.warn(
        f"{artifact.path / name}: names other code than the base's {of_base.name}; the base's code stays",
        stacklevel=3,
    )
    return json.dumps(trusted, indent=2).encode() + b"\n"


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):  # then it names no code
        return None


def _with_code_of(theirs: Any, ours: Any) -> Any:
    """`ours`, with the code that `theirs` names in the same places, or none where it names none."""
    if not isinstance(ours, dict):
        return ours
    theirs = theirs if isinstance(theirs, dict) else {}
    kept = {key: _with_code_of(theirs.get(key), value) for key, value in ours.items()}
    return {
        key: theirs[key] if key in CODE else value
        for key, value in kept.items()
        if key not in CODE or key in theirs
    }
