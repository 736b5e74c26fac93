"""Whether a tuned model tokenises text as its base does.

One server has one tokenizer, the base's. A tenant that would cut text into other tokens must not be given
the base's tokenizer silently: it is refused, and the error says what differs.
"""

from __future__ import annotations

import json
from pathlib import Path

from deltacome.errors import UnsupportedError
from deltacome.format.artifact import Artifact

PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of a `tokenizer.json` that decide the tokens of a text; padding and truncation are a caller's."""
SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space")
"""Settings of a `tokenizer_config.json` that change the tokens of a text."""
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
"""Files of tokenizers that have no `tokenizer.json`."""


def check_tokenizer(artifact: Artifact, base: Path) -> None:
    """Compares the tokenizer files of an artifact with the base's; it has none where they are equal.

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
    """Compares the settings that the tuned model has.

    One that it lacks may have been left out when it was saved: newer transformers leave it to
    `tokenizer.json`.
    """
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
