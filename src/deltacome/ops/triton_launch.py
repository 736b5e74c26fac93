"""What the Triton implementations share: on what they run, and which configuration of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from triton import knobs

from deltacome.errors import UnsupportedError
from deltacome.ops.impls import OLDEST_GPU

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REPEATS = 5
"""Timings of a configuration, of which the least counts."""

C = TypeVar("C")
_fastest: dict[Hashable, object] = {}


def check_gpu(op: str, *tensors: Tensor) -> None:
    """Refuses tensors that the kernels do not cover.

    Raises:
        UnsupportedError: names the device or the dtype.
    """
    device = tensors[0].device
    if not knobs.runtime.interpret:
        if device.type != "cuda":
            raise UnsupportedError(
                f"{op}: impl='triton' expects a CUDA device (or TRITON_INTERPRET=1), got {device}"
            )
        if torch.cuda.get_device_capability(device) < OLDEST_GPU:
            raise UnsupportedError(
                f"{op}: impl='triton' expects compute capability 8.0 or newer, got "
                f"{torch.cuda.get_device_capability(device)}"
            )
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{op}: impl='triton' expects dtypes of {DTYPES}, got {tensor.dtype}"
            )


def bucket(programs: int) -> int:
    """The power of two that is not below: launches of about this many programs share a choice."""
    return 1 << max(0, programs - 1).bit_length()


def tuned(
    key: Hashable,
    configs: Sequence[C],
    run: Callable[[C], None],
    *,
    restore: Tensor | None = None,
) -> None:
    """Runs a kernel in the fastest of a few configurations, timed when a key is first seen.

    Keys have the number of programs rounded up by `bucket`, so that there are few: a batch of a new
    size rarely has to be timed. Choices live as long as the process. What takes long is compiling,
    which Triton keeps on disk; timing two configurations takes less than reading a file.

    Nothing is timed in the interpreter, nor while a CUDA graph is captured, when the device must not be
    waited for: then the first configuration runs, and the next call outside of a capture decides.
    (`triton.autotune` times within captures too.)

    Args:
        key: what the choice depends on.
        configs: the configurations.
        run: launches the kernel.
        restore: what the kernel changes in place; it is changed once, however often the kernel is timed.
    """
    config = _fastest.get(key)
    if config is None:
        silent = knobs.runtime.interpret or torch.cuda.is_current_stream_capturing()
        if silent or len(configs) == 1:
            run(configs[0])
            return
        copy = None if restore is None else restore.clone()
        times = [_time(config, run) for config in configs]
        _fastest[key] = config = configs[times.index(min(times))]
        if restore is not None and copy is not None:
            restore.copy_(copy)
    run(config)  # pyright: ignore[reportArgumentType]


def _time(config: C, run: Callable[[C], None]) -> float:
    """Milliseconds."""
    run(config)  # compiles
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(config)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)
