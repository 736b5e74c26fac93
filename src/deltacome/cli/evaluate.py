"""`deltacome eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltacome.cli.options import Base, Device, Json, parse_json
from deltacome.cli.printing import quiet_libraries, show


def evaluate(
    base: Base,
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
        str | None, typer.Option(help="With --task: arguments of the data set, as JSON.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="With --task: number of questions. Default: 200."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="With --task: seed of the questions. reasoning-gym's seeds must be n apart "
            "to share none. Default: 0."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="With --task: file of general text for KL; needs --tuned. Default: Python's manual."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --task: longest answer, in tokens. Default: 64.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 saves memory, but its own noise hides a good delta's KL.")
    ] = "float32",
    shots: Annotated[
        int | None, typer.Option(min=0, help="With --lm-eval: few-shot examples.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --lm-eval: examples per task.")
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="With --lm-eval: folder of your own task files."
        ),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="With --lm-eval: use the chat template.")
    ] = None,
    run_code: Annotated[
        bool | None,
        typer.Option(
            "--run-code",
            help="With --lm-eval: run code that the model writes, on this machine.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score base, tuned and deltas on held-out questions; compare each with the tuned model."""
    if (task is None) == (lm_eval is None):
        raise typer.BadParameter("give one of --task and --lm-eval", param_hint="--task")
    common: dict[str, Any] = {"tuned": tuned, "deltas": delta or [], "device": device}
    common |= {"dtype": dtype, "batch_size": batch_size}
    if lm_eval is not None:
        of_task = {"n": n, "seed": seed, "text": text, "max_new_tokens": max_new_tokens}
        _refuse("--lm-eval", **of_task, task_args=task_args)
        quiet_libraries()
        from deltacome.evals.harness import run_harness
        from deltacome.evals.report import harness_table as table

        result = run_harness(
            base,
            [name for name in lm_eval.split(",") if name],
            folder=tasks_folder,
            shots=shots,
            limit=limit,
            chat=bool(chat),
            run_code=bool(run_code),
            **common,
        )
    else:
        assert task is not None
        of_harness = {"shots": shots, "limit": limit, "chat": chat, "run_code": run_code}
        _refuse("--task", **of_harness, tasks_folder=tasks_folder)
        given = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens}
        common |= {key: value for key, value in given.items() if value is not None}
        args = None if task_args is None else parse_json(task_args, "--task-args")
        quiet_libraries()
        from deltacome.evals.report import table
        from deltacome.evals.run import evaluate

        result = evaluate(base, task=task, task_args=args, text=text, **common)
    if as_json:
        print(json.dumps(result))
    else:
        show(table(result), 120)


def _refuse(mode: str, **options: Any) -> None:
    """Refuse options that only the other kind of task uses."""
    for key, value in options.items():
        if value is not None:
            hint = f"-{key}" if len(key) == 1 else f"--{key.replace('_', '-')}"
            raise typer.BadParameter(f"{mode} has no such option", param_hint=hint)
