"""What the API server can ask of a worker by name: methods that are added to vLLM's workers.

Reading an artifact takes a worker some tenths of a second for a 7B model: headers, fingerprints and, on a
GPU, the copy into pinned memory. It is done in a thread, while the engine goes on with its steps.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from deltacome.errors import UnsupportedError


def install() -> None:
    """Adds the methods to the class of all workers."""
    for function in (deltacome_prefetch, deltacome_fetched, deltacome_drop, deltacome_figures):
        setattr(WorkerBase, function.__name__, function)


def deltacome_prefetch(self: Any, id: int, path: str) -> None:
    """Starts reading an artifact."""
    _manager(self).prefetch(id, path)


def deltacome_fetched(self: Any, id: int) -> bool | str:
    """Whether an artifact has been read, or why it was refused."""
    return _manager(self).fetched(id)


def deltacome_drop(self: Any, id: int) -> None:
    """Frees an artifact's memory and its slot."""
    _manager(self).drop(id)


def deltacome_figures(self: Any) -> dict[str, int]:
    """What this worker holds."""
    return _manager(self).figures()


def _manager(worker: Any) -> Any:
    manager = getattr(worker.model_runner, "lora_manager", None)
    if manager is None:
        raise UnsupportedError("deltacome: the engine was started without --enable-lora")
    return manager
