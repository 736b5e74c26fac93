"""Tensors in safetensors files: their types, their sizes, and what a header says about them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Dtypes by the names they have in headers of safetensors files."""
DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}
"""The same dtypes by torch's names, which manifests use."""


def entry_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of one safetensors entry."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def open_shard(file: Path) -> safe_open:
    """Opens a safetensors file without mapping it into memory.

    Reading a mapped file that has been truncated kills the process, and bytes already checked would
    change with the file.
    """
    return safe_open(file, framework="pt", backend="pread")


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The entries of a safetensors file: key → (torch's name of the type, shape).

    The name is `unknown` where torch has none.

    Raises:
        SafetensorError, OSError: the file is incomplete, or cannot be read.
    """
    entries = {}
    with open_shard(file) as shard:
        for key in shard.keys():  # noqa: SIM118
            view = shard.get_slice(key)
            dtype = SAFETENSORS_DTYPES.get(view.get_dtype() or "")
            name = "unknown" if dtype is None else dtype_name(dtype)
            entries[key] = name, tuple(view.get_shape())
    return entries
