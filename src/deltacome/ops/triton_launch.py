"""What the Triton implementations share: what they run on, and a kernel's choice of configuration."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from triton import knobs

from deltacome.errors import UnsupportedError
from deltacome.ops.impls import runs_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REPEATS = 5
"""Timings of a configuration, of which the shortest counts."""
BUSY = 1_000_000
"""Cycles of the device before a timing: half a millisecond."""

C = TypeVar("C")
Tensors = tuple[Tensor, ...]
_fastest: dict[Hashable, object] = {}


def check_gpu(op: str, *tensors: Tensor) -> None:
    """Refuses tensors that the kernels do not cover.

    Raises:
        UnsupportedError: names the device or the dtype.
    """
    device = tensors[0].device
    if not knobs.runtime.interpret and not runs_kernels(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise UnsupportedError(
            f"{op}: impl='triton' expects an NVIDIA GPU of compute capability 8.0 or newer (or "
            f"TRITON_INTERPRET=1), got {name}"
        )
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{op}: impl='triton' expects dtypes of {DTYPES}, got {tensor.dtype}"
            )


def bucket(programs: int) -> int:
    """The smallest power of two not below: launches of about this many programs share a choice."""
    return 1 << max(0, programs - 1).bit_length()


def tuned(
    key: Hashable,
    configs: Sequence[C],
    run: Callable[[C, Tensors], None],
    tensors: Tensors,
    made_up: Callable[[], Tensors],
) -> None:
    """Runs a kernel in the fastest of a few configurations, timed when a key is first seen.

    It is timed on made-up tensors and not on the caller's: an engine first calls a layer to warm up and
    to capture graphs, before there is a tenant. Kernels then have nothing to do, their times are noise,
    and the graphs would keep what was chosen.

    Keys have the number of programs rounded up by `bucket`, so that there are few keys, and a batch of
    a new size rarely has to be timed. Choices live as long as the process. Compiling is what takes long,
    and Triton caches it on disk; timing two configurations takes less than reading a file.

    Nothing is timed in the interpreter, nor while a CUDA graph is captured, when the device must not be
    waited for: then the first configuration runs, and the next call outside of a capture decides.
    (`triton.autotune` times within captures too.)

    Args:
        key: what the choice depends on.
        configs: the configurations.
        run: launches the kernel on such tensors.
        tensors: the caller's.
        made_up: makes stand-ins for as many programs, each with as much to do as there can be.
    """
    config = _fastest.get(key)
    if config is None:
        silent = knobs.runtime.interpret or torch.cuda.is_current_stream_capturing()
        if silent or len(configs) == 1:
            run(configs[0], tensors)
            return
        trial = made_up()
        times = [_time(lambda config=config: run(config, trial)) for config in configs]
        _fastest[key] = config = configs[times.index(min(times))]
    run(config, tensors)  # pyright: ignore[reportArgumentType]


def full_batch(tokens: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Order and tiles, as `Rows` has them, of a batch that uses all of its tiles, for the first slot.

    Args:
        tokens: rows of the batch, at least as many as tiles.
        tiles: tiles that it is shared out among.
        device: where to put them.
    """
    bound = torch.arange(tiles + 1, device=device) * tokens // tiles
    fields_M = (torch.zeros_like(bound[1:]), bound[:-1], bound.diff())
    return torch.arange(tokens, dtype=torch.int32, device=device), torch.stack(fields_M, 1).int()


def _time(call: Callable[[], None]) -> float:
    """Milliseconds that a call takes on the device."""
    call()  # compiles
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # A launch takes longer than a small kernel: the device is kept busy until all are queued.
        torch.cuda._sleep(BUSY)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)
