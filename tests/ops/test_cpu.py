"""The CPU kernels against the dense delta in float64, for every instruction set that this CPU has."""

import importlib.util
from pathlib import Path

import pytest
import torch
from artifact_helpers import PLAN, random_bands
from hypothesis import given, settings
from hypothesis import strategies as st

from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.codec import BandTensors, Factor, dense, write_bands
from deltacome.format.spec import WIDTHS, Band
from deltacome.ops.bands import band_rows, bands, cpu

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
assert spec is not None
assert spec.loader is not None
hatch_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hatch_build)

COMPILER = hatch_build.compiler()
HAS = {
    "avx2": torch.cpu._is_avx2_supported,
    "avx512": torch.cpu._is_avx512_supported,
}
ISAS = [
    pytest.param(
        isa,
        marks=pytest.mark.skipif(
            isa in HAS and not HAS[isa](), reason=f"this CPU cannot run {isa} instructions"
        ),
    )
    for isa in hatch_build.instruction_sets()
]
# Where there is a compiler, a missing library fails the tests instead.
native = pytest.mark.skipif(
    COMPILER is None and cpu.missing() is not None, reason="no C++ compiler, and no library"
)
pytestmark = pytest.mark.usefixtures("poison")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(shape, plan, group_size):
    tensors = random_bands(shape, plan, group_size)
    return write_bands(tensors), dense(tensors).double()


def lists(plan):
    return [band.bits for band in plan], [band.count for band in plan]


def assert_rounded(got, expected, size):
    """`got` is `expected`, rounded to its dtype after float32 sums of terms of magnitude `size`."""
    eps = torch.finfo(got.dtype).eps if got.dtype.itemsize < 4 else 0.0
    bound = 0.51 * eps * expected.abs() + 1e-5 * expected.abs() + 3e-6 * size
    assert got.isfinite().all()
    assert ((got.double() - expected).abs() <= bound).all()


def framed(values_TN, dtype):
    """The values in the middle of NaN, so that what is written beside them shows."""
    rows, columns = values_TN.shape
    frame = torch.full((rows + 2, columns + 3), float("nan"), dtype=dtype)
    inside = frame[1 : rows + 1, 1 : columns + 1]
    inside.copy_(values_TN)
    return frame, inside


def assert_framed(frame, columns):
    assert frame[[0, -1]].isnan().all()
    assert frame[:, 0].isnan().all()
    assert frame[:, columns + 1 :].isnan().all()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", hatch_build.instruction_sets())
def test_a_compiler_means_a_library_of_this_source(isa):
    # If this fails after a change of cpu.cpp: python hatch_build.py
    assert cpu.library(isa).deltacome_source().decode() == hatch_build.source_digest()


@native
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_bands_are_the_dense_delta(isa, bits):
    for shape in [(1, 1), (63, 65), (64, 64), (129, 127), (200, 33), (321, 700)]:
        for group_size in (128, 32):  # with and without several groups in a block
            plan = (Band(bits, min(5, *shape)),)
            blob, delta_OI = packed(shape, plan, group_size)
            for tokens in (0, 1, 3, 16, 65):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    x_TI = randn(tokens, shape[1]).to(dtype)
                    frame, y_TO = framed(randn(tokens, shape[0], seed=1), dtype)
                    expected = y_TO.double() + x_TI.double() @ delta_OI.T
                    cpu.bands(y_TO, x_TI, blob, *lists(plan), group_size, isa=isa)
                    assert_rounded(y_TO, expected, 1)
                    assert_framed(frame, shape[0])


@native
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_are_those_of_the_dense_delta(isa, bits):
    for shape in [(1, 1), (65, 63), (64, 64), (127, 129), (200, 33), (700, 321)]:
        for group_size in (128, 32):
            plan = (Band(bits, min(5, *shape)),)
            blob, delta_OI = packed(shape, plan, group_size)
            every = torch.arange(shape[0]).flip(0)
            for ids_T in (every, every.int().repeat(2), every[:0], every[:3]):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    frame, y_TI = framed(randn(len(ids_T), shape[1], seed=1), dtype)
                    expected = y_TI.double() + 7.5 * delta_OI[ids_T.long()]
                    arguments = (shape[0], *lists(plan), group_size, 7.5)
                    cpu.band_rows(y_TI, ids_T, blob, *arguments, isa=isa)
                    assert_rounded(y_TI, expected, 1)
                    assert_framed(frame, shape[1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_half_is_read_exactly(isa):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = torch.where(halves.isfinite(), halves, 0)[None]
    one = Factor.from_values(torch.ones(1, 1))
    blob = write_bands([BandTensors(Factor.from_values(halves.float()), one, torch.ones(1))])
    y_TI = torch.zeros(1, 2**16)
    cpu.band_rows(y_TI, torch.tensor([0]), blob, 1, [16], [1], 128, 1.0, isa=isa)
    assert torch.equal(y_TI, halves.float())


@native
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa):
    shape, plan = (512, 640), (Band(8, 3), Band(3, 20), Band(2, 100))
    blob, _ = packed(shape, plan, 128)
    before = torch.get_num_threads()
    try:
        for tokens in (16, 65):  # enough work to wake a second thread
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y_TO, y_TI = randn(tokens, 512, seed=1), randn(tokens, 640, seed=2)
                cpu.bands(y_TO, randn(tokens, 640), blob, *lists(plan), 128, isa=isa)
                ids_T = torch.arange(tokens)
                cpu.band_rows(y_TI, ids_T, blob, 512, *lists(plan), 128, 2.0, isa=isa)
                results.append(torch.cat([y_TO, y_TI], 1))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@native
@given(
    out_size=st.integers(1, 200),
    in_size=st.integers(1, 200),
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4),
    group_size=st.sampled_from([1, 7, 64, 100, 128, 192, 1000]),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_plan(out_size, in_size, widths, group_size, tokens, seed):
    plan = tuple(Band(bits, 1 + (seed + i) % 3) for i, bits in enumerate(widths))
    blob, delta_OI = packed((out_size, in_size), plan, group_size)
    x_TI, y_TO = randn(tokens, in_size, seed=seed), randn(tokens, out_size, seed=1)
    expected = y_TO.double() + x_TI.double() @ delta_OI.T
    bands(y_TO, x_TI, blob, plan, group_size, impl="cpu")
    assert_rounded(y_TO, expected, 1)
    ids_T, y_TI = torch.arange(tokens) * seed % out_size, randn(tokens, in_size, seed=2)
    expected = y_TI.double() + 3 * delta_OI[ids_T]
    band_rows(y_TI, ids_T, blob, out_size, plan, group_size, scale=3.0, impl="cpu")
    assert_rounded(y_TI, expected, 1)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strides_and_misaligned_rows(dtype):
    blob, delta_OI = packed((80, 70), PLAN, 32)
    wide = randn(6, 200, seed=3).to(dtype)
    inputs = {
        "an odd offset": wide[:, 1:71],
        "every other column": wide[:, 1:141:2],
        "columns together": randn(70, 6).to(dtype).T,
        "one row for all": wide[:1, 3:73].expand(6, 70),
    }
    outputs = {
        "an odd offset": lambda: randn(6, 101, seed=1).to(dtype)[:, 1:81],
        "columns together": lambda: randn(80, 6, seed=1).to(dtype).T,
        "every other column": lambda: randn(6, 160, seed=1).to(dtype)[:, ::2],
        "one column of many": lambda: randn(6, 80, 2, seed=1).to(dtype)[..., 0],
    }
    for x_name, x_TI in inputs.items():
        for y_name, make in outputs.items():
            y_TO, copy = make(), x_TI.clone()
            expected = y_TO.double() + x_TI.double() @ delta_OI.T
            assert bands(y_TO, x_TI, blob, PLAN, 32, impl="cpu") is None
            assert torch.equal(x_TI, copy), (x_name, y_name)
            assert_rounded(y_TO, expected, 4)
    with pytest.raises(RuntimeError, match="memory"):  # as torch says of such outputs
        bands(torch.zeros(1, 80).expand(6, 80), wide[:, :70], blob, PLAN, 32, impl="cpu")


@native
@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_rounded_once_and_to_even(isa):
    blob, _ = packed((300, 70), PLAN, 64)
    x_TI, y_TO = randn(6, 70).bfloat16(), randn(6, 300, seed=1).bfloat16()
    y_TO[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    expected = y_TO.float()
    cpu.bands(expected, x_TI.float(), blob, *lists(PLAN), 64, isa=isa)
    cpu.bands(y_TO, x_TI, blob, *lists(PLAN), 64, isa=isa)
    torch.testing.assert_close(y_TO, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)
    # Half-way between two neighbours, one with an even and one with an odd mantissa below.
    half, one = torch.full((1, 2), 2.0**-8), torch.ones(1, 1)
    band = BandTensors(Factor.from_values(one), Factor.from_values(half), torch.ones(1))
    y_TO = torch.tensor([[1, 1 + 2.0**-7]]).bfloat16()
    cpu.bands(y_TO, one, write_bands([band]), [16], [1], 128, isa=isa)
    assert y_TO.tolist() == [[1, 1 + 2.0**-6]]


@native
@pytest.mark.parametrize("ids", [[0, 80], [-1, 0]])
def test_rows_out_of_range(ids):
    blob, _ = packed((80, 70), PLAN, 32)
    y_TI = torch.zeros(2, 70)
    with pytest.raises(IndexError, match=r"\[0, 80\)"):
        band_rows(y_TI, torch.tensor(ids), blob, 80, PLAN, 32, impl="cpu")
    assert not y_TI.any()


@native
def test_arguments_that_do_not_fit():
    blob, _ = packed((80, 70), PLAN, 32)
    y_TO, x_TI = torch.zeros(2, 80), torch.zeros(2, 70)
    for wrong in (blob[:-16], torch.stack([blob, blob], 1)[:, 0]):
        with pytest.raises(ArtifactError, match=f"expected {len(blob)} bytes"):
            bands(y_TO, x_TI, wrong, PLAN, 32, impl="cpu")
    with pytest.raises(MismatchError):
        bands(y_TO, torch.zeros(3, 70), blob, PLAN, 32, impl="cpu")
    with pytest.raises(MismatchError, match="on the CPU"):
        cpu.bands(y_TO.to("meta"), x_TI.to("meta"), blob.to("meta"), *lists(PLAN), 32)


@native
def test_registration():
    """Schema, fake implementation, and functionalization, as torch itself checks them."""
    blob, _ = packed((80, 70), PLAN, 32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (randn(3, 80), randn(3, 70), blob, *lists(PLAN), 32, "cpu")
    torch.library.opcheck(torch.ops.deltacome.bands.default, arguments, test_utils=tests)
    ids_T = torch.tensor([0, 79, 3])
    arguments = (randn(3, 70), ids_T, blob, 80, *lists(PLAN), 32, 2.0, "cpu")
    torch.library.opcheck(torch.ops.deltacome.band_rows.default, arguments, test_utils=tests)


@native
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    blob, _ = packed((80, 70), PLAN, 32)

    def layer(x_TI):
        y_TO = x_TI.sin() @ torch.ones(70, 80)
        bands(y_TO, x_TI, blob, PLAN, 32, impl="cpu")
        return y_TO + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        x_TI = randn(tokens, 70)
        torch.testing.assert_close(compiled(x_TI), layer(x_TI))


def test_without_a_library_it_is_an_error(monkeypatch):
    blob, _ = packed((80, 70), PLAN, 32)
    y_TO = torch.zeros(2, 80)
    monkeypatch.setattr(cpu, "default_isa", lambda: "absent")
    with pytest.raises(UnsupportedError, match=r"install a C\+\+ compiler"):
        bands(y_TO, torch.ones(2, 70), blob, PLAN, 32, impl="cpu")
    assert not y_TO.any()


@pytest.mark.parametrize(("command", "says"), [("/no/compiler", "no C++"), ("false", "without")])
def test_the_build_goes_on_without_a_compiler(command, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "_cpu_portable.so").write_bytes(b"of an older build")
    monkeypatch.setenv("CXX", command)
    assert hatch_build.build(tmp_path) == []
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
