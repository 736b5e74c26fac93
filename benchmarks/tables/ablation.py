"""Ablation of `adaptive`: what each of its parts is worth at 1/32, one left out at a time.

The parts are left out of a run without the last step, distillation, which makes up for much of what
leaving one out costs; its own worth is the difference of the first two rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import cells as md
from lab import Lab
from torch import Tensor

from deltacome import Adaptive, DeltaCome
from deltacome.format.codec import Packed
from deltacome.methods.method import Matrix, Method, Planner, Terms

RATIO = 32.0


@dataclass(frozen=True)
class Without(Adaptive):
    """Adaptive without one part, which is named in the artifact."""

    distill: int = 0
    part: str = ""

    def options(self) -> dict[str, Any]:
        return super().options() | {"without": self.part}


@dataclass(frozen=True)
class WithoutOutputs(Without):
    """Errors are weighted by inputs alone: how much an output matters to the answer is ignored."""

    part: str = "outputs"

    def spectrum(self, delta_OI: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        return super().spectrum(delta_OI, inputs, None)

    def pack(
        self, delta_OI: Tensor, plan: Terms, inputs: Tensor | None, outputs: Tensor | None
    ) -> Packed:
        return super().pack(delta_OI, plan, inputs, None)


@dataclass(frozen=True)
class WithoutSharing(Without):
    """Every matrix gets bytes in proportion to its size, as in the paper; widths are still chosen."""

    part: str = "sharing"

    def planner(self, matrices: Mapping[str, Matrix]) -> Planner:
        planners = {name: Adaptive.planner(self, {name: one}) for name, one in matrices.items()}
        sizes = {name: one.shape[0] * one.shape[1] for name, one in matrices.items()}
        total = sum(sizes.values())

        def plans(nbytes: float) -> dict[str, Terms]:
            shares = {name: nbytes * size / total for name, size in sizes.items()}
            return {name: planners[name](share)[name] for name, share in shares.items()}

        return plans


@contextmanager
def ungarbled(last: bool = True) -> Iterator[None]:
    """The sweep, and if asked the last step, see questions as they are asked and no garbled ones."""
    swept = patch("deltacome.compression.planning.half_garbled", lambda rows, *args: rows)
    none = patch("deltacome.compression.polish.garbled", lambda *args: [])
    with swept, none if last else nullcontext():
        yield


def make(lab: Lab) -> str:
    task = lab.size.side[0]
    once = patch("deltacome.methods.adaptive.CUT", 1.0)
    equal = patch("deltacome.compression.sensitivity.ANSWER", 1.0)
    undivided = patch("deltacome.compression.sensitivity.LIFT", 1.0)
    own = patch("deltacome.compression.sensitivity.TEMPERATURE", 1.0)
    trusted = patch("deltacome.methods.adaptive.ALIKE", 0.0)
    as_asked = Without(distill=lab.size.fit, part="garbled")
    late = Without(distill=lab.size.fit, part="garbled in the sweep")
    found: dict[str, tuple[Method, AbstractContextManager[Any]]] = {
        "Delta-CoMe": (DeltaCome(), nullcontext()),
        "Delta-CoMe, distilled too": (DeltaCome(distill=lab.size.fit), nullcontext()),
        "adaptive": (Adaptive(distill=lab.size.fit), nullcontext()),
        "adaptive, questions garbled in the last step only": (late, ungarbled(last=False)),
        "adaptive, no question garbled": (as_asked, ungarbled()),
        "less distillation": (Adaptive(distill=0), nullcontext()),
        "… and that sure tokens are lifted": (Without(part="division"), undivided),
        "… and that answers are softened": (Without(part="temperature"), own),
        "… and that answers weigh more than text": (Without(part="answers"), equal),
        "… and that what is cut counts thrice": (Without(part="cut"), once),
        "… and that matrices are taken half alike": (Without(part="alike"), trusted),
        "… and bytes shared across matrices": (WithoutSharing(), nullcontext()),
        "… and weights of outputs": (WithoutOutputs(), nullcontext()),
        "… and all but the diagonals of those": (Adaptive(distill=0, diagonal=True), nullcontext()),
    }
    rows, cells = [], {}
    for name, (method, change) in found.items():
        if not lab.wanted(task, method, RATIO):
            continue
        with change:
            cell = cells[name] = lab.cell(task, method, RATIO)
        kl = [text for k in ("task", "text") for text in (md.kl(cell, k), _against(cells, name, k))]
        rows.append([name, *md.sizes(cell), md.score(cell), *kl])
    header = ["", *md.SIZES, f"{task} %", "KL task", "difference", "KL text", "difference"]
    return (
        "## Ablation: adaptive at 1/32, less one part each\n\n"
        + md.table(header, rows)
        + "\n\nDifferences, row by row: to `less distillation` where a part is left out,"
        " else to Delta-CoMe."
    )


def _against(cells: dict[str, dict[str, Any]], name: str, kind: str) -> str:
    """The difference to the row that this one is compared with."""
    other = "less distillation" if name.startswith("…") else "Delta-CoMe"
    return (
        "–" if name == other or other not in cells else md.farther(cells[name], cells[other], kind)
    )
