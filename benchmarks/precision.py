"""The paper's order of errors on a real pair: rounding > GPTQ; single > double > triple precision.

    python benchmarks/precision.py work/base work/sums --calibration work/text.txt

All variants have the same bytes on disk and the same calibration text. The error is the mean over
the linears of blocks of ‖(D − D̂)X‖² / ‖DX‖², X being the inputs that reach the linear in the model
compressed so far. Exits with 1 if the order does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import deltacome
from deltacome.methods.delta_come import DeltaCome
from deltacome.methods.template import PRECISIONS, parse_template

VARIANTS = [("triple", False), ("single", True), ("double", True), ("triple", True)]


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    errors = {}
    print("| precision | rounding | mean error of linears | ratio on disk |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for precision, gptq in VARIANTS:
            artifact = deltacome.compress(
                options.base,
                options.tuned,
                Path(folder) / f"{precision}-{gptq}",
                method=DeltaCome(parse_template(PRECISIONS[precision]), gptq=gptq),
                ratio=options.ratio,
                calibration=options.calibration,
                samples=options.samples,
                seq_len=options.seq_len,
            )
            records = artifact.manifest.records.values()
            of_linears = [
                r.error for r in records if r.error is not None and ".embed" not in r.name
            ]
            errors[precision, gptq] = sum(of_linears) / len(of_linears)
            rounding = "GPTQ" if gptq else "nearest"
            print(
                f"| {precision} `{PRECISIONS[precision]}` | {rounding} | "
                f"{errors[precision, gptq]:.5f} | {artifact.ratio():.2f} |",
                flush=True,
            )
    holds = errors["triple", False] > errors["triple", True]
    holds &= errors["single", True] > errors["double", True] > errors["triple", True]
    print(f"\nnearest > GPTQ and single > double > triple: {'holds' if holds else 'DOES NOT HOLD'}")
    sys.exit(0 if holds else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Errors by precision and rounding, equal bytes.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--calibration", required=True, help=".txt or .jsonl file")
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, help="where temporary artifacts go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
