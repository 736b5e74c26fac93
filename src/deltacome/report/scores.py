"""What `deltacome eval --json` printed, read back: scores and divergences by ratio."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltacome.errors import DeltaError


@dataclass(frozen=True)
class Score:
    """Of one model."""

    name: str
    score: float | None
    low: float | None
    """Of the 95 % interval, as `high`."""
    high: float | None
    kl_task: float | None
    """KL to the tuned model in nats a token, as `kl_text`."""
    kl_text: float | None
    artifact: str | None = None
    """SHA-256 of an artifact's manifest; None for base and tuned, as what follows."""
    method: str | None = None
    nbytes: int | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Exam:
    """One task: base, tuned if it was given, and deltas."""

    task: str
    metric: str
    questions: int | None
    models: tuple[Score, ...]

    @property
    def deltas(self) -> list[Score]:
        """The smallest ratio first."""
        found = [model for model in self.models if model.ratio is not None]
        return sorted(found, key=lambda model: model.ratio or 0)

    @property
    def percent(self) -> bool:
        """Whether scores are shares of something."""
        values = [v for m in self.models for v in (m.score, m.low, m.high) if v is not None]
        return all(0 <= value <= 1 for value in values)

    def dense(self, name: str) -> Score | None:
        """`base` or `tuned`."""
        return next((m for m in self.models if m.name == name and m.ratio is None), None)


def read_scores(files: Sequence[Path]) -> list[Exam]:
    """The exams of all files; deltas that were asked the same are put together.

    Raises:
        DeltaError: a file cannot be read, or is not what `deltacome eval --json` prints.
    """
    exams: dict[tuple[str, str, int | None], Exam] = {}
    for file in files:
        for exam in _read(file):
            key = (exam.task, exam.metric, exam.questions)
            known = exams.get(key, replace(exam, models=()))
            new = tuple(model for model in exam.models if model not in known.models)
            exams[key] = replace(known, models=known.models + new)
    return list(exams.values())


def _read(file: Path) -> list[Exam]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if "task" in document:
            models = tuple(_score(model, model) for model in document["models"])
            return [Exam(_label(document["task"]), "exact match", int(document["n"]), models)]
        return [
            _harness_exam(document["models"], task) for task in document["models"][0]["results"]
        ]
    except OSError as error:
        raise DeltaError(f"{file}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DeltaError(
            f"{file}: expected what deltacome eval --json prints, got something else "
            f"({type(error).__name__}: {error})"
        ) from error


def _harness_exam(models: list[dict[str, Any]], task: str) -> Exam:
    """A task of lm-eval, by its first metric."""
    keys = list(models[0]["results"][task])
    metric, *_ = (key for key in keys if "stderr" not in key and "sample_len" not in key)
    name, _, form = metric.partition(",")

    def score(model: dict[str, Any]) -> Score:
        figures = model["results"][task]
        half = 1.96 * figures.get(f"{name}_stderr,{form}", 0.0)
        value = figures[metric]
        return _score(
            model, {"score": value, "score_low": value - half, "score_high": value + half}
        )

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


def _label(task: str) -> str:
    """Of a file, its folder and its name: where that lies is of no use to a reader elsewhere."""
    return "/".join(Path(task).parts[-2:])
