"""JSON that comes from outside, read strictly: each field is checked, and unknown ones are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any

from deltacome.errors import ArtifactError, PlanError

Check = Callable[[Any], Any]
"""Returns the value that an item stands for, or raises TypeError, ValueError, OverflowError or
PlanError."""

_MISSING = object()


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parses one JSON object strictly.

    Raises:
        ArtifactError: not JSON, not an object, a key that appears twice, or a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ArtifactError(f"{where}: a key appears twice in one object")
        return document

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):  # NaN, Infinity, and 1e999
            raise ArtifactError(f"{where}: expected finite numbers, got {number:.80}")
        return float(number)

    try:
        document = json.loads(
            text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(document).__name__}")
    return document


TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def tagged_floats(value: Any) -> Any:
    """A parsed `config.json` with its floats that JSON lacks: transformers writes one as
    `{"__float__": "Infinity"}`, and turns it back only when it reads the file itself.
    """
    if isinstance(value, list):
        return [tagged_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and isinstance(tag := value["__float__"], str):
        return TAGGED.get(tag, value)
    return {key: tagged_floats(item) for key, item in value.items()}


class Fields:
    """The fields of an object. Each is taken out once, so whatever is left at the end is unknown."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: expected an object, got {value!r:.80}")
        self._left = dict(value)
        self._where = where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, check: Check, default: Any = _MISSING) -> Any:
        """Takes out a field's checked value; without a default the field must be present."""
        if key not in self._left:
            if default is _MISSING:
                raise ArtifactError(f"{self._where}: {key!r} is missing")
            return default
        item = self._left.pop(key)
        try:
            return check(item)
        except (TypeError, ValueError, OverflowError, PlanError) as error:
            raise ArtifactError(f"{self._where}: {key}: {error}, got {item!r:.80}") from error

    def end(self) -> None:
        """Refuses fields that were not taken."""
        if self._left:
            raise ArtifactError(f"{self._where}: unknown fields {sorted(self._left)[:5]}")


def string(item: Any) -> str:
    if not isinstance(item, str) or not is_text(item):
        raise TypeError("expected a string")
    return item


def strings(item: Any) -> tuple[str, ...]:
    if not isinstance(item, list):
        raise TypeError("expected a list of strings")
    return tuple(map(string, item))


def is_text(item: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        item.encode()
    except UnicodeEncodeError:
        return False
    return True


def mapping(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise TypeError("expected an object")
    return item


def integer(low: int, high: int) -> Check:
    def check(item: Any) -> int:
        if type(item) is not int or not low <= item <= high:
            raise ValueError(f"expected an integer in [{low}, {high}]")
        return item

    return check


def number(item: Any) -> float:
    if type(item) not in (int, float) or not 0 <= item < float("inf"):
        raise ValueError("expected a finite number ≥ 0")
    return float(item)


def true(item: Any) -> bool:
    if item is not True:
        raise ValueError("expected true")
    return True


def choice(allowed: Collection[str]) -> Check:
    def check(item: Any) -> str:
        if not isinstance(item, str) or item not in allowed:
            raise ValueError(f"expected one of {sorted(allowed)}")
        return item

    return check


def optional(check: Check) -> Check:
    return lambda item: None if item is None else check(item)
