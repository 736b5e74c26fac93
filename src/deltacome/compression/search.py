"""Finds a template for Delta-CoMe by the paper's two searches (arXiv 2406.08903, section 5 and appendix).

The search is over the numbers of directions at 8, 4 and 3 bits; the rest of the bytes goes to 2 bits.
A candidate's cost is the mean relative error `‖(D − D̂)X‖² / ‖DX‖²` over the linears of a few blocks,
spread over the depth, with the inputs that the tuned model gives them.

**Greedy** fixes one width after the other, widest first, each at its best count. **Genetic** keeps a
population of templates. A parent is the better of two random ones; a child has each count from one of
its parents, sometimes moved to a neighbouring one. The paper found the two about equal and greedy far
cheaper; `benchmarks/tables` measures it again.

Legend: O out, I in, R directions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from deltacome.arch.checkpoint import Checkpoint, check_dense
from deltacome.compression.calibration import Calibration, check_length, check_tokens
from deltacome.compression.capture import Stream, drop_weights
from deltacome.compression.data import calibration_rows
from deltacome.compression.run import Progress
from deltacome.compression.survey import pair_models
from deltacome.device import pick_device
from deltacome.errors import CalibrationError, PlanError, UnsupportedError, naming
from deltacome.format.codec import dense
from deltacome.format.spec import rank
from deltacome.methods.bands import Gptq, scaled_svd
from deltacome.methods.template import Template
from deltacome.numerics.gptq import GramFactor, factor_gram
from deltacome.numerics.gram import relative_error
from deltacome.rows import Row
from deltacome.skeleton import set_buffers, set_weight

Way = Literal["greedy", "genetic"]
WIDTHS = (8, 4, 3)
COUNTS = (None, *(Fraction(1, 1 << power) for power in range(9, 2, -1)))
"""Shares of the smaller side that a width may have, from none to 1/8."""
Genes = tuple[int, ...]
"""An index into COUNTS for each of WIDTHS."""

POPULATION, GENERATIONS, MUTATION = 12, 8, 0.3
MOST = {
    "greedy": len(WIDTHS) * len(COUNTS),
    "genetic": POPULATION * (GENERATIONS + 1),
}
"""The most templates that a search tries."""

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Linear:
    """A sampled linear: delta, all singular triples, the gram of its inputs, and the gram's factor."""

    name: str
    delta_OI: Tensor
    triple: tuple[Tensor, Tensor, Tensor]
    gram_II: Tensor
    factor: GramFactor


@dataclass
class Search:
    """What was found, and what was tried."""

    template: Template
    error: float
    tried: dict[str, float]
    """Template → error, in the order of trying."""


def sample_linears(
    base: Checkpoint,
    tuned: Checkpoint,
    rows: list[Row],
    *,
    blocks: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Report = lambda progress: None,
) -> list[Linear]:
    """Linears of `blocks` blocks, evenly spread over the depth, and their inputs in the tuned model.

    Raises:
        CheckpointError: the base has no tensor that a linear came from.
        MismatchError: the two do not belong together.
        UnsupportedError: linears that are stacked in one parameter.
    """
    found = pair_models(base, tuned, dtype)
    model, layout, stored = found.model, found.layout, found.names
    before = {pair.name: pair.base_name for pair in found.pairs}

    def read(parameter: str) -> Tensor:
        if parameter not in stored:
            raise UnsupportedError(
                f"{parameter}: {tuned.path} has no single tensor that holds all of it"
            )
        return tuned.read(stored[parameter])

    def delta_of(weight: str, transposed: bool) -> Tensor:
        delta = tuned.read(weight).float() - base.read(before[weight] or weight).float()
        return (delta.T.contiguous() if transposed else delta).to(device)

    embedding = tuned.tensors[stored[str(layout.embedding)]]
    check_tokens("text", (row.ids for row in rows), embedding.shape[0])
    set_buffers(model, found.where, tuned.read)
    stream = Stream(model, layout, read, rows, device=device, dtype=dtype)
    names = list(layout.blocks)
    chosen = {names[i * (len(names) - 1) // max(1, blocks - 1)] for i in range(blocks)}
    linears = []
    for number, name in enumerate(names, 1):
        for parameter, _ in list(layout.blocks[name].named_parameters()):
            full = f"{name}.{parameter}"
            set_weight(model, full, read(full).to(device, dtype))
        for group in stream.groups(name) if name in chosen else ():
            gram_II = stream.gram(name, group[0])
            with naming([stored[f"{linear}.weight"] for linear in group]):
                factor = factor_gram(gram_II)
            for linear in group:
                weight = stored[f"{linear}.weight"]
                delta_OI = delta_of(weight, f"{linear}.weight" in layout.transposed)
                if delta_OI.any():
                    with naming([weight]):
                        triple = scaled_svd(delta_OI, min(delta_OI.shape))
                    linears.append(Linear(weight, delta_OI, triple, gram_II, factor))
        stream.advance(name)
        drop_weights(layout.blocks[name])
        progress(Progress("blocks", number, len(names), name))
    if not linears:
        raise PlanError(f"{tuned.path}: no linear of the sampled blocks differs from the base")
    return linears


def search_template(
    linears: list[Linear],
    ratio: float,
    way: Way = "greedy",
    seed: int = 0,
    nearest: bool = False,
    progress: Report = lambda progress: None,
) -> Search:
    """The template of least mean error among those tried, each matrix at `ratio` of its own bytes."""
    tried: dict[str, float] = {}
    most = MOST[way]

    def cost(genes: Genes) -> float:
        template = _template(genes)
        if str(template) not in tried:
            error = tried[str(template)] = _mean_error(linears, template, ratio, nearest)
            progress(Progress("search", len(tried), most, str(template), error))
        return tried[str(template)]

    genes = _greedy(cost) if way == "greedy" else _genetic(cost, random.Random(seed))
    progress(Progress("search", most, most))
    return Search(_template(genes), cost(genes), tried)


def _greedy(cost: Callable[[Genes], float]) -> Genes:
    genes = (0,) * len(WIDTHS)
    for place in range(len(WIDTHS)):
        choices = [(*genes[:place], i, *genes[place + 1 :]) for i in range(len(COUNTS))]
        genes = min(choices, key=cost)
    return genes


def _genetic(cost: Callable[[Genes], float], draw: random.Random) -> Genes:
    def child(parents: list[Genes]) -> Genes:
        one, two = (min(draw.sample(parents, 2), key=cost) for _ in range(2))
        mixed = [draw.choice(pair) for pair in zip(one, two, strict=True)]
        moved = [i + draw.choice((-1, 1)) if draw.random() < MUTATION else i for i in mixed]
        return tuple(min(max(i, 0), len(COUNTS) - 1) for i in moved)

    people = [tuple(draw.randrange(len(COUNTS)) for _ in WIDTHS) for _ in range(POPULATION)]
    for _ in range(GENERATIONS):
        born = {*people, *(child(people) for _ in range(POPULATION))}
        people = sorted(born, key=lambda genes: (cost(genes), genes))[:POPULATION]
    return people[0]


def _template(genes: Genes) -> Template:
    wide = [(bits, COUNTS[i]) for bits, i in zip(WIDTHS, genes, strict=True) if COUNTS[i]]
    return Template((*wide, (2, None)))


def _mean_error(
    linears: list[Linear], template: Template, ratio: float, nearest: bool = False
) -> float:
    gptq, errors = Gptq(nearest=nearest), []
    for linear in linears:
        out_size, in_size = linear.delta_OI.shape
        plan = template.fill((out_size, in_size), 2 * out_size * in_size / ratio)
        if not plan:
            return 1.0
        u_RO, s_R, v_RI = (part[: rank(plan)] for part in linear.triple)
        with naming([linear.name]):
            factor = None if nearest else linear.factor
            (factors,) = gptq.v_factors([(v_RI, plan)], factor)
            bands = gptq.with_u(u_RO, s_R, factors, plan, linear.gram_II)
        delta_hat_OI = dense(bands).to(linear.delta_OI.device)
        errors.append(relative_error(linear.delta_OI, delta_hat_OI, linear.gram_II))
    return sum(errors) / len(errors)


def find_template(
    base: str | Path,
    tuned: str | Path,
    ratio: float,
    way: Way = "greedy",
    *,
    source: str = "self",
    samples: int = 128,
    seq_len: int = 256,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    blocks: int = 3,
    nearest: bool = False,
    progress: Report = lambda progress: None,
) -> Search:
    """Finds a template for two checkpoints.

    Calibration text is as in `compress`; `dtype` is that of its passes. `nearest` rounds codes to
    nearest: what is best for GPTQ need not be best for plain rounding. `progress` is called as in
    `compress`, with phases `calibration`, `blocks` and `search`.

    Raises:
        DeltaError: as `compress`, and for `source` "none", as errors are those of outputs.
    """
    if source == "none":
        raise CalibrationError("search: expected calibration text to measure errors on, got none")
    device = pick_device(device, doubles=True)
    before, after = Checkpoint(base), Checkpoint(tuned)
    for checkpoint in (before, after):
        check_dense(checkpoint.path)
    check_length(seq_len, after.path)
    rows = calibration_rows(
        Calibration(source, samples, seq_len, seed),
        after.path,
        device=device,
        on_step=lambda done, total: progress(Progress("calibration", done, total)),
    )
    linears = sample_linears(
        before, after, rows, blocks=blocks, device=device, dtype=dtype, progress=progress
    )
    return search_template(linears, ratio, way, seed, nearest, progress)
