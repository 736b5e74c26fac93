"""Whether a tuned model reads text as its base does.

One server has one tokenizer, the base's. A tenant that would cut text into other tokens must not be
given the base's in silence: it is refused, by what differs.
"""

from __future__ import annotations

import json
from pathlib import Path

from deltacome.errors import UnsupportedError
from deltacome.format.artifact import Artifact

PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Of a `tokenizer.json`, what decides on the tokens of a text; padding and truncation are a caller's."""
SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space")
"""Of a `tokenizer_config.json`, what changes the tokens of a text."""
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
"""Files of tokenizers that have no `tokenizer.json`."""


def check_tokenizer(artifact: Artifact, base: Path) -> None:
    """Compares what an artifact carries (nothing, where it equals the base's) with the base's.

    Raises:
        ArtifactError: what it carries cannot be read.
        UnsupportedError: the tuned model has another tokenizer.
    """
    way_out = (
        "requests are tokenised with the base's: merge the artifact, or set base_tokenizer to true in "
        "additional_config's deltacome if that is what you want"
    )
    _check_settings(artifact, base, way_out)
    ours = artifact.json_file("tokenizer.json")
    file = base / "tokenizer.json"
    if ours is not None and file.is_file():
        theirs = json.loads(file.read_bytes())
        for part in PARTS:
            if ours.get(part) != theirs.get(part):
                raise UnsupportedError(
                    f"{artifact.path}: tokenizer.json: another {part} than the base's; {way_out}"
                )
        return
    for name in ("tokenizer.json", *OTHERS):
        if name in artifact.manifest.files:
            raise UnsupportedError(f"{artifact.path}: {name}: not the base's; {way_out}")


def _check_settings(artifact: Artifact, base: Path, way_out: str) -> None:
    """What the tuned model does not set may have been left out as it was saved: newer transformers leave
    it to `tokenizer.json`."""
    name = "tokenizer_config.json"
    file = base / name
    ours = artifact.json_file(name) or {}
    theirs = json.loads(file.read_bytes()) if file.is_file() else {}
    for key in SETTINGS:
        expected, got = theirs.get(key) or False, ours.get(key)
        if got is not None and got != expected:
            raise UnsupportedError(
                f"{artifact.path}: {name}: {key}: expected the base's, {expected}, got {got!r}; {way_out}"
            )
