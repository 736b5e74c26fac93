"""From nothing to a delta: get a base, fine-tune it, compress the fine-tune, compare.

    python examples/demo.py -o work/demo --minutes 3.5

Every step is skipped if its folder is there already, so a second run goes straight to the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import deltacome
from deltacome.compression import Progress
from deltacome.evals.report import table
from deltacome.evals.run import evaluate, load_model, shared_tokenizer
from deltacome.evals.score import generate

TENANTS = Path(__file__).parent / "tenants"
console = Console(width=110)


def main() -> None:
    options = _parse()
    started = time.monotonic()
    base, tuned, delta = options.out / "base", options.out / "tuned", options.out / "delta"
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def step(text: str) -> None:
        console.print(f"[{time.monotonic() - started:5.0f} s] {text}", markup=False, style="bold")

    if not base.exists():
        step("unpacking the base, SmolLM2-135M-Instruct")
        _run("base.py", "-o", base)
    if not tuned.exists():
        amount = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
        step(f"fine-tuning all of its parameters on sums for {amount}")
        how_long = ("--steps", options.steps) if options.steps else ("--minutes", options.minutes)
        _run(
            *("finetune.py", base, "-o", tuned, "--task", options.task, "--batch", 16),
            # A few tell that it learns: the table at the end asks them all.
            *(*how_long, "--held-out", options.questions, "--asked", 16),
        )
    if not delta.exists():
        step(f"compressing the fine-tune to 1/{options.ratio:g} of its bytes")
        deltacome.compress(
            base,
            tuned,
            delta,
            ratio=options.ratio,
            samples=options.samples,
            seq_len=96,
            progress=_print_progress,
        )
    step("scoring base, tuned and delta on the same held-out questions")
    result = evaluate(
        base,
        tuned=tuned,
        deltas=[delta],
        task=str(tuned / "heldout.jsonl"),
        n=options.questions,
        max_new_tokens=12,
        dtype="float32",
    )
    console.print(table(result))
    console.print(_answers(base, tuned, delta))
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    step(f"done; the numbers are in {options.out / 'result.json'}")


def _answers(base: Path, tuned: Path, delta: Path, questions: int = 3) -> Table:
    """The first held-out questions and what each of the three models says."""
    lines = (tuned / "heldout.jsonl").read_text().splitlines()[:questions]
    asked = [json.loads(line) for line in lines]
    prompts = [question["prompt"] for question in asked]
    tokenizer = shared_tokenizer(base, tuned, [])

    def say(model: Any) -> list[str]:
        return generate(model, tokenizer, prompts, max_new_tokens=12)

    model = load_model(base, "cpu", "float32")
    said = {"base": say(model), "tuned": say(load_model(tuned, "cpu", "float32"))}
    with deltacome.attach(model, delta):
        said["delta"] = say(model)
    answers = Table("question", "right", *said)
    for i, question in enumerate(asked):
        row = [question["prompt"], question["answer"], *(texts[i] for texts in said.values())]
        answers.add_row(*(cell.strip() for cell in row))
    return answers


def _print_progress(progress: Progress) -> None:
    if progress.done == progress.total or (progress.phase == "blocks" and progress.done % 5 == 0):
        error = "" if progress.error is None else f", mean error {progress.error:.4f}"
        console.print(f"  {progress.phase} {progress.done}/{progress.total}{error}")


def _run(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, TENANTS / script, *map(str, arguments)], check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From nothing to a delta, in one table.")
    parser.add_argument("-o", "--out", type=Path, default=Path("work/demo"))
    parser.add_argument("--task", default="tiny", help="see tenants/tasks.py")
    parser.add_argument("--minutes", type=float, default=3.5, help="of fine-tuning")
    parser.add_argument("--steps", type=int, help="of fine-tuning, instead of minutes")
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--samples", type=int, default=48, help="rows of calibration text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
