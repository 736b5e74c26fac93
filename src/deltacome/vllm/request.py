"""How an artifact is named in a request: by its folder and a digest of what it holds.

The engine's prefix cache keeps the blocks of adapters apart by name and path. New weights in the same
folder would find the blocks of the old ones, so the path that the engine sees ends in a digest of the
manifest, which has the checksums of all weights.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from deltacome.errors import ArtifactError
from deltacome.format.artifact import read_manifest
from deltacome.format.manifest import MANIFEST_FILE

_MARK = "#deltacome-"


def content_path(folder: str) -> str:
    """The path of an artifact's folder with the digest of what it holds now.

    Raises:
        ArtifactError: the manifest is missing, cannot be read, or is too large to be one.
    """
    folder = artifact_path(folder)
    digest = hashlib.sha256(read_manifest(Path(folder))).hexdigest()[:16]
    return f"{folder}{_MARK}{digest}"


def is_unchanged(path: str) -> bool:
    """Whether the folder of a path that `content_path` gave still holds what it held then."""
    try:
        return content_path(path) == path
    except ArtifactError:
        return False


def artifact_path(path: str) -> str:
    """The folder in a path that `content_path` gave; any other path as it is."""
    return path.rpartition(_MARK)[0] or path


def is_artifact(path: str) -> bool:
    """Whether a path, which may be anything that a client sends, names an artifact's folder."""
    return os.path.isfile(os.path.join(artifact_path(path), MANIFEST_FILE))


def has_digest(path: str) -> bool:
    """Whether a path is one that `content_path` gave."""
    return _MARK in path
