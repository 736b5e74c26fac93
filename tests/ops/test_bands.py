"""`bands` and `band_rows` against the dense deltas in float64, one row at a time."""

import pytest
import torch
from artifact_helpers import PLAN
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import (
    DEVICE,
    DTYPES,
    IMPLS,
    INTERPRETED,
    MIXED,
    MIXES,
    PLANS,
    TILES,
    any_example,
    assert_added,
    assert_framed,
    expected_of,
    filled,
    framed,
    randn,
    rows_of,
)

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.codec import BandTensors, Factor, write_bands
from deltacome.format.spec import WIDTHS, Band, bands_nbytes
from deltacome.ops.bands import band_rows, bands, many
from deltacome.ops.rows import group_all
from deltacome.ops.slots import BandTable, PlacedBands, Pool, S

OUTS = [[70, 1, 200]] if INTERPRETED else [[130], [128, 64, 64], [70, 1, 200]]
"""Outputs of the parts of a layer; the interpreter, which takes seconds for each, gets the least even."""
every_tile = pytest.mark.parametrize("tile", TILES)


def check(slots, table, deltas, impl, tile=16, *, dtype=torch.float32, seed=0):
    """Checks `bands` on outputs that are framed by NaN."""
    x_TI = randn(len(slots), table.in_size, seed=seed, dtype=dtype)
    frame, y_TO = framed(randn(len(slots), sum(table.outs), seed=seed + 1, dtype=dtype))
    before = y_TO.clone()
    assert bands(y_TO, x_TI, rows_of(slots, table, tile), table, impl=impl) is None
    expected = expected_of(x_TI, slots, deltas)
    exact_t = impl != "triton" or dtype == torch.float32
    assert_added(y_TO, before, expected, exact_t=exact_t)
    assert_framed(frame, sum(table.outs))


def check_rows(slots, table, deltas, impl, tile=16, *, dtype=torch.float32, scale=1.0, seed=0):
    """Checks `band_rows` on outputs framed by NaN; rows without a slot have ids that don't exist."""
    out = table.outs[0]
    ids_T = (torch.arange(len(slots)) * 7 + 3) % out
    ids_T[torch.tensor(slots, dtype=torch.int64) < 0] = out + 5
    frame, y_TI = framed(randn(len(slots), table.in_size, seed=seed + 1, dtype=dtype))
    before = y_TI.clone()
    rows = rows_of(slots, table, tile)
    assert band_rows(y_TI, ids_T.to(DEVICE), rows, table, scale=scale, impl=impl) is None
    nothing = torch.zeros(table.in_size, dtype=torch.float64)
    expected = [
        nothing if slot < 0 else scale * deltas[slot][i]
        for slot, i in zip(slots, ids_T.tolist(), strict=True)
    ]
    expected = torch.stack(expected) if expected else torch.zeros(0, table.in_size).double()
    exact_t = impl != "triton" or dtype == torch.float32
    assert_added(y_TI, before, expected, exact_t=exact_t)
    assert_framed(frame, table.in_size)


@every_tile
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(impl, bits, tile):
    plans = [(Band(bits, 35),), (Band(bits, 2),)]
    slots = [1, -1, 0, 2, 1]  # one tenant twice, another once, no slot, an empty slot
    shapes = ((1, 1), (63, 65), (64, 128), (129, 127), (150, 1100), (700, 33))
    # Many blocks take the interpreter seconds; `test_splits_of_a_sum` gives it some.
    for out, size in shapes[:4] if INTERPRETED else shapes:
        table, deltas = filled(size, [out], plans, slots=3)
        check(slots, table, deltas, impl, tile)
        check_rows(slots, table, deltas, impl, tile, scale=7.5)


@pytest.mark.skipif(INTERPRETED, reason="takes seconds for what `test_parts_and_dtypes` shows")
def test_every_width_in_bfloat16(impl):
    """A CPU that can multiply such rows as bytes does; what multiplies the codes then has 16 bits."""
    slots = [1, -1, 0, 2, 1, 1, 1, 1, 0, 1, 1]  # one, two and four rows of a tenant at a time
    shapes = ((65, 63, 128), (1, 1, 64), (300, 700, 64), (127, 1100, 192))
    for out, size, group in shapes:
        for bits in WIDTHS:
            plans = [(Band(bits, 35),), (Band(bits, 2), Band(2, 9))]
            table, deltas = filled(size, [out, 1, out], plans, group, slots=3)
            x_TI = randn(len(slots), size, seed=bits, dtype=torch.bfloat16)
            x_TI[:, size // 2] *= 300  # as in activations
            y_TO = torch.zeros(len(slots), 2 * out + 1, device=DEVICE)
            bands(y_TO, x_TI, rows_of(slots, table), table, impl=impl)
            expected = expected_of(x_TI, slots, deltas)
            error = (y_TO.cpu() - expected).norm(dim=-1)
            assert (error <= 5e-4 * expected.norm(dim=-1)).all(), (out, bits)
            for j, slot in enumerate(slots):
                # The result is the same whoever else is in the batch.
                alone = torch.zeros_like(y_TO[:1])
                bands(alone, x_TI[j : j + 1], rows_of([slot], table), table, impl=impl)
                assert (alone - y_TO[j]).norm() <= 1e-6 * expected[j].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so(impl, dtype, bad):
    table, _ = filled(200, [130], PLANS)
    x_TI, y_TO = randn(3, 200, dtype=dtype), torch.zeros(3, 130, device=DEVICE)
    x_TI[1, 150] = bad
    bands(y_TO, x_TI, rows_of([0, 0, 1], table), table, impl=impl)
    assert not y_TO[1].isfinite().any()
    assert y_TO[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tile", [1, 16])
def test_the_nan_of_a_gpu_s_arithmetic_stays_one(impl, tile):
    """All of its bits are set but the sign, which rounding on the bits must not reach."""
    table, _ = filled(200, [130], [(Band(2, 5),)])
    at = int(table.fields_SPBF[0, 0, 0, S])
    table.pool.blobs_SN[0, at : at + 4].view(torch.int32).fill_(0x7FFFFFFF)
    y_TO, x_TI = torch.zeros(2, 130, dtype=torch.float16, device=DEVICE), randn(2, 200)
    bands(y_TO, x_TI.half(), rows_of([0, 0], table, tile), table, impl=impl)
    assert y_TO.isnan().all()


@pytest.mark.parametrize("tokens", [3, 9, 257])
def test_tiles_that_the_op_chooses(impl, tokens):
    slots = [2, 0, -1, 0, 1, 3, 2, 0, 1, *[0] * 140, *[1] * 108][:tokens]
    table, deltas = filled(140, [70], PLANS, slots=4)
    x_TI, ids_T = randn(tokens, 140), torch.arange(tokens, device=DEVICE) % 70
    rows = group_all(torch.tensor(slots, dtype=torch.int32, device=DEVICE), 4)
    y_TO, y_TI = torch.zeros(tokens, 70, device=DEVICE), torch.zeros(tokens, 140, device=DEVICE)
    bands(y_TO, x_TI, rows, table, impl=impl)
    assert_added(y_TO, torch.zeros(tokens, 70), expected_of(x_TI, slots, deltas))
    band_rows(y_TI, ids_T, rows, table, impl=impl)
    rows_of_u = [(slot >= 0) * deltas[slot][i % 70] for i, slot in enumerate(slots)]
    assert_added(y_TI, torch.zeros(tokens, 140), torch.stack(rows_of_u))


@pytest.mark.parametrize(("slots", "tile"), MIXED, ids=str)
def test_tenant_mixes(impl, slots, tile):
    table, deltas = filled(140, [70], PLANS, slots=4)
    check(slots, table, deltas, impl, tile)
    check_rows(slots, table, deltas, impl, tile)


@every_tile
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs", OUTS, ids=str)
def test_parts_and_dtypes(impl, outs, dtype, tile):
    table, deltas = filled(200, outs, PLANS, slots=4)
    check(MIXES[5], table, deltas, impl, tile, dtype=dtype)
    if len(outs) == 1:
        check_rows(MIXES[5], table, deltas, impl, tile, dtype=dtype, scale=2.0)


def test_many_rows_of_a_few(impl):
    table, deltas = filled(140, [70, 90], PLANS)
    check([2] * 3 + [1] * 70 + [-1] + [0] * 64, table, deltas, impl, 64)


@pytest.mark.parametrize(
    "slots",
    [[0] * 5, [2] * 3 + [1, 0, 1] * 2 + [-1, 1] + [3] * 4, [0, 2] * 5 + [1]],
    ids=["one", "in and out of one piece", "two in turn"],
)
def test_many_rows_in_bfloat16(impl, slots, by_python, monkeypatch):
    """A CPU with bfloat16 instructions has another path, which torch can take slowly without them too."""
    called = []
    decode = many._decode
    monkeypatch.setattr(many, "MANY", 4)
    monkeypatch.setattr(many, "PIECE", 70 * 64)  # so that both factors are decoded in pieces
    monkeypatch.setattr(many, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(many, "_decode", lambda *a: called.append(a[0]) or decode(*a))
    used = {slot for slot in range(3) if slots.count(slot) >= 4}
    x_TI, y_TO = (randn(len(slots), n, seed=n, dtype=torch.bfloat16) for n in (140, 261))
    for group in (64, 100) if impl == "cpu" else (64,):
        table, deltas = filled(140, [170, 1, 90], PLANS, group, slots=4)
        got, expected = y_TO.clone(), expected_of(x_TI, slots, deltas)
        bands(got, x_TI, rows_of(slots, table), table, impl=impl)
        few = [i for i, slot in enumerate(slots) if slot not in used]
        assert_added(got[few], y_TO[few], expected[few], exact_t=impl == "cpu")
        error = (got.cpu().double() - y_TO.cpu().double() - expected).norm(dim=-1)
        assert (error <= 2**-8 * (y_TO.cpu().double().norm(dim=-1) + expected.norm(dim=-1))).all()
        assert set(called) == (used if impl == "cpu" else set())


@every_tile
@pytest.mark.parametrize("group", [192, 1024] if INTERPRETED else [64, 192, 1024])
def test_other_group_sizes(impl, group, tile):
    table, deltas = filled(330, [270], [PLAN, PLANS[0]], group)
    check([0, 1], table, deltas, impl, tile)
    check_rows([0, 1], table, deltas, impl, tile)


@pytest.mark.skipif("triton" not in IMPLS, reason="test_triton.py runs it where there is Triton")
@every_tile
@pytest.mark.parametrize("splits", [2, 8])
def test_splits_of_a_sum(tile, splits, monkeypatch):
    """Each part counts once, even if some have no steps, whether their number is `SPLITS` or another."""
    from deltacome.ops.bands import triton as kernels

    monkeypatch.setattr(kernels, "split_count", lambda *_: splits)
    table, deltas = filled(1100, [70], PLANS)
    check([2, -1, 0, 2], table, deltas, "triton", tile)


def test_sums_are_split_into_one_number_of_parts():
    """Each further number would be another kernel to compile."""
    kernels = pytest.importorskip("deltacome.ops.bands.triton")
    count, many = kernels.split_count, kernels.PROGRAMS
    programs, steps = range(1, 4 * many, 7), range(1, 40)
    for tile, counts in ((1, {1, kernels.SPLITS}), (16, {1, kernels.SPLITS}), (64, {1})):
        assert {count(tile, p, s) for p in programs for s in steps} == counts
    assert count(1, 34, 8) == kernels.SPLITS  # a row of 4096 × 4096 at 1/16
    assert count(1, many, 8) == count(1, 34, 1) == 1


def test_groups_that_cut_through_blocks(impl):
    for group in (1, 7, 100):
        table, deltas = filled(130, [70], [PLAN], group)
        if impl == "triton":
            with pytest.raises(UnsupportedError, match="multiple of 64"):
                check([0], table, deltas, impl)
        else:
            check([0], table, deltas, impl)
            check_rows([0], table, deltas, impl)


@every_tile
def test_activations_of_any_size(impl, tile):
    """Between the two products, sums are not clipped to the range of float16."""
    table, deltas = filled(140, [70], PLANS)
    x_TI = 6e4 * randn(1, 140).sign().to(torch.float16)
    y_TO = torch.zeros(1, 70, device=DEVICE)
    bands(y_TO, x_TI, rows_of([0], table, tile), table, impl=impl)
    expected = expected_of(x_TI, [0], deltas)
    assert (y_TO.cpu() - expected).norm() < 2**-10 * expected.norm()


@every_tile
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_outputs_are_rounded_once(impl, dtype, tile):
    table, _ = filled(200, [130], PLANS)
    rows = rows_of([1, 0, 2, -1, 1], table, tile)
    x_TI, y_TO = randn(5, 200, dtype=dtype), randn(5, 130, seed=1, dtype=dtype)
    expected = y_TO.float()
    bands(expected, x_TI, rows, table, impl=impl)
    bands(y_TO, x_TI, rows, table, impl=impl)
    assert torch.equal(y_TO, expected.to(dtype))


@every_tile
def test_inputs_stay_and_strides_are_free(impl, tile):
    table, deltas = filled(140, [70], PLANS)
    slots = [2, -1, 0]
    rows = rows_of(slots, table, tile)
    wide = randn(3, 400, seed=3)
    inputs = [randn(140, 3).T, wide[:, 1:141], wide[:, :280:2], wide[:1, :140].expand(3, 140)]
    for x_TI in inputs:
        whole = randn(3, 210, seed=1)
        for y_TO in (whole[:, 5:75], whole[:, 1:141:2], randn(70, 3, seed=1).T):
            copies = x_TI.clone(), y_TO.clone(), table.pool.blobs_SN.clone()
            bands(y_TO, x_TI, rows, table, impl=impl)
            assert torch.equal(x_TI, copies[0])
            assert torch.equal(table.pool.blobs_SN, copies[2])
            assert_added(y_TO, copies[1], expected_of(x_TI, slots, deltas))


@every_tile
def test_a_slot_is_loaded_cleared_and_loaded_again(impl, tile):
    table, deltas = filled(140, [70], PLANS)
    other, (delta, *_) = filled(140, [70], PLANS[2:])
    table.clear(1)
    check([1, 0], table, [deltas[0], torch.zeros_like(deltas[0])], impl, tile)
    blob = other.pool.blobs_SN[0][: bands_nbytes((70, 140), PLANS[2])]
    table.pool.load(0, 0, blob)  # fewer bands than were there
    table.load(0, [PlacedBands(0, PLANS[2])])
    check([0, 2], table, [delta, deltas[1], deltas[2]], impl, tile)


@every_tile
@any_example
@given(data=st.data(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_any_shape(impl, tile, data, seed, dtype):
    """Other shapes, plans, tenants and numbers in each run."""
    outs = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3), "outs")
    size = data.draw(st.integers(1, 300), "in")
    band = st.builds(Band, st.sampled_from(WIDTHS), st.integers(1, 40))
    plans = data.draw(st.lists(st.lists(band, min_size=1, max_size=4), min_size=1, max_size=3))
    options = {"slots": len(plans) + 1, "seed": seed}  # one slot is empty
    table, deltas = filled(size, outs, [tuple(plan) for plan in plans], **options)
    slots = data.draw(st.lists(st.integers(-1, len(plans)), max_size=8), "slots")
    check(slots, table, deltas, impl, tile, dtype=dtype, seed=seed)
    if len(outs) == 1:
        check_rows(slots, table, deltas, impl, tile, dtype=dtype, seed=seed)


def test_ids_of_an_empty_slot_are_not_looked_at(impl):
    table, deltas = filled(70, [80], PLANS, slots=len(PLANS) + 1)
    y_TI, ids_T = torch.zeros(2, 70, device=DEVICE), torch.tensor([85, 5], device=DEVICE)
    band_rows(y_TI, ids_T, rows_of([len(PLANS), 0], table), table, impl=impl)
    assert not y_TI[0].any()
    assert_added(y_TI[1:], torch.zeros(1, 70), deltas[0][5:6])


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the assertion ends the process")
@pytest.mark.parametrize("ids", [[0, 80], [-1, 0]])
def test_rows_out_of_range(impl, ids):
    table, _ = filled(70, [80], PLANS)
    y_TI = torch.zeros(2, 70)
    with pytest.raises((IndexError, RuntimeError), match=r"\[0, 80\)"):
        band_rows(y_TI, torch.tensor(ids), rows_of([1, 1], table), table, impl=impl)
    assert not y_TI.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"], indirect=True)
def test_threads_do_not_change_a_bit(impl, dtype):
    table, _ = filled(640, [512, 100], [(Band(8, 3), Band(3, 20), Band(2, 100))] * 7)
    before = torch.get_num_threads()
    try:
        # Enough work to wake other threads, which share out the tasks of few tenants and take many whole.
        for slots in ([0] * 16, [0, 1, 2] * 22, list(range(7)) * 9):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y_TO = randn(len(slots), 612, seed=1)
                x_TI = randn(len(slots), 640, dtype=dtype)
                bands(y_TO, x_TI, rows_of(slots, table), table, impl=impl)
                results.append(y_TO)
            if impl == "reference":  # torch's own products do not promise this
                torch.testing.assert_close(results[0], results[1])
                continue
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_every_half_is_read_exactly(impl):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = torch.where(halves.isfinite(), halves, 0)[None]
    halves = halves[:, ::13] if INTERPRETED else halves
    one = Factor.from_values(torch.ones(1, 1))
    blob = write_bands([BandTensors(Factor.from_values(halves.float()), one, torch.ones(1))])
    pool = Pool(1, len(blob), device=DEVICE)
    pool.load(0, 0, blob)
    table = BandTable(pool, halves.numel(), [1])
    table.load(0, [PlacedBands(0, (Band(16, 1),))])
    y_TI = torch.zeros(1, halves.numel(), device=DEVICE)
    ids_T = torch.tensor([0], device=DEVICE)
    band_rows(y_TI, ids_T, rows_of([0], table), table, impl=impl)
    assert torch.equal(y_TI.cpu(), halves.float())


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
def test_arguments_that_do_not_fit(impl, y, x):
    table, _ = filled(140, [70], PLANS)
    x = x if x.is_meta else x.to(DEVICE)
    with pytest.raises(MismatchError, match="bands: expected"):
        bands(y.to(DEVICE), x, rows_of([0, 1], table), table, impl=impl)


def test_ids_that_do_not_fit(impl):
    table, _ = filled(70, [80], PLANS)
    rows, y_TI = rows_of([0, 1], table), torch.zeros(2, 70, device=DEVICE)
    for ids_T in (torch.zeros(3).long(), torch.zeros(1, 2).long(), torch.zeros(2)):
        with pytest.raises(MismatchError, match="ids"):
            band_rows(y_TI, ids_T.to(DEVICE), rows, table, impl=impl)
    two, _ = filled(70, [80, 80], PLANS)
    with pytest.raises(MismatchError, match="one part"):
        band_rows(y_TI, torch.zeros(2).long().to(DEVICE), rows, two, impl=impl)


def test_gradients_are_refused(impl):
    table, _ = filled(140, [70], PLANS)
    rows, y_TO = rows_of([0, 1], table), torch.zeros(2, 70, device=DEVICE)
    x_TI = randn(2, 140).requires_grad_()
    with pytest.raises(UnsupportedError, match="inference"):
        bands(y_TO, x_TI, rows, table, impl=impl)
    with torch.no_grad():
        bands(y_TO, x_TI, rows, table, impl=impl)


def test_unknown_implementation_is_not_another():
    table, _ = filled(140, [70], PLANS)
    y_TO = torch.zeros(2, 70, device=DEVICE)
    with pytest.raises(UnsupportedError, match="'fast'"):
        bands(y_TO, randn(2, 140), rows_of([0, 1], table), table, impl="fast")
    assert not y_TO.any()


def test_registration(impl):
    """Schema, fake implementation, and functionalization, as torch itself checks them."""
    table, _ = filled(70, [80], PLANS)
    rows = rows_of([0, -1, 1], table)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    where = (rows.slot_T, rows.order_T, rows.tiles_M3, table.pool.blobs_SN, table.fields_SPBF)
    how = (rows.tile, table.max_rank, table.group_size)
    arguments = (randn(3, 80), randn(3, 70), *where, table.outs, *how, impl)
    torch.library.opcheck(torch.ops.deltacome.bands.default, arguments, test_utils=tests)
    ids_T = torch.tensor([0, 79, 3], device=DEVICE)
    arguments = (randn(3, 70), ids_T, *where, 80, *how, 2.0, impl)
    torch.library.opcheck(torch.ops.deltacome.band_rows.default, arguments, test_utils=tests)
