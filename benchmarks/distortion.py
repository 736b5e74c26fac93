"""What a direction loses when it is stored at a width: the figures of `methods.adaptive`.

    deltacome compress BASE TUNED -o DELTA --method adaptive --ratio 32 --sweeps work/sweeps
    python benchmarks/distortion.py BASE TUNED work/sweeps/…

Both vectors of the first directions of a matrix are stored at one width. The squared error that this
adds to the error of leaving out the rest is divided by the directions' weight, Σ σ², all under the
weights that the sweep measured. Prints the median over matrices of each kind, and the range.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from deltacome import Adaptive
from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression.sensitivity import measured
from deltacome.format.spec import Band
from deltacome.methods.method import Terms
from deltacome.numerics.weigh import weighted_spectrum, weighted_svd

WIDTHS = (2, 3, 4, 8)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Distortion of directions by width.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("sweep", type=Path, help="folder of a sweep, with a file for each matrix")
    parser.add_argument("--directions", type=int, default=24)
    parser.add_argument("--every", type=int, default=12, help="take one matrix in so many")
    options = parser.parse_args()
    base, tuned = Checkpoint(options.base), Checkpoint(options.tuned)
    names = sorted(file.stem for file in options.sweep.glob("*.safetensors"))
    found = defaultdict(list)
    for place, name in enumerate(names):
        weights = measured(options.sweep, name)
        diagonal = weights.outputs.ndim == 1
        if place % options.every and not diagonal:
            continue
        delta_OI = tuned.read(name).float() - base.read(name).float()
        for bits in WIDTHS:
            share = distortion(delta_OI, *weights, bits, options.directions)
            found["diagonal" if diagonal else "whole", bits].append(share)
    print("| G | bits | matrices | median | range |\n| --- | --: | --: | --: | --: |")
    for (kind, bits), shares in found.items():
        spread = f"{min(shares):.5f}–{max(shares):.5f}"
        print(f"| {kind} | {bits} | {len(shares)} | {median(shares):.5f} | {spread} |")


def distortion(delta_OI: Tensor, inputs: Tensor, outputs: Tensor, bits: int, count: int) -> float:
    """Squared error of the first directions at a width, divided by their weight."""
    method = Adaptive()

    def weight(error_OI: Tensor) -> float:
        return float(weighted_spectrum(error_OI, inputs, outputs, method.damping).double().sum())

    u_RO, s_R, v_RI = weighted_svd(delta_OI, count, inputs, outputs, method.damping)
    stored = method.pack(delta_OI, Terms((Band(bits, count),)), inputs, outputs)
    cut = weight(u_RO.T @ (s_R[:, None] * v_RI) - delta_OI)
    return (weight(stored.dense() - delta_OI) - cut) / float(s_R.double().square().sum())


if __name__ == "__main__":
    main()
