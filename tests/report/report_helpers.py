"""Artifacts of random codes with a model's tensor names, and what `eval --json` prints."""

import json

import torch
from artifact_helpers import PLAN, random_bands, random_packed, write_artifact

from deltacome.format.codec import Packed
from deltacome.format.manifest import Record

SHAPE = (48, 80)
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
HOSTILE = "<script>alert(1)</script>$x_1$\u202e\x01&amp;\"'"


def matrix(name, packed, error=None):
    """A record with its entries."""
    record = Record(
        name,
        SHAPE,
        "bfloat16",
        name,
        SHAPE,
        "5" * 16,
        "d" * 32,
        plan=PLAN if packed.bands else (),
        sign_scales=None if packed.signs is None else packed.signs.scale.numel(),
        error=error,
    )
    return record, {f"{name}.{kind}": blob for kind, blob in packed.blobs().items()}


def save(folder, names, *, terms="bands", errors=True, group_size=32, dropped=()):
    """An artifact of packed matrices with these names, and a norm that is stored exactly.

    Those that are `dropped` have no term.
    Returns it with the dense part of every band direction: name → float32 (directions, out, in).
    """
    records, entries, parts = [], {}, {}
    for number, name in enumerate(names):
        if name in dropped:
            records.append(matrix(name, Packed(), 1.0)[0])
            continue
        packed = random_packed(SHAPE, terms, PLAN, group_size, seed=number)
        if packed.bands:
            packed = Packed(
                random_bands(SHAPE, PLAN, group_size, number, size=1 + number), packed.signs
            )
        record, mine = matrix(name, packed, 0.001 * (number + 1) if errors else None)
        records.append(record)
        entries |= mine
        parts[name] = [
            torch.outer(u, v) * s
            for band in packed.bands
            for u, v, s in zip(band.u.dequantize(), band.v.dequantize(), band.s, strict=True)
        ]
    entries["norm.exact"] = torch.ones(7, dtype=torch.bfloat16)
    records.append(Record("norm", (7,), "bfloat16", None, None, None, None, exact_rows=(0, 7)))
    files = {"tokenizer.json": b"{}"}
    return write_artifact(
        folder, records, entries, config={}, group_size=group_size, files=files
    ), parts


def layers(count):
    """Names of a decoder's matrices."""
    inside = [f"model.layers.{i}.{p}.weight" for i in range(count) for p in PROJECTIONS]
    return [*inside, "model.embed_tokens.weight"]


def evaluated(file, models, task="folder/questions.jsonl", digest="0"):
    """A file as `deltacome eval --json` writes it; a model is (name, method, bytes, ratio, score)."""
    rows = []
    for name, method, nbytes, ratio, score in models:
        interval = {"score": score, "score_low": score - 0.1, "score_high": score + 0.1}
        kl = {"kl_task": 0.0 if name == "tuned" else 1 - score, "kl_text": None}
        size = {
            "artifact": digest if name == "delta" else "0",
            "method": method,
            "bytes": nbytes,
            "ratio": ratio,
        }
        size = {} if method is None else size
        rows.append({"name": name} | size | interval | kl)
    file.write_text(json.dumps({"task": task, "n": 50, "models": rows}))
    return file
