"""Files that go along with the weights: tokenizer, template, configuration, and the model card."""

from __future__ import annotations

from pathlib import Path

from deltacome.format.artifact import TUNED_CONFIG_FILE

CARRIED = (
    *("tokenizer*", "chat_template*", "generation_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "preprocessor_config.json"),
)


def carried_files(base: Path, tuned: Path) -> dict[str, bytes]:
    """Content of the tuned model's side files, those that equal the base's left out.

    The tuned `config.json` is always carried, under a name that no loader takes for a model.
    """
    files = {TUNED_CONFIG_FILE: (tuned / "config.json").read_bytes()}
    for pattern in CARRIED:
        for file in sorted(tuned.glob(pattern)):
            content = file.read_bytes()
            twin = base / file.name
            if not (twin.is_file() and twin.read_bytes() == content):
                files[file.name] = content
    return files
