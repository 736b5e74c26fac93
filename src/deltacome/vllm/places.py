"""Where in vLLM's model the tensors of a checkpoint live: fused, renamed and sharded.

vLLM multiplies q, k and v at once, and gate and up; a worker has only some rows or columns of each; names
are those of vLLM's own classes. A place is one module of this worker, and says for each of the
checkpoint's tensors in it which rows and columns it has. What a model's loader does by hand is not
guessed at: a tensor that no place names is reported, and a tenant that changes it is refused.

Modules that encode images and sound have no place: their rows are not the tokens of a step, and their
outputs are kept for all adapters alike. Nor do modules that a pooler calls, such as a classifier's head:
their rows are requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltacome.errors import UnsupportedError
from deltacome.format.spec import BLOCK
from deltacome.vllm import compat
from deltacome.vllm.shard import Range, common_group


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint within a module, or this worker's shard of it."""

    name: str
    """In vLLM's naming, without `.weight` or `.bias`."""
    rows: tuple[Range, ...]
    columns: Range
    before: int = 0
    """How many of the rows come before the module's own; others may come after them."""

    @property
    def size(self) -> int:
        """Number of rows in this worker's shard."""
        return sum(stop - start for start, stop in self.rows)


@dataclass
class Place:
    """A module of this worker's model, and what it contains of the checkpoint."""

    name: str
    module: nn.Module
    kind: str
    """`linear`, `embedding` (which may be the head too), `head` or `norm`."""
    parts: tuple[Part, ...]
    tied: bool = False
    """Whether it is a head that uses the embedding's weight."""

    def group(self, group_size: int) -> int:
        """Entries that share a scale in this worker's shards of its tensors."""
        return common_group(group_size, [r for p in self.parts for r in (p.rows, (p.columns,))])


def find_places(model: nn.Module) -> list[Place]:
    """All modules of a model that a delta can reach.

    Raises:
        UnsupportedError: a module computes with a matrix in a way that is not covered (experts), or a
            model of images or sound does not say what encodes them.
    """
    packed = compat.packed_modules(model)
    encoders = encoder_prefixes(model)
    embeddings: list[Place] = []
    places = []
    seen = pooled_modules(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen or f"{name}.".startswith(encoders):
            continue
        place = _place(name, module, packed)
        if place is not None:
            seen.add(id(module))
            places.append(place)
            if place.kind == "embedding":
                embeddings.append(place)
    for place in places:
        if place.kind == "head" and compat.ties_head(model.config):
            place.parts, place.tied = _tied_to(place, embeddings).parts, True
    return places


def _tied_to(head: Place, embeddings: Sequence[Place]) -> Place:
    """The embedding whose weight a head uses; the head itself where this worker has no embedding."""
    if len(embeddings) < 2:
        return (*embeddings, head)[0]
    for one in embeddings:  # in Gemma's E models the layers have one too
        if one.module.weight is head.module.weight:
            return one
    names = ", ".join(one.name for one in embeddings)
    raise UnsupportedError(f"{head.name}: expected the weight of {names}, got one of its own")


def pooled_modules(model: nn.Module) -> set[int]:
    """Ids of the modules that poolers call, which get a row for each request, not for each token."""
    poolers = (module for module in model.modules() if isinstance(module, compat.Pooler))
    return {id(module) for pooler in poolers for module in pooler.modules()}


def encoder_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of what encodes images and sound, towers and connectors; none for a text-only model.

    Raises:
        UnsupportedError: the model takes more than text and names no such modules.
    """
    if not getattr(model, "supports_multimodal", False):
        return ()
    prefixes = compat.encoders(model)
    if not prefixes:
        raise UnsupportedError(
            f"{type(model).__name__}: takes more than text, and names no tower that encodes it: not "
            "covered yet"
        )
    return prefixes


def missing_prefixes(model: nn.Module) -> list[str]:
    """Name prefixes of the modules that other workers of the pipeline have."""
    return [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, compat.PPMissingLayer)
    ]


def _place(name: str, module: nn.Module, packed: dict[str, list[str]]) -> Place | None:
    for kind, words in compat.BYPASSING.items():
        if isinstance(module, kind):
            raise UnsupportedError(f"{name}: {type(module).__name__}: {words}: not covered yet")
    if isinstance(module, compat.ParallelLMHead):
        return Place(name, module, "head", (_vocabulary(name, module),))
    if isinstance(module, compat.VocabParallelEmbedding):
        return Place(name, module, "embedding", (_vocabulary(name, module),))
    if isinstance(module, compat.LinearBase):
        return Place(name, module, "linear", tuple(_linear(name, module, packed)))
    weight = getattr(module, "weight", None)
    if isinstance(module, compat.NORMS) and isinstance(weight, nn.Parameter):
        return Place(name, module, "norm", (Part(name, ((0, len(weight)),), (0, 1)),))
    return None


def _vocabulary(name: str, module: Any) -> Part:
    """A worker's rows, and those around them, to whole blocks of codes.

    vLLM pads the vocabulary to whole blocks, but not each worker's part of it.
    """
    shard = module.shard_indices
    start, stop = shard.org_vocab_start_index, shard.org_vocab_end_index
    before = start % BLOCK
    around = (start - before, min(-(-stop // BLOCK) * BLOCK, module.org_vocab_size))
    return Part(name, (around,), (0, module.embedding_dim), before)


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
    """Merges runs that touch."""
    start, stop = rows[0]
    for first, last in rows[1:]:
        if first != stop:
            yield start, stop
            start = first
        stop = last
    yield start, stop


def _runs(name: str, module: Any) -> tuple[list[tuple[int, Range]], Range]:
    """For each matrix of a linear, its number of rows and this worker's range; and the columns."""
    rank, size = compat.tensor_parallel(module)

    def mine(full: int) -> Range:
        return rank * (full // size), (rank + 1) * (full // size)

    every: Range = (0, module.input_size)
    if isinstance(module, compat.QKVParallelLinear):
        return [*_qkv(module, rank)], every
    if isinstance(module, compat.MergedColumnParallelLinear):
        return [(full, mine(full)) for full in module.output_sizes], every
    full: int = module.output_size
    if isinstance(module, compat.RowParallelLinear):
        return [(full, (0, full))], mine(module.input_size)
    if isinstance(module, compat.ColumnParallelLinear):
        return [(full, mine(full))], every
    if isinstance(module, compat.ReplicatedLinear):
        return [(full, (0, full))], every
    raise UnsupportedError(f"{name}: a linear layer of type {type(module).__name__} is not covered")


def _qkv(module: Any, rank: int) -> Iterator[tuple[int, Range]]:
    queries = (module.total_num_heads, module.num_heads, rank)
    # Workers outnumbering the heads of k and v hold copies of them.
    pairs = (module.total_num_kv_heads, module.num_kv_heads, rank // module.num_kv_head_replicas)
    sizes = (module.head_size, module.head_size, module.v_head_size)
    for (total, mine, which), size in zip((queries, pairs, pairs), sizes, strict=True):
        first = which * mine * size
        yield total * size, (first, first + mine * size)
