"""Reads back what `deltacome eval --json` printed: scores and divergences by ratio."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltacome.errors import DeltaError
from deltacome.format.card import harness_metrics

NO_SHARES = ("bits_per_byte", "perplexity", "byte_perplexity", "word_perplexity", "brier_score")
"""Metrics of lm-eval that may lie between 0 and 1, but are not shares of something."""


@dataclass(frozen=True)
class Score:
    """The scores of one model."""

    name: str
    score: float | None
    low: float | None
    """Lower end of the 95 % interval, `high` the upper; None where none is known."""
    high: float | None
    kl_task: float | None
    """KL to the tuned model in nats per token, like `kl_text`."""
    kl_text: float | None
    artifact: str | None = None
    """SHA-256 of an artifact's manifest; None for base and tuned, like the fields below."""
    method: str | None = None
    nbytes: int | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Exam:
    """One task: base, tuned if it was given, and deltas."""

    task: str
    """The task, and how it was asked where that differs from the default."""
    metric: str
    questions: int | None
    models: tuple[Score, ...]

    @property
    def deltas(self) -> list[Score]:
        """Those of deltas, the smallest ratio first."""
        found = [model for model in self.models if model.ratio is not None]
        return sorted(found, key=lambda model: model.ratio or 0)

    @property
    def percent(self) -> bool:
        """Whether all scores are shares, from 0 to 1; ends of an interval may lie outside."""
        return not self.metric.startswith(NO_SHARES) and all(
            m.score is None or 0 <= m.score <= 1 for m in self.models
        )

    def dense(self, name: str) -> Score | None:
        """The scores of `base` or `tuned`, if there are any."""
        return next((m for m in self.models if m.name == name and m.ratio is None), None)


def read_scores(files: Sequence[Path]) -> list[Exam]:
    """The exams of all files; models that were asked the same are put together.

    Raises:
        DeltaError: a file cannot be read, or is not what `deltacome eval --json` prints.
    """
    exams: list[Exam] = []
    for file in files:
        for exam in _read(file):
            at = next((i for i, known in enumerate(exams) if _together(known, exam)), len(exams))
            known = exams[at] if at < len(exams) else replace(exam, models=())
            new = tuple(model for model in exam.models if model not in known.models)
            exams[at : at + 1] = [replace(known, models=known.models + new)]
    return exams


def _together(one: Exam, other: Exam) -> bool:
    """Whether two exams asked the same, of the same base and fine-tune as far as their scores tell."""
    asked = (one.task, one.metric, one.questions) == (other.task, other.metric, other.questions)
    pairs = [(one.dense(name), other.dense(name)) for name in ("base", "tuned")]
    return asked and all(not (a and b) or a.score == b.score for a, b in pairs)


def _read(file: Path) -> list[Exam]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if "task" in document:
            models = tuple(_score(model, model) for model in document["models"])
            label = _label(document["task"]) + _how(document)
            return [Exam(label, "exact match", int(document["n"]), models)]
        exams = _harness_exams(document["models"])
        return [replace(exam, task=exam.task + _how(document)) for exam in exams]
    except OSError as error:
        raise DeltaError(f"{file}: cannot be read: {error}") from error
    except (
        *(ValueError, KeyError, TypeError, IndexError, AttributeError),
        *(RecursionError, OverflowError),
    ) as error:
        raise DeltaError(
            f"{file}: expected what deltacome eval --json prints, got something else "
            f"({type(error).__name__}: {error})"
        ) from error


def _harness_exams(models: list[dict[str, Any]]) -> list[Exam]:
    """Tasks of lm-eval, each by its first metric; a group may have none of its own."""
    metrics = {
        task: next(harness_metrics(found), None) for task, found in models[0]["results"].items()
    }
    exams = [_harness_exam(models, task, metric) for task, metric in metrics.items() if metric]
    if not exams:
        raise ValueError(f"expected a metric of a task, got {list(metrics)!r:.80}")
    return exams


def _harness_exam(models: list[dict[str, Any]], task: str, metric: str) -> Exam:
    name, _, form = metric.partition(",")

    def score(model: dict[str, Any]) -> Score:
        figures = model["results"][task]
        value, error = figures[metric], figures.get(f"{name}_stderr,{form}")
        low = high = None
        if error:  # 0 means equal answers to few questions, and bounds nothing
            low, high = value - 1.96 * error, value + 1.96 * error
        return _score(model, {"score": value, "score_low": low, "score_high": high})

    return Exam(task, metric.removesuffix(",none"), None, tuple(map(score, models)))


def _score(model: dict[str, Any], figures: dict[str, Any]) -> Score:
    names = ("score", "score_low", "score_high", "kl_task", "kl_text")
    score, low, high, kl_task, kl_text = (
        None if figures.get(name) is None else _finite(figures[name]) for name in names
    )
    found = Score(str(model["name"]), score, low, high, kl_task, kl_text)
    if found.name in ("base", "tuned") and "ratio" not in model:
        return found
    ratio = _finite(model["ratio"], above=0)
    return replace(
        found,
        artifact=str(model["artifact"]),
        method=str(model["method"]),
        nbytes=int(model["bytes"]),
        ratio=ratio,
    )


def _finite(value: Any, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r:.80}")
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"expected a finite number, got {value!r:.80}")
    return float(value)


USUAL = {"seed": 0, "dtype": "float32", "chat": False, "max_new_tokens": 64}
"""What goes without saying: the defaults of `deltacome eval`."""


def _how(document: dict[str, Any]) -> str:
    """`, seed 1`: how it was asked. Models that were asked differently must not be compared."""
    names = ("seed", "task_args", "shots", "limit", "chat", "dtype", "max_new_tokens", "text")
    found = {name: document.get(name, USUAL.get(name)) for name in names}
    found["text"] = found["text"] and _label(found["text"])
    said = (f", {n} {found[n]}" for n in names if found[n] not in (None, USUAL.get(n)))
    return "".join(said)


def _label(task: str) -> str:
    """Folder and name of a task's file: the rest of its path is of no use to a reader elsewhere."""
    return "/".join(Path(task).parts[-2:])
