"""The entry point `vllm.general_plugins`, which every process of the engine calls once.

What is rebound: the class of the worker's adapter manager (in the one place where vLLM names it), what
the API server does with adapters' names (`frontend`), and a few methods more (`mends`, `prompts`,
`worker`). Exceptions of this function stop the engine, while those of an import are only logged, so vLLM
is imported only inside the function.
"""

from __future__ import annotations

import logging

from deltacome.errors import UnsupportedError

logger = logging.getLogger("vllm.deltacome")  # only loggers below `vllm` have a handler


def register() -> None:
    """Hooks the plugin into this process.

    A vLLM that the hooks were not written for is left alone: its log says so, and it runs without them,
    since every vLLM of this Python calls this, whatever it serves. It then has no tenants: an artifact's
    folder has no `adapter_config.json`, so it is refused as an adapter.
    """
    from deltacome.vllm.version import check_version

    try:
        check_version()
        from deltacome.vllm import compat

        compat.check()
    except UnsupportedError as error:
        logger.error("deltacome is not hooked in, so no tenants can be served: %s", error)
        return
    from deltacome.vllm import frontend, mends, prompts, worker
    from deltacome.vllm.manager import WorkerManager

    compat.lora_model_runner_mixin.LRUCacheWorkerLoRAManager = WorkerManager  # pyright: ignore
    mends.install()
    prompts.install()
    worker.install()
    frontend.install()
