"""The grouped op against the dense deltas in float64, one row at a time.

Triton decides at its first import whether it interprets, so this file runs itself once more with
TRITON_INTERPRET=1 for the cases of that implementation; where there is a GPU they run on it as well.
"""

import os
import subprocess
import sys

import pytest
import torch
from artifact_helpers import PLAN, random_bands
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltacome.errors import ArtifactError, MismatchError, PlanError, UnsupportedError
from deltacome.format.codec import dense, write_bands
from deltacome.format.spec import WIDTHS, Band, bands_nbytes, rank
from deltacome.ops.grouped import Rows, SlotPool, group_rows, grouped_bands

pytestmark = pytest.mark.usefixtures("poison")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
IMPLS = ("reference", "triton") if INTERPRETED or DEVICE == "cuda" else ("reference",)
TILES = (1, 16)
PLANS = ((Band(8, 2), Band(3, 3), Band(2, 5)), (Band(16, 1), Band(4, 33)), (Band(1, 4),))
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_tile = pytest.mark.parametrize("tile", TILES)


def randn(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def filled(shape, plans, group=128, slots=None):
    """A pool with a tenant for each plan, and the dense deltas; slots left over are empty."""
    slots = len(plans) if slots is None else slots
    pool = SlotPool.create(
        shape,
        slots,
        slot_bytes=max(bands_nbytes(shape, plan, group) for plan in plans),
        max_rank=max(map(rank, plans)),
        max_bands=max(map(len, plans)),
        group_size=group,
        device=DEVICE,
    )
    pool.blobs_SN.fill_(0xFF)  # what lies behind a blob must not be read
    deltas = [torch.zeros(shape, dtype=torch.float64)] * slots
    for slot, plan in enumerate(plans):
        bands = random_bands(shape, plan, group, seed=slot)
        pool.load(slot, write_bands(bands), plan)
        deltas[slot] = dense(bands).double()
    return pool, deltas


def added(x_TI, slots, deltas):
    """float64 (T, O), what each row should get."""
    rows = [
        deltas[slot] @ row if slot >= 0 else torch.zeros(len(deltas[0]), dtype=torch.float64)
        for slot, row in zip(slots, x_TI.cpu().double(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, len(deltas[0]), dtype=torch.float64)


def check(slots, pool, deltas, impl, tile, *, dtype=torch.float32, seed=0):
    """Runs the op into float32 outputs, so that only its own rounding shows."""
    slot_T = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    x_TI = randn(len(slots), pool.shape[1], seed=seed, dtype=dtype)
    y_TO = randn(len(slots), pool.shape[0], seed=seed + 1)
    before = y_TO.clone()
    rows = group_rows(slot_T, len(pool.table_SBF), tile=tile)
    assert grouped_bands(y_TO, x_TI, rows, pool, impl=impl) is None
    expected = added(x_TI, slots, deltas)
    # With 16-bit activations t may be rounded to 11 bits on its way.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-10
    limit = tolerance * (expected.norm(dim=-1, keepdim=True) + 1e-1)
    error = (y_TO.cpu().double() - before.cpu().double() - expected).abs()
    assert (error <= limit).all(), (error / limit).max()
    untouched = (expected == 0).all(-1)
    assert torch.equal(y_TO.cpu()[untouched], before.cpu()[untouched])


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_triton_in_the_interpreter():
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", __file__, "-k", "triton"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count("PASSED") > 30, child.stdout


@every_impl
@every_tile
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits, impl, tile):
    for shape in ((1, 1), (63, 65), (64, 128), (129, 127), (150, 1100)):
        plan = (Band(bits, min(35, *shape)),)
        check([0, -1, 0], *filled(shape, [plan]), impl, tile)


@every_impl
@every_tile
@pytest.mark.parametrize(
    "slots",
    [
        [],
        [-1],
        [1],
        [-1] * 5,
        [0, 1, 2],
        [2, -1, 0, 3, 2, 1, 1, -1, 0],  # 3 is empty
        [3, 3, 3],
        [0] * 17 + [2] * 3 + [-1],
    ],
    ids=str,
)
def test_tenant_mixes(slots, impl, tile):
    check(slots, *filled((70, 140), PLANS, slots=4), impl, tile)


@every_impl
def test_tiles_of_prefill(impl):
    check([2] * 3 + [1] * 70 + [-1] + [0] * 64, *filled((70, 140), PLANS), impl, 64)


@every_impl
@every_tile
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations(dtype, impl, tile):
    check([1, 0, 2, -1, 1], *filled((130, 200), PLANS), impl, tile, dtype=dtype)


@every_impl
@every_tile
# The interpreter cuts float32 off to bfloat16; that GPUs round is read from the PTX.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (not INTERPRETED))
def test_outputs_are_rounded_once(dtype, impl, tile):
    pool, _ = filled((130, 200), PLANS)
    rows = group_rows(torch.tensor([1, 0, 2, -1, 1], device=DEVICE), 3, tile=tile)
    x_TI, y_TO = randn(5, 200, dtype=dtype), randn(5, 130, seed=1, dtype=dtype)
    expected = y_TO.float()
    grouped_bands(expected, x_TI, rows, pool, impl=impl)
    grouped_bands(y_TO, x_TI, rows, pool, impl=impl)
    assert torch.equal(y_TO, expected.to(dtype))


@every_impl
@every_tile
@pytest.mark.parametrize("group", [64, 192, 1024])
def test_other_group_sizes(group, impl, tile):
    check([0, 1], *filled((270, 330), [PLAN, PLANS[0]], group), impl, tile)


@every_impl
@every_tile
def test_activations_of_any_size(impl, tile):
    """Sums are not clipped to what float16 holds between the two products."""
    pool, deltas = filled((70, 140), PLANS)
    x_TI = 6e4 * randn(1, 140).sign().to(torch.float16)
    y_TO = torch.zeros(1, 70, device=DEVICE)
    rows = group_rows(torch.tensor([0], device=DEVICE), 3, tile=tile)
    grouped_bands(y_TO, x_TI, rows, pool, impl=impl)
    expected = added(x_TI, [0], deltas)
    assert (y_TO.cpu() - expected).norm() < 2**-10 * expected.norm()


@every_impl
@every_tile
def test_inputs_stay_and_outputs_may_be_views(impl, tile):
    pool, deltas = filled((70, 140), PLANS)
    x_TI, whole = randn(140, 3).T, randn(3, 100, seed=1)
    copies = x_TI.clone(), whole.clone(), pool.blobs_SN.clone(), pool.table_SBF.clone()
    rows = group_rows(torch.tensor([2, -1, 0], device=DEVICE), 3, tile=tile)
    grouped_bands(whole[:, 5:75], x_TI, rows, pool, impl=impl)
    for got, copy in zip(
        (x_TI, pool.blobs_SN, pool.table_SBF), copies[:1] + copies[2:], strict=True
    ):
        assert torch.equal(got, copy)
    assert torch.equal(whole[:, :5], copies[1][:, :5])
    assert torch.equal(whole[:, 75:], copies[1][:, 75:])
    difference = (whole - copies[1])[:, 5:75].cpu().double()
    expected = added(x_TI, [2, -1, 0], deltas)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)


@every_impl
@every_tile
def test_a_slot_is_loaded_cleared_and_loaded_again(impl, tile):
    pool, deltas = filled((70, 140), PLANS)
    pool.clear(1)
    check([1, 0], pool, [deltas[0], torch.zeros_like(deltas[0])], impl, tile)
    bands = random_bands((70, 140), PLANS[2], 128, seed=9)  # fewer bands than what was there
    pool.load(0, write_bands(bands), PLANS[2])
    check([0, 2], pool, [dense(bands).double(), deltas[1], deltas[2]], impl, tile)


@every_impl
@every_tile
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(impl, tile, data):
    shape = tuple(data.draw(st.tuples(st.integers(1, 150), st.integers(1, 300)), "shape"))
    band = st.builds(Band, st.sampled_from(WIDTHS), st.integers(1, 40))
    plans = data.draw(st.lists(st.lists(band, min_size=1, max_size=4), min_size=1, max_size=3))
    pool, deltas = filled(shape, [tuple(plan) for plan in plans])
    slots = data.draw(st.lists(st.integers(-1, len(plans) - 1), max_size=8), "slots")
    check(slots, pool, deltas, impl, tile, dtype=torch.float16)


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
def test_tiles_cover_each_row_once(tokens, slots, tile):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        slot_T = torch.randint(-1, slots, (tokens,), generator=generator)
        if seed == 0:
            slot_T.fill_(slots - 1)
        rows = group_rows(slot_T, slots, tile=tile)
        covered = []
        for slot, start, count in rows.tiles_M3.tolist():
            assert (count > 0) == (slot >= 0)
            assert count <= tile
            places = rows.order_T[start : start + count].tolist()
            assert all(slot_T[place] == slot for place in places)
            covered += places
        assert sorted(covered) == (slot_T >= 0).nonzero().view(-1).tolist()
        if tile > 1:  # rows of one tenant are together: its tiles are full but for one
            needed = sum(-(-int((slot_T == slot).sum()) // tile) for slot in range(slots))
            assert sum(slot >= 0 for slot, _, _ in rows.tiles_M3.tolist()) == needed


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the assertion ends the process")
@pytest.mark.parametrize("slots", [[0, 3], [-2, 0]])
def test_slots_out_of_range(slots):
    with pytest.raises(RuntimeError, match=r"slots: not in \[-1, 3\)"):
        group_rows(torch.tensor(slots), 3)


def test_what_a_pool_refuses():
    pool, deltas = filled((70, 140), PLANS)
    blob = write_bands(random_bands((70, 140), PLANS[0], 128))
    for slot in (-1, 3):
        with pytest.raises(MismatchError, match="slot"):
            pool.load(slot, blob, PLANS[0])
        with pytest.raises(MismatchError, match="slot"):
            pool.clear(slot)
    with pytest.raises(PlanError, match="bands of at most 34 directions"):
        pool.load(0, blob, (Band(1, 35),))
    with pytest.raises(PlanError, match="1 to 3 bands"):
        pool.load(0, blob, (Band(1, 1),) * 4)
    with pytest.raises(PlanError, match="1 to 3 bands"):
        pool.load(0, blob, ())
    plan = (Band(2, 2),)
    with pytest.raises(ArtifactError, match=f"expected {bands_nbytes((70, 140), plan)} bytes"):
        pool.load(0, blob, plan)
    plan = (Band(16, 34),)
    blob = write_bands(random_bands((70, 140), plan, 128))
    with pytest.raises(ArtifactError, match="in a slot of"):
        pool.load(0, blob, plan)
    # What was refused left the slot empty, and the others as they were.
    deltas[0] = torch.zeros_like(deltas[0])
    check([0, 1, 2], pool, deltas, "reference", 16)
    for sizes in ({"slot_bytes": 0}, {"slot_bytes": 2**31}, {"slot_bytes": 64, "max_bands": 0}):
        with pytest.raises(PlanError, match="slot pool"):
            SlotPool.create((4, 4), 1, max_rank=4, **sizes)


def test_unknown_or_missing_implementations_are_not_the_reference():
    pool, _ = filled((70, 140), PLANS)
    rows = group_rows(torch.tensor([0, 1], device=DEVICE), 3)
    y_TO, x_TI = torch.zeros(2, 70, device=DEVICE), randn(2, 140)
    with pytest.raises(UnsupportedError, match="'fast'"):
        grouped_bands(y_TO, x_TI, rows, pool, impl="fast")
    if DEVICE == "cpu":
        with pytest.raises(UnsupportedError, match="CUDA device"):
            grouped_bands(y_TO, x_TI, rows, pool, impl="triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "deltacome.ops.grouped.triton", raising=False)
        patch.delattr("deltacome.ops.grouped.triton", raising=False)
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(UnsupportedError, match="needs Triton"):
            grouped_bands(y_TO, x_TI, rows, pool, impl="triton")
    assert not y_TO.any()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl == "triton"] or ["none"])
def test_what_triton_does_not_cover(impl):
    if impl == "none":  # the parent; the child has the case
        return
    y_TO, x_TI = torch.zeros(2, 70, device=DEVICE), randn(2, 140)
    pool, _ = filled((70, 140), PLANS)
    slot_T = torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(UnsupportedError, match="float64"):
        grouped_bands(y_TO.double(), x_TI, group_rows(slot_T, 3), pool, impl=impl)
    with pytest.raises(UnsupportedError, match="got 24"):
        grouped_bands(y_TO, x_TI, group_rows(slot_T, 3, tile=24), pool, impl=impl)
    pool, _ = filled((70, 140), PLANS, 32)
    with pytest.raises(UnsupportedError, match="multiple of 64"):
        grouped_bands(y_TO, x_TI, group_rows(slot_T, 3), pool, impl=impl)
    assert not y_TO.any()


@pytest.mark.parametrize(
    ("y", "x"),
    [
        (torch.zeros(2, 70), torch.zeros(3, 140)),
        (torch.zeros(3, 70), torch.zeros(3, 140)),
        (torch.zeros(2, 71), torch.zeros(2, 140)),
        (torch.zeros(2, 70), torch.zeros(2, 141)),
        (torch.zeros(1, 2, 70), torch.zeros(2, 140)),
        (torch.zeros(2, 70), torch.zeros(2, 140, dtype=torch.int64)),
        (torch.zeros(2, 70, dtype=torch.int64), torch.zeros(2, 140)),
        (torch.zeros(2, 70), torch.zeros(2, 140, device="meta")),
    ],
)
def test_arguments_that_do_not_fit(y, x):
    pool, _ = filled((70, 140), PLANS)
    rows = group_rows(torch.tensor([0, 1], device=DEVICE), 3)
    x = x if x.is_meta else x.to(DEVICE)
    with pytest.raises(MismatchError, match="grouped_bands: expected"):
        grouped_bands(y.to(DEVICE), x, rows, pool)


def test_gradients_are_refused():
    pool, _ = filled((70, 140), PLANS)
    rows = group_rows(torch.tensor([0, 1], device=DEVICE), 3)
    x_TI = randn(2, 140).requires_grad_()
    y_TO = torch.zeros(2, 70, device=DEVICE)
    with pytest.raises(UnsupportedError, match="inference"):
        grouped_bands(y_TO, x_TI, rows, pool)
    with torch.no_grad():
        grouped_bands(y_TO, x_TI, rows, pool)


def test_registration():
    """Schema, fake implementation, and functionalization, as torch itself checks them."""
    pool, _ = filled((70, 140), PLANS)
    rows = group_rows(torch.tensor([0, -1, 1], device=DEVICE), 3)
    arguments = (
        *(randn(3, 70), randn(3, 140), rows.slot_T, rows.order_T, rows.tiles_M3),
        *(pool.blobs_SN, pool.table_SBF, rows.tile, pool.max_rank, pool.group_size, "reference"),
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.deltacome.grouped_bands.default, arguments, test_utils=tests)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    pool, _ = filled((70, 140), PLANS)

    def layer(x_TI, slot_T):
        rows: Rows = group_rows(slot_T, 3)
        y_TO = x_TI.sin() @ torch.ones(140, 70, device=DEVICE)
        grouped_bands(y_TO, x_TI, rows, pool, impl=IMPLS[-1] if DEVICE == "cuda" else "reference")
        return y_TO + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for slots in ([0, -1, 2], [1, 1, 0, 2, -1]):
        slot_T, x_TI = torch.tensor(slots, device=DEVICE), randn(len(slots), 140)
        torch.testing.assert_close(compiled(x_TI, slot_T), layer(x_TI, slot_T))
