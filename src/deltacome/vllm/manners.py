"""What a request gets of the tuned model beside its weights: chat template, sampling, end tokens.

An artifact carries those files of the tuned model that differ from the base's. What it does not carry
is the base's, and vLLM knows it already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltacome.errors import ArtifactError

SAMPLING = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("temperature", "top_k", "top_p", "min_p"),
)
"""Defaults that vLLM takes from a model's generation configuration."""


@dataclass(frozen=True)
class Manners:
    """What differs from the base's."""

    template: str | None = None
    """The chat template; None: the base's."""
    sampling: dict[str, Any] | None = field(default=None)
    """Defaults of sampling; None: the base's."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, beside the base's."""

    @classmethod
    def read(cls, folder: str, tokenizer: Any) -> Manners:
        """Reads what an artifact carries.

        Args:
            folder: of the artifact.
            tokenizer: the base's, which knows the number of a token.

        Raises:
            ArtifactError: a file is not what its name says.
        """
        tokens, generation = (
            _json(Path(folder) / name)
            for name in ("tokenizer_config.json", "generation_config.json")
        )
        ends = set()
        if generation is not None and (end := generation.get("eos_token_id")) is not None:
            ends = {end} if isinstance(end, int) else set(end)
        token = (tokens or {}).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in tokenizer.get_vocab():
            ends.add(tokenizer.get_vocab()[token])
        sampling = None
        if generation is not None:
            sampling = {n: generation[n] for n in SAMPLING if generation.get(n) is not None}
        return cls(_template(Path(folder), tokens or {}), sampling, frozenset(ends))


def _template(folder: Path, tokens: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokens.get("chat_template") or (_json(folder / "chat_template.json") or {}).get(
        "chat_template"
    )
    if isinstance(found, list):  # several by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file}: expected an object, got {type(value).__name__}")
    return value
