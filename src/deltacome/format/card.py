"""The model card of an artifact: metadata that the Hub reads, and tables of sizes, errors and scores.

Compression writes it into the folder, and a push writes it again, when the name and perhaps the scores
are known; a card without `MARK` has been written by somebody and keeps its text. Scores are those of
`deltacome eval --json`, accepted only if they were measured on this artifact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deltacome.errors import MismatchError
from deltacome.format.hub import NAME
from deltacome.format.manifest import Record

if TYPE_CHECKING:
    from deltacome.format.artifact import Artifact

FIGURES = {"score": "exact match", "kl_task": "KL on the task", "kl_text": "KL on general text"}
"""Figures of `evals.run.evaluate` → names in the card; KL is in nats per token, from the tuned model."""

MARK = (
    "<!-- Written by deltacome, and anew when it is pushed: without this line your words stay. -->"
)

COMMIT = re.compile(r"[\w.-]+", re.ASCII)
"""What a base's revision must look like to be written into commands."""

Figure = tuple[str, str, str, dict[str, float | None]]
"""Task, metric, the metric's pretty name, and its value for `base`, `tuned` and `delta`."""


def model_card(
    artifact: Artifact, name: str | None = None, scores: Sequence[dict[str, Any]] = ()
) -> ModelCard:
    """`README.md` of an artifact.

    Args:
        artifact: opened.
        name: the name its readers use, `org/name`; None for readers who are in its folder.
        scores: results of `evals.run.evaluate` or `evals.harness.run_harness`.

    Raises:
        MismatchError: the scores are those of another artifact, or no scores.
    """
    base, revision = artifact.manifest.base_name_or_path, artifact.manifest.base_revision
    # A path on one machine is of no use to a reader elsewhere; a base from the Hub has its commit.
    # Anything else is kept out of the commands that readers copy: the artifact may be anybody's.
    name_of_hub = NAME.fullmatch(base)
    linked = bool(name_of_hub and not name_of_hub["revision"] and COMMIT.fullmatch(revision or ""))
    try:
        figures = [figure for result in scores for figure in _figures(artifact, result)]
        table = _scores(figures)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MismatchError(
            f"scores: expected what `deltacome eval --json` prints, got {error!r}"
        ) from error
    data = ModelCardData(
        base_model=base if linked else None,
        base_model_relation="adapter",
        library_name="deltacome",
        tags=["deltacome", "delta-compression"],
        model_name=(name or "delta").rpartition("/")[2] if figures else None,  # goes with results
        eval_results=_eval_results(figures) or None,
    )
    called = base if linked else Path(base).name
    text = "\n".join(
        [
            MARK,
            *_heading(artifact, name, called),
            *_sizes(artifact),
            *_errors(artifact),
            *table,
            *_usage(artifact, name or ".", base if linked else "BASE"),
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _heading(artifact: Artifact, name: str | None, base: str) -> list[str]:
    manifest = artifact.manifest
    said = [
        f"{key if key.isidentifier() else _code(key)} {_code(value)}"
        for key, value in manifest.method.items()
        if key != "name"
    ]
    options = f" with {', '.join(said)}" if said else ""
    revision = f" at revision {_code(manifest.base_revision)}" if manifest.base_revision else ""
    return [
        f"# {name or 'Delta of a full fine-tune'}",
        "",
        f"What a full fine-tune changed in {_code(base)}{revision}. Method "
        f"{_code(manifest.method['name'])}{options}. "
        "It runs only on that base, which is checked.",
        "",
    ]


def _code(text: object) -> str:
    """Text from an artifact as inline code that cannot end the line or table cell it is in."""
    return "`" + "".join(c if c.isprintable() and c not in "`|" else "�" for c in str(text)) + "`"


def _sizes(artifact: Artifact) -> list[str]:
    manifest, nominal = artifact.manifest, artifact.manifest.nominal_ratio()
    kinds: dict[str, list[int]] = {}
    for record in manifest.records.values():
        kinds.setdefault(record.held, []).append(record.nbytes(manifest.group_size))
    return [
        "| size | |",
        "|---|---:|",
        f"| tuned model at 16 bit | {manifest.tuned_nbytes():,} bytes |",
        f"| this artifact on disk | {artifact.bytes_on_disk():,} bytes |",
        f"| ratio, everything counted | {artifact.ratio():.2f} |",
        f"| nominal ratio (codes only) | {'–' if nominal is None else f'{nominal:.2f}'} |",
        *(
            f"| tensors held as `{kind}` | {len(sizes)}, {sum(sizes):,} bytes |"
            for kind, sizes in sorted(kinds.items())
        ),
        "",
    ]


def _errors(artifact: Artifact) -> list[str]:
    """Errors by projection: tensors whose names differ only in block or expert numbers share a row."""
    groups: dict[str, list[Record]] = {}
    for record in artifact.manifest.records.values():
        if record.error is not None:
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", record.name), []).append(record)
    if not groups:
        return []
    size = artifact.manifest.group_size
    lines = ["| matrices | count | bytes | mean error | largest |", "|---|---:|---:|---:|---:|"]
    for name, records in groups.items():
        errors = [record.error for record in records if record.error is not None]
        mean, worst = math.fsum(errors) / len(errors), max(errors)
        nbytes = sum(record.nbytes(size) for record in records)
        lines.append(f"| {_code(name)} | {len(records)} | {nbytes:,} | {mean:.3g} | {worst:.3g} |")
    said = (
        "Errors are ‖(D − D̂)X‖² / ‖DX‖² for a matrix's delta D; X is its calibration inputs, or the "
        "identity where there were none."
    )
    return [*lines, "", said, ""]


def _scores(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return []
    lines = ["| task | metric | base | tuned | this delta |", "|---|---|---:|---:|---:|"]
    for task, _, pretty, values in figures:
        cells = [_number(values.get(whose)) for whose in ("base", "tuned", "delta")]
        lines.append(f"| {task} | {pretty} | {' | '.join(cells)} |")
    return [*lines, "", "KL is from the tuned model, in nats per token.", ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _usage(artifact: Artifact, name: str, base: str) -> list[str]:
    from deltacome.format.artifact import TUNED_CONFIG_FILE  # which imports this module

    revision = None if base == "BASE" else artifact.manifest.base_revision
    called = f"{base}@{revision}" if revision else base
    at = f', revision="{revision}"' if revision else ""
    tenant = re.sub(r"\W+", "-", name.rpartition("/")[2]).strip("-") or "tuned"
    imports = ["import deltacome", "from transformers import AutoModelForCausalLM"]
    model = f'AutoModelForCausalLM.from_pretrained("{base}"{at})'
    config = artifact.json_file(TUNED_CONFIG_FILE) or {}
    if "ForConditionalGeneration" in str(config.get("architectures")):
        # It takes pictures, or has an encoder: the base may be of another class, with the same weights.
        imports, model = imports[:1], f'deltacome.base_for("{called}", "{name}")'
    return [
        "```bash",
        "# with deltacome installed from its source",
        f'deltacome generate {called} "your prompt" --delta {name}',
        f"deltacome merge {called} {name} -o dense    # the tuned model, as a normal checkpoint",
        f"deltacome serve {called} --tenant {tenant}={name}",
        "```",
        "",
        "```python",
        *imports,
        "",
        f"model = {model}",
        f'with deltacome.attach(model, "{name}"):',
        "    ...  # it is the tuned model now",
        "```",
        "",
    ]


def _figures(artifact: Artifact, result: dict[str, Any]) -> Iterator[Figure]:
    rows = _rows(artifact, result)
    if "task" in result:
        task = Path(result["task"]).name  # a file of questions has its path on one machine
        for metric, pretty in FIGURES.items():
            values = {whose: row.get(metric) for whose, row in rows.items()}
            if values["delta"] is not None:
                name = "exact_match" if metric == "score" else metric
                yield task, name, f"{pretty}, {result['n']} questions", values
        return
    for task, metrics in rows["delta"]["results"].items():
        for metric in harness_metrics(metrics):
            values = {
                whose: row["results"].get(task, {}).get(metric) for whose, row in rows.items()
            }
            yield task, metric.partition(",")[0], metric.removesuffix(",none"), values


def harness_metrics(figures: Iterable[str]) -> Iterator[str]:
    """The names of metrics among those of lm-eval's figures, without standard errors and counts."""
    return (name for name in figures if "stderr" not in name and "sample_len" not in name)


def _rows(artifact: Artifact, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of base, tuned model and this artifact."""
    models = list(result["models"])
    rows = {m["name"]: m for m in models if "artifact" not in m}
    ours = [m for m in models if m.get("artifact") == artifact.digest]
    if not ours:
        others = [m["name"] for m in models if "artifact" in m]
        raise MismatchError(
            f"{artifact.path}: expected scores of this artifact, got those of "
            f"{', '.join(others) or 'none'}"
        )
    return {"delta": ours[0]} | {key: rows[key] for key in ("base", "tuned") if key in rows}


def _eval_results(figures: Sequence[Figure]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=pretty,
            metric_value=values["delta"],
        )
        for task, metric, pretty, values in figures
    ]
