"""The entry point `vllm.general_plugins`, which every process of the engine calls once.

What is rebound: the class of the worker's adapter manager (the one place where vLLM names it), and
what the API server does with adapters' names (`frontend`). Exceptions of this function stop the
engine, while those of an import are only logged: so all imports of vLLM happen inside of it.
"""

from __future__ import annotations


def register() -> None:
    """Hooks the plugin into this process.

    Raises:
        UnsupportedError: a vLLM that the hooks were not written for.
    """
    from deltacome.vllm.version import check_version

    check_version()
    from deltacome.vllm import compat

    compat.check()
    from deltacome.vllm import frontend, mends, prompts, worker
    from deltacome.vllm.manager import WorkerManager

    compat.lora_model_runner_mixin.LRUCacheWorkerLoRAManager = WorkerManager  # pyright: ignore
    mends.install()
    prompts.install()
    worker.install()
    frontend.install()
