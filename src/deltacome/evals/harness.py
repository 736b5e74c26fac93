"""EleutherAI's lm-evaluation-harness on base, tuned and deltas: the papers' own columns.

The harness gets the attached model through its own `HFLM`, so prompts, few-shot examples, stop words and
metrics are those that published figures were made with. Its data sets come from the Hub, or from a
folder of task files for those who work offline. `lm-eval` is an extra (`pip install deltacome[lm-eval]`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltacome.device import pick_device
from deltacome.errors import DeltaError
from deltacome.evals.models import load_model, tuned_by
from deltacome.evals.run import account, free_memory, names, shared_tokenizer
from deltacome.format.artifact import opened

Figures = dict[str, dict[str, float]]
"""Task → `metric,filter` → value, and `metric_stderr,filter` → its standard error where the harness
knows one. Empty for a group of tasks without a figure of its own."""
RESAMPLES = 100
"""Bootstrap resamples for standard errors without a closed form (perplexity, F1, BLEU), good to 7 %.
With zero the harness omits all other standard errors too."""


def run_harness(
    base: str | Path,
    tasks: Sequence[str],
    *,
    tuned: str | Path | None = None,
    deltas: Sequence[str | Path] = (),
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    run_code: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int = 16,
) -> dict[str, Any]:
    """Runs tasks of the harness on each model.

    Args:
        base, tuned, deltas: as in `run.evaluate`; all models get the prompts of one tokenizer.
        tasks: names that the harness knows.
        folder: further task files (YAML).
        shots: few-shot examples; None uses each task's own number.
        limit: only the first examples of each task.
        chat: put prompts through the chat template.
        run_code: let tasks such as HumanEval execute what the model writes, on this machine.
        dtype: a torch dtype or its name; "auto" is that of the checkpoints, as in published figures.

    Returns:
        `{"tasks": …, "shots", "limit", "chat", "dtype", "models": [{"name": …, "results": Figures}]}`;
        deltas also have the entries of `run.account`.

    Raises:
        DeltaError: the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DeltaError(
            f"lm-eval: needs the harness (pip install 'deltacome[lm-eval]'): {error}"
        ) from error
    # The harness's decorators hide the parameters of these two.
    evaluate: Any = simple_evaluate
    wrap: Any = HFLM
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise DeltaError(f"lm-eval: expected tasks that the harness knows, got {unknown or 'none'}")
    dtype, device = str(dtype).removeprefix("torch."), pick_device(device)
    artifacts = [opened(delta) for delta in deltas]
    tokenizer = shared_tokenizer(base, tuned, artifacts)

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise it forks even for so few resamples
    # It warns about being handed a loaded model, which is intended.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def figures(model: Any) -> Figures:
        with contextlib.redirect_stdout(sys.stderr):  # it prints while it resamples
            try:
                found = evaluate(
                    model=_quiet(
                        wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                    ),
                    tasks=list(tasks),
                    task_manager=manager,
                    num_fewshot=shots,
                    limit=limit,
                    apply_chat_template=chat,
                    confirm_run_unsafe_code=run_code,
                    bootstrap_iters=RESAMPLES,
                    log_samples=False,
                )
            except OSError as error:  # a data set or metric that neither cache nor Hub has
                raise DeltaError(f"lm-eval: {', '.join(tasks)}: {error}") from error
        return {task: _numbers(values) for task, values in found["results"].items()}

    models = []
    if tuned is not None:
        model = load_model(tuned, device, dtype)
        models.append({"name": "tuned", "results": figures(model)})
        del model
        free_memory()
    model = load_model(base, device, dtype)
    models.insert(0, {"name": "base", "results": figures(model)})
    for name, artifact in zip(names(deltas), artifacts, strict=True):
        with tuned_by(artifact, base, model) as running:
            models.append({"name": name, **account(artifact), "results": figures(running)})
    how = {"shots": shots, "limit": limit, "chat": chat, "dtype": dtype}
    return {"tasks": list(tasks), **how, "models": models}


def _quiet(model: Any) -> Any:
    """Disable progress bars unless stderr is a terminal."""
    if not sys.stderr.isatty():
        for name in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
            setattr(model, name, functools.partial(getattr(model, name), disable_tqdm=True))
    return model


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The entries that are numbers: `exact_match,strict-match` and the like."""
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
