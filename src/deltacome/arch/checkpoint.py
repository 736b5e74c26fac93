"""Dense checkpoints: sharded safetensors, read tensor by tensor.

A tensor is read out of its file and the file is closed again, so a run's memory is what it holds and
not what it has touched (a mapped file's pages stay in the resident set). Opening the file costs a
header read for each access, which is small compared with a matrix.

Fingerprints say which base a delta belongs to. The *sample* is read when an artifact is attached:
512 values of each tensor in eight runs, in under a second for 7B. They are rounded to bfloat16, so a
base loaded in bfloat16 or wider still matches (one loaded in float16 does not: its values are rounded
twice, the small ones coarsely). The *digest* covers every byte and is for `verify` and `merge`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from deltacome.errors import CheckpointError
from deltacome.format.hub import fetch_folder, split_name
from deltacome.format.tensors import DTYPES, entry_nbytes, open_shard, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SIDE_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json", "*.model", "*.tiktoken", "tekken.json"),
    "*processor_config.json",
)
"""Files of a checkpoint that a model needs besides weights and configuration."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """torch's name for it; `unknown` if torch has none."""
    start: int = 0
    """Byte offset of its values in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values.

        Raises:
            CheckpointError: torch has no such type.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: a tensor of {self.shape} has a type unknown to torch"
            )
        return entry_nbytes(self.dtype, self.shape)


class Checkpoint:
    """A folder with `config.json` and safetensors weights (one file or shards).

    Args:
        name_or_path: a folder, or `org/name` or `org/name@revision` on the Hub (fetched to its cache).
        revision: the repository's revision, where the name has none.

    Attributes:
        name_or_path: the name without a revision.
        revision: the commit that was fetched; None for a folder.
        path: the folder.
        tensors: where each tensor is stored, by name.

    Raises:
        CheckpointError: no weights, a shard that is missing or truncated, or only pickled weights.
    """

    def __init__(self, name_or_path: str | Path, revision: str | None = None) -> None:
        self.name_or_path, revision = split_name(name_or_path, revision, CheckpointError)
        self.path = fetch_folder(self.name_or_path, revision, CheckpointError)
        # The Hub's cache names a snapshot after its commit, which stays when branches and tags move.
        of_hub = self.path != Path(self.name_or_path)
        self.revision = self.path.name if of_hub else None
        self.tensors = _list_tensors(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return read_config_file(self.path)

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, in the dtype of the file.

        Raises:
            CheckpointError: there is no such tensor, or some of its bytes are missing.
        """
        info = self._info(name)
        try:
            with open_shard(info.file) as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error

    def sample(self, name: str) -> str:
        """Fingerprint of a tensor's sampled values (`sample_digest`); reads nothing else.

        Raises:
            CheckpointError: as `read`.
        """
        info = self._info(name)
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: {name}: expected one of torch's dtypes, got another"
            )
        dtype, size = DTYPES[info.dtype], DTYPES[info.dtype].itemsize
        runs = _runs(math.prod(info.shape))
        try:
            with info.file.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    # By default the system reads ahead at each place: some 300 MB of a 7B model that
                    # is not in memory yet, where 300 kB are wanted.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                values = bytearray()
                for run in runs:
                    file.seek(info.start + size * run.start)
                    values += file.read(size * (run.stop - run.start))
        except OSError as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error
        wanted = size * sum(run.stop - run.start for run in runs)
        if len(values) != wanted:
            raise CheckpointError(
                f"{info.file}: {name}: expected {wanted} bytes of sampled values, got {len(values)}"
            )
        sample = torch.frombuffer(values or bytearray(size), dtype=dtype)[: len(values) // size]
        return _digest_of_sample(info.shape, sample)

    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor named {name}")
        return self.tensors[name]


def check_dense(folder: Path) -> None:
    """Refuses quantised weights: codes are not values to take a difference of.

    Raises:
        CheckpointError: the weights are quantised; it says how.
    """
    if not (folder / "config.json").is_file():
        return
    config = read_config_file(folder)
    said = config.get("quantization_config") if isinstance(config, dict) else None
    if said:
        how = said.get("quant_method", "?") if isinstance(said, dict) else said
        raise CheckpointError(
            f"{folder}: expected weights as values, got a checkpoint quantised by {how}: load it "
            "with AutoModel….from_pretrained(…), call dequantize(), and save that"
        )


def read_config_file(folder: Path) -> Any:
    """The parsed `config.json`.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected a model configuration: {error}") from error


def json_folder(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint; from a repository on the Hub only the JSON files are fetched.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return fetch_folder(name_or_path, None, CheckpointError, ("*.json",))


def _list_tensors(folder: Path) -> dict[str, TensorInfo]:
    files, weight_map = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            header, starts = read_header(file), _starts(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or not a safetensors file: {error}"
            ) from error
        for name, (dtype, shape) in header.items():
            tensors[name] = TensorInfo(file, shape, dtype, starts[name])
    for name, shard_name in weight_map.items():
        got = tensors[name].file.name if name in tensors else "no shard"
        if got != shard_name:
            raise CheckpointError(f"{folder}: {name}: expected in {shard_name}, found in {got}")
    return dict(sorted(tensors.items()))


def _starts(file: Path) -> dict[str, int]:
    """Where each tensor's values begin in a file that safetensors has opened, and thus found valid."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the index's map where there is one."""
    if (folder / SINGLE_FILE).is_file():  # first, as transformers does: an index may be left over
        return [folder / SINGLE_FILE], {}
    index_file = folder / INDEX_FILE
    if index_file.is_file():
        try:
            weight_map = dict(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"])
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index_file}: expected an index, got {error!r}") from error
        for file in files:
            if file.parent != folder or not file.is_file():
                raise CheckpointError(f"{folder}: shard {file.name} of the index is missing")
        return files, weight_map
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: only pickled weights found, which can run code when they are read; convert "
            "them with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) first"
        )
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a whole model, got an adapter: merge it first (PEFT's "
            "merge_and_unload), or serve it as it is (deltacome serve --lora)"
        )
    raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")


def check_finite(name: str, tensor: Tensor, whose: str) -> None:
    """Refuses NaN and Inf.

    Raises:
        CheckpointError: names the tensor, how many values are not finite, and the first of them.
    """
    if not tensor.is_floating_point():
        return
    flat = tensor.view(-1)
    # There is no isfinite for 8-bit floats; a copy of anything larger would cost its memory again.
    finite = torch.isfinite(flat if flat.dtype.itemsize > 1 else flat.float())
    if not finite.all():
        bad = ~finite
        first = int(bad.nonzero()[0])
        raise CheckpointError(
            f"{name} of the {whose}: expected finite values, got {int(bad.sum())} that are not, "
            f"the first is {flat[first].item()} at flat index {first}"
        )


def sample_digest(tensor: Tensor) -> str:
    """Fingerprint of a tensor's shape and 512 sampled values: 16 hex digits.

    Floating-point values are rounded to bfloat16 first, so a base held in bfloat16, float32 or float64
    has the fingerprint of its checkpoint, whatever the checkpoint's dtype. A base held in float16 has
    it if the checkpoint is in float16 too, and hardly ever otherwise.
    """
    flat = tensor.detach().reshape(-1)
    sample = torch.cat([flat[run] for run in _runs(flat.numel())])
    return _digest_of_sample(tuple(tensor.shape), sample)


def _runs(values: int) -> list[slice]:
    """Which of `values` values are sampled: all of up to 512, or else eight runs from first to last."""
    run, runs = 64, 8
    if values <= run * runs:
        return [slice(0, values)]
    starts = (i * (values - run) // (runs - 1) for i in range(runs))
    return [slice(start, start + run) for start in starts]


def _digest_of_sample(shape: tuple[int, ...], sample: Tensor) -> str:
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=8)
    digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full_digest(tensor: Tensor) -> str:
    """Fingerprint of a tensor's dtype, shape and every byte: 32 hex digits."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
