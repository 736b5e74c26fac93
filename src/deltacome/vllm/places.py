"""Where in vLLM's model the tensors of a checkpoint live: fused, renamed and sharded.

vLLM multiplies q, k and v at once, and gate and up; a worker has some rows or columns of each; names
are those of vLLM's own classes. A place is one module of this worker, and says for each tensor of the
checkpoint in it which rows and columns it has. What a model's loader does by hand is not guessed at: a
tensor that no place names is reported, and a tenant that changes it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from deltacome.errors import UnsupportedError
from deltacome.vllm import compat
from deltacome.vllm.shard import Range


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint within a module, or this worker's shard of it."""

    name: str
    """In vLLM's naming, without `.weight` or `.bias`."""
    rows: tuple[Range, ...]
    columns: Range

    @property
    def size(self) -> int:
        """Rows that this worker has."""
        return sum(stop - start for start, stop in self.rows)


@dataclass
class Place:
    """A module of this worker's model, and what of the checkpoint is in it."""

    name: str
    module: nn.Module
    kind: str
    """`linear`, `embedding` (which may be the head too), `head` or `norm`."""
    parts: tuple[Part, ...]
    tied: bool = field(default=False)
    """A head that uses the embedding's weight."""


def find_places(model: nn.Module) -> list[Place]:
    """All modules of a model that a delta can reach.

    Raises:
        UnsupportedError: a module that computes with a matrix in a way that is not covered (experts).
    """
    packed = compat.packed_modules(model)
    embeddings: list[Place] = []
    places = []
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            continue
        place = _place(name, module, packed)
        if place is not None:
            seen.add(id(module))
            places.append(place)
            if place.kind == "embedding":
                embeddings.append(place)
    for place in places:
        if place.kind == "head" and compat.ties_head(model):
            (embedding,) = embeddings or (place,)
            place.parts, place.tied = embedding.parts, True
    return places


def missing_prefixes(model: nn.Module) -> list[str]:
    """Names of what other workers of the pipeline have."""
    return [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, compat.PPMissingLayer)
    ]


def _place(name: str, module: nn.Module, packed: dict[str, list[str]]) -> Place | None:
    if isinstance(module, compat.MOE):
        raise UnsupportedError(f"{name}: experts ({type(module).__name__}) are not covered yet")
    if isinstance(module, compat.ParallelLMHead):
        return Place(name, module, "head", (_vocabulary(name, module),))
    if isinstance(module, compat.VocabParallelEmbedding):
        return Place(name, module, "embedding", (_vocabulary(name, module),))
    if isinstance(module, compat.LinearBase):
        return Place(name, module, "linear", tuple(_linear(name, module, packed)))
    if isinstance(module, compat.NORMS) and isinstance(
        getattr(module, "weight", None), nn.Parameter
    ):
        size = module.weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        return Place(name, module, "norm", (Part(name, ((0, size),), (0, 1)),))
    return None


def _vocabulary(name: str, module: nn.Module) -> Part:
    shard = module.shard_indices  # pyright: ignore
    rows = (shard.org_vocab_start_index, shard.org_vocab_end_index)  # pyright: ignore
    return Part(name, (rows,), (0, module.embedding_dim))  # pyright: ignore


def _linear(name: str, module: nn.Module, packed: dict[str, list[str]]) -> Iterator[Part]:
    parent, _, leaf = name.rpartition(".")
    names = [f"{parent}.{part}" if parent else part for part in packed.get(leaf, [leaf])]
    runs, columns = _runs(name, module)
    if len(names) == len(runs):
        for part, run in zip(names, runs, strict=True):
            yield Part(part, (run[1],), columns)
    elif len(names) == 1:  # one tensor in the checkpoint too
        start, rows = 0, []
        for full, (first, stop) in runs:
            rows.append((start + first, start + stop))
            start += full
        yield Part(names[0], tuple(_joined(rows)), columns)
    else:
        raise UnsupportedError(
            f"{name}: expected {len(runs)} tensors in the checkpoint, the model names {names}"
        )


def _joined(rows: Sequence[Range]) -> Iterator[Range]:
    """Runs that touch become one."""
    start, stop = rows[0]
    for first, last in rows[1:]:
        if first != stop:
            yield start, stop
            start = first
        stop = last
    yield start, stop


def _runs(name: str, module: nn.Module) -> tuple[list[tuple[int, Range]], Range]:
    """For each matrix of a linear: its rows in all, and those of this worker; and the columns."""
    rank, size = compat.tensor_parallel(module)
    mine: Callable[[int], Range] = lambda full: (rank * (full // size), (rank + 1) * (full // size))  # noqa: E731
    every = (0, module.input_size)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(module, compat.QKVParallelLinear):
        return [*_qkv(module, rank)], every  # pyright: ignore[reportReturnType]
    if isinstance(module, compat.MergedColumnParallelLinear):
        sizes: list[int] = module.output_sizes
        return [(full, mine(full)) for full in sizes], every  # pyright: ignore[reportReturnType]
    full: int = module.output_size  # pyright: ignore
    if isinstance(module, compat.RowParallelLinear):
        return [(full, (0, full))], mine(every[1])  # pyright: ignore
    if isinstance(module, compat.ColumnParallelLinear):
        return [(full, mine(full))], every  # pyright: ignore[reportReturnType]
    if isinstance(module, compat.ReplicatedLinear):
        return [(full, (0, full))], every  # pyright: ignore[reportReturnType]
    raise UnsupportedError(f"{name}: a linear layer of type {type(module).__name__} is not covered")


def _qkv(module: nn.Module, rank: int) -> Iterator[tuple[int, Range]]:
    heads = (
        (module.total_num_heads, module.num_heads, module.head_size, rank),
        *(
            (
                module.total_num_kv_heads,
                module.num_kv_heads,
                size,
                rank // module.num_kv_head_replicas,
            )  # pyright: ignore
            for size in (module.head_size, module.v_head_size)
        ),
    )
    for total, mine, size, which in heads:
        first = which * mine * size  # pyright: ignore
        yield total * size, (first, first + mine * size)  # pyright: ignore
