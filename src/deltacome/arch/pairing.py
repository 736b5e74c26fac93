"""Which tensor of the base each tensor of a tuned checkpoint came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deltacome.arch.checkpoint import TensorInfo
from deltacome.errors import MismatchError


@dataclass(frozen=True)
class Pair:
    """A tensor of the tuned checkpoint and the base's tensor that it came from."""

    name: str
    shape: tuple[int, ...]
    base_name: str | None
    base_shape: tuple[int, ...] | None


class HasTensors(Protocol):
    """A checkpoint, or what is known about one without its weights."""

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
    """Matches every tensor of the tuned checkpoint with its counterpart in the base.

    Names may differ by a prefix: a vision-language model has its text base under `language_model`.

    Args:
        base, tuned: the checkpoints.
        head, embedding: names of the tuned head's and input embedding's weights. Where one side ties
            them and does not store the head, the head's counterpart is the embedding.
        ignored: whether a tensor that only the base has does not matter (a table the model computes).

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

    Each is the change that fits the largest number of the remaining tensors, by name and row shape.
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
                "of the tuned model equally well"
            )
        found.append((ours, theirs))
        left -= {theirs + name[len(ours) :] for name in free if name.startswith(ours)}
        free = [name for name in free if not name.startswith(ours)]
    return found


def _tails(name: str) -> Iterator[str]:
    """Suffixes of a dotted name, longest first, of at least two components."""
    parts = name.split(".")
    return (".".join(parts[cut:]) for cut in range(len(parts) - 1))


def _changes(
    name: str,
    tails: Mapping[str, list[str]],
    base: Mapping[str, TensorInfo],
    shape: tuple[int, ...],
) -> Iterator[tuple[str, str]]:
    """Prefix changes (ours, theirs) from a name to those of the base that share its longest suffix."""
    tail = next((tail for tail in _tails(name) if tail in tails), "")
    for other in tails.get(tail, ()):
        if base[other].shape[1:] == shape[1:]:
            yield name.removesuffix(tail), other.removesuffix(tail)
