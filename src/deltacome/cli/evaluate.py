"""`deltacome eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deltacome.cli.options import Device, Json, parse_json
from deltacome.cli.printing import quiet_libraries


def evaluate(
    base: Annotated[str, typer.Argument(help="Base checkpoint.")],
    task: Annotated[
        str | None, typer.Option(help="A reasoning-gym data set, or FILE.jsonl.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead, e.g. gsm8k,humaneval."),
    ] = None,
    tuned: Annotated[str | None, typer.Option(help="The dense fine-tune, for KL.")] = None,
    delta: Annotated[list[str] | None, typer.Option(help="Artifact; may be repeated.")] = None,
    task_args: Annotated[
        str | None, typer.Option(help="--task: arguments of the data set, JSON.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="--task: questions. Default: 200.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="--task: of the questions; n apart for others of reasoning-gym. Default: 0."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="--task: general text for KL, which needs --tuned.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="--task: of an answer, at most. Default: 64.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 saves memory, but its own noise hides a good delta's KL.")
    ] = "float32",
    shots: Annotated[int | None, typer.Option(min=0, help="--lm-eval: few-shot examples.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--lm-eval: examples a task.")] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="--lm-eval: a folder with task files of your own."
        ),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="--lm-eval: prompts through the template.")
    ] = None,
    run_code: Annotated[
        bool | None,
        typer.Option("--run-code", help="--lm-eval: execute what the model writes, here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score base, tuned and deltas on held-out questions; compare each with the tuned model."""
    if (task is None) == (lm_eval is None):
        raise typer.BadParameter("give one of --task and --lm-eval", param_hint="--task")
    if lm_eval is not None:
        of_task = {"n": n, "seed": seed, "text": text, "max_new_tokens": max_new_tokens}
        _refuse("--lm-eval", **of_task, task_args=task_args)
        quiet_libraries()
        from deltacome.evals.harness import run_harness
        from deltacome.evals.report import harness_table

        found = run_harness(
            base,
            [name for name in lm_eval.split(",") if name],
            tuned=tuned,
            deltas=delta or [],
            folder=tasks_folder,
            shots=shots,
            limit=limit,
            chat=bool(chat),
            run_code=bool(run_code),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        if as_json:
            print(json.dumps(found))
        else:
            Console(width=None if sys.stdout.isatty() else 120).print(harness_table(found))
        return
    assert task is not None
    of_harness = {"shots": shots, "limit": limit, "chat": chat, "run_code": run_code}
    _refuse("--task", **of_harness, tasks_folder=tasks_folder)
    given = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens}
    args = None if task_args is None else parse_json(task_args, "--task-args")
    quiet_libraries()
    from deltacome.evals.report import table
    from deltacome.evals.run import evaluate

    result = evaluate(
        base,
        tuned=tuned,
        deltas=delta or [],
        task=task,
        task_args=args,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        text=text,
        **{key: value for key, value in given.items() if value is not None},
    )
    if as_json:
        print(json.dumps(result))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(result))


def _refuse(mode: str, **options: Any) -> None:
    """Options that only the other kind of task looks at."""
    for key, value in options.items():
        if value is not None:
            hint = f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}"
            raise typer.BadParameter(f"{mode} has no such option", param_hint=hint)
