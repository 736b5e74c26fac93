"""Time and peak memory of compressing one decoder block of Llama-2-7B geometry.

    python benchmarks/block.py work/block

Writes a pair of one-block checkpoints (random base; a long-tailed delta plus the rounding of
bfloat16), compresses it in a process of its own, with and without calibration, and prints where the
time went: cumulative seconds of our main functions. The embedding is left out (it is the same on
both sides), so the figures are those of one block. Those of a whole model are that times its blocks.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import pstats
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import deltacome
from deltacome.arch.checkpoint import Checkpoint

BLOCKS = 32
STEPS = {
    "survey": "survey of both checkpoints",
    "svd": "SVD",
    "gram": "grams (with the forward passes that feed them)",
    "factor_gram": "factors of grams",
    "quantize_v": "GPTQ of V",
    "quantize_u": "GPTQ of U",
    "relative_error": "measuring errors",
    "advance": "advancing hidden states",
}


def main() -> None:
    options = _parse()
    make_pair(options.folder, options.hidden, options.intermediate)
    if options.tokenizer:
        for file in options.tokenizer.glob("tokenizer*"):
            shutil.copy(file, options.folder / "tuned")
    for calibration in options.calibration:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            report = pool.apply(measure, (options, calibration))
        print(json.dumps(report, indent=1), flush=True)


def make_pair(folder: Path, hidden: int, intermediate: int) -> None:
    """Base and tuned with one block each: 405 MB in bfloat16 at 7B sizes."""
    if (folder / "tuned" / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=49152,
        dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_config(config)  # in the config's bfloat16
    model.save_pretrained(folder / "base")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            parameter.data = (parameter.float() + _long_tailed(parameter.shape)).to(torch.bfloat16)
    model.save_pretrained(folder / "tuned")


def _long_tailed(shape: torch.Size) -> torch.Tensor:
    """A delta whose singular values fall as a power law, of about 5 % of the base's norm."""
    directions = 256
    s = torch.arange(1, directions + 1).float().pow(-0.7)
    delta = torch.randn(shape[0], directions) * s @ torch.randn(directions, shape[1])
    return delta * (0.05 * 0.02 / delta.std())


def _whole_over_block(folder: Path) -> float:
    """Bytes of the whole model ÷ those of its block.

    A ratio counts whole models, but here only the block takes bytes.
    """
    tensors = Checkpoint(folder / "tuned").tensors
    sizes = {name: torch.Size(info.shape).numel() for name, info in tensors.items()}
    return sum(sizes.values()) / sum(n for name, n in sizes.items() if ".layers." in name)


def measure(options: argparse.Namespace, calibration: str) -> dict:
    """One compression. Runs in a process of its own, so that the peak is its own."""
    output = options.folder / "delta"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name("delta.partial"), ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    profile = cProfile.Profile()
    start = time.monotonic()
    profile.enable()
    artifact = deltacome.compress(
        options.folder / "base",
        options.folder / "tuned",
        output,
        ratio=options.ratio * _whole_over_block(options.folder),
        calibration=calibration,
        samples=options.samples,
        seq_len=options.seq_len,
    )
    profile.disable()
    seconds = time.monotonic() - start
    stats = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    spent = dict.fromkeys(STEPS, 0.0)
    for (file, _, function), (*_, cumulative, _) in stats.items():
        if "deltacome" in file and function in STEPS:
            spent[function] += cumulative
    errors = [r.error for r in artifact.manifest.records.values() if r.error is not None]
    block_bytes = sum(r.tuned_nbytes() for r in artifact.manifest.records.values() if r.plan)
    return {
        "calibration": calibration,
        "seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gib_before": round(before / 2**20, 2),
        "block_gib_at_16_bit": round(block_bytes / 2**30, 3),
        "mean_error": round(sum(errors) / len(errors), 4),
        "seconds_in": {STEPS[k]: round(v, 1) for k, v in spent.items()},
        f"hours_for_{BLOCKS}_blocks": round(BLOCKS * seconds / 3600, 2),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One block of 7B geometry: time and memory.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--tokenizer", type=Path, help="folder of one, for calibration files")
    parser.add_argument("--calibration", nargs="+", default=["none"], help="none, FILE.txt, …")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
