"""What a tuned model says to a few tokens, recorded when its artifact is made.

Whoever runs the artifact can ask it the same and compare: a layer that was passed over, or a kernel
that is wrong on this machine, shows in numbers before a user sees it in words. The tokens are drawn at
random: they belong to nobody's text, and every matrix takes part in what follows them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from deltacome.errors import ArtifactError

CANARY_FILE = "canary.json"
TOKENS = 16


@dataclass(frozen=True)
class Canary:
    """Tokens, and how likely the model finds each of them after those before it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithms, for all tokens but the first."""

    @classmethod
    def read(cls, folder: Path) -> Canary | None:
        """The canary of an artifact; None where it has none.

        Raises:
            ArtifactError: the file is not what it should be.
        """
        file = folder / CANARY_FILE
        if not file.is_file():
            return None
        try:
            value = json.loads(file.read_bytes())
            ids = tuple(int(id) for id in value["ids"])
            logprobs = tuple(float(logprob) for logprob in value["logprobs"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{file}: expected ids and logprobs: {error!r}") from error
        if not 2 <= len(ids) <= 64 or len(logprobs) != len(ids) - 1 or min(ids) < 0:
            raise ArtifactError(f"{file}: expected 2 to 64 ids and a logprob for all but one")
        if not all(map(math.isfinite, logprobs)):
            raise ArtifactError(f"{file}: expected finite logprobs")
        return cls(ids, logprobs)

    def to_json(self) -> bytes:
        """The file's content."""
        logprobs = [round(logprob, 4) for logprob in self.logprobs]
        return json.dumps({"ids": self.ids, "logprobs": logprobs}).encode() + b"\n"

    def distance(self, logprobs: list[float]) -> float:
        """Root of the mean square of the differences, in nats."""
        pairs = zip(self.logprobs, logprobs, strict=True)
        return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(self.logprobs))


def canary_ids(vocabulary: int) -> list[int]:
    """The tokens of a canary: random ones below a size, the same every time."""
    draw = random.Random(0)
    return [draw.randrange(vocabulary) for _ in range(TOKENS)]
