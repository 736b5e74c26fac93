"""The ops against the dense delta, for every width and awkward shapes."""

import pytest
import torch
from artifact_helpers import PLAN, random_bands

from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.codec import dense, write_bands
from deltacome.format.spec import WIDTHS, Band
from deltacome.ops.bands import band_rows, bands

pytestmark = pytest.mark.usefixtures("poison")
GROUP = 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(shape, plan):
    tensors = random_bands(shape, plan, GROUP)
    return write_bands(tensors), dense(tensors).double()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (64, 64), (129, 127), (200, 33)])
def test_bands_are_the_dense_delta(bits, shape):
    plan = (Band(bits, min(3, *shape)),)
    blob, delta_OI = packed(shape, plan)
    for tokens in (0, 1, 5):
        x_TI, y_TO = randn(tokens, shape[1]), randn(tokens, shape[0], seed=1)
        expected = y_TO.double() + x_TI.double() @ delta_OI.T
        assert bands(y_TO, x_TI, blob, plan, GROUP) is None
        torch.testing.assert_close(y_TO.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (65, 63), (64, 64), (127, 129), (200, 33)])
def test_rows_are_those_of_the_dense_delta(bits, shape):
    plan = (Band(bits, min(3, *shape)),)
    blob, delta_OI = packed(shape, plan)
    ids = torch.arange(shape[0]).flip(0).repeat(2)  # every row, and every row twice
    for ids_T in (ids, ids.to(torch.int32), ids[:0]):
        y_TI = randn(len(ids_T), shape[1], seed=1)
        expected = y_TI.double() + 7.5 * delta_OI[ids_T.long()]
        assert band_rows(y_TI, ids_T, blob, shape[0], plan, GROUP, scale=7.5) is None
        torch.testing.assert_close(y_TI.double(), expected, rtol=1e-5, atol=1e-6)


def test_bands_of_several_widths_add_up():
    blob, delta_OI = packed((150, 90), PLAN)
    x_TI, y_TO = randn(4, 90), torch.zeros(4, 150)
    bands(y_TO, x_TI, blob, PLAN, GROUP)
    torch.testing.assert_close(y_TO.double(), x_TI.double() @ delta_OI.T, rtol=1e-5, atol=1e-6)
    y_TI = torch.zeros(3, 90)
    ids_T = torch.tensor([149, 0, 64])
    band_rows(y_TI, ids_T, blob, 150, PLAN, GROUP)
    torch.testing.assert_close(y_TI.double(), delta_OI[ids_T], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_and_rounded_once(dtype):
    plan = (Band(8, 60),)
    blob, _ = packed((80, 70), plan)
    x_TI, y_TO = randn(6, 70).to(dtype), randn(6, 80, seed=1).to(dtype)
    expected = y_TO.float()
    bands(expected, x_TI.float(), blob, plan, GROUP)
    bands(y_TO, x_TI, blob, plan, GROUP)
    assert torch.equal(y_TO, expected.to(dtype))
    y_TI = randn(6, 70, seed=2).to(dtype)
    expected = y_TI.float()
    band_rows(expected, torch.arange(6), blob, 80, plan, GROUP, scale=3.0)
    band_rows(y_TI, torch.arange(6), blob, 80, plan, GROUP, scale=3.0)
    assert torch.equal(y_TI, expected.to(dtype))


def test_inputs_stay_and_outputs_may_be_views():
    blob, delta_OI = packed((80, 70), PLAN)
    x_TI, whole = randn(70, 6).T, randn(6, 100, seed=1)
    copies = x_TI.clone(), whole.clone(), blob.clone()
    bands(whole[:, 5:85], x_TI, blob, PLAN, GROUP)
    assert torch.equal(x_TI, copies[0])
    assert torch.equal(blob, copies[2])
    assert torch.equal(whole[:, :5], copies[1][:, :5])
    assert torch.equal(whole[:, 85:], copies[1][:, 85:])
    added = (whole - copies[1])[:, 5:85].double()
    torch.testing.assert_close(added, x_TI.double() @ delta_OI.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ids", [[0, 80], [-1, 0]])
def test_rows_out_of_range(ids):
    blob, _ = packed((80, 70), PLAN)
    y_TI = torch.zeros(2, 70)
    with pytest.raises(IndexError, match=r"\[0, 80\)"):
        band_rows(y_TI, torch.tensor(ids), blob, 80, PLAN, GROUP)
    assert not y_TI.any()


def test_unknown_implementation_is_not_the_reference():
    blob, _ = packed((80, 70), PLAN)
    y_TO, y_TI = torch.zeros(2, 80), torch.zeros(2, 70)
    with pytest.raises(UnsupportedError, match="'triton'"):
        bands(y_TO, torch.ones(2, 70), blob, PLAN, GROUP, impl="triton")
    with pytest.raises(UnsupportedError, match="'triton'"):
        band_rows(y_TI, torch.tensor([0, 1]), blob, 80, PLAN, GROUP, impl="triton")
    assert not y_TO.any()
    assert not y_TI.any()


def test_gradients_are_refused():
    blob, _ = packed((80, 70), PLAN)
    x_TI = torch.ones(2, 70, requires_grad=True)
    with pytest.raises(UnsupportedError, match="inference"):
        bands(torch.zeros(2, 80), x_TI, blob, PLAN, GROUP)
    y_TI = torch.zeros(2, 70, requires_grad=True) + 0
    with pytest.raises(UnsupportedError, match="inference"):
        band_rows(y_TI, torch.tensor([0, 1]), blob, 80, PLAN, GROUP)
    with torch.no_grad():
        bands(torch.zeros(2, 80), x_TI, blob, PLAN, GROUP)


@pytest.mark.parametrize(
    ("y", "x", "error"),
    [
        (torch.zeros(2, 80), torch.zeros(3, 70), MismatchError),
        (torch.zeros(1, 2, 80), torch.zeros(2, 70), MismatchError),
        (torch.zeros(2, 80), torch.zeros(2, 70, dtype=torch.int64), MismatchError),
        (torch.zeros(2, 80, dtype=torch.int64), torch.zeros(2, 70), MismatchError),
        (torch.zeros(2, 80), torch.zeros(2, 70, device="meta"), MismatchError),
        (torch.zeros(2, 80), torch.zeros(2, 200), ArtifactError),
    ],
)
def test_arguments_that_do_not_fit(y, x, error):
    blob, _ = packed((80, 70), PLAN)
    with pytest.raises(error):
        bands(y, x, blob, PLAN, GROUP)


def test_ids_that_do_not_fit():
    blob, _ = packed((80, 70), PLAN)
    for ids_T in (torch.zeros(3).long(), torch.zeros(1, 2).long(), torch.zeros(2)):
        with pytest.raises(MismatchError, match="ids"):
            band_rows(torch.zeros(2, 70), ids_T, blob, 80, PLAN, GROUP)


def test_registration():
    """Schema, fake implementation, and functionalization, as torch itself checks them."""
    blob, _ = packed((80, 70), PLAN)
    bits, counts = [band.bits for band in PLAN], [band.count for band in PLAN]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (randn(3, 80), randn(3, 70), blob, bits, counts, GROUP, "reference")
    torch.library.opcheck(torch.ops.deltacome.bands.default, arguments, test_utils=tests)
    ids_T = torch.tensor([0, 79, 3])
    arguments = (randn(3, 70), ids_T, blob, 80, bits, counts, GROUP, 2.0, "reference")
    torch.library.opcheck(torch.ops.deltacome.band_rows.default, arguments, test_utils=tests)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    blob, _ = packed((80, 70), PLAN)

    def layer(x_TI, ids_T):
        y_TO = x_TI.sin() @ torch.ones(70, 80)
        bands(y_TO, x_TI, blob, PLAN, GROUP)
        y_TI = x_TI.cos()
        band_rows(y_TI, ids_T, blob, 80, PLAN, GROUP, scale=2.0)
        return y_TO + 1, y_TI + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x_TI, ids_T = randn(tokens, 70), torch.arange(tokens)
        for got, expected in zip(compiled(x_TI, ids_T), layer(x_TI, ids_T), strict=True):
            torch.testing.assert_close(got, expected)
