"""How many tenants fit on a device beside their base and a KV cache.

A tenant takes a slot for its packed terms, the tables that say where they lie, and what is stored
exactly, in float32. `allocate` really takes the memory and measures it, since arithmetic about memory is
worth little until something has been allocated.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from deltacome.errors import MismatchError, PlanError
from deltacome.format.artifact import Artifact, opened
from deltacome.format.manifest import Record
from deltacome.format.spec import aligned
from deltacome.ops.slots import FIELDS, SIGN_FIELDS, Pool
from deltacome.outline import outline
from deltacome.skeleton import read_config


@dataclass(frozen=True)
class Capacity:
    """What fits; all in bytes except the counts."""

    device: int
    usable: int
    """The device's bytes less the share that is kept free."""
    base: int
    kv_cache: int
    slot: int
    """Packed terms of the largest tenant."""
    beside: int
    """Tables and exact values of the largest tenant."""
    tenants: int
    whole_models: int
    """Full fine-tunes that would fit instead, each with weights of its own."""


def capacity(
    base: str | Path,
    deltas: Sequence[Artifact | str | Path],
    *,
    device_bytes: int,
    ratio: float | None = None,
    utilization: float = 0.9,
    kv_bytes: int = 0,
    kv_tokens: int = 0,
) -> Capacity:
    """Counts the tenants that fit, each as large as the largest of some artifacts.

    Args:
        base: its folder, or a repository on the Hub, whose configuration is enough.
        deltas: artifacts; none if a ratio is given.
        ratio: stands for an artifact not yet made, of a fine-tune of the base's size.
        device_bytes: memory of the device.
        utilization: share of it that may be used; the rest is for activations and fragmentation.
        kv_bytes: size of the KV cache, bytes.
        kv_tokens: its size as tokens at 16 bits; added to `kv_bytes`.

    Raises:
        MismatchError: neither artifact nor ratio, or both, or an artifact of another base's shapes.
        PlanError: base and cache alone do not fit; or `utilization` is not above 0 and at most
            1, or `ratio` not above 0 and finite.
    """
    if not 0 < utilization <= 1:
        raise PlanError(f"utilization: expected a share above 0, at most 1, got {utilization}")
    if bool(deltas) == (ratio is not None):
        raise MismatchError(
            f"capacity: expected either artifacts or a ratio, got {len(deltas)} artifacts, ratio {ratio}"
        )
    shapes = outline(base)
    weights = sum(info.nbytes for info in shapes.tensors.values())
    artifacts = list(map(opened, deltas))
    for artifact in artifacts:
        for record in artifact.manifest.records.values():
            there = shapes.tensors.get(record.base_name or "")
            if there is not None and there.shape != record.base_shape:
                raise MismatchError(
                    f"{artifact.path}: {record.name}: expected a base of shape {record.base_shape}, "
                    f"got {there.shape}"
                )
    if ratio is not None:
        if not 0 < ratio < math.inf:
            raise PlanError(f"ratio: expected a finite number above 0, got {ratio}")
        entries = sum(math.prod(info.shape) for info in shapes.tensors.values())
        slot, beside = aligned(math.ceil(2 * entries / ratio)), 0
    else:
        slot, beside = max(map(slot_nbytes, artifacts)), max(map(beside_nbytes, artifacts))
        if not slot + beside:
            raise PlanError(f"{artifacts[0].path}: holds nothing, so any number of tenants fits")
    cache = kv_bytes + kv_tokens * kv_token_nbytes(read_config(shapes.path))
    usable = int(device_bytes * utilization)
    left = usable - weights - cache
    if left < 0:
        raise PlanError(
            f"{base}: {weights:,} bytes and a KV cache of {cache:,} do not fit into {usable:,} usable"
        )
    return Capacity(
        device_bytes,
        usable,
        weights,
        cache,
        slot,
        beside,
        left // (slot + beside),
        (usable - cache) // weights,
    )


def slot_nbytes(artifact: Artifact) -> int:
    """Bytes of an artifact's packed terms, as a slot holds them."""
    group = artifact.manifest.group_size
    records = artifact.manifest.records.values()
    return sum(sum(record.packed_nbytes(group).values()) for record in records)


def beside_nbytes(artifact: Artifact) -> int:
    """Bytes that an artifact takes beside its slot: table fields and exact values in float32."""
    return sum(map(_beside, artifact.manifest.records.values()))


def _beside(record: Record) -> int:
    exact = 4 * math.prod(record.exact_shape) if record.exact_rows else 0
    fields = len(record.plan) * FIELDS + (SIGN_FIELDS if record.sign_scales else 0)
    return exact + 8 * fields


def kv_token_nbytes(config: Any) -> int:
    """Bytes of the keys and values of one token in all layers, at 16 bits.

    Raises:
        PlanError: the configuration does not state the sizes.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    layers, hidden = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not heads or not layers or not hidden:
        raise PlanError(
            f"{config.model_type}: expected layers, heads and hidden size for a KV cache"
        )
    size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    return 2 * layers * heads * size * 2


@contextmanager
def allocate(found: Capacity, device: str = "cpu") -> Iterator[int]:
    """Takes the memory of base, cache and all tenants, and yields the bytes that the device lost by it.

    Raises:
        PlanError: there is not that much memory.
    """
    before = _used(device)
    try:
        held: list[Any] = [
            torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)  # so that pages exist
            for nbytes in (found.base, found.kv_cache, found.beside * found.tenants)
        ]
        if found.tenants:
            held.append(Pool(found.tenants, found.slot, device=device))
            held[-1].blobs_SN.fill_(1)
    except (MemoryError, RuntimeError) as error:
        raise PlanError(f"{device}: the memory of {found.tenants} tenants: {error}") from error
    try:
        yield _used(device) - before
    finally:
        held.clear()


def _used(device: str) -> int:
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    # glibc keeps freed memory and hands it out again: memory taken from there would not be counted.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return psutil.Process().memory_info().rss
