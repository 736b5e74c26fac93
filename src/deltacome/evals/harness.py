"""EleutherAI's lm-evaluation-harness on base, tuned and deltas: the papers' own columns.

The harness gets the attached model through its own `HFLM`, so prompts, few-shot examples, stop words and
metrics are those that published figures were made with. Its data sets come from the Hub, or from a
folder of task files for those who work offline. `lm-eval` is an extra (`pip install deltacome[lm-eval]`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltacome.device import pick_device
from deltacome.errors import DeltaError
from deltacome.evals.divergence import readable
from deltacome.evals.models import check_base, load_model, tuned_by
from deltacome.evals.prompts import prompt_ids
from deltacome.evals.run import account, free_memory, names, shared_tokenizer
from deltacome.format.artifact import TUNED_CONFIG_FILE, Artifact, opened
from deltacome.rows import Row
from deltacome.skeleton import parse_config

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
        DeltaError: the harness is not installed, or does not know or refuses a task.
        MismatchError: a delta is of another base.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from deltacome.evals.hflm import quiet, wrapped
    except ImportError as error:
        raise DeltaError(
            f"lm-eval: needs the harness (pip install 'deltacome[lm-eval]'): {error}"
        ) from error
    evaluate: Any = simple_evaluate  # its decorators hide its parameters
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise DeltaError(f"lm-eval: expected tasks that the harness knows, got {unknown or 'none'}")
    dtype, device = str(dtype).removeprefix("torch."), pick_device(device)
    artifacts = [opened(delta) for delta in deltas]
    check_base(base, artifacts)
    tokenizer = shared_tokenizer(base, tuned, artifacts)
    if chat and not tokenizer.chat_template:
        raise DeltaError("lm-eval: --chat: expected a tokenizer with a chat template, got none")
    _check_tasks(manager, tasks, shots, run_code)

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # otherwise it forks even for so few resamples
    quiet()

    def figures(model: Any, positions: int | None = None) -> Figures:
        with contextlib.redirect_stdout(sys.stderr):  # it prints while it resamples
            try:
                found = evaluate(
                    model=wrapped(model, tokenizer, batch_size, positions),
                    tasks=list(tasks),
                    task_manager=manager,
                    num_fewshot=shots,
                    limit=limit,
                    apply_chat_template=chat,
                    confirm_run_unsafe_code=run_code,
                    bootstrap_iters=RESAMPLES,
                    log_samples=False,
                )
            # A data set or metric that neither cache nor Hub has, or settings that do not fit a task.
            except (OSError, ImportError, ValueError, AssertionError) as error:
                raise DeltaError(f"lm-eval: {', '.join(tasks)}: {error}") from error
        return {task: _numbers(values) for task, values in found["results"].items()}

    models = []
    if tuned is not None:
        model = load_model(tuned, device, dtype)
        models.append({"name": "tuned", "results": figures(model)})
        del model
        free_memory()
    model = load_model(base, device, dtype)
    if chat and not readable(model, [Row(prompt_ids(tokenizer, "question"))]):
        lacks = f"lm-eval: {base} is left out: it lacks tokens that the chat template uses"
        warnings.warn(lacks, stacklevel=2)
    else:
        models.insert(0, {"name": "base", "results": figures(model)})
    for name, artifact in zip(names(deltas), artifacts, strict=True):
        with tuned_by(artifact, base, model) as running:
            found = figures(running, _positions(artifact))
            models.append({"name": name, **account(artifact), "results": found})
    how = {"shots": shots, "limit": limit, "chat": chat, "dtype": dtype}
    return {"tasks": list(tasks), **how, "models": models}


def _check_tasks(manager: Any, tasks: Sequence[str], shots: int | None, run_code: bool) -> None:
    """Refuses, before a model is loaded, what the harness would ignore, or refuse after hours.

    Raises:
        DeltaError: a task cannot be loaded, takes no examples, or runs code and may not.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            loaded = manager.load(list(tasks))["tasks"]
    except (OSError, ImportError, ValueError) as error:
        raise DeltaError(f"lm-eval: {', '.join(tasks)}: {error}") from error
    for name, task in loaded.items():
        if shots and task.get_config("num_fewshot") == 0:
            raise DeltaError(f"lm-eval: {name}: expected no --shots, as it takes none, got {shots}")
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise DeltaError(f"lm-eval: {name}: expected --run-code: it runs what a model writes")


def _positions(artifact: Artifact) -> int | None:
    """How long a prompt of the tuned model can be; None: as long as the base's."""
    config = artifact.json_file(TUNED_CONFIG_FILE)
    if config is None:
        return None
    text = parse_config(config).get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The entries that are numbers: `exact_match,strict-match` and the like."""
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
