"""Table 8: how far activations are from the tuned model's, by depth and by projection.

Each linear's output on held-out questions, run through the whole compressed model: the mean squared
difference from the tuned model's output, divided by the mean square of the latter. "Outliers" are the
1 % of the tuned model's entries that are largest in magnitude.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import cells as md
import torch
from lab import Lab, Variant, device
from rows import main_rows
from torch import Tensor

from deltacome.arch.layout import find_layout, linears_of
from deltacome.evals.divergence import question_rows

QUESTIONS = 32
OUTLIERS = 0.01
THIRDS = ("first third", "middle third", "last third")
Key = tuple[str, str]


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    wanted = _outputs(lab, task, lab.dense(lab.tenant(task)))
    found = {}
    for name, method, ratio in main_rows(lab.size):
        if not lab.wanted(task, method, ratio):
            continue
        variant = lab.packed(lab.artifact(task, method, ratio))
        found[name] = _errors(lab, wanted, _outputs(lab, task, variant))
    found = {"backbone": _errors(lab, wanted, _outputs(lab, task, lab.dense(lab.base)))} | found
    columns = list(next(iter(found.values())))
    sections = []
    for kind in ("all", "outliers"):
        header = [f"{kind}", *(where for where, which in columns if which == kind)]
        rows = [
            [
                name,
                *(f"{1e3 * errors[where, kind]:.3g}" for where, which in columns if which == kind),
            ]
            for name, errors in found.items()
        ]
        sections.append(md.table(header, rows))
    note = f"Relative squared errors, in thousandths, on {QUESTIONS} held-out questions of {task}."
    return "## T8: activation errors\n\n" + "\n\n".join(sections) + f"\n\n{note}"


@torch.inference_mode()
def _outputs(lab: Lab, task: str, variant: Variant) -> dict[str, Tensor]:
    """Output of every linear of the blocks at all tokens of some questions, in float16."""
    rows = question_rows(lab.tokenizer(task), lab.questions(task)[:QUESTIONS])
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    with lab.weights(variant) as model:
        hooks = []
        blocks = find_layout(model).blocks.items()
        for path, module in (linear for block in blocks for linear in linears_of(*block)):
            name = f"{path}.weight"

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                outputs[name].append(output[0].half().cpu())

            hooks.append(module.register_forward_hook(keep))
        for one in rows:
            model(input_ids=torch.tensor([one.row.ids], device=device()), use_cache=False)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in outputs.items() if ".layers." in name}


def _errors(lab: Lab, wanted: dict[str, Tensor], got: dict[str, Tensor]) -> dict[Key, float]:
    """Means over linears, by third of the depth and by projection, of all entries and of outliers."""
    depth = len(find_layout(lab.model).blocks)
    groups: dict[Key, list[float]] = defaultdict(list)
    for name, target in wanted.items():
        where = name.split(".layers.")[1].split(".")
        target, other = target.float(), got[name].float()
        square, error = target.square(), (other - target).square()
        keep = max(1, int(OUTLIERS * target.numel()))
        large = square.flatten().topk(keep).indices
        figures = {
            "all": float(error.sum() / square.sum()),
            "outliers": float(error.flatten()[large].sum() / square.flatten()[large].sum()),
        }
        for kind, value in figures.items():
            for group in ("mean", THIRDS[3 * int(where[0]) // depth], where[-2]):
                groups[group, kind].append(value)
    projections = list(
        dict.fromkeys(where for where, _ in groups if where not in (*THIRDS, "mean"))
    )
    order = [
        (where, kind) for kind in ("all", "outliers") for where in ("mean", *THIRDS, *projections)
    ]
    return {key: sum(groups[key]) / len(groups[key]) for key in order if key in groups}
