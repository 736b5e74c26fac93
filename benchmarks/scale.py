"""A pair of Llama-2-7B geometry: does compressing it stay within its memory, and how fast is it?

    python benchmarks/scale.py make work/7b                       # 27 GB, shard by shard
    python benchmarks/scale.py base work/7b                       # how fast another base is refused
    python benchmarks/scale.py run work/7b --stop-after 1         # survey all, compress one block
    python benchmarks/scale.py make work/1b --blocks 1
    python benchmarks/scale.py run work/1b --text work/text.txt --tokenizer work/base

The base is random; the delta has singular values that fall as a power law and the rounding of bfloat16. A
whole 7B takes hours on two cores: `run` measures a few blocks in a process of its own, prints seconds and
peak memory of each phase, the whole extrapolated from them, and the forecast of `deltacome plan`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from origin import origin
from safetensors.torch import save_file
from transformers import AutoTokenizer

import deltacome
from deltacome.arch.checkpoint import Checkpoint, full_digest, sample_digest
from deltacome.compression.forecast import forecast
from deltacome.errors import MismatchError
from deltacome.format.artifact import Artifact
from deltacome.format.folder import partial_of
from deltacome.format.manifest import Manifest, Record
from deltacome.format.writer import ArtifactWriter, Unit
from deltacome.runtime.base import Base

HIDDEN, INTERMEDIATE, VOCAB, BLOCKS = 4096, 11008, 32000, 32
BLOCK = {
    **{f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"},
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
OUTSIDE = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}


class Stopped(Exception):
    """Enough blocks were measured."""


def main() -> None:
    options = _parse()
    if options.step == "make":
        make_pair(options.folder, options.blocks)
    elif options.step == "base":
        print(json.dumps(wrong_base(options.folder), indent=1))
    else:
        where = origin()
        said = forecast(
            options.folder / "base",
            options.folder / "tuned",
            ratios=(options.ratio,),
            calibration=str(options.text or "none"),
            samples=options.samples,
            seq_len=options.seq_len,
        )
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (options,))
        report = {"origin": where, "measured": measured, "plan had said": asdict(said)}
        print(json.dumps(report, indent=1))


def make_pair(folder: Path, blocks: int) -> None:
    """Base and tuned, a shard for each block."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCAB,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }
    shards = [
        OUTSIDE,
        *({f"model.layers.{i}.{n}": s for n, s in BLOCK.items()} for i in range(blocks)),
    ]
    entries = sum(torch.Size(shape).numel() for shard in shards for shape in shard.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 4.2 * entries:
        sys.exit(
            f"the disk is too small: the pair takes {4 * entries / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        )
    for side in ("base", "tuned"):
        (folder / side).mkdir(exist_ok=True)
        (folder / side / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        base, tuned = {}, {}
        for key, shape in shapes.items():
            weight = torch.randn(shape, generator=generator) * 0.02 + (len(shape) == 1)
            base[key] = weight.to(torch.bfloat16)
            weight += 0.05 * 0.02 * _long_tailed(shape, generator)
            tuned[key] = weight.to(torch.bfloat16)
        save_file(base, folder / "base" / name, metadata={"format": "pt"})
        save_file(tuned, folder / "tuned" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
        print(f"{name}: written", flush=True)
    for side in ("base", "tuned"):
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / side / "model.safetensors.index.json").write_text(index)


def _long_tailed(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A delta of unit size whose singular values fall as a power law."""
    if len(shape) == 1:
        return torch.randn(shape, generator=generator)
    s = torch.arange(1, 65).float().pow(-0.7)
    left = torch.randn(shape[0], len(s), generator=generator) * s
    return left @ torch.randn(len(s), shape[1], generator=generator) / s.square().sum().sqrt()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peaks of a run, which may be stopped early. Runs in a process of its own."""
    output = options.folder / "delta"
    for folder in (output, partial_of(output)):
        shutil.rmtree(folder, ignore_errors=True)
    if options.tokenizer:
        # Trained anew, so that its token ids fit into the vocabulary.
        texts = options.text.read_text().splitlines()
        kind = AutoTokenizer.from_pretrained(options.tokenizer)
        kind.train_new_from_iterator(texts, VOCAB).save_pretrained(options.folder / "tuned")
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    start = last = time.monotonic()

    def progress(step: Any) -> None:
        nonlocal last
        now = time.monotonic()
        seconds.setdefault(step.phase, []).append(now - last)
        peaks[step.phase] = _peak_gib()
        last = now
        if step.phase == "blocks" and step.done == options.stop_after:
            raise Stopped

    before = _peak_gib()
    artifact = None
    with contextlib.suppress(Stopped):
        artifact = deltacome.compress(
            options.folder / "base",
            options.folder / "tuned",
            output,
            ratio=options.ratio,
            calibration=str(options.text or "none"),
            samples=options.samples,
            seq_len=options.seq_len,
            workers=options.workers,
            progress=progress,
        )
    blocks = Checkpoint(options.folder / "tuned").config["num_hidden_layers"]
    measured = seconds["blocks"][: min(blocks, options.stop_after or blocks)]
    # Survey, blocks and canary grow with the number of blocks; embedding and head do not.
    outside = seconds["blocks"][blocks:] if artifact else []
    each = (sum(seconds["survey"]) + sum(seconds.get("canary", []))) / blocks
    whole = BLOCKS * (each + sum(measured) / len(measured)) + sum(outside)
    return {
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - start, 1),
        "seconds_of_survey": round(sum(seconds["survey"]), 1),
        "seconds_of_each_block": [round(s, 1) for s in measured],
        "seconds_of_embedding_and_head": [round(s, 1) for s in outside],
        "seconds_of_canary": round(sum(seconds.get("canary", [])), 1),
        "peak_gib_before": round(before, 2),
        "peak_gib_until": {phase: round(peak, 2) for phase, peak in peaks.items()},
        "ratio": artifact and round(artifact.ratio(), 3),
        f"hours_of_{BLOCKS}_blocks": round(whole / 3600, 2),
        "gb_of_tuned_weights_per_hour": round(13.5 / (whole / 3600), 2),
    }


def wrong_base(folder: Path) -> dict[str, Any]:
    """Seconds to accept the right base of an artifact and to refuse a wrong one, by sampled values."""
    base = Checkpoint(folder / "base")
    records = [
        Record(
            *(name, info.shape, info.dtype, name, info.shape),
            base_sample=base.sample(name),
            base_digest="0" * 32,
        )
        for name, info in base.tensors.items()
    ]
    last = records[-1].name
    records[-1] = Record(**{**vars(records[-1]), "base_sample": "0" * 16})
    found = {}
    cold = "right, nothing of it in memory"
    for which, mine in ((cold, records[:-1]), ("right", records[:-1]), ("wrong", records)):
        output = folder / f"records-{len(mine)}"
        shutil.rmtree(output, ignore_errors=True)
        writer = ArtifactWriter(output, {}, resume=False)
        writer.save("all", Unit(tuple(mine), {}))
        path = writer.finish(["all"], Manifest("7b", None, {"name": "none"}, {}, {}))
        if which == cold:
            _forget(base)
        start = time.perf_counter()
        try:
            Base(folder / "base").check(Artifact.open(path))
            refused = None
        except MismatchError as error:
            refused = str(error)
        found[which] = {"seconds": round(time.perf_counter() - start, 3), "refused": refused}
        shutil.rmtree(output)
    assert found["right"]["refused"] is found[cold]["refused"] is None, "the right base was refused"
    assert last in found["wrong"]["refused"], "the wrong base was not refused"
    start = time.perf_counter()
    name = "model.embed_tokens.weight"
    full_digest(base.read(name))
    found["all bytes of the embedding alone"] = {"seconds": round(time.perf_counter() - start, 3)}
    assert sample_digest(base.read(name)) == base.sample(name)
    return {"tensors": len(base.tensors), "bytes": base.nbytes(), **found}


def _forget(checkpoint: Checkpoint) -> None:
    """Drops a checkpoint's files from the system's page cache."""
    for file in {info.file for info in checkpoint.tensors.values()}:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="7B geometry: memory, rate, wrong bases.")
    parser.add_argument("step", choices=("make", "base", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks of the model to make")
    parser.add_argument("--stop-after", type=int, default=0, help="blocks; 0: a whole run")
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--text", type=Path, help="calibration text; default: no calibration")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer, which is trained anew"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
