"""What compilers and captured graphs need: shapes that follow from shapes, no waiting for the device."""

import pytest
import torch
from ops_helpers import DEVICE, INTERPRETED, PLANS, TILES, filled, filled_signs, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from deltacome.ops.bands import band_rows, bands
from deltacome.ops.norm import norm
from deltacome.ops.rows import group_all, group_rows, set_unused
from deltacome.ops.signs import rows as plain
from deltacome.ops.signs import sign_rows, signs
from deltacome.ops.slots import COUNT, BandTable, Pool, SignTable

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="test_triton.py runs it in a process that interprets"
)


def test_all_ops_in_one_graph(impl):
    torch._dynamo.reset()
    table, _ = filled(140, [70], PLANS)
    square, _ = filled(140, [140], PLANS)
    sign_table, _ = filled_signs(140, [70], empty=0)
    sign_square, _ = filled_signs(140, [140], empty=0)
    weights_SH = randn(3, 140)

    def step(x_TI, slot_T, ids_T):
        rows = group_rows(slot_T, 3)
        y_TI = x_TI.cos()
        band_rows(y_TI, ids_T, rows, square, scale=2.0, impl=impl)
        sign_rows(y_TI, ids_T, rows, sign_square)
        norm(y_TI, x_TI, rows, weights_SH, 1e-5, impl=impl)
        y_TO = y_TI.sin() @ torch.ones(140, 70, device=DEVICE)
        bands(y_TO, y_TI, rows, table, impl=impl)
        signs(y_TO, y_TI, rows, sign_table, impl=impl)
        return y_TO + 1, y_TI + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for slots in ([0, -1, 2], [1, 1, 0, 2, -1]):
        slot_T, x_TI = torch.tensor(slots, device=DEVICE), randn(len(slots), 140)
        ids_T = torch.arange(len(slots), device=DEVICE)
        for got, expected in zip(
            compiled(x_TI, slot_T, ids_T), step(x_TI, slot_T, ids_T), strict=True
        ):
            torch.testing.assert_close(got, expected)


class Launch:
    """Stands in for a kernel: takes any grid and any arguments, and records what it is launched with."""

    def __init__(self):
        self.grids, self.compiled = [], set()

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append(grid)
            # The compiler knows of a number whether it is 1, and whether 16 divides it.
            numbers = [(n == 1, n % 16) for n in arguments if isinstance(n, int)]
            self.compiled.add((*numbers, *sorted(constants.items())))

        return launch


@interpreted
@pytest.mark.parametrize("tile", TILES)
def test_launching_asks_nothing_of_the_device(monkeypatch, tile):
    """With tensors that have no values, which is what a capture sees, every launch is made."""
    from deltacome.ops.bands import triton as band_kernels
    from deltacome.ops.norm import triton as norm_kernel
    from deltacome.ops.signs import triton as sign_kernel

    launch = Launch()
    for module, names in (
        (band_kernels, ("shrink", "expand", "gather")),
        (sign_kernel, ("multiply",)),
        (norm_kernel, ("normalise",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, launch)
    with FakeTensorMode():
        x_TI, y_TO = torch.empty(5, 140), torch.empty(5, 90)
        slot_T, ids_T = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
        blobs_SN = torch.empty(4, 160_000, dtype=torch.uint8)
        fields_SPBF = torch.empty(4, 2, 3, 12, dtype=torch.int64)
        fields_SPF = torch.empty(4, 2, 3, dtype=torch.int64)
        rows = group_rows(slot_T, 4, tile=tile)
        where = (rows.order_T, rows.tiles_M3, blobs_SN)
        band_kernels.bands(y_TO, x_TI, *where, fields_SPBF, [70, 20], tile, 60, 128)
        band_kernels.band_rows(
            *(x_TI, ids_T, rows.slot_T, *where, fields_SPBF[:, :1], 70),
            *(tile, 60, 128, 1.0),
        )
        sign_kernel.signs(y_TO, x_TI, *where, fields_SPF, [70, 20], tile)
        norm_kernel.norm(x_TI, x_TI, rows.slot_T, torch.empty(4, 140), 1e-5)
        plain.sign_rows(x_TI, ids_T, rows.slot_T, blobs_SN, fields_SPF[:, :1], 70, 1.0)
    assert len(launch.grids) == 6
    assert all(isinstance(size, int) for grid in launch.grids for size in grid)


@interpreted
def test_a_batch_known_to_be_of_the_base_launches_nothing(monkeypatch):
    """So a graph that is captured for such batches contains no launch."""
    from deltacome.ops.bands import triton as band_kernels
    from deltacome.ops.norm import triton as norm_kernel
    from deltacome.ops.signs import triton as sign_kernel

    launch = Launch()
    for module, name in (
        *((band_kernels, name) for name in ("shrink", "expand", "gather")),
        *((sign_kernel, "multiply"), (norm_kernel, "normalise")),
    ):
        monkeypatch.setattr(module, name, launch)
    table, _ = filled(140, [140], PLANS)
    sign_table, _ = filled_signs(140, [140], empty=0)
    rows = group_all(torch.tensor([0, 1, 2], dtype=torch.int32), 3)
    y_TO, x_TI, ids_T = torch.zeros(3, 140), randn(3, 140), torch.arange(3)

    def step():
        launch.grids.clear()
        bands(y_TO, x_TI, rows, table, impl="triton")
        band_rows(y_TO, ids_T, rows, table, impl="triton")
        signs(y_TO, x_TI, rows, sign_table, impl="triton")
        sign_rows(y_TO, ids_T, rows, sign_table)
        norm(y_TO.view(3, 2, 70), x_TI.view(3, 2, 70), rows, randn(3, 70), 1e-5, impl="triton")
        return len(launch.grids)

    set_unused(rows.slot_T, True)
    assert step() == 0
    assert not y_TO.any()
    set_unused(rows.slot_T, False)
    assert step() == 6


@interpreted
def test_a_plan_changes_no_launch(monkeypatch):
    """What is loaded later is data: a graph that was captured before serves it."""
    from deltacome.ops.bands import triton as band_kernels

    grids = []
    for plans in (PLANS, PLANS[::-1]):
        launch = Launch()
        for name in ("shrink", "expand"):
            monkeypatch.setattr(band_kernels, name, launch)
        table, _ = filled(140, [70], plans)
        y_TO, x_TI = torch.zeros(3, 70), randn(3, 140)
        for slots in ([0, 1, 2], [2, 2, -1]):
            bands(y_TO, x_TI, group_rows(torch.tensor(slots), 3), table, impl="triton")
        grids.append(launch.grids)
    assert grids[0] == grids[1]
    assert grids[0][:2] == grids[0][2:]


@interpreted
def test_few_variants_are_compiled(monkeypatch):
    """One for each number of splits, whatever the ranks of layers and the sizes of batches."""
    from deltacome.ops.bands import triton as band_kernels

    launches = {name: Launch() for name in ("shrink", "expand", "gather")}
    for name, launch in launches.items():
        monkeypatch.setattr(band_kernels, name, launch)
    for max_rank in (1, 60, 96, 3001):
        table = BandTable(Pool(8, 16), 4096, [1024], max_rank=max_rank)
        for tokens in (5, 16, 33, 64):
            rows = group_rows(torch.zeros(tokens, dtype=torch.int32), 8)
            y_TO, x_TI = torch.zeros(tokens, 1024), torch.zeros(tokens, 4096)
            bands(y_TO, x_TI, rows, table, impl="triton")
            band_rows(x_TI, torch.zeros(tokens).long(), rows, table, impl="triton")
    compiled = {name: len(launch.compiled) for name, launch in launches.items()}
    # Rows of an embedding are expanded without splits, and from another side.
    assert compiled == {"shrink": 2, "expand": 3, "gather": 1}


@interpreted
def test_what_is_timed_has_all_there_can_be_to_do(monkeypatch):
    """Even if no row of the batch has a tenant and no slot holds anything, as when an engine starts."""
    from deltacome.ops.bands import triton as band_kernels
    from deltacome.ops.signs import triton as sign_kernel

    def tuned(key, configs, run, tensors, made_up):
        trial = made_up()
        run(configs[-1], trial)
        timed.append((key[0], tensors, trial))

    timed = []
    monkeypatch.setattr(band_kernels, "tuned", tuned)
    monkeypatch.setattr(sign_kernel, "tuned", tuned)
    pool, outs = Pool(2, 16), [70, 1, 20]
    y_TO, x_TI = torch.zeros(20, 91), randn(20, 140)
    before = y_TO.clone(), x_TI.clone()
    rows = group_rows(torch.full((20,), -1), 2)
    where = (rows.order_T, rows.tiles_M3, pool.blobs_SN)
    for max_rank in (2, 60):
        fields_SPBF = BandTable(pool, 140, outs).fields_SPBF
        band_kernels.bands(y_TO, x_TI, *where, fields_SPBF, outs, 16, max_rank, 128)
    fields_SPBF, ids_T = BandTable(pool, 140, [70]).fields_SPBF, torch.zeros(20).long()
    band_kernels.band_rows(
        *(x_TI, ids_T, rows.slot_T, *where, fields_SPBF, 70, 16, 60, 128, 1.0),
    )
    sign_kernel.signs(y_TO, x_TI, *where, SignTable(pool, 140, outs).fields_SPF, outs, 16)
    assert [name for name, *_ in timed] == ["shrink", "expand"] * 2 + ["expand", "signs"]
    for name, tensors, trial in timed:
        assert [t.dtype for t in trial] == [t.dtype for t in tensors]
        assert [t.shape for t in trial[:4]] == [t.shape for t in tensors[:4]]
        _, _, order_T, tiles_M3, _, fields = trial
        assert order_T.tolist() == list(range(20))
        assert tiles_M3[:, 0].tolist() == [0] * len(tiles_M3)
        assert tiles_M3[:, 1].tolist() == [0, *tiles_M3[:, 2].cumsum(0)[:-1].tolist()]
        assert tiles_M3[:, 2].sum() == 20
        assert tiles_M3[:, 2].max() <= 16
        live = fields[..., 2] if name == "signs" else fields[:, :, 0, COUNT]
        assert live.flatten().tolist() in ([1, 1, 1], [1, 1, 0], [20, 20, 20], [60])
        if name == "shrink":  # every row met every direction: none of the fixture's NaN is left
            assert not trial[0][:, : int(live.sum())].any()
    assert torch.equal(y_TO, before[0])
    assert torch.equal(x_TI, before[1])


def test_a_configuration_is_chosen_once_and_never_in_a_capture(monkeypatch):
    launch = pytest.importorskip("deltacome.ops.triton_launch")
    times, runs, capturing = {"slow": 2.0, "fast": 1.0}, [], [True]

    def time(call):
        call()
        return times[runs[-1][0]]

    def tune(key="key"):
        before = len(runs)
        launch.tuned(
            *(key, ("slow", "fast"), lambda config, what: runs.append((config, what))),
            *("rows", lambda: "made up"),
        )
        return runs[before:]

    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(launch, "_time", time)
    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert tune() == [("slow", "rows")]  # nothing may be timed in a capture
    capturing[0] = False
    timed = [("slow", "made up"), ("fast", "made up"), ("fast", "rows")]
    assert tune() == timed  # the rows are changed once
    assert tune() == [("fast", "rows")]
    capturing[0] = True
    assert tune() == [("fast", "rows")]
    capturing[0] = False
    assert tune("another") == timed


@pytest.mark.parametrize(
    ("programs", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)]
)
def test_batches_of_about_a_size_share_a_choice(programs, power):
    launch = pytest.importorskip("deltacome.ops.triton_launch")
    assert launch.bucket(programs) == power


@pytest.mark.parametrize(("tokens", "tiles"), [(1, 1), (5, 5), (64, 12), (257, 12), (8192, 136)])
def test_a_batch_that_needs_all_of_its_tiles(tokens, tiles):
    launch = pytest.importorskip("deltacome.ops.triton_launch")
    order_T, tiles_M3 = launch.full_batch(tokens, tiles, torch.device("cpu"))
    rows = [range(start, start + count) for _, start, count in tiles_M3.tolist()]
    assert [place for tile in rows for place in tile] == order_T.tolist() == list(range(tokens))
    assert max(map(len, rows)) == -(-tokens // tiles)
    assert {t.dtype for t in (order_T, tiles_M3)} == {torch.int32}
