"""The family matrix: each architecture compressed, merged and attached, with sizes and errors.

    python tests/compression/family_matrix.py -o docs/results/families.md

The models are the tests' own: tiny, random, of the real configuration classes. A row is written only
after the attached base gave the merged model's logits and, detached, its own again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import families
import tiny_pairs
import torch
from families import load, logits

import deltacome
from deltacome import Artifact

HEADER = ["class", "calibration", "ratio", "bytes", "in bands", "exact", "rank", "error", "logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*no canary")  # encoders have none
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "--:|" * (len(HEADER) - 2)]
    with tempfile.TemporaryDirectory() as folder:
        lines += ["| " + " | ".join(row) + " |" for row in rows(Path(folder))]
    page = "\n".join([TITLE, *lines, AFTER])
    if options.output:
        options.output.write_text(page)
    print(page)


def rows(folder: Path) -> list[list[str]]:
    """One row for each family."""
    text = folder / "text.txt"
    text.write_text("\n".join(tiny_pairs.text_lines(8, seed=4)))
    found = []
    for name in tiny_pairs.FAMILIES:
        _, tuned = pair = tiny_pairs.make_pair(name, folder / name)
        # Merged weights have the fine-tune's dtype, and are to be compared without rounding.
        tiny_pairs.rewrite(tuned, tiny_pairs.weights_of(tuned), torch.float32)
        found.append(row(*pair, 8, text))
    for name in families.FAMILIES:
        pair = families.make_pair(name, folder / name)
        source = text if name in families.STREAMED else None
        found.append(row(*pair, families.RATIOS.get(name, 3), source))
    return found


def row(base: Path, tuned: Path, ratio: float, text: Path | None) -> list[str]:
    """Compresses a pair, and compares the attached base with the merged model."""
    options: dict[str, Any] = {"calibration": "none"}
    if text is not None:
        options = {"calibration": str(text), "samples": 6, "seq_len": 16}
    artifact = deltacome.compress(base, tuned, base.parent / "delta", ratio=ratio, **options)
    merged = load(deltacome.merge(base, artifact, base.parent / "merged"))
    model = load(base)
    before, wanted = logits(model), logits(merged)
    with deltacome.attach(model, artifact):
        got = logits(model)
    difference = float((got - wanted).abs().max() / wanted.abs().max())
    if difference > 1e-4 or not torch.equal(logits(model), before):
        raise SystemExit(
            f"{base}: attached and merged differ by {difference:g}, or base is changed"
        )
    tied = ", tied" if model.config.get_text_config().tie_word_embeddings else ""
    return said(f"{type(model).__name__}{tied}", artifact, text, difference)


def said(name: str, artifact: Artifact, text: Path | None, difference: float) -> list[str]:
    records = artifact.manifest.records.values()
    bands = [record for record in records if record.plan]
    errors = [record.error for record in bands if record.error is not None]
    ranks = [sum(band.count for band in record.plan) for record in bands]
    return [
        name,
        "yes" if text else "no",
        f"{artifact.ratio():.2f}",
        f"{artifact.bytes_on_disk():,}",
        str(len(bands)),
        str(sum(record.exact_rows is not None for record in records)),
        f"{min(ranks)}–{max(ranks)}",
        f"{statistics.mean(errors):.4f}",
        f"{difference:.1e}",
    ]


TITLE = """# Families

`python tests/compression/family_matrix.py -o docs/results/families.md`: a tiny random model of each real
configuration class and a random fine-tune of it, compressed, merged and attached.
"""

AFTER = """
*Error* is the mean over matrices of the relative squared error of what is stored (on the inputs where
there is calibration). *Logits* is the largest difference between the logits of the attached base and the
merged model, in float32 and relative to the largest. Ratios are what so small a model allows, given its
headers and exact tensors. The fine-tune has few directions and noise, so the errors show that nothing is
wrong, not how good a method is.
"""


if __name__ == "__main__":
    main()
