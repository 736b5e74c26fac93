"""How likely a tuned model finds a few tokens, recorded when its artifact is made.

Whoever runs the artifact can compute the same and compare: a layer that was skipped, or a kernel that
is wrong on this machine, shows in the numbers before a user sees it in the text. The tokens are drawn
at random: they are nobody's text, and every matrix takes part in predicting them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

from deltacome.errors import ArtifactError

CANARY_FILE = "canary.json"
TOKENS = 16
NBYTES = 512
MAX_IDS = 64
MAX_NBYTES = 4 << 10
"""Limit for a file that is read at all; `MAX_IDS` ids and their logprobs take a quarter of it."""


@dataclass(frozen=True)
class Canary:
    """Tokens, and how likely the model finds each of them given those before it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithms, for all tokens but the first."""

    @classmethod
    def from_json(cls, content: bytes) -> Canary:
        """Inverse of `to_json`.

        Raises:
            ArtifactError: the content is not a valid canary.
        """
        if len(content) > MAX_NBYTES:
            raise ArtifactError(
                f"{CANARY_FILE}: expected at most {MAX_NBYTES} bytes, got {len(content)}"
            )
        try:
            value = json.loads(content)
            ids = tuple(int(id) for id in value["ids"])
            logprobs = tuple(float(logprob) for logprob in value["logprobs"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ArtifactError(f"{CANARY_FILE}: expected ids and logprobs: {error!r}") from error
        if not 2 <= len(ids) <= MAX_IDS or len(logprobs) != len(ids) - 1 or min(ids) < 0:
            raise ArtifactError(
                f"{CANARY_FILE}: expected 2 to {MAX_IDS} ids and a logprob for all but the first"
            )
        if not all(map(math.isfinite, logprobs)):
            raise ArtifactError(f"{CANARY_FILE}: expected finite logprobs")
        return cls(ids, logprobs)

    @classmethod
    def unknown(cls) -> Canary:
        """A placeholder for a canary not recorded yet, to count its bytes."""
        return cls((0,) * TOKENS, (0.0,) * (TOKENS - 1))

    def to_json(self) -> bytes:
        """The file's content, padded to a fixed size, as its bytes are counted before it is known."""
        logprobs = [round(logprob, 4) for logprob in self.logprobs]
        text = json.dumps({"ids": self.ids, "logprobs": logprobs}, separators=(",", ":"))
        return text.encode().ljust(NBYTES - 1) + b"\n"

    def distance(self, logprobs: list[float]) -> float:
        """Root mean square of the differences, in nats."""
        pairs = zip(self.logprobs, logprobs, strict=True)
        return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(self.logprobs))


def canary_ids(vocabulary: int) -> list[int]:
    """The tokens of a canary: random ids below `vocabulary`, the same every time."""
    draw = random.Random(0)
    return [draw.randrange(vocabulary) for _ in range(TOKENS)]
