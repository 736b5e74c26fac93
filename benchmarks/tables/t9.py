"""Table 9: ways to find the plan: fixed beforehand, greedy search, genetic search, integer program."""

import time

import cells as md
from lab import Lab, code_hash, hash_of
from rows import RATIO

from deltacome import DeltaCome, PrinMix
from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.compression.search import sample_linears, search_template
from deltacome.methods.method import Matrix, Method
from deltacome.methods.template import parse_template

BLOCKS = 3


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    found: dict[str, tuple[Method, str, str]] = {"set beforehand (8+3+2)": (DeltaCome(), "–", "–")}
    for way in ("greedy", "genetic"):
        template, seconds, tried = _searched(lab, task, way)
        found[f"{way} search"] = (DeltaCome(parse_template(template)), f"{seconds:.0f}", str(tried))
    for name, refit in (("integer program", False), ("integer program and refit", True)):
        found[name] = (PrinMix(refit=refit), f"{_program_seconds(lab, task):.0f}", "–")
    rows = []
    for name, (method, seconds, tried) in found.items():
        cell = lab.cell(task, method, RATIO)
        plan = method.options().get("template", "by matrix")
        rows.append([name, f"`{plan}`", seconds, tried, *md.figures(cell)])
    header = ["plan by", "plan", "search s", "tried", *md.SIZES, f"{task} %"]
    note = f"Searches look at the linears of {BLOCKS} blocks; the program plans every matrix by itself."
    return (
        "## T9: greedy, genetic, integer program\n\n"
        + md.table([*header, "KL task", "KL text"], rows)
        + f"\n\n{note}"
    )


def _searched(lab: Lab, task: str, way: str) -> tuple[str, float, int]:
    """Template, seconds and number of candidates; kept, since a search takes minutes."""
    tuned, text = lab.tenant(task), lab.calibration(task)
    models = [lab.dense(folder).key for folder in (lab.base, tuned)]
    key = hash_of(*models, text.name, way, RATIO, BLOCKS, code_hash(DeltaCome()))

    def search() -> list:
        asked = Calibration(str(text), lab.size.rows, lab.size.row_tokens, seed=0)
        rows = calibration_rows(asked, tuned)
        started = time.monotonic()
        linears = sample_linears(Checkpoint(lab.base), Checkpoint(tuned), rows, blocks=BLOCKS)
        result = search_template(linears, RATIO, "greedy" if way == "greedy" else "genetic")
        return [str(result.template), time.monotonic() - started, len(result.tried)]

    template, seconds, tried = lab.kept(f"search/{way}-{key}", search)
    return template, seconds, tried


def _program_seconds(lab: Lab, task: str) -> float:
    """Seconds to plan all matrices: an SVD of each delta, its costs, and the integer programs."""
    before, after = Checkpoint(lab.base), Checkpoint(lab.tenant(task))
    names = [n for n, info in after.tensors.items() if len(info.shape) == 2 and ".layers." in n]

    def plan() -> float:
        def matrix(name: str) -> Matrix:
            shape = after.tensors[name].shape
            return Matrix(
                (shape[0], shape[1]), lambda: after.read(name).float() - before.read(name).float()
            )

        matrices = {name: matrix(name) for name in names}
        started = time.monotonic()
        size = sum(2 * m.shape[0] * m.shape[1] for m in matrices.values())
        PrinMix().planner(matrices)(size / RATIO)
        return time.monotonic() - started

    models = [lab.dense(folder).key for folder in (lab.base, lab.tenant(task))]
    return lab.kept(f"search/program-{hash_of(*models, RATIO, code_hash(PrinMix()))}", plan)
