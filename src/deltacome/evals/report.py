"""The tables of `run.evaluate` and `harness.run_harness` for a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from deltacome.format.card import harness_metrics
from deltacome.format.clip import clip


def table(result: dict[str, Any]) -> Table:
    """The table of what `run.evaluate` returns.

    Columns: score with its 95 % interval, KL on the task and on general text in nats per token, with
    standard errors; bytes on disk and ratio if there is a delta.

    A dash stands for what was not measured.
    """
    sizes = any("ratio" in model for model in result["models"])
    shown = Table(title=Text(clip(f"{result['task']}, {result['n']} questions")))
    shown.add_column("model")
    for column in ("score %", "95 %", "KL task", "KL text", *(("MB", "ratio") if sizes else ())):
        shown.add_column(column, justify="right")
    for model in result["models"]:
        low, high = model["score_low"], model["score_high"]
        interval = "-" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
        cells = ["-" if model["score"] is None else f"{100 * model['score']:.1f}", interval]
        for kl in ("kl_task", "kl_text"):
            cells.append(nats(model[kl], model.get(f"{kl}_error")))
        if sizes:
            known = "ratio" in model
            cells.append(f"{model['bytes'] / 1e6:.1f}" if known else "-")
            cells.append(f"{model['ratio']:.1f}" if known else "-")
        shown.add_row(Text(clip(model["name"])), *cells)
    return shown


def harness_table(result: dict[str, Any]) -> Table:
    """A row for each task and metric of lm-eval, a column for each model."""
    models = result["models"]
    shown = Table(title=Text(clip(f"lm-eval: {', '.join(result['tasks'])}")))
    shown.add_column("task, metric")
    for model in models:
        shown.add_column(Text(clip(model["name"])), justify="right")
    for task, metrics in models[0]["results"].items():
        for metric in harness_metrics(metrics):
            values = [model["results"][task][metric] for model in models]
            shown.add_row(
                Text(clip(f"{task}, {metric.split(',none')[0]}")), *(f"{v:.4f}" for v in values)
            )
    return shown


def nats(value: float | None, error: float | None = None) -> str:
    """A KL with its standard error, to five decimals, or to two significant digits below 0.0001."""
    if value is None:
        return "-"
    figures = (value, error) if error else (value,)
    return " ± ".join(f"{x:.2g}" if value < 1e-4 or x < 1e-5 else f"{x:.5f}" for x in figures)
