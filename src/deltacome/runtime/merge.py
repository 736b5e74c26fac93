"""Merges base and artifact back into a dense checkpoint, for everything that cannot run packed codes.

It works tensor by tensor, so that memory holds about one shard of the output. Before a tensor is used,
all its bytes are compared with the fingerprint of the base that the delta was taken against: a merge with
the wrong base looks like a model but is none. The folder is renamed into place once it is whole.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltacome.arch.checkpoint import (
    INDEX_FILE,
    SIDE_FILES,
    SINGLE_FILE,
    Checkpoint,
    full_digest,
)
from deltacome.errors import ArtifactError, MismatchError
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.format.folder import new_folder, write_atomic
from deltacome.format.manifest import Record
from deltacome.format.side_files import write_side_files
from deltacome.format.tensors import DTYPES, entry_nbytes
from deltacome.format.writer import grouped

MAX_SHARD_BYTES = 2 * 10**9

ANOTHER = "give the checkpoint that the delta was made from (`deltacome inspect` names it)"


def merge(
    base: str | Path,
    artifact: Artifact | str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes `base + delta` as an ordinary checkpoint that `from_pretrained` loads.

    Sums are float32, rounded once to the dtype of the tuned model. Tokenizer, chat template and
    generation configuration are the artifact's where it carries them, else the base's.

    Args:
        base: the base's folder, or its repository on the Hub.
        artifact: opened, or its folder or name on the Hub.
        output: a folder that does not exist yet.
        max_shard_bytes: largest size of one weight file (a larger tensor gets one of its own).

    Returns:
        `output`.

    Raises:
        MismatchError: a tensor of the base is not the one that the delta was taken against.
        ArtifactError: the artifact is damaged.
        CheckpointError: the base is damaged.
        OutputError: the output exists, or cannot be written. Nothing is left behind.
    """
    output = Path(output)
    artifact = opened(artifact)
    artifact.verify_bytes()
    checkpoint = Checkpoint(base)
    with new_folder(output) as folder:
        _write_weights(folder, checkpoint, artifact, max_shard_bytes)
        _write_rest(folder, checkpoint, artifact)
    return output


def base_tensor(base: Checkpoint, record: Record) -> Tensor:
    """Reads the base's tensor of a record, checked against its fingerprint.

    Raises:
        MismatchError: the base has no such tensor, or its shape, dtype or any byte differs.
        CheckpointError: it cannot be read.
    """
    assert record.base_name is not None
    if record.base_name not in base.tensors:
        raise MismatchError(
            f"{base.path}: wrong base: it has no tensor {record.base_name}: {ANOTHER}"
        )
    tensor = base.read(record.base_name)
    if tuple(tensor.shape) != record.base_shape:
        raise MismatchError(
            f"{record.base_name}: wrong base: expected shape {record.base_shape}, "
            f"got {tuple(tensor.shape)}: {ANOTHER}"
        )
    got = full_digest(tensor)
    if got != record.base_digest:
        raise MismatchError(
            f"{record.base_name}: wrong base: expected fingerprint {record.base_digest}, got {got}: "
            f"{ANOTHER}"
        )
    return tensor


def tuned_tensor(base: Checkpoint, artifact: Artifact, record: Record) -> Tensor:
    """The tuned value of one tensor, in the tuned model's dtype.

    Raises:
        MismatchError, CheckpointError: as `base_tensor`.
    """
    before = None if record.base_name is None else base_tensor(base, record)
    exact = artifact.exact(record.name) if record.exact_rows else None
    if before is None or record.replaced:
        assert exact is not None  # the manifest accounts for every row
        return exact
    kept = before[: record.shape[0]] if record.shape else before
    if record.packed:
        delta = artifact.packed(record.name).dense()
        kept = (delta.T if record.transposed else delta).add_(kept)
    kept = kept.to(DTYPES[record.dtype])
    return kept if exact is None else torch.cat([kept, exact])


def _write_weights(
    folder: Path, base: Checkpoint, artifact: Artifact, max_shard_bytes: int
) -> None:
    records = artifact.manifest.records.values()
    groups = list(grouped(((r, entry_nbytes(r.dtype, r.shape)) for r in records), max_shard_bytes))
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {r.name: tuned_tensor(base, artifact, r).contiguous() for r in group}
        file = folder / (shard if len(groups) > 1 else SINGLE_FILE)
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard's are made
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_rest(folder: Path, base: Checkpoint, artifact: Artifact) -> None:
    if TUNED_CONFIG_FILE not in artifact.manifest.files:
        raise ArtifactError(f"{artifact.path}: expected {TUNED_CONFIG_FILE}, found none")
    write_side_files(folder, base.path, artifact, (*SIDE_FILES, "*.py"))
