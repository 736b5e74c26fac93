"""Files beside the weights: the base's, under those that an artifact carries."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.canary import CANARY_FILE


def write_side_files(folder: Path, base: Path, artifact: Artifact, patterns: Iterable[str]) -> None:
    """Makes a folder's tokenizer, template and configurations those of the tuned model.

    Args:
        folder: where to.
        base: folder of the base.
        artifact: says which of the base's the tuned model has no more, and carries those that differ.
        patterns: of the base's files.

    Raises:
        ArtifactError: a carried file is not what the manifest says.
    """
    for pattern in patterns:
        for file in base.glob(pattern):
            if file.is_file() and file.name not in artifact.manifest.dropped_files:
                shutil.copyfile(file, folder / file.name)
    for name in artifact.manifest.files.keys() - {CANARY_FILE}:
        content = artifact.file(name)
        assert content is not None
        (folder / ("config.json" if name == TUNED_CONFIG_FILE else name)).write_bytes(content)
