"""Makes units side by side in several processes, where none needs what another makes.

Without calibration blocks are independent. Each process has its share of the threads, or a GPU of its
own. Each writes its units to disk itself, so that nothing large passes between processes and a run that
is cut off resumes as usual.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from deltacome.format.writer import Unit, save_unit

Make = Callable[[list[str], str], Unit]
"""Names of tensors, and a device → their unit."""

_worker: dict[str, Any] = {}
"""What a process was started with."""


def side_by_side(
    make: Make,
    todo: Mapping[str, list[str]],
    partial: Path,
    workers: int,
    device: str,
    on_unit: Callable[[str], None],
) -> None:
    """Makes and stores units.

    Args:
        make: picklable, and the same function of its arguments in every process.
        todo: names of tensors by the name of their unit.
        partial: the folder of the run, locked by this process.
        workers: processes.
        device: `cuda` stands for all GPUs in turn.
        on_unit: called here with the name of each unit that is stored.

    Raises:
        DeltaError: the first that a process raised; units that were stored stay.
    """
    context = multiprocessing.get_context("spawn")  # threads of this process do not survive a fork
    count = context.Value("i", 0)
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(todo))),
        mp_context=context,
        initializer=_start,
        initargs=(make, partial, threads, device, count),
    )
    try:
        futures = [pool.submit(_one, name, names) for name, names in todo.items()]
        for future in as_completed(futures):
            on_unit(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make: Make, partial: Path, threads: int, device: str, count: Any) -> None:
    torch.set_num_threads(threads)
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    _worker.update(make=make, partial=partial, device=device)


def _one(name: str, names: list[str]) -> str:
    save_unit(_worker["partial"], name, _worker["make"](names, _worker["device"]))
    return name
