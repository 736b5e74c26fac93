"""What `deltacome serve` runs: vLLM with the flags and the environment that its tenants need.

Nothing of vLLM is imported here. The command is that of vLLM's API server, and `--dry-run` shows it; what
follows `--` goes to it as it is.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.format.spec import rank
from deltacome.runtime.capacity import slot_nbytes

MAX_BANDS = 6
"""Bands of a plan that tenants can have which are loaded later; `Settings.max_bands` by default."""


@dataclass(frozen=True)
class Launch:
    """A command and what its environment adds to ours."""

    command: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    def run(self) -> None:
        """Becomes the server; does not return."""
        os.execvpe(self.command[0], self.command, os.environ | self.environment)


def plan_launch(
    base: str,
    tenants: Mapping[str, str],
    *,
    folder: str | None = None,
    slots: int | None = None,
    slot_bytes: int | None = None,
    lora: bool = False,
    port: int = 8000,
    more: Sequence[str] = (),
) -> Launch:
    """The command that serves a base and its tenants; checks every tenant first.

    Args:
        base: folder or Hub name of the base.
        tenants: name → an artifact, a folder or on the Hub.
        folder: where tenants that are not named are found when a request names them: a folder, or an
            address that fsspec understands.
        slots: tenants in one batch; by default all of them, at most 16.
        slot_bytes: bytes of a slot; by default those of the largest tenant, in `tenants` or a local
            `folder`.
        lora: whether ordinary LoRA adapters are served too.
        port: of the server.
        more: arguments of vLLM.

    Raises:
        MismatchError: a tenant of another base.
        ArtifactError: a folder is not a whole artifact.
        UnsupportedError: tenants with scale groups of different sizes.
    """
    known = {name: Artifact.from_pretrained(path) for name, path in tenants.items()}
    found = {artifact.path.resolve(): artifact for artifact in known.values()}
    if folder is not None and Path(folder).is_dir():
        for one in sorted(Path(folder).resolve().iterdir()):
            if (one / MANIFEST_FILE).is_file():
                found.setdefault(one, Artifact.open(one))
    checkpoint = Checkpoint(base)
    for artifact in found.values():
        check_base(artifact, checkpoint)
    groups = {artifact.manifest.group_size for artifact in found.values()}
    if len(groups) > 1:
        raise UnsupportedError(f"tenants: expected one size of scale groups, got {sorted(groups)}")
    settings: dict[str, object] = {"lora": lora}
    if found:
        records = [r for one in found.values() for r in one.manifest.records.values()]
        settings["slot_bytes"] = max(map(slot_nbytes, found.values()))
        settings["max_rank"] = max(1, *map(max_rank, found.values()))
        settings["max_bands"] = max(MAX_BANDS, *(len(record.plan) for record in records))
        settings["signs"] = any(record.sign_scales for record in records)
        (settings["group_size"],) = groups
    if slot_bytes is not None:
        settings["slot_bytes"] = slot_bytes
    if folder is not None:
        settings["tenants"] = folder
    slots = slots or min(16, max(1, len(found)))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", checkpoint.name_or_path]
    if checkpoint.revision is not None:
        command += ["--revision", checkpoint.revision, "--tokenizer-revision", checkpoint.revision]
    command += ["--port", str(port), "--enable-lora", "--max-loras", str(slots)]
    command += ["--max-cpu-loras", str(max(slots, len(found), 4 * slots))]
    command += ["--additional-config", json.dumps({"deltacome": settings})]
    if known:
        modules = [f"{name}={artifact.path.resolve()}" for name, artifact in known.items()]
        command += ["--lora-modules", *modules]
    return Launch([*command, *more], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})


def max_rank(artifact: Artifact) -> int:
    """At least the directions of its largest layer: those of matrices that vLLM multiplies at once
    belong to one module of the checkpoint."""
    ranks: Counter[str] = Counter()
    for record in artifact.manifest.records.values():
        ranks[record.name.rsplit(".", 2)[0]] += rank(record.plan)
    return max(ranks.values(), default=0)


def check_base(artifact: Artifact, base: Checkpoint) -> None:
    """Compares sampled fingerprints of all tensors.

    Raises:
        MismatchError: names the tensor.
    """
    for record in artifact.manifest.records.values():
        if record.base_name is None or record.base_sample is None:
            continue
        if record.base_name not in base.tensors:
            raise MismatchError(
                f"{artifact.path}: {record.base_name}: {base.path} has no such tensor"
            )
        got = base.sample(record.base_name)
        if got != record.base_sample:
            raise MismatchError(
                f"{artifact.path}: {record.name}: wrong base: expected fingerprint "
                f"{record.base_sample}, got {got} in {base.path}"
            )
