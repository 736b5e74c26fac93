"""What a request gets of the tuned model beside its weights: chat template, sampling, end tokens.

An artifact carries those files of the tuned model that differ from the base's. What it does not carry
is the base's, and vLLM knows it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltacome.format.artifact import Artifact

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
    sampling: dict[str, Any] | None = None
    """Defaults of sampling; None: the base's."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, beside the base's."""

    @classmethod
    def read(cls, artifact: Artifact, vocabulary: Mapping[str, int]) -> Manners:
        """Reads what an artifact carries.

        Args:
            artifact: of the tuned model.
            vocabulary: the base's tokens and their numbers.

        Raises:
            ArtifactError: a file is not what its name says.
        """
        tokens = artifact.json_file("tokenizer_config.json") or {}
        generation = artifact.json_file("generation_config.json")
        ends = set()
        if generation is not None and (end := generation.get("eos_token_id")) is not None:
            ends = {end} if isinstance(end, int) else set(end)
        token = tokens.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
            ends.add(vocabulary[token])
        sampling = None
        if generation is not None:
            sampling = {n: generation[n] for n in SAMPLING if generation.get(n) is not None}
        return cls(_template(artifact, tokens), sampling, frozenset(ends))


def _template(artifact: Artifact, tokens: dict[str, Any]) -> str | None:
    content = artifact.file("chat_template.jinja")
    if content is not None:
        return content.decode()
    legacy = artifact.json_file("chat_template.json") or {}
    found = tokens.get("chat_template") or legacy.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found
