"""Which device of torch a name stands for."""

from __future__ import annotations

import torch

from deltacome.errors import DeviceError


def pick_device(device: str) -> str:
    """The device of a name, `cpu`, `cuda`, `cuda:1`…; `auto` is the GPU if there is one.

    Raises:
        DeviceError: torch knows none of this name, or has none of it here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # a number there and back: `meta` holds none
    except Exception as error:  # which one depends on what is missing
        raise DeviceError(
            f"device: expected auto, cpu or another that torch can use here, got {device!r}: "
            f"{error!s:.160}"
        ) from error
    return device
