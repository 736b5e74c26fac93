"""Pools filled with tenants of random codes, what each row should get, and the implementations.

Triton decides at its first import whether it interprets, so `test_triton.py` runs the tests of the ops
again in a process of their own, with TRITON_INTERPRET=1; there, and only there, `IMPLS` is Triton alone.

T tokens, I in, O out.
"""

import importlib.util
import os
from pathlib import Path

import torch
from artifact_helpers import random_bands
from hypothesis import HealthCheck, settings

from deltacome.format.codec import SignTensors, dense, write_bands, write_signs
from deltacome.format.spec import Band, bands_nbytes, rank
from deltacome.ops import native
from deltacome.ops.rows import group_rows
from deltacome.ops.slots import BandTable, PlacedBands, PlacedSigns, Pool, SignTable, arrange

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from interpreter import mend

    mend()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
assert spec is not None
assert spec.loader is not None
hatch_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hatch_build)

RUNS = {
    "avx2": torch.cpu._is_avx2_supported,
    "avx512": torch.cpu._is_avx512_supported,
    "avx512_vnni": lambda: torch.cpu.get_capabilities().get("avx512_vnni", False),
}
ISAS = [isa for isa in hatch_build.instruction_sets() if isa not in RUNS or RUNS[isa]()]
"""Instruction sets that this CPU has; `test_native.py` checks that their libraries are there."""


def implementations():
    if INTERPRETED:
        return ["triton"]
    if DEVICE == "cuda":
        return ["reference", "triton"]
    # Only without a compiler is there nothing to test, and `test_native.py` then says so.
    native_ones = ["cpu", *(f"cpu-{isa}" for isa in ISAS)] if hatch_build.compiler() else []
    return ["reference", *native_ones]


IMPLS = implementations()
# The kernels for 64 rows are those for 16 with other sizes, so the slow interpreter needs only 16.
TILES = (1, 16) if INTERPRETED else (1, 16, 64) if "triton" in IMPLS else (16,)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLANS = ((Band(8, 2), Band(3, 3), Band(2, 5)), (Band(16, 1), Band(4, 33)), (Band(1, 4),))
MIXES = [
    [],
    [-1],
    [1],
    [-1] * 5,
    [0, 1, 2],
    [2, -1, 0, 3, 2, 1, 1, -1, 0],  # slot 3 is empty
    [3, 3, 3],
    [0] * 17 + [2] * 3 + [-1],
]
"""Slots of the rows of several batches, for pools of four slots, the last of them empty."""
MIXED = [
    (slots, tile)
    for tile in TILES
    for slots in MIXES
    # To tiles of one row, more than 16 rows are nothing new, and the interpreter takes seconds for them.
    if not INTERPRETED or len(slots) <= 16 * tile
]


any_example = settings(
    max_examples=5 if INTERPRETED else 25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def randn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def filled(in_size, outs, plans, group=128, slots=None, seed=0):
    """A table with a tenant for each plan, and their dense deltas; slots left over are empty.

    Every part of a tenant has the tenant's plan, cut to what fits, except that the third part of every
    third tenant has none.
    """
    slots = len(plans) if slots is None else slots
    tenants = [
        [
            None if slot % 3 == 2 and part == 2 else fitted(plan, min(out, in_size))
            for part, out in enumerate(outs)
        ]
        for slot, plan in enumerate(plans)
    ]
    layouts = [
        arrange(
            {
                str(i): bands_nbytes((out, in_size), plan, group)
                for i, (out, plan) in enumerate(zip(outs, parts, strict=True))
                if plan
            }
        )
        for parts in tenants
    ]
    pool = Pool(slots, max(n for _, n in layouts), device=DEVICE)
    pool.blobs_SN.fill_(0xFF)  # what lies after a blob must not be read
    table = BandTable(
        *(pool, in_size, outs),
        max_rank=max(sum(rank(p) for p in parts if p) for parts in tenants),
        max_bands=max(map(len, plans)),
        group_size=group,
    )
    deltas = [torch.zeros(sum(outs), in_size, dtype=torch.float64) for _ in range(slots)]
    for slot, (parts, (offsets, _)) in enumerate(zip(tenants, layouts, strict=True)):
        placed, pieces = [], []
        for i, (out, plan) in enumerate(zip(outs, parts, strict=True)):
            if plan is None:
                placed.append(None)
                pieces.append(torch.zeros(out, in_size, dtype=torch.float64))
                continue
            bands = random_bands((out, in_size), plan, group, seed=seed + 7 * slot + i)
            pool.load(slot, offsets[str(i)], write_bands(bands))
            placed.append(PlacedBands(offsets[str(i)], plan))
            pieces.append(dense(bands).double())
        table.load(slot, placed)
        deltas[slot] = torch.cat(pieces)
    return table, deltas


def fitted(plan, most):
    """The plan cut to at most `most` directions, which is at least one."""
    kept, left = [], most
    for band in plan:
        if left:
            kept.append(Band(band.bits, min(band.count, left)))
            left -= kept[-1].count
    return tuple(kept)


def filled_signs(in_size, outs, slots=3, empty=1, seed=0):
    """A table of signs, with one scale for the matrix or one for each row, and the dense deltas."""
    total = slots + empty
    pool = Pool(total, 16 * sum(outs) * (in_size // 64 + 4), device=DEVICE)
    pool.blobs_SN.fill_(0xFF)
    table = SignTable(pool, in_size, outs)
    deltas = [torch.zeros(sum(outs), in_size, dtype=torch.float64) for _ in range(total)]
    for slot in range(slots):
        placed, pieces, offset = [], [], 0
        for i, out in enumerate(outs):
            if slot == 1 and i == 1:
                placed.append(None)
                pieces.append(torch.zeros(out, in_size, dtype=torch.float64))
                continue
            scales = out if slot % 2 else 1
            positive = randn(out, in_size, seed=seed + slot * 10 + i).cpu() > 0
            scale = (randn(scales, seed=seed + slot).cpu().abs() + 0.1) / in_size**0.5
            blob = write_signs(SignTensors.from_signs(positive, scale))
            pool.load(slot, offset, blob)
            placed.append(PlacedSigns(offset, scales))
            pieces.append((2.0 * positive.double() - 1) * scale.double()[:, None])
            offset += len(blob)
        table.load(slot, placed)
        deltas[slot] = torch.cat(pieces)
    return table, deltas


def expected_of(x_TI, slots, deltas):
    """What each row should get, float64 (T, O)."""
    rows = [
        deltas[slot] @ row if slot >= 0 else torch.zeros(len(deltas[0]), dtype=torch.float64)
        for slot, row in zip(slots, x_TI.cpu().double(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, len(deltas[0]), dtype=torch.float64)


def rows_of(slots, table, tile=16):
    slot_T = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    return group_rows(slot_T, len(table.pool.blobs_SN), tile=tile)


def assert_added(y, before, expected, *, exact_t=True):
    """Asserts that `y` is `before + expected` in float32, rounded once.

    Rows that get nothing must keep every bit. Without `exact_t`, what lies between the two products may
    have been rounded to 11 bits.
    """
    y, before = y.cpu(), before.cpu()
    untouched = (expected == 0).all(-1)
    assert torch.equal(y[untouched], before[untouched])
    eps = torch.finfo(y.dtype).eps if y.dtype.itemsize < 4 else 0.0
    total = before.double() + expected
    size = expected.norm(dim=-1, keepdim=True) + 0.1
    bound = 0.51 * eps * total.abs() + (1e-5 if exact_t else 2**-10) * size
    assert y.isfinite().all()
    error = (y.double() - total).abs()
    assert (error <= bound).all(), (error / bound).max()


def framed(values_TN):
    """A frame of NaN around the values, so that a write outside of them shows, and the values in it."""
    rows, columns = values_TN.shape
    frame = torch.full((rows + 2, columns + 3), float("nan"), dtype=values_TN.dtype, device=DEVICE)
    inside = frame[1 : rows + 1, 1 : columns + 1]
    inside.copy_(values_TN)
    return frame, inside


def assert_framed(frame, columns):
    assert frame[[0, -1]].isnan().all()
    assert frame[:, 0].isnan().all()
    assert frame[:, columns + 1 :].isnan().all()


def use(impl, monkeypatch):
    """The name for the op. Sets the CPU's library to that of the instruction set, if one is named.

    Without an instruction set, torch calls the library, as it does for users; with one, Python does.
    """
    name, _, isa = impl.partition("-")
    if isa:
        native.few_rows(0)
        monkeypatch.setattr(native, "default_isa", lambda: isa)
    return name
