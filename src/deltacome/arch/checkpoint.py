"""Dense checkpoints as people have them: sharded safetensors, read tensor by tensor.

A tensor is copied out of its file and the file is closed again, so that the memory of a run is what
it holds and not what it once touched (a mapped file's pages stay in the resident set). Opening costs
a header read for each access, which is small beside a matrix.

Fingerprints say which base a delta belongs to. The *sample* is read when an artifact is attached:
512 values of a tensor in eight runs, under a second for 7B; rounded to bfloat16, so that a base loaded
in bfloat16 or wider still matches (in float16 it does not: values are rounded twice, the small ones
coarsely). The *digest* covers every byte and is for `verify` and `merge`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltacome.errors import CheckpointError, MismatchError
from deltacome.format.hub import fetch_folder, split_name
from deltacome.format.manifest import DTYPES, SAFETENSORS_DTYPES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SIDE_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json", "*.model", "*.tiktoken", "tekken.json"),
    "*processor_config.json",
)
"""Files of a checkpoint that a model needs beside weights and configuration."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """torch's name of it; `unknown` if torch has none."""
    start: int = 0
    """Where its values begin in the file."""

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
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """A folder with `config.json` and safetensors weights (one file or shards).

    Args:
        name_or_path: a folder, or `org/name` or `org/name@revision` on the Hub (fetched to its cache).
        revision: of the repository, where the name has none.

    Attributes:
        name_or_path: without a revision.
        revision: the commit that was fetched; None of a folder.
        path: the folder.
        tensors: by name.

    Raises:
        CheckpointError: no weights, a shard missing or truncated, or only pickled weights.
    """

    def __init__(self, name_or_path: str | Path, revision: str | None = None) -> None:
        self.name_or_path, revision = split_name(name_or_path, revision, CheckpointError)
        self.path = fetch_folder(self.name_or_path, revision, CheckpointError)
        # The Hub's cache calls a snapshot by its commit, which stays when branches and tags move on.
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
            CheckpointError: there is no such tensor, or its bytes are not all there.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor named {name}")
        try:
            with safe_open(info.file, framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error

    def sample(self, name: str) -> str:
        """Fingerprint of a tensor's sampled values (`sample_digest`); reads nothing else.

        Raises:
            CheckpointError: as `read`.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor named {name}")
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: {name}: expected one of torch's dtypes, got another"
            )
        dtype, size = DTYPES[info.dtype], DTYPES[info.dtype].itemsize
        try:
            with info.file.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    # By default the system reads ahead at each place: of a 7B model that is not in
                    # memory yet some 300 MB, for 300 kB that are wanted.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                values = bytearray()
                for run in _runs(math.prod(info.shape)):
                    file.seek(info.start + size * run.start)
                    values += file.read(size * (run.stop - run.start))
        except OSError as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}") from error
        wanted = size * sum(run.stop - run.start for run in _runs(math.prod(info.shape)))
        if len(values) != wanted:
            raise CheckpointError(
                f"{info.file}: {name}: expected {wanted} bytes of sampled values, got {len(values)}"
            )
        sample = torch.frombuffer(values or bytearray(size), dtype=dtype)[: len(values) // size]
        return _digest_of_sample(info.shape, sample)

    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})


def check_dense(folder: Path) -> None:
    """Refuses weights that are quantised: codes are no values to take a difference of.

    Raises:
        CheckpointError: says how they are quantised.
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
    """`config.json` as it is parsed.

    Raises:
        CheckpointError: there is none, or it is no JSON.
    """
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected a model configuration: {error}") from error


def json_folder(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint; of a repository on the Hub only the JSON files are fetched.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return fetch_folder(name_or_path, None, CheckpointError, ("*.json",))


def _list_tensors(folder: Path) -> dict[str, TensorInfo]:
    files, weight_map = _weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                starts = _starts(file)
                for name in shard.keys():  # noqa: SIM118
                    view = shard.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(view.get_dtype() or "", "unknown")
                    shape = tuple(view.get_shape())
                    tensors[name] = TensorInfo(file, shape, dtype, starts[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or not a safetensors file: {error}"
            ) from error
    for name, shard_name in weight_map.items():
        got = tensors[name].file.name if name in tensors else "no shard"
        if got != shard_name:
            raise CheckpointError(f"{folder}: {name}: expected in {shard_name}, found in {got}")
    return dict(sorted(tensors.items()))


def _starts(file: Path) -> dict[str, int]:
    """Where each tensor's values begin in a file that safetensors has opened, and so found sound."""
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
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index_file}: expected an index, got {error!r}") from error
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise CheckpointError(f"{folder}: shard {file.name} of the index is missing")
        return files, weight_map
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: only pickled weights found, which can run code when they are read; convert "
            "them with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) first"
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
    has the fingerprint of its checkpoint, whichever that is in. One held in float16 has it if the
    checkpoint is in float16 too, and hardly ever else.
    """
    flat = tensor.detach().reshape(-1)
    sample = torch.cat([flat[run] for run in _runs(flat.numel())])
    return _digest_of_sample(tuple(tensor.shape), sample)


def _runs(values: int) -> list[slice]:
    """Which of so many values are sampled: all of 512, of more eight runs from first to last."""
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


@dataclass(frozen=True)
class Pair:
    """A tensor of the tuned checkpoint and the base's tensor that it came from."""

    name: str
    shape: tuple[int, ...]
    base_name: str | None
    base_shape: tuple[int, ...] | None


class HasTensors(Protocol):
    """A checkpoint, or what is known of one without its weights."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def pair_tensors(
    base: HasTensors,
    tuned: HasTensors,
    head: str | None,
    embedding: str | None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> list[Pair]:
    """Matches every tensor of the tuned checkpoint with the base's.

    Names may differ by a prefix: a vision-language model has its text base under `language_model`.

    Args:
        base, tuned: the checkpoints.
        head, embedding: names of the tuned head's and input embedding's weights. Where one side ties
            them and does not store the head, the head's counterpart is the embedding.
        ignored: whether a tensor that only the base has says nothing (a table that the model computes).

    Raises:
        MismatchError: shapes differ in more than the number of rows, or the base has a tensor that
            the tuned model lacks.
    """
    prefixes = _prefixes(base.tensors, tuned.tensors)

    def counterpart(name: str | None) -> str | None:
        if name is None or name in base.tensors:
            return name
        for ours, theirs in prefixes:
            if name.startswith(ours) and theirs + name[len(ours) :] in base.tensors:
                return theirs + name[len(ours) :]
        return None

    pairs = []
    used = {counterpart(head)}
    for name, info in tuned.tensors.items():
        base_name = counterpart(name)
        if base_name is None and name == head:
            base_name = counterpart(embedding)
        shape = base.tensors[base_name].shape if base_name else None
        if shape is not None and (shape[1:] != info.shape[1:] or len(shape) != len(info.shape)):
            raise MismatchError(
                f"{name}: the base has shape {shape}, the tuned model {info.shape}; only the number "
                "of rows may differ: is this a fine-tune of this base?"
            )
        used.add(base_name)
        pairs.append(Pair(name, info.shape, base_name, shape))
    missing = sorted(name for name in base.tensors.keys() - used if not ignored(name))
    if missing:
        raise MismatchError(
            f"{tuned.path}: {len(missing)} tensors of the base are missing, the first is {missing[0]}: "
            "is this a fine-tune of this base?"
        )
    return pairs


def _prefixes(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]
) -> list[tuple[str, str]]:
    """Changes of prefix, tuned → base, that account for tensors of the base under other names.

    Each is the change that fits the most of the tensors that are left, by name and row shape.
    """
    found = []
    left = {name for name in base if name not in tuned}
    free = [name for name in tuned if name not in base]
    while left and free:
        tails: dict[str, list[str]] = {}
        for name in left:
            for tail in _tails(name):
                tails.setdefault(tail, []).append(name)
        votes = Counter(
            change for name in free for change in _changes(name, tails, base, tuned[name].shape)
        )
        if not votes:
            break
        (ours, theirs), count = votes.most_common(1)[0]
        rivals = [change[0] for change, n in votes.items() if n == count and change[1] == theirs]
        if len(rivals) > 1:
            raise MismatchError(
                f"tensors of the base below {theirs!r} fit {' and '.join(map(repr, sorted(rivals)))} "
                "of the tuned model alike"
            )
        found.append((ours, theirs))
        left -= {theirs + name[len(ours) :] for name in free if name.startswith(ours)}
        free = [name for name in free if not name.startswith(ours)]
    return found


def _tails(name: str) -> Iterator[str]:
    """Ends of a dotted name, longest first, of two components at least."""
    parts = name.split(".")
    return (".".join(parts[cut:]) for cut in range(len(parts) - 1))


def _changes(
    name: str,
    tails: Mapping[str, list[str]],
    base: Mapping[str, TensorInfo],
    shape: tuple[int, ...],
) -> Iterator[tuple[str, str]]:
    """Prefixes (ours, theirs) whose change makes a name one of the base that shares its longest end."""
    tail = next((tail for tail in _tails(name) if tail in tails), "")
    for other in tails.get(tail, ()):
        if base[other].shape[1:] == shape[1:]:
            yield name.removesuffix(tail), other.removesuffix(tail)
