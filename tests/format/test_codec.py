import pytest
import torch
from artifact_helpers import PLAN, random_bands, random_factor, random_packed, random_signs

from deltacome.errors import ArtifactError, PlanError
from deltacome.format.codec import (
    Factor,
    SignTensors,
    dense,
    dequantize,
    pack,
    plan_of,
    read_bands,
    read_signs,
    unpack,
    unpack_at,
    write_bands,
    write_signs,
)
from deltacome.format.spec import PLANES, WIDTHS, Band, bands_nbytes, sign_sections

pytestmark = pytest.mark.usefixtures("poison")
SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 200)


def random_codes(rows, size, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_round_trip(bits, size, rows):
    codes_RN = random_codes(rows, size, bits)
    before = codes_RN.clone()
    planes = pack(codes_RN, bits)
    assert torch.equal(codes_RN, before)
    blocks = -(-size // 64)
    assert [p.shape for p in planes] == [(rows, 2 * plane * blocks) for plane in PLANES[bits]]
    assert all(plane.dtype == torch.int32 for plane in planes)
    assert torch.equal(unpack(planes, bits, size), codes_RN)
    assert not unpack(planes, bits, 64 * blocks)[:, size:].any()
    index = torch.arange(size).flip(0)
    assert torch.equal(unpack_at(planes, bits, index), codes_RN[:, index])
    assert unpack_at(planes, bits, index[:0]).shape == (rows, 0)


@pytest.mark.parametrize("bits", PLANES)
def test_every_code_in_every_place(bits):
    for k in (0, 1, 2, 31, 32, 33, 62, 63):
        codes_RN = torch.zeros(2**bits, 64, dtype=torch.uint8)
        codes_RN[:, k] = torch.arange(2**bits)
        assert torch.equal(unpack(pack(codes_RN, bits), bits, 64), codes_RN)


# Worked out by hand: code k of a block is in word k mod 2p at bit p · (k div 2p).
@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (1, {0: 1}, [[0x00000001, 0]]),
        (1, {1: 1}, [[0, 0x00000001]]),
        (1, {2: 1, 63: 1}, [[0x00000002, 0x80000000]]),
        (2, {0: 3}, [[0x00000003, 0, 0, 0]]),
        (2, {5: 2}, [[0, 0x00000008, 0, 0]]),
        (2, {62: 1, 63: 2}, [[0, 0, 0x40000000, 0x80000000]]),
        (3, {0: 5}, [[0x00000001, 0, 0, 0], [0x00000001, 0]]),
        (3, {7: 6}, [[0, 0, 0, 0x00000008], [0, 0x00000008]]),
        (3, {63: 7}, [[0, 0, 0, 0xC0000000], [0, 0x80000000]]),
        (4, {0: 9, 8: 10}, [[0x000000A9, 0, 0, 0, 0, 0, 0, 0]]),
        (4, {63: 15, 3: 1}, [[0, 0, 0, 0x00000001, 0, 0, 0, 0xF0000000]]),
        (8, {0: 0x12, 16: 0x34, 32: 0x56, 48: 0x78}, [[0x78563412, *[0] * 15]]),
        (8, {17: 0xAB, 63: 0xFF}, [[0, 0x0000AB00, *[0] * 13, 0xFF000000]]),
    ],
)
def test_words_worked_out_by_hand(bits, codes, words):
    codes_RN = torch.zeros(1, 64, dtype=torch.uint8)
    for k, code in codes.items():
        codes_RN[0, k] = code
    got = [[word % 2**32 for word in plane[0].tolist()] for plane in pack(codes_RN, bits)]
    assert got == words


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_that_do_not_fit_are_refused(bits):
    with pytest.raises(ValueError, match=f"below {2**bits}"):
        pack(torch.tensor([[0, 2**bits]], dtype=torch.uint8), bits)


def test_dequantize_is_code_minus_zero_times_scale():
    codes_RN = torch.tensor([[0, 1, 2, 3, 255]], dtype=torch.uint8)
    scale_RG = torch.tensor([[0.5, 2.0, 2.0**-14]], dtype=torch.float16)
    zero_RG = torch.tensor([[1, 3, 255]], dtype=torch.uint8)
    got = dequantize(codes_RN, scale_RG, zero_RG, group_size=2)
    assert got.dtype == torch.float32
    assert got.tolist() == [[-0.5, 0.0, -2.0, 0.0, 0.0]]
    got = dequantize(codes_RN, scale_RG, zero_RG - 1, group_size=2)
    assert got.tolist() == [[0.0, 0.5, 0.0, 2.0, 2.0**-14]]
    # A group that is larger than the direction takes no memory for entries that do not exist.
    got = dequantize(codes_RN, scale_RG[:, :1], zero_RG[:, :1], group_size=1 << 50)
    assert got.tolist() == [[-0.5, 0.0, 0.5, 1.0, 127.0]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [1, 63, 129])
@pytest.mark.parametrize("group_size", [1, 32, 128])
def test_some_entries_are_those_of_all(bits, size, group_size):
    generator = torch.Generator().manual_seed(0)
    factor = random_factor(bits, 3, size, group_size, generator)
    index = torch.tensor([size - 1, 0, size // 2, 0])
    assert torch.equal(factor.dequantize_at(index), factor.dequantize()[:, index])


def test_16_bits_are_float16():
    values = torch.tensor([[1.0, 1 / 3, -65504.0, 2.0**-24]])
    assert Factor.from_values(values).dequantize().tolist() == values.half().float().tolist()


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (127, 129), (200, 7)])
@pytest.mark.parametrize("plan", [*((Band(bits, 1),) for bits in WIDTHS), PLAN])
@pytest.mark.parametrize("group_size", [32, 128])
def test_blob_round_trip(shape, plan, group_size):
    bands = random_bands(shape, plan, group_size)
    assert plan_of(bands) == plan
    blob = write_bands(bands)
    assert blob.shape == (bands_nbytes(shape, plan, group_size),)
    again = read_bands(blob, shape, plan, group_size)
    assert torch.equal(dense(again), dense(bands))
    assert torch.equal(write_bands(again), blob)
    storage = blob.untyped_storage().data_ptr()
    assert all(band.s.untyped_storage().data_ptr() == storage for band in again)


def test_dense_is_u_s_v():
    bands = random_bands((6, 5), (Band(4, 2), Band(16, 1)))
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for band in bands:
        u, v = band.u.dequantize().double(), band.v.dequantize().double()
        for r, s in enumerate(band.s.tolist()):
            expected += s * torch.outer(u[r], v[r])
    torch.testing.assert_close(dense(bands).double(), expected, rtol=1e-6, atol=1e-8)


def test_blob_of_another_size_is_refused():
    blob = write_bands(random_bands((6, 5)))
    for wrong in (blob[:-16], torch.cat([blob, blob[:16]]), blob.view(torch.int32), blob[None]):
        with pytest.raises(ArtifactError, match=rf"shape \(6, 5\): expected {len(blob)} bytes"):
            read_bands(wrong, (6, 5), PLAN, 32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (65, 63), (5, 129)])
@pytest.mark.parametrize("rows", [False, True])
def test_signs_round_trip(shape, rows):
    scales = shape[0] if rows else 1
    positive_OI = random_codes(*shape, 1).bool()
    scale = torch.randn(scales, generator=torch.Generator().manual_seed(1))
    signs = SignTensors.from_signs(positive_OI, scale)
    expected = torch.where(positive_OI, 1.0, -1.0) * scale[:, None]
    assert torch.equal(signs.dense(), expected)
    blob = write_signs(signs)
    assert blob.shape == (sign_sections(shape, scales)[2],)
    again = read_signs(blob, shape, scales)
    assert torch.equal(again.dense(), expected)
    assert torch.equal(write_signs(again), blob)
    assert again.words.untyped_storage().data_ptr() == blob.untyped_storage().data_ptr()


def test_signs_worked_out_by_hand():
    positive_OI = torch.zeros(1, 66, dtype=torch.bool)
    positive_OI[0, [0, 3, 63, 64]] = True
    words = SignTensors.from_signs(positive_OI, torch.ones(1)).words
    assert [word % 2**32 for word in words[0].tolist()] == [1, 0x80000002, 1, 0]


def test_signs_of_another_size_are_refused():
    blob = write_signs(random_signs((6, 5), 6))
    for wrong in (blob[:-16], torch.cat([blob, blob[:16]]), blob.view(torch.int32), blob[None]):
        with pytest.raises(ArtifactError, match=rf"shape \(6, 5\): expected {len(blob)} bytes"):
            read_signs(wrong, (6, 5), 6)
    with pytest.raises(PlanError, match="expected 1 or 6 scales, got 5"):
        read_signs(blob, (6, 5), 5)


@pytest.mark.parametrize("terms", ["bands", "one", "rows+bands"])
def test_packed_terms_are_added(terms):
    packed = random_packed((70, 50), terms, PLAN, 32, 3)
    parts = [band.dense() for band in packed.bands]
    parts += [packed.signs.dense()] if packed.signs else []
    expected = sum(part.double() for part in parts)
    torch.testing.assert_close(packed.dense().double(), expected, rtol=1e-6, atol=1e-6)
    kinds = {"bands": ["bands"], "one": ["signs"], "rows+bands": ["bands", "signs"]}
    assert list(packed.blobs()) == kinds[terms]
