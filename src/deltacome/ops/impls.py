"""The implementations that an op can have, which of them run here, and what all ops refuse.

The caller names an implementation. An unknown or missing one is an error, never a fallback to another:
whoever asks for a fast one must not time, or trust, the slow one. `fastest` is for callers who leave the
choice to us, and they can print what it chose.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.ops import native

IMPLS = ("reference", "cpu", "triton")
OLDEST_GPU = (8, 0)
"""Compute capability of Ampere, whose tensor cores the kernels use."""


def fastest(device: torch.device) -> str:
    """The best implementation for tensors on a device."""
    if device.type == "cpu" and native.missing() is None:
        return "cpu"
    if importlib.util.find_spec("triton") is not None and runs_kernels(device):
        return "triton"
    return "reference"


def runs_kernels(device: torch.device) -> bool:
    """Whether a device is a GPU that the Triton kernels are for: NVIDIA's, Ampere or newer.

    torch calls AMD's GPUs `cuda` too. They lack an option that the kernels are compiled with, a limit on
    registers.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU


def check_impl(op: str, impl: str) -> None:
    """Raises UnsupportedError unless there is such an implementation, and it can run here."""
    if impl not in IMPLS:
        raise UnsupportedError(f"{op}: expected an implementation of {IMPLS}, got {impl!r}")
    if impl == "cpu" and (missing := native.missing()):
        raise missing
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        raise UnsupportedError(f"{op}: impl 'triton' needs the package triton")


def check_floats(op: str, **tensors: Tensor) -> None:
    """Raises MismatchError unless all are matrices of float dtypes with the same number of rows."""
    rows = None
    for name, tensor in tensors.items():
        rows = tensor.shape[0] if rows is None and tensor.dim() else rows
        if tensor.dim() != 2 or tensor.shape[0] != rows:
            got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise MismatchError(f"{op}: expected matrices of equally many rows, got {got}")
        if not tensor.is_floating_point():
            raise MismatchError(f"{op}: expected {name} of a float dtype, got {tensor.dtype}")


def check_devices(op: str, *tensors: Tensor) -> None:
    """Raises MismatchError unless all lie on one device."""
    first = tensors[0].device
    for tensor in tensors:
        if tensor.device != first:
            devices = sorted({str(tensor.device) for tensor in tensors})
            raise MismatchError(f"{op}: expected one device, got {devices}")


def check_ids(op: str, y: Tensor, ids: Tensor, slot: Tensor, *tables: Tensor) -> None:
    """Raises MismatchError unless there is an id and a slot for each row, all on one device."""
    check_floats(op, y=y)
    check_devices(op, y, ids, slot, *tables)
    if not slot.shape == ids.shape == y.shape[:1]:
        raise MismatchError(
            f"{op}: expected {len(y)} slots and ids, got {tuple(slot.shape)} and {tuple(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise MismatchError(f"{op}: expected ids of int64 or int32, got {ids.dtype}")


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which products keep their operands' dtype, even where autocast is on around the op."""
    return torch.autocast(tensor.device.type, enabled=False)


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises UnsupportedError for a tensor that asks for a gradient.

    An op that writes in place and has no derivative would silently drop the delta's part from it.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UnsupportedError(
            "packed deltas are for inference: expected tensors without gradients, got one that "
            "requires a gradient; run under torch.no_grad()"
        )
