"""What the page says: for each figure a heading, the finding in a sentence, the numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from deltacome.format.clip import clip
from deltacome.report import figures
from deltacome.report.facts import CODES, KINDS, Facts, Place
from deltacome.report.scores import Exam
from deltacome.report.words import KIND_WORDS, number, share, short_names, size

LISTED = 6
"""Errors outside blocks that a sentence has at most."""


@dataclass(frozen=True)
class Section:
    """One figure of the report and what goes with it."""

    key: str
    title: str
    finding: str
    """What the figure shows, from its numbers; a screen reader reads it out too."""
    note: str
    """How to read it."""
    draw: Callable[..., Figure]
    """A function of `figures`; `subject` is what it draws."""
    subject: tuple[Facts | Sequence[Exam], ...]
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sections(facts: Facts, exams: Sequence[Exam]) -> list[Section]:
    """The sections that the artifact has something to show in."""
    found = [_bytes(facts)]
    if any(place.nbytes for place in facts.places):
        found.append(_widths(facts))
    if any(place.error is not None and place.depth is not None for place in facts.places):
        found.append(_errors(facts))
    if any((place.spectrum > 0).any() for place in facts.places):
        found.append(_spectra(facts))
    if any(exam.deltas for exam in exams):
        found.append(_scores(facts, exams))
    return found


def _bytes(facts: Facts) -> Section:
    codes = sum(facts.nbytes[kind] for kind in CODES) / facts.bytes_on_disk
    there = {kind: facts.nbytes[kind] for kind in KINDS if facts.nbytes[kind]}
    rows = [(KIND_WORDS[k], f"{n:,}", share(n / facts.bytes_on_disk)) for k, n in there.items()]
    return Section(
        "bytes",
        "Bytes by kind",
        f"{size(facts.bytes_on_disk)} on disk in place of {size(facts.tuned_nbytes)}: a ratio of "
        f"{facts.ratio:.2f}. {share(codes)} of the bytes on disk are codes.",
        "Everything on disk is counted: weight files with their headers, index and manifest. "
        f"Tokenizer, configuration and the like ({size(facts.beside_nbytes)}) are counted on neither "
        "side.",
        figures.bytes_by_kind,
        (facts,),
        ("kind", "bytes", "share"),
        [*rows, ("total", f"{facts.bytes_on_disk:,}", share(1))],
    )


def _widths(facts: Facts) -> Section:
    kinds = [kind for kind in facts.codes if kind != "signs"]
    names = _names(facts)
    rows = [
        (
            *_where(names, place),
            *(f"{place.directions[k]:,}" for k in kinds),
            f"{place.nbytes.total():,}",
            f"{place.bits:.3f}",
        )
        for place in facts.places
    ]
    most, least = (choose(facts.places, key=lambda place: place.bits) for choose in (max, min))
    if most.bits - least.bits < 5e-4:
        finding = f"Every matrix has {most.bits:.2f} bits per weight."
    else:
        finding = (
            f"From {least.bits:.2f} bits per weight ({_name(names, least)}) to {most.bits:.2f} "
            f"({_name(names, most)})."
        )
    header = ("matrix", "layer", *(f"{k}-bit directions" for k in kinds))
    return Section(
        "widths",
        "Where the bits went",
        finding,
        "Each panel is one projection, with its total bytes over all layers; layers run from left to "
        "right. A matrix of 16-bit weights would reach 16." + _undrawn(facts),
        figures.widths,
        (facts,),
        (*header, "bytes", "bits per weight"),
        rows,
    )


def _errors(facts: Facts) -> Section:
    names = _names(facts)
    known = [place for place in facts.places if place.error is not None]
    worst = max(known, key=lambda place: place.worst or 0)
    outside = [f"{_name(names, p)} {number(p.error)}" for p in facts.outside if p.error is not None]
    more = f" and {len(outside) - LISTED} more" if len(outside) > LISTED else ""
    beside = f" Outside blocks: {', '.join(outside[:LISTED])}{more}." if outside else ""
    if facts.dropped:
        beside += f" Matrices left as in the base, with an error of 1: {facts.dropped:,}."
    return Section(
        "errors",
        "Error by layer",
        f"{number(facts.mean_error)} on average, {number(worst.worst)} at most: {_name(names, worst)}."
        + beside,
        "‖(D − D̂)X‖² / ‖DX‖² for the delta D of a matrix, measured when it was compressed; X holds its "
        "calibration inputs, or is the identity where there were none."
        + _undrawn(facts, outside=False),
        figures.errors,
        (facts,),
        ("matrix", "layer", "error"),
        [(*_where(names, place), number(place.error, 4)) for place in known],
    )


def _spectra(facts: Facts) -> Section:
    names = _names(facts)
    places = [place for place in facts.places if (place.spectrum > 0).any()]
    rows = []
    for place in places:
        s = place.spectrum
        ends = (number(float(s[0])), number(float(s[len(s) // 2])), number(float(s[-1])))
        rows.append((*_where(names, place), f"{len(s):,}", *ends, f"{_half(s):,}"))
    halves = median(_half(place.spectrum) for place in places)
    kept = median(len(place.spectrum) for place in places)
    return Section(
        "spectra",
        "Spectra of the deltas",
        f"Half of the squared norm of a matrix's bands lies in its first {halves:g} of {kept:g} "
        "directions (medians).",
        "‖s u vᵀ‖ of each direction as it is stored, largest first: a singular value, up to "
        "quantisation, where the method takes a plain SVD. Colour shows depth"
        + (f"; {figures.LINES} layers are drawn." if len(facts.depths) > figures.LINES else ".")
        + _undrawn(facts),
        figures.spectra,
        (facts,),
        ("matrix", "layer", "directions", "largest", "middle", "smallest", "half of ‖·‖² in"),
        rows,
    )


def _scores(facts: Facts, exams: Sequence[Exam]) -> Section:
    rows = []
    for exam in exams:
        for m in exam.models:
            low, high = _score(exam, m.low), _score(exam, m.high)
            interval = "–" if m.low is None else f"{low} to {high}"
            measured = (_score(exam, m.score), interval, number(m.kl_task), number(m.kl_text))
            nbytes = "–" if m.nbytes is None else f"{m.nbytes:,}"
            ratio = "–" if m.ratio is None else f"{m.ratio:.2f}"
            names = (clip(exam.task, 60), clip(m.name, 60), clip(m.method or "–", 20))
            rows.append((*names, nbytes, ratio, *measured))
    said = []
    for exam in exams:
        asked = "" if exam.questions is None else f", {exam.questions} questions"
        shown = {"base": exam.dense("base"), "tuned": exam.dense("tuned")}
        mine = [m for m in exam.deltas if m.artifact == facts.digest]
        shown |= {"this artifact": mine[0]} if mine else {}
        words = [f"{name} {_score(exam, m.score)}" for name, m in shown.items() if m is not None]
        said.append(f"{clip(exam.task, 60)}{asked}: {', '.join(words)}.")
    if not any(m.artifact == facts.digest for exam in exams for m in exam.deltas):
        said.append("This artifact is not among them.")
    return Section(
        "scores",
        "Score against ratio",
        " ".join(said),
        "Bars are 95 % intervals. "
        "A smaller KL is better; the tuned model, which it is measured against, has none.",
        figures.scores,
        (exams, facts),
        ("task", "model", "method", "bytes", "ratio", "score", "95 %", "KL task", "KL text"),
        rows,
    )


def _score(exam: Exam, value: float | None) -> str:
    return share(value) if exam.percent and value is not None else number(value)


def _undrawn(facts: Facts, *, outside: bool = True) -> str:
    """What a figure leaves out for lack of room, as a sentence with a space before it."""
    there = {"projections": (len(facts.projections), figures.PANELS)}
    if outside:
        there["matrices outside blocks"] = (len(facts.outside), figures.BESIDE)
    said = [f"{most} of {n} {what}" for what, (n, most) in there.items() if n > most]
    return f" Drawn are {' and '.join(said)}; the numbers below have all." if said else ""


def _names(facts: Facts) -> dict[str, str]:
    return short_names(dict.fromkeys(place.projection for place in facts.places))


def _where(names: dict[str, str], place: Place) -> tuple[str, str]:
    return clip(names[place.projection], 60), "–" if place.depth is None else str(place.depth)


def _name(names: dict[str, str], place: Place) -> str:
    word = clip(names[place.projection], 40)
    return word if place.depth is None else f"{word} of layer {place.depth}"


def _half(spectrum: np.ndarray) -> int:
    """How many of the largest directions have half of the squared norm."""
    squares = np.cumsum(spectrum**2)
    return int(np.searchsorted(squares, squares[-1] / 2)) + 1
