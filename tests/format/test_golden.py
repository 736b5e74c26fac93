"""The golden artifacts: what was once written is read to the same values and written to the same bytes.

The decoder here follows docs/format.md in plain Python, bytes to numbers, without `deltacome`.
"""

import json
import math
import struct

import make_golden as golden
import pytest
import torch

from deltacome.arch.checkpoint import full_digest, sample_digest
from deltacome.format.artifact import Artifact

FILES = (
    *("delta_config.json", "delta.safetensors.index.json", "delta-00001-of-00001.safetensors"),
    "tuned_config.json",
)


def code_at(block_words, p, k):
    """Code k of a block of 64, from its 2p words."""
    return block_words[k % (2 * p)] >> (p * (k // (2 * p))) & (2**p - 1)


def entries_of(file):
    """Key → (header entry, bytes) of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "deltacome"}
    data = content[8 + length :]
    return {key: (value, data[slice(*value["data_offsets"])]) for key, value in header.items()}


class Reader:
    """Sections of a blob, one after the other."""

    def __init__(self, blob):
        self.blob, self.at = blob, 0

    def take(self, kind, count):
        size = struct.calcsize(kind)
        values = struct.unpack_from(f"<{count}{kind}", self.blob, self.at)
        end = self.at + size * count
        self.at = math.ceil(end / 16) * 16
        assert not any(self.blob[end : self.at]), "padding bytes are zero"
        return values


def read_factor(reader, bits, count, size, group):
    """`count` vectors of `size` numbers."""
    if bits == 16:
        values = reader.take("e", count * size)
        return [list(values[r * size : (r + 1) * size]) for r in range(count)]
    blocks = math.ceil(size / 64)
    codes = [[0] * size for _ in range(count)]
    low = 0
    for p in {1: [1], 2: [2], 3: [2, 1], 4: [4], 8: [8]}[bits]:
        words = reader.take("I", count * blocks * 2 * p)
        for r in range(count):
            for n in range(size):
                first = (r * blocks + n // 64) * 2 * p
                codes[r][n] |= code_at(words[first : first + 2 * p], p, n % 64) << low
        low += p
    groups = math.ceil(size / group)
    scale = reader.take("e", count * groups)
    zero = reader.take("B", count * groups)
    return [
        [
            (codes[r][n] - zero[r * groups + n // group]) * scale[r * groups + n // group]
            for n in range(size)
        ]
        for r in range(count)
    ]


def read_delta(blob, shape, plan, group):
    """The delta of a bands term, as rows of numbers."""
    reader = Reader(blob)
    delta = [[0.0] * shape[1] for _ in range(shape[0])]
    for bits, count in plan:
        v = read_factor(reader, bits, count, shape[1], group)
        u = read_factor(reader, bits, count, shape[0], group)
        s = reader.take("f", count)
        for r in range(count):
            for o in range(shape[0]):
                for i in range(shape[1]):
                    delta[o][i] += u[r][o] * s[r] * v[r][i]
    assert reader.at == len(blob)
    return delta


def read_signs(blob, shape, scales):
    """The delta of a signs term, as rows of numbers."""
    reader, blocks = Reader(blob), math.ceil(shape[1] / 64)
    words = reader.take("I", shape[0] * blocks * 2)
    alpha = reader.take("f", scales)
    assert reader.at == len(blob)
    return [
        [
            (2 * code_at(words[(o * blocks + n // 64) * 2 :][:2], 1, n % 64) - 1)
            * alpha[o if scales > 1 else 0]
            for n in range(shape[1])
        ]
        for o in range(shape[0])
    ]


def expected_factor(bits, side, size):
    """From the formulas that the golden artifact was made with."""
    if bits == 16:
        return [golden.half(side, n) for n in range(size)]
    return [
        (golden.code(bits, side, n) - golden.zero(bits, side, n // golden.GROUP))
        * golden.scale(bits, side, n // golden.GROUP)
        for n in range(size)
    ]


def expected_delta(plan):
    first = len(golden.PLAN) - len(plan)
    delta = [[0.0] * golden.SHAPE[1] for _ in range(golden.SHAPE[0])]
    for number, (bits, _) in enumerate(plan):
        u = expected_factor(bits, "u", golden.SHAPE[0])
        v = expected_factor(bits, "v", golden.SHAPE[1])
        for o, i in ((o, i) for o in range(len(u)) for i in range(len(v))):
            delta[o][i] += u[o] * golden.singular(first + number) * v[i]
    return torch.tensor(delta, dtype=torch.float64)


def expected_signs(scales):
    """Likewise."""
    delta = [
        [
            (1 if golden.positive(o, n) else -1) * golden.sign_scale(o if scales > 1 else 0)
            for n in range(golden.SHAPE[1])
        ]
        for o in range(golden.SHAPE[0])
    ]
    return torch.tensor(delta, dtype=torch.float64)


@pytest.mark.parametrize("which", golden.UNITS)
@pytest.mark.parametrize("name", FILES)
def test_writing_gives_the_same_bytes(tmp_path, name, which):
    out = golden.write(tmp_path / "out", which)
    assert {file.name for file in out.iterdir()} == set(FILES)
    assert (out / name).read_bytes() == (golden.FOLDER / which / name).read_bytes()


def test_reading_gives_the_known_values():
    artifact = Artifact.open(golden.GOLDEN)
    artifact.verify_bytes()
    unit = golden.unit()
    # `error` is stored with four digits.
    assert {n: r.kind for n, r in artifact.manifest.records.items()} == {
        r.name: r.kind for r in unit.records
    }
    assert artifact.manifest.records["embed.weight"].error == 0.01235
    assert artifact.manifest.method == golden.manifest().method
    for record in unit.records:
        got = artifact.manifest.records[record.name]
        assert (got.shape, got.base_shape, got.plan) == (
            record.shape,
            record.base_shape,
            record.plan,
        )
        if record.exact_rows:
            key = f"{record.name}.exact"
            assert torch.equal(artifact.exact(record.name), unit.entries[key])
        if record.plan:
            plan = [(band.bits, band.count) for band in record.plan]
            total = sum(band.dense().double() for band in artifact.bands(record.name))
            expected = expected_delta(plan)
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def test_a_reader_in_plain_python_agrees():
    document = json.loads((golden.GOLDEN / "delta_config.json").read_text())
    entries = entries_of(golden.GOLDEN / FILES[2])
    read = 0
    for name, tensor in document["tensors"].items():
        if "plan" not in tensor:
            continue
        shape = (
            (min(tensor["shape"][0], tensor["base_shape"][0]), tensor["shape"][1])
            if ("base_shape" in tensor)
            else tensor["shape"]
        )
        header, blob = entries[f"{name}.bands"]
        assert header["dtype"] == "U8"
        delta = read_delta(blob, shape, tensor["plan"], document["group_size"])
        got = torch.tensor(delta, dtype=torch.float64)
        assert torch.equal(got, expected_delta(tensor["plan"]))  # small dyadic numbers: no rounding
        read += 1
    assert read == 3


def test_signs_are_read_to_the_known_values():
    folder = golden.FOLDER / "signs"
    document = json.loads((folder / "delta_config.json").read_text())["tensors"]
    kinds = {name: record["kind"] for name, record in document.items()}
    assert kinds == {
        "embed.weight": "signs+bands",
        "one.weight": "signs",
        "rows.weight": "signs",
    }
    artifact, entries = Artifact.open(folder), entries_of(folder / FILES[2])
    artifact.verify_bytes()
    for name, record in document.items():
        header, blob = entries[f"{name}.signs"]
        assert header["dtype"] == "U8"
        expected = expected_signs(record["sign_scales"])
        got = read_signs(blob, golden.SHAPE, record["sign_scales"])
        assert torch.equal(torch.tensor(got, dtype=torch.float64), expected)
        assert torch.equal(artifact.signs(name).dense().double(), expected)
        if "plan" in record:
            expected = expected + expected_delta(record["plan"])
        assert torch.equal(artifact.packed(name).dense().double(), expected)


def test_fingerprints_stay():
    small, large = torch.arange(6.0).reshape(2, 3), torch.arange(4096).reshape(64, 64)
    assert sample_digest(small) == sample_digest(small.bfloat16()) == sample_digest(small.double())
    assert full_digest(small) != full_digest(small.bfloat16())
    assert sample_digest(small) != sample_digest(small.T)
    tensors = Artifact.open(golden.GOLDEN).manifest.records
    still = golden.base_tensor((2, 300))
    assert tensors["still.weight"].base_sample == sample_digest(still) == "ad95983ffdbfa1f0"
    assert tensors["still.weight"].base_digest == full_digest(still)
    changed = large.clone()
    changed[0, 0] = changed[-1, -1] = -1
    for place in (0, 63, 4032, 4095):  # in the first and the last run
        changed = large.clone()
        changed.view(-1)[place] = -1
        assert sample_digest(changed) != sample_digest(large)
    changed = large.clone()
    changed.view(-1)[64] = -1  # between two runs, where only the full fingerprint sees it
    assert sample_digest(changed) == sample_digest(large)
    assert full_digest(changed) != full_digest(large)
