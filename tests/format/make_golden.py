"""Writes tests/golden, the artifacts whose bytes must never change within a schema version.

Run `python tests/format/make_golden.py` after a change of the schema, never to make a test pass.
All numbers follow from formulas of small integers; there is no randomness and no rounding.
"""

import shutil
from pathlib import Path

import torch

from deltacome.arch.checkpoint import full_digest, sample_digest
from deltacome.format.codec import BandTensors, Factor, SignTensors, write_bands, write_signs
from deltacome.format.manifest import Manifest, Record
from deltacome.format.spec import Band
from deltacome.format.writer import ArtifactWriter, Unit

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = FOLDER / "tiny"
GROUP = 40
SHAPE = (7, 70)
PLAN = tuple(Band(bits, 1) for bits in (16, 8, 4, 3, 2, 1))


def code(bits, side, n):
    """The code of entry n."""
    return (5 * n + n * n // 3 + 11 * (side == "u") + bits) % 2**bits


def scale(bits, side, group):
    return 2.0 ** (-bits - group - 2 * (side == "u"))


def zero(bits, side, group):
    return (2**bits // 2 + group) % 2**bits


def half(side, n):
    """Entry n of a 16-bit factor, a number that float16 represents exactly."""
    return (n - 3) / 8 if side == "v" else (5 - 2 * n) / 16


def singular(band):
    return 3.5 / 2**band


def factor(bits, side, size):
    if bits == 16:
        return Factor.from_values(torch.tensor([[half(side, n) for n in range(size)]]))
    groups = range(-(-size // GROUP))
    codes_RN = torch.tensor([[code(bits, side, n) for n in range(size)]], dtype=torch.uint8)
    scale_RG = torch.tensor([[scale(bits, side, g) for g in groups]], dtype=torch.float16)
    zero_RG = torch.tensor([[zero(bits, side, g) for g in groups]], dtype=torch.uint8)
    return Factor.from_codes(codes_RN, scale_RG, zero_RG, bits, GROUP)


def base_tensor(shape):
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) / 64).to(torch.bfloat16).reshape(shape)


def bands():
    return [
        BandTensors(
            factor(band.bits, "v", SHAPE[1]),
            factor(band.bits, "u", SHAPE[0]),
            torch.tensor([singular(i)]),
        )
        for i, band in enumerate(PLAN)
    ]


def record(name, shape, *, base_shape=None, base_name=None, **terms):
    base = base_tensor(base_shape or shape)
    return Record(
        *(name, shape, "bfloat16", base_name or name, base_shape or shape),
        *(sample_digest(base), full_digest(base)),
        **terms,
    )


def added_rows():
    return (torch.arange(140, dtype=torch.float32) / 4 - 9).to(torch.bfloat16).reshape(2, 70)


def unit():
    grown = {"base_shape": SHAPE, "plan": PLAN, "exact_rows": (7, 9)}
    norm, scalar = torch.tensor([0.5, -2.0, 3.25], dtype=torch.bfloat16), torch.tensor(7)
    records = (
        record("embed.weight", (9, 70), error=0.012345678, **grown),
        record("head.weight", (9, 70), base_name="embed.weight", **grown),
        record("layer.weight", SHAPE, plan=PLAN[3:], error=0.0),
        record("norm.weight", (3,), exact_rows=(0, 3)),
        Record("step", (), "int64", None, None, None, None, exact_rows=(0, 1)),
        record("still.weight", (2, 300)),
    )
    entries = {
        "embed.weight.bands": write_bands(bands()),
        "embed.weight.exact": added_rows(),
        "head.weight.bands": write_bands(bands()),
        "head.weight.exact": -added_rows(),
        "layer.weight.bands": write_bands(bands()[3:]),
        "norm.weight.exact": norm,
        "step.exact": scalar,
    }
    return Unit(records, entries)


def positive(row, n):
    """Whether the sign of an entry is positive."""
    return (3 * n + n * n // 5 + 7 * row) % 5 < 2


def sign_scale(row):
    return (3 - row) / 16  # of both signs, and one is zero


def signs(scales):
    codes = [[positive(row, n) for n in range(SHAPE[1])] for row in range(SHAPE[0])]
    scale = torch.tensor([sign_scale(row) for row in range(scales)])
    return SignTensors.from_signs(torch.tensor(codes), scale)


def signs_unit():
    """Signs alone, with one scale or one for each row, and signs with bands and added rows."""
    grown = {"base_shape": SHAPE, "plan": PLAN[3:], "sign_scales": 7, "exact_rows": (7, 9)}
    records = (
        record("embed.weight", (9, 70), **grown),
        record("one.weight", SHAPE, sign_scales=1),
        record("rows.weight", SHAPE, sign_scales=7),
    )
    entries = {
        "embed.weight.bands": write_bands(bands()[3:]),
        "embed.weight.signs": write_signs(signs(7)),
        "embed.weight.exact": added_rows(),
        "one.weight.signs": write_signs(signs(1)),
        "rows.weight.signs": write_signs(signs(7)),
    }
    return Unit(records, entries)


UNITS = {"tiny": unit, "signs": signs_unit}


def manifest():
    method = {"name": "golden", "options": [1, 2.5, None, True]}
    return Manifest("some/base", "main", method, {"seed": 0}, {}, group_size=GROUP)


def write(output, name="tiny"):
    writer = ArtifactWriter(output, {}, resume=False)
    writer.save("all", UNITS[name]())
    return writer.finish(["all"], manifest(), {"tuned_config.json": b"{}"})


if __name__ == "__main__":
    for name in UNITS:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write(FOLDER / name, name)
