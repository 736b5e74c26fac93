"""Makes the tables: `python benchmarks/tables/run.py --base work/base [t2 t3 …] [--size small]`.

Without names all tables are made; in the small size, those that two cores can make in an hour (`HOUR`),
training included. Results go to `docs/results/tables.md`, with a section for each table and, where they
are not the usual ones, for its tasks and calibration rows. Other sections stay as they are. Existing
tenants can be given; others are trained.
"""

from __future__ import annotations

import argparse
import importlib
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from lab import SIZES, Lab, Size, say, settings
from origin import origin
from transformers.utils import logging

TABLES = ("t2", "t3", "t5", "t6", "t8", "t9", "t10", "t11")
TABLES += ("goals", "vlm", "case", "ablation", "unseen", "texts", "longer", "known", "rates")
HOUR = ("t3", "t8", "case")
FILTERED = (
    "t3",
    "t5",
    "t8",
    "t10",
    "t11",
    "goals",
    "ablation",
    "unseen",
    "texts",
    "longer",
    "known",
    "rates",
)
"""Tables that can show only those of their cells that exist."""
LESS = {"steps": 80, "rows": 128, "fit": 24, "distill": 96, "kl_questions": 250, "beside": False}
"""Reduced training, calibration text and distillation, alike for all methods that have a last step."""


def main() -> None:
    options = _parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    given = dict(text.split("=", 1) for text in options.tenant)
    tenants = {task: Path(folder) for task, folder in given.items()}
    size = SIZES[options.size]
    if options.tasks:
        tasks = tuple(options.tasks)
        size = replace(size, tasks=tasks, side=tasks[:1])
    if options.rows:
        size = replace(size, rows=options.rows)
    if options.fit:
        size = replace(size, fit=options.fit)
    if options.seeds:
        size = replace(size, seeds=tuple(options.seeds))
    names = options.tables or TABLES
    hour = options.size == "small" and not options.tables
    if hour:
        names, size = HOUR, replace(size, **LESS)
    if options.only_kept and (unasked := set(names) - set(FILTERED)):
        raise SystemExit(f"--only-kept: expected some of {', '.join(FILTERED)}, got {min(unasked)}")
    where = origin("transformers")
    lab = Lab(options.base, options.work, size, tenants, options.only_kept)
    for name in names:
        started = time.monotonic()
        section = importlib.import_module(name).make(lab)
        other = size.tasks != SIZES["full"].tasks and " on " not in _name(section)
        if other:  # a separate section beside that of the usual tasks
            section = section.replace(":", f" on {' and '.join(size.tasks)}:", 1)
        if options.rows:
            section = section.replace(":", f", {options.rows} calibration rows:", 1)
        if options.fit:
            section = section.replace(":", f", {options.fit} last steps:", 1)
        if hour:
            section = section.replace(":", ", made by `make tables SIZE=small`:", 1)
        seconds = time.monotonic() - started
        command = f"make tables SIZE={options.size}" + f" TABLES={name}" * bool(options.tables)
        if options.tasks or options.rows or options.fit or options.seeds or options.only_kept:
            words = ["--tasks", *options.tasks] if options.tasks else []
            words += ["--rows", str(options.rows)] if options.rows else []
            words += ["--fit", str(options.fit)] if options.fit else []
            words += ["--seeds", *map(str, options.seeds)] if options.seeds else []
            command = (
                f"python benchmarks/tables/run.py {name} --size {options.size} {' '.join(words)}"
            )
        spent = f"{seconds:.0f} s of work not kept"
        if options.only_kept:
            spent += "; what it lacks of that command's cells was not made (`--only-kept`)"
        text = f"{section}\n\n`{command}`, {spent}. {where} {settings(lab)}\n"
        print(text, flush=True)
        _replace_section(options.report, text)
        say(f"{name}: {seconds:.0f} s")


def _replace_section(report: Path, text: str) -> None:
    """Puts a section in the place of the one with the same name, by the numbers in their names."""
    title = "# The paper's tables, measured\n\n"
    old = report.read_text() if report.exists() else title
    parts = re.split(r"(?m)^(?=## )", old)
    sections = {_name(part): part for part in parts[1:]} | {_name(text): text + "\n"}
    ordered = sorted(
        sections, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [99, len(name)]
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text((parts[0] + "".join(sections[name] for name in ordered)).rstrip() + "\n")


def _name(section: str) -> str:
    return section.removeprefix("## ").split(":")[0]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The paper's tables on real models.")
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="TABLE")
    parser.add_argument("--base", type=Path, default=Path("work/base"))
    parser.add_argument("--work", type=Path, default=Path("work/tables"))
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument(
        "--tenant", action="append", default=[], help="TASK=FOLDER of a trained tenant"
    )
    parser.add_argument("--tasks", nargs="+", help="tasks instead of sums, code and chat")
    parser.add_argument("--rows", type=int, help=f"calibration rows, instead of {Size.rows}")
    parser.add_argument(
        "--fit", type=int, help="steps that fit singular values, instead of the size's"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="calibration seeds for the main rows")
    parser.add_argument(
        "--only-kept",
        action="store_true",
        help=f"show only cells that exist, of interrupted runs: {', '.join(FILTERED)}",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", type=Path, default=Path("docs/results/tables.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
