"""Files that go along with the weights: tokenizer, template, configuration, and the model card."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from deltacome.arch.checkpoint import SIDE_FILES
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.format.manifest import CARRIED_NAME

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def carried_files(base: Path, tuned: Path) -> dict[str, bytes]:
    """Content of the tuned model's side files, those that equal the base's left out.

    The tuned `config.json` is always carried, under a name that no loader takes for a model.
    """
    files = {TUNED_CONFIG_FILE: (tuned / "config.json").read_bytes()}
    for pattern in SIDE_FILES:
        for file in sorted(file for file in tuned.glob(pattern) if file.is_file()):
            if not CARRIED_NAME.fullmatch(file.name):
                continue  # code, say: an artifact holds data
            content = file.read_bytes()
            twin = base / file.name
            if not (twin.is_file() and twin.read_bytes() == content):
                files[file.name] = content
    return files


def model_card(artifact: Artifact) -> bytes:
    """`README.md` of the artifact's folder: metadata that the Hub reads, sizes and errors."""
    manifest = artifact.manifest
    base = manifest.base_name_or_path
    kinds = Counter(record.kind for record in manifest.records.values())
    errors = [r.error for r in manifest.records.values() if r.error is not None]
    nominal = manifest.nominal_ratio()
    # A path of one machine is of no use to a reader elsewhere, and the Hub refuses it.
    link = [f"base_model: {base}"] if HUB_ID.fullmatch(base) and not Path(base).exists() else []
    lines = [
        "---",
        *link,
        "base_model_relation: adapter",
        "library_name: deltacome",
        "tags:",
        "- deltacome",
        "- delta-compression",
        "---",
        "",
        "# Delta of a full fine-tune",
        "",
        f"Method `{manifest.method['name']}`{_options(manifest.method)}, to be used with the base "
        f"`{base if link else Path(base).name}` and nothing else.",
        "",
        "| | |",
        "|---|---|",
        f"| tuned model at 16 bit | {manifest.tuned_nbytes():,} bytes |",
        f"| this artifact on disk | {artifact.bytes_on_disk():,} bytes |",
        f"| ratio, everything counted | {artifact.ratio():.2f} |",
        f"| nominal ratio (codes only) | {'–' if nominal is None else f'{nominal:.2f}'} |",
        *(f"| tensors held as `{kind}` | {count} |" for kind, count in sorted(kinds.items())),
        f"| mean relative error of a matrix | {_mean(errors)} |",
        "",
        "```bash",
        'deltacome generate BASE --delta . "your prompt"',
        "deltacome merge BASE . -o DENSE",
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def _options(method: dict[str, Any]) -> str:
    said = [f"{key} `{value}`" for key, value in method.items() if key != "name"]
    return f" with {', '.join(said)}" if said else ""


def _mean(errors: list[float]) -> str:
    return f"{sum(errors) / len(errors):.4g}" if errors else "–"
