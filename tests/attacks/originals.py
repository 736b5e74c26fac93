"""Two small artifacts that hold every kind of term, and the base that both are for, as bytes."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import make_golden as golden
import torch
from safetensors.torch import save_file

from deltacome.arch.checkpoint import Checkpoint
from deltacome.format.codec import SignTensors, write_bands, write_signs
from deltacome.format.writer import ArtifactWriter, Unit

FILES = {
    "tuned_config.json": b'{"model_type": "llama", "hidden_size": 70}',
    "generation_config.json": b'{"temperature": 0.5}',
    "chat_template.jinja": b"{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def make(folder: Path) -> tuple[Checkpoint, list[dict[str, bytes]]]:
    """The base, and the files of each artifact by name: one of one shard, one of several."""
    unit = _unit()
    base = {r.base_name: golden.base_tensor(r.base_shape) for r in unit.records if r.base_name}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    return Checkpoint(folder / "base"), [
        _files(_write(folder / "whole", unit)),
        _files(_write(folder / "sharded", unit, shard_bytes=1)),
    ]


def _unit() -> Unit:
    """The golden tensors, two with signs, and one whose bands are those of its transpose."""
    unit = golden.unit()
    matrix = unit.records[2]
    assert matrix.name == "layer.weight"
    signs = replace(matrix, name="signs.weight", plan=(), sign_scales=7, error=0.5)
    both = replace(matrix, name="both.weight", sign_scales=1)
    positive = (torch.arange(490).view(golden.SHAPE) * 37 % 11) > 4
    entries = {
        "signs.weight.signs": _signs(positive, torch.arange(1, 8) / 64),
        "both.weight.signs": _signs(~positive, torch.tensor([0.25])),
        "both.weight.bands": write_bands(golden.bands()[3:]),
    }
    records = [replace(r, base_name="layer.weight") for r in (signs, both)]
    other_way = golden.record("conv.weight", golden.SHAPE[::-1], plan=golden.PLAN, transposed=True)
    entries["conv.weight.bands"] = write_bands(golden.bands())
    return Unit((*unit.records, *records, other_way), unit.entries | entries)


def _signs(positive_OI: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return write_signs(SignTensors.from_signs(positive_OI, scale))


def _write(output: Path, unit: Unit, shard_bytes: int = 1 << 30) -> Path:
    writer = ArtifactWriter(output, {}, resume=False)
    names = []
    for number, record in enumerate(unit.records):
        keys = record.entries(golden.GROUP)
        writer.save(str(number), Unit((record,), {key: unit.entries[key] for key in keys}))
        names.append(str(number))
    with patch("deltacome.format.writer.MAX_SHARD_BYTES", shard_bytes):
        return writer.finish(names, golden.manifest(), FILES, lambda artifact: b"# A card\n")


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
