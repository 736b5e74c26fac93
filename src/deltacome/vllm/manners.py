"""What a request gets from the tuned model besides its weights: chat template, sampling, end tokens.

An artifact carries those files of the tuned model that differ from the base's. What it does not carry
is the same as the base's, which vLLM knows already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltacome.errors import ArtifactError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact
from deltacome.vllm import compat
from deltacome.vllm.templates import MAX_NBYTES, check_template

SAMPLING = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("temperature", "top_k", "top_p", "min_p"),
)
"""Defaults that vLLM takes from a model's generation configuration."""
MAX_ENDS = compat.MAX_NUM_STOP_TOKEN_IDS // 2
"""Half of what a step of vLLM takes; the other half is for the base's and a request's own."""
TOP_K = 2**31
"""Values of `top_k` are below this: vLLM's workers keep it in 32 bits."""
SPECIAL = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
"""Special tokens that a chat template may use."""
TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class Manners:
    """What differs from the base."""

    template: str | None = None
    """The chat template; None: the base's."""
    sampling: dict[str, Any] | None = None
    """Sampling defaults; None: the base's."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, besides the base's."""
    special: dict[str, str] = field(default_factory=dict)
    """`eos_token` and the like, as chat templates use them, where they differ from the base's."""

    @classmethod
    def read(
        cls, artifact: Artifact, vocabulary: Mapping[str, int], size: int, templates: bool = True
    ) -> Manners:
        """Reads and checks what an artifact carries.

        All of it is checked here: in the engine, a value of another type would end the thread that reads
        requests.

        Args:
            artifact: of the tuned model.
            vocabulary: the base's tokens and their ids.
            size: of the base's vocabulary; a tokenizer may have ids beyond it.
            templates: whether to use its chat template, which is a program that the API server runs.

        Raises:
            ArtifactError: a file is not what its name says.
        """
        tokens = artifact.json_file(TOKENIZER) or {}
        generation = artifact.json_file(GENERATION)
        special = {name: text for name in SPECIAL if (text := _text(tokens.get(name)))}
        ends = _ends(artifact, generation or _without_file(artifact), size)
        end = vocabulary.get(special.get("eos_token", ""), size)
        if end < size:
            ends.add(end)
        sampling = None if generation is None else _sampling(artifact, generation)
        template = _template(artifact, tokens) if templates else None
        return cls(template, sampling, frozenset(ends), special)


def _without_file(artifact: Artifact) -> dict[str, Any]:
    """End tokens of the model's configuration, where the tuned model lacks a generation configuration."""
    if GENERATION not in artifact.manifest.dropped_files:
        return {}
    config = artifact.json_file(TUNED_CONFIG_FILE) or {}
    of_text = config.get("text_config")
    holders = (config, of_text if isinstance(of_text, dict) else {})
    found = [holder["eos_token_id"] for holder in holders if holder.get("eos_token_id") is not None]
    return {"eos_token_id": found[0]} if found else {}


def _text(token: Any) -> str | None:
    """The text of a token, which tokenizers write as a string or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _wrong(artifact: Artifact, key: str, expected: str, got: Any) -> ArtifactError:
    return ArtifactError(f"{artifact.path}: {key}: expected {expected}, got {got!r:.100}")


def _ends(artifact: Artifact, generation: dict[str, Any], size: int) -> set[int]:
    end = generation.get("eos_token_id")
    if end is None:
        return set()
    ids = end if isinstance(end, list) else [end]
    where = f"{GENERATION}: eos_token_id"
    for id in ids:
        if type(id) is not int or not 0 <= id < size:  # True is an int to isinstance
            raise _wrong(artifact, where, f"numbers of tokens, from 0 to {size - 1}", id)
    if len(set(ids)) > MAX_ENDS:
        raise _wrong(artifact, where, f"at most {MAX_ENDS} tokens", len(set(ids)))
    return set(ids)


def _sampling(artifact: Artifact, generation: dict[str, Any]) -> dict[str, Any]:
    checked: Any = compat.SamplingParams  # it checks vLLM's own ranges
    found = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    for name, value in found.items():
        where = f"{GENERATION}: {name}"
        if name == "top_k":
            if type(value) is not int or not -1 <= value < TOP_K:
                raise _wrong(artifact, where, f"a whole number from -1 to {TOP_K - 1}", value)
        elif type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise _wrong(artifact, where, "a finite number", value)
        else:
            found[name] = float(value)
        try:
            checked(**{name: found[name]})
        except (compat.VLLMValidationError, ValueError) as error:
            raise ArtifactError(f"{artifact.path}: {where}: {error}") from error
    return found


def _template(artifact: Artifact, tokens: dict[str, Any]) -> str | None:
    found = _written_template(artifact, tokens)
    if found is not None:
        check_template(f"{artifact.path}: chat template", found)
    return found


def _written_template(artifact: Artifact, tokens: dict[str, Any]) -> str | None:
    name = "chat_template.jinja"
    content = artifact.file(name, MAX_NBYTES)
    if content is not None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise _wrong(artifact, name, "UTF-8", content) from error
    legacy = artifact.json_file("chat_template.json") or {}
    found = tokens.get("chat_template") or legacy.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template", 0) if named else None
    if not isinstance(found, str | None):
        raise _wrong(artifact, f"{TOKENIZER}: chat_template", "text, or a list with names", found)
    return found
