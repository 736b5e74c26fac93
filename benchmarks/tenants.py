"""Does a delta keep the score? Base, tuned and deltas at several ratios, for several tenants.

    python benchmarks/tenants.py work/base work/sums work/spell work/sort -o work/tenants \
        --report docs/results/tenants.md

Each tenant is a folder made by `examples/tenants/finetune.py`. Existing artifacts are reused. KL and
scores are computed in float32: in bfloat16 the arithmetic alone differs by about as much as a good
delta does.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from origin import command, origin

import deltacome
from deltacome.evals.run import evaluate


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    header = _header(options)
    lines = [
        "| tenant | model | exact match % (95 %) | of tuned % | KL task | KL text | bytes on disk "
        "| ratio on disk | nominal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tenant in options.tenants:
        lines += _rows(tenant, options)
        print("\n".join(lines[-2 - len(options.ratios) :]), flush=True)
    report = header + "\n".join(lines) + "\n"
    print(report)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(report)


def _rows(tenant: Path, options: argparse.Namespace) -> list[str]:
    folders = []
    for ratio in options.ratios:
        asked = f"{options.calibration} {options.samples} {options.seq_len}"
        digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
        folder = options.output / f"{tenant.name}-{ratio:g}-{digest}"
        if not folder.exists():
            deltacome.compress(
                options.base,
                tenant,
                folder,
                ratio=ratio,
                calibration=options.calibration,
                samples=options.samples,
                seq_len=options.seq_len,
                resume=True,
            )
        folders.append(folder)
    result = evaluate(
        options.base,
        tuned=tenant,
        deltas=folders,
        task=str(tenant / "heldout.jsonl"),
        n=options.n,
        dtype="float32",
        batch_size=32,
        max_new_tokens=options.max_new_tokens,
    )
    base, tuned, *deltas = result["models"]
    tuned_bytes = deltacome.Artifact.open(folders[0]).manifest.tuned_nbytes()
    rows = [_row(tenant.name, base, tuned, None, None), _row("", tuned, tuned, tuned_bytes, None)]
    for model, folder in zip(deltas, folders, strict=True):
        artifact = deltacome.Artifact.open(folder)
        rows.append(_row("", model, tuned, artifact.bytes_on_disk(), artifact))
    return rows


def _row(
    tenant: str,
    model: dict[str, Any],
    tuned: dict[str, Any],
    nbytes: int | None,
    artifact: deltacome.Artifact | None,
) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    def nats(value: float | None) -> str:
        return "–" if value is None else f"{value:.5f}"

    score = percent(model["score"])
    interval = f"{percent(model['score_low'])}–{percent(model['score_high'])}"
    kept = None if model["score"] is None or not tuned["score"] else model["score"] / tuned["score"]
    nominal = artifact.manifest.nominal_ratio() if artifact else None
    cells = [
        tenant,
        model["name"] if artifact is None else f"delta 1/{artifact.ratio():.0f}",
        f"{score} ({interval})",
        percent(kept),
        nats(model["kl_task"]),
        nats(model["kl_text"]),
        "–" if nbytes is None else f"{nbytes:,}",
        "–" if artifact is None else f"{artifact.ratio():.2f}",
        "–" if nominal is None else f"{nominal:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _header(options: argparse.Namespace) -> str:
    return (
        "# Tenants: what a delta keeps\n\n"
        f"`{command()}`, calibration `{options.calibration}` ({options.samples} rows of up to "
        f"{options.seq_len} tokens), {options.n} held-out questions, float32, deltas run from packed "
        f"bytes. {origin()} {torch.get_num_threads()} threads.\n\n"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score and KL of deltas, in one table.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tenants", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("work/tenants"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[16, 32])
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
