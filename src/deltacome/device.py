"""Torch's devices and dtypes by name."""

from __future__ import annotations

import torch

from deltacome.errors import DeltaError, DeviceError


def pick_device(device: str | torch.device, *, doubles: bool = False) -> str:
    """The device of a name, `cpu`, `cuda`, `cuda:1`…; `auto` is the GPU if there is one.

    Args:
        device: the name, or a `torch.device`.
        doubles: whether it must hold float64, which not every GPU does (Apple's do not).

    Raises:
        DeviceError: torch does not know the name, has no such device here, or it lacks the dtype.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = torch.float64 if doubles else torch.float32
    try:
        torch.zeros(1, dtype=number, device=device).item()  # read back: `meta` holds no values
    except Exception as error:  # which one depends on what is missing
        raise DeviceError(
            f"device: expected auto, cpu or another that torch can use here, with {number}, got "
            f"{str(device)!r}: {error!s:.160}"
        ) from error
    return str(device)


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name, `float32`, `bfloat16`…; a `torch.dtype` is returned as it is.

    Raises:
        DeltaError: torch has no dtype of this name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise DeltaError(f"dtype: expected the name of a torch dtype, got {dtype!r}")
    return found
