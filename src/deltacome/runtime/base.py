"""The base that deltas were taken against, recognised by its fingerprints.

Nothing here imports vLLM.
"""

from __future__ import annotations

from pathlib import Path

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import MismatchError
from deltacome.format.artifact import Artifact


class Base(Checkpoint):
    """A checkpoint whose fingerprints are read once, however many artifacts are compared with it."""

    def __init__(self, name_or_path: str | Path, revision: str | None = None) -> None:
        super().__init__(name_or_path, revision)
        self._samples: dict[str, str] = {}

    def check(self, artifact: Artifact) -> None:
        """Compares shape and sampled values of each tensor that a delta was taken against.

        Raises:
            MismatchError: names the tensor, what was expected and what was got.
            CheckpointError: a tensor cannot be read.
        """
        for record in artifact.manifest.records.values():
            name = record.base_name
            if name is None:
                continue
            if name not in self.tensors:
                raise MismatchError(
                    f"{artifact.path}: {name}: the base {self.path} has no such tensor"
                )
            for what, expected, get in (
                ("shape", record.base_shape, lambda name: self.tensors[name].shape),
                ("fingerprint", record.base_sample, self._sampled),
            ):
                if (got := get(name)) != expected:
                    raise MismatchError(
                        f"{artifact.path}: {record.name}: wrong base: expected {name} of {what} "
                        f"{expected}, got {got} in {self.path}: use the base that it was made from "
                        "(`deltacome inspect` names it)"
                    )

    def _sampled(self, name: str) -> str:
        if name not in self._samples:
            self._samples[name] = self.sample(name)
        return self._samples[name]
