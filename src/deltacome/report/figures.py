"""The figures of the report, each for a wide and for a narrow page.

One unit of a figure is one pixel of the page that it is made for, so text has its nominal size. Figures
are drawn without pyplot, whose state is global to the process, and in the light shades of `colours`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from deltacome.format.clip import clip
from deltacome.report.colours import LIGHT, STEPS, kind_colour, ramp
from deltacome.report.facts import CODES, KINDS, Facts, Place
from deltacome.report.scores import Exam, Score
from deltacome.report.words import KIND_WORDS, number, share, short_names, size

WIDTH = {True: 1080, False: 342}
"""Pixels of a figure, wide or narrow."""
PANELS = 24
"""Projections drawn at most; the table has them all."""
BESIDE = 6
"""Matrices outside blocks drawn at most."""
LINES = 32
"""Lines in a panel of spectra at most; where there are more depths, evenly spaced ones are drawn."""
POINTS = 32
"""Points of a line at most, evenly spaced on its logarithmic axis."""
MARKERS = "osD^vP*X"
SCALES = (
    (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 6, 8),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)
"""Mantissas of class bounds, finest first."""


def draw(what: Callable[..., Figure], wide: bool, *subject: Any) -> Figure:
    """Draws one of the figures below, with the settings that they share."""
    text = 12.5 if wide else 11
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": text,
        "axes.titlesize": text,
        "axes.labelsize": text - 0.5,
        "xtick.labelsize": text - 1,
        "ytick.labelsize": text - 1,
        "legend.fontsize": text - 0.5,
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.titlecolor": LIGHT["ink"],
        "xtick.color": LIGHT["line"],
        "ytick.color": LIGHT["line"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["line"],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["line"],
        "grid.linewidth": 0.7,
        "figure.facecolor": LIGHT["paper"],
        "figure.labelsize": "medium",
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "text.parse_math": False,
    }
    with rc_context(settings):
        figure = what(wide, *subject)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is settled, and takes most of the time
    return figure


def bytes_by_kind(wide: bool, facts: Facts) -> Figure:
    """The tuned model and the artifact as bars to scale, then the artifact's magnified, by kind."""
    kinds = [kind for kind in KINDS if facts.nbytes[kind]]
    columns = 3 if wide else 1
    rows = math.ceil(len(kinds) / columns)
    width, height = WIDTH[wide], 176 + 24 * rows
    figure = _figure(wide, height, layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    part = width / max(facts.ratio, 1)
    axes.text(0, 12, f"tuned model at 16 bit: {size(facts.tuned_nbytes)}")
    axes.add_patch(Rectangle((0, 20), width, 26, color=LIGHT["fog"], lw=0))
    axes.add_patch(Rectangle((0, 50), part, 26, color=LIGHT["accent"], lw=0))
    said = f"this artifact: {size(facts.bytes_on_disk)}, to the same scale"
    if part < width / 3:
        axes.text(part + 8, 68, said)
    else:
        axes.text(8, 68, said, color=LIGHT["paper"])
    funnel = [(0, 79), (part, 79), (width, 116), (0, 116)]
    axes.add_patch(Polygon(funnel, color=LIGHT["line"], lw=0))
    left = 0.0
    for index, kind in enumerate(kinds):
        nbytes = facts.nbytes[kind]
        colour = kind_colour(kind)
        step = width * nbytes / facts.bytes_on_disk
        edge = 0.8 if step > 3 else 0
        axes.add_patch(Rectangle((left, 118), step, 38, fc=colour, ec=LIGHT["paper"], lw=edge))
        left += step
        x, y = width / columns * (index // rows), 176 + 24 * (index % rows)
        right = x + width / columns - (36 if index // rows < columns - 1 else 0)
        axes.add_patch(Rectangle((x, y), 13, 13, color=colour, lw=0))
        axes.text(x + 20, y + 11, KIND_WORDS[kind])
        axes.text(right - 62, y + 11, size(nbytes), ha="right")
        part = share(nbytes / facts.bytes_on_disk)
        axes.text(right, y + 11, part, ha="right", color=LIGHT["muted"])
    return figure


def widths(wide: bool, facts: Facts) -> Figure:
    """Bits on disk per weight, stacked by width: a panel for each projection, depth to the right."""
    kinds = facts.codes
    figure, panels = _panels(wide, facts, 172 if wide else 142)
    for projection, axes in panels.items():
        places = _places(facts, projection)
        below = np.zeros(len(places))
        for kind in [*kinds, "rest"]:
            above = below + [8 * _bytes_of(place, kind) / place.weights for place in places]
            if projection is None:
                bars = range(len(places))
                axes.bar(bars, above - below, 0.6, below, color=kind_colour(kind), lw=0)
            else:
                _steps(axes, _positions(facts, places), above, below, kind_colour(kind))
            below = above
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.06 * max(place.bits for place in facts.places))
        _depth_ticks(axes, facts, projection, wide)
    words = {kind: KIND_WORDS[kind] for kind in kinds} | {"rest": "scales and the rest"}
    patches = [Patch(color=kind_colour(kind), label=word, lw=0) for kind, word in words.items()]
    _legend(figure, patches, 6 if wide else 3)
    figure.supylabel("bits on disk per weight", color=LIGHT["muted"])
    return figure


def errors(wide: bool, facts: Facts) -> Figure:
    """A map of errors by depth and projection, with the mean of each depth beside it."""
    depths = facts.depths
    grid = np.full((len(facts.projections), len(depths)), np.nan)
    for row, name in enumerate(facts.projections):
        for place in facts.of(name):
            if place.error is not None and place.depth is not None:
                grid[row, depths.index(place.depth)] = place.error
    known = np.ma.masked_invalid(grid)
    means, known = known.mean(0), known[:PANELS]
    names = facts.projections[:PANELS]
    bounds = _classes(known.compressed())
    shades = _shades(len(bounds) - 1)
    look: dict[str, Any] = {"cmap": ListedColormap(shades), "edgecolors": LIGHT["paper"]}
    look |= {"norm": BoundaryNorm(bounds, len(shades)), "lw": 1.2 if len(depths) < 50 else 0.5}
    labels = [clip(name, 28 if wide else 20) for name in short_names(names).values()]
    at, edges = np.arange(len(depths)), np.arange(len(depths) + 1) - 0.5
    sides = np.arange(len(names) + 1) - 0.5
    if wide:
        figure = _figure(wide, 190 + 26 * len(names))
        bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=(80, 26 * len(names)))
        bars.bar(at, means, 0.78, color=LIGHT["accent"], lw=0)
        bars.set_ylabel("mean")
        cells.pcolormesh(edges, sides, known, **look)
        cells.set_yticks(range(len(names)), labels, color=LIGHT["ink"])
        cells.set_xlabel("layer")
    else:
        figure = _figure(wide, 170 + int(min(max(440 / len(depths), 5), 26) * len(depths)))
        cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(2.6, 1))
        bars.barh(at, means, 0.78, color=LIGHT["accent"], lw=0)
        bars.set_xlabel("mean")
        bars.xaxis.set_major_locator(MaxNLocator(2))
        cells.pcolormesh(sides, edges, known.T, **look)
        cells.set_xticks(range(len(names)), labels, rotation=90, color=LIGHT["ink"])
        cells.set_ylabel("layer")
    cells.invert_yaxis()
    cells.grid(visible=False)
    bars.grid(axis="x" if wide else "y", visible=False)
    for axes in (cells, bars):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    _name_depths(cells.xaxis if wide else cells.yaxis, depths, 16)
    words = [f"{number(low)} to {number(high)}" for low, high in pairwise(bounds)]
    words[0] = f"up to {number(bounds[1])}"
    patches = [Patch(color=c, label=word, lw=0) for c, word in zip(shades, words, strict=True)]
    _legend(figure, patches, 8 if wide else 3)
    return figure


def spectra(wide: bool, facts: Facts) -> Figure:
    """‖s u vᵀ‖ of the directions, largest first: a panel for each projection, a line for each depth."""
    figure, panels = _panels(wide, facts, 200 if wide else 160)
    depths, colours = facts.depths, ramp("depth")
    steps = {d: int(STEPS * i / len(depths)) for i, d in enumerate(depths)}
    values = np.concatenate([place.spectrum for place in facts.places])
    low, high = values[values > 0].min(), values.max()
    longest = max(len(place.spectrum) for place in facts.places)
    for projection, axes in panels.items():
        places = [place for place in _places(facts, projection) if (place.spectrum > 0).any()]
        kept = {round(i) for i in np.linspace(0, len(places) - 1, LINES)}
        shown = [p for i, p in enumerate(places) if i in kept or projection is None]
        for index, place in enumerate(shown):
            at = np.unique(np.geomspace(1, len(place.spectrum), POINTS).round().astype(int))
            line = np.ma.masked_less_equal(place.spectrum[at - 1], 0)
            look: dict[str, Any] = {"color": LIGHT["ink"], "ls": ("-", "--", ":", "-.")[index % 4]}
            if place.depth is not None:
                look = {"color": colours[steps[place.depth]]}
            if len(at) == 1:
                look |= {"marker": "o", "ms": 3}
            label = clip(place.projection.rpartition(".")[2], 16)
            axes.plot(at, line, lw=1.1, label=label, **look)
        axes.set(
            xscale="log", yscale="log", xlim=(0.9, 1.1 * longest), ylim=(low / 1.3, high * 1.3)
        )
        axes.xaxis.set_major_locator(LogLocator(10, numticks=6))
        axes.yaxis.set_major_locator(LogLocator(10, (1.0,) if high / low > 100 else (1, 2, 5)))
        _plain_numbers(axes.xaxis, axes.yaxis)
        if projection is None and shown:
            axes.legend(loc="lower left", handlelength=1.4, borderaxespad=0.1)
    figure.supxlabel("direction", color=LIGHT["muted"])
    figure.supylabel("size of the direction", color=LIGHT["muted"])
    named = sorted({depths[round(x)] for x in np.linspace(0, len(depths) - 1, 5)}) if depths else []
    lines = [Line2D([], [], color=colours[steps[d]], lw=3, label=f"layer {d}") for d in named]
    _legend(figure, lines, 5 if wide else 3)
    return figure


def scores(wide: bool, exams: Sequence[Exam], facts: Facts) -> Figure:
    """Score, and KL where there is one, against the ratio: a row for each task."""
    drawn = {True: (_draw_scores, _draw_kl), False: (_draw_scores,)}
    rows = [(exam, what) for exam in exams for what in drawn[_has_kl(exam)]]
    methods = list(dict.fromkeys(m.method for e in exams for m in e.deltas))
    if wide:
        figure = _figure(wide, 60 + 270 * len(exams))
        grid = figure.subplots(len(exams), 2, squeeze=False)
        places = [grid[exams.index(exam), int(what is _draw_kl)] for exam, what in rows]
        for axes in set(grid.flat) - set(places):
            axes.set_axis_off()
    else:
        figure = _figure(wide, 70 + 220 * len(rows))
        places = list(figure.subplots(len(rows), 1, squeeze=False).flat)
    for axes, (exam, what) in zip(places, rows, strict=True):
        what(axes, exam, methods, facts)
        ratios = sorted({m.ratio for m in exam.deltas if m.ratio}) or [1.0]
        axes.set(xscale="log", xlim=(ratios[0] / 1.35, ratios[-1] * 1.35), xlabel="ratio on disk")
        low, high = 0.9 * ratios[0], 1.1 * ratios[-1]
        ticks = [x for x in 2.0 ** np.arange(-4, 16) if low <= x <= high] or ratios[:1]
        _plain_numbers(axes.xaxis)
        axes.set_xticks(ticks, map(number, ticks))
    handles = [
        Line2D([], [], color=c, marker=marker, lw=1.2, label=clip(method or "–", 20))
        for method, (c, marker) in _looks(methods).items()
    ]
    ring = {"marker": "o", "ms": 13, "mfc": "none", "mec": LIGHT["ink"], "ls": ""}
    if any(m.artifact == facts.digest for e in exams for m in e.deltas):
        handles.append(Line2D([], [], label="this artifact", **ring))
    _legend(figure, handles, 6 if wide else 2)
    return figure


def _draw_scores(axes: Axes, exam: Exam, methods: Sequence[str | None], facts: Facts) -> None:
    scale = 100 if exam.percent else 1
    axes.set_title(clip(exam.task, 36))
    axes.set_ylabel(clip(exam.metric, 24) + (", %" if exam.percent else ""))
    for name, dashes in (("tuned", "--"), ("base", ":")):
        model = exam.dense(name)
        if model is not None and model.score is not None:
            axes.axhline(scale * model.score, color=LIGHT["muted"], ls=dashes, lw=1.3)
            axes.annotate(
                *(name, (1, scale * model.score)),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=LIGHT["muted"],
            )
    for method, (colour, marker) in _looks(methods).items():
        found = [m for m in exam.deltas if m.method == method and m.score is not None]
        x, y = _ratios(found), np.array([scale * (m.score or 0) for m in found])
        below = [scale * _between(m.low, m.score) for m in found]
        above = [scale * _between(m.score, m.high) for m in found]
        look: dict[str, Any] = {"color": colour, "marker": marker, "elinewidth": 1, "capsize": 3}
        axes.errorbar(x, y, yerr=[below, above], lw=1.2, **look)
        _ring(axes, found, y, facts)
    if exam.percent:
        axes.set_ylim(0, max(5.0, 1.04 * axes.get_ylim()[1]))


def _between(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else max(high - low, 0.0)


def _draw_kl(axes: Axes, exam: Exam, methods: Sequence[str | None], facts: Facts) -> None:
    axes.set_title("divergence from the tuned model")
    axes.set_ylabel("KL, nats per token")
    for key, fill in (("kl_task", True), ("kl_text", False)):
        for method, (colour, marker) in _looks(methods).items():
            found = [m for m in exam.deltas if m.method == method and (getattr(m, key) or 0) > 0]
            y = [getattr(m, key) for m in found]
            look: dict[str, Any] = {"color": colour, "marker": marker}
            look["mfc"] = colour if fill else LIGHT["paper"]
            axes.plot(_ratios(found), y, lw=1.2, ls="-" if fill else ":", **look)
            _ring(axes, found, y, facts)
    axes.set_yscale("log")
    axes.margins(y=0.16)
    _plain_numbers(axes.yaxis)
    axes.plot([], [], "o-", color=LIGHT["muted"], label="on the task")
    axes.plot([], [], "o:", color=LIGHT["muted"], mfc=LIGHT["paper"], label="on general text")
    axes.legend(loc="best", fontsize="small")


def _ring(
    axes: Axes, found: Sequence[Score], y: Sequence[float] | np.ndarray, facts: Facts
) -> None:
    for model, ratio, value in zip(found, _ratios(found), y, strict=True):
        if model.artifact == facts.digest:
            axes.plot(ratio, value, "o", ms=14, mfc="none", mec=LIGHT["ink"], mew=1.4)


def _ratios(found: Sequence[Score]) -> list[float]:
    return [model.ratio for model in found if model.ratio is not None]


def _has_kl(exam: Exam) -> bool:
    return any((m.kl_task or 0) > 0 or (m.kl_text or 0) > 0 for m in exam.deltas)


def _looks(methods: Sequence[str | None]) -> dict[str | None, tuple[str, str]]:
    """Colour and marker of each method; the marker alone tells them apart."""
    kinds = ("8", "2", "4", "1", "3", "16", "signs", "rest")
    return {m: (kind_colour(kinds[i % 8]), MARKERS[i % 8]) for i, m in enumerate(methods)}


# --- what they share -----------------------------------------------------------------------------


def _figure(wide: bool, height: float, layout: Any = "constrained") -> Figure:
    """A figure of `WIDTH` × `height` units."""
    figure = Figure(figsize=(WIDTH[wide] / 72, height / 72), layout=layout)
    if layout == "constrained":
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.08, h_pad=0.06, wspace=0.02, hspace=0.02)
    return figure


def _panels(wide: bool, facts: Facts, height: int) -> tuple[Figure, dict[str | None, Axes]]:
    """Small axes on one scale: one for each projection, and one (None) for what is outside blocks."""
    names: list[str | None] = [*facts.projections[:PANELS], *([None] if facts.outside else [])]
    rows = math.ceil(len(names) / (4 if wide else 2))
    columns = max(math.ceil(len(names) / rows), 2)
    figure = _figure(wide, 70 + height * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    words = short_names(facts.projections)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    panels = dict(zip(names, grid.flat, strict=False))
    for name, axes in panels.items():
        whole = facts.outside if name is None else facts.of(name)
        nbytes = sum(place.nbytes.total() for place in whole)
        word = "outside blocks" if name is None else words[name]
        axes.set_title(clip(word, 22 if wide else 14))
        axes.set_title(size(nbytes), loc="right", color=LIGHT["muted"], fontsize="small")
        axes.tick_params(length=0)
    return figure, panels


def _places(facts: Facts, projection: str | None) -> list[Place]:
    return facts.outside[:BESIDE] if projection is None else facts.of(projection)


def _positions(facts: Facts, places: Sequence[Place]) -> list[int]:
    where = {depth: index for index, depth in enumerate(facts.depths)}
    return [where[place.depth] for place in places if place.depth is not None]


def _name_depths(axis: Axis, depths: Sequence[int], most: int) -> None:
    """Labels the depths that lie side by side along an axis, at most so many of them."""

    def name(position: float, _: object) -> str:
        whole = round(position)
        return str(depths[whole]) if whole == position and 0 <= whole < len(depths) else ""

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(name))


def _plain_numbers(*axes: Axis) -> None:
    """Writes 0.01 rather than a power, and only at the major ticks of a logarithmic scale."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _depth_ticks(axes: Axes, facts: Facts, projection: str | None, wide: bool) -> None:
    if projection is None:
        names = [p.projection.rpartition(".")[2] for p in facts.outside[:BESIDE]]
        few = len(names) <= (2 if wide else 1)
        turn: dict[str, Any] = {} if few else {"rotation": 90}
        axes.set_xticks(range(len(names)), [clip(name, 14) for name in names], **turn)
        axes.set_xlim(-0.8, len(names) - 0.2)
        return
    _name_depths(axes.xaxis, facts.depths, 5 if wide else 4)
    axes.set_xlim(-0.8, len(facts.depths) - 0.2)


def _bytes_of(place: Place, kind: str) -> int:
    if kind != "rest":
        return place.nbytes[kind]
    return place.nbytes.total() - sum(place.nbytes[code] for code in CODES)


def _steps(axes: Axes, at: Sequence[int], above: Any, below: Any, colour: str) -> None:
    """Bars of width 1, as one shape for each run of neighbours: a page of 80 layers stays small."""
    cuts = [0, *(i for i in range(1, len(at)) if at[i] != at[i - 1] + 1), len(at)]
    for start, stop in pairwise(cuts):
        edges = np.arange(at[start], at[stop - 1] + 2) - 0.5
        axes.stairs(
            above[start:stop], edges, baseline=below[start:stop], fill=True, color=colour, lw=0
        )


def _classes(values: np.ndarray) -> list[float]:
    """Bounds of classes, at most as many as there are shades: round numbers, the first 0."""
    positive = values[values > 0]
    if not len(positive):
        return [0.0, 1.0]
    low, high = float(positive.min()), float(positive.max())
    choices = [_marks(scale, low, high) for scale in SCALES]
    bounds = next((c for c in choices if len(c) <= STEPS + 1), choices[-1][-STEPS - 1 :])
    return [0.0, *bounds[1:]]


def _marks(mantissas: Sequence[float], low: float, high: float) -> list[float]:
    """Round numbers from the last below `low` to the first not below `high`, at least two."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [float(f"{m}e{power}") for power in powers for m in mantissas]
    first = max(i for i, mark in enumerate(marks) if mark < low)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    return marks[first : last + 1]


def _shades(count: int) -> list[str]:
    """That many shades of the ramp, the strongest last."""
    steps = np.linspace(0 if count == STEPS else 1, STEPS - 1, count) if count > 1 else [STEPS - 1]
    return [ramp("heat")[round(step)] for step in steps]


def _legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside upper left",
            ncols=columns,
            handlelength=1.2,
            handleheight=0.9,
            columnspacing=1.2,
            borderaxespad=0,
            borderpad=0.3,
        )
