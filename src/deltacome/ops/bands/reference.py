"""Plain torch, one tenant after the other: what the ops mean. Slow, and right on every device.

It reads widths, counts and the start of the first band from the table, and asks the format where
everything else lies. So it shares neither the table's other offsets nor the grouping of rows with the
kernels that are tested against it. It waits for the device to read the table, so a CUDA graph cannot
capture it.

One factor at a time is decoded to float32 and thrown away, so the extra memory is that of the largest
factor. Merging `Û diag(s) V̂` first would be shorter, but would need the dense matrix.

Legend: T tokens, I in, O out, R directions, S slots, N bytes of a slot, P parts, B bands, F fields.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from deltacome.format.codec import BandTensors, read_bands
from deltacome.format.spec import Band, bands_nbytes
from deltacome.ops.slots import BITS, COUNT, V


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    outs: list[int],
    group_size: int,
) -> None:
    """`y[t] += Σ_g ((x[t] V̂_gᵀ) · s_g) Û_g`, summed in float32."""
    for slot, fields_PBF in _used(slot_T, fields_SPBF):
        rows = (slot_T == slot).nonzero().view(-1)
        x_RI = x_TI[rows].float()
        first = 0
        for out, fields_BF in zip(outs, fields_PBF, strict=True):
            part_TO = y_TO[:, first : first + out]
            total_TO = part_TO[rows].float()
            shape = (out, x_TI.shape[1])
            for band in _read(blobs_SN[slot], fields_BF, shape, group_size):
                t_TR = x_RI @ band.v.dequantize().T * band.s
                total_TO = total_TO + t_TR @ band.u.dequantize()
            part_TO[rows] = total_TO.to(y_TO.dtype)
            first += out


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    slot_T: Tensor,
    blobs_SN: Tensor,
    fields_SPBF: Tensor,
    out: int,
    group_size: int,
    scale: float,
) -> None:
    """`y[t] += scale · Σ_g Û_g[:, ids[t]]ᵀ diag(s_g) V̂_g`, summed in float32."""
    for slot, fields_PBF in _used(slot_T, fields_SPBF):
        rows = (slot_T == slot).nonzero().view(-1)
        ids = ids_T[rows].long()
        # A negative id would count from the end, and one past the end could read another's padding.
        if int(ids.min()) < 0 or int(ids.max()) >= out:
            raise IndexError(
                f"ids: expected each in [0, {out}), got {int(ids.min())} to {int(ids.max())}"
            )
        total_TI = y_TI[rows].float()
        shape = (out, y_TI.shape[1])
        for band in _read(blobs_SN[slot], fields_PBF[0], shape, group_size):
            t_TR = band.u.dequantize_at(ids).T * (scale * band.s)
            total_TI = total_TI + t_TR @ band.v.dequantize()
        y_TI[rows] = total_TI.to(y_TI.dtype)


def _used(slot_T: Tensor, fields_SPBF: Tensor) -> Iterator[tuple[int, list[list[list[int]]]]]:
    """The slots that rows name and that hold something, with their fields."""
    named = set(slot_T.tolist())
    for slot, fields_PBF in enumerate(fields_SPBF.tolist()):
        if slot in named and any(f[COUNT] for fields_BF in fields_PBF for f in fields_BF):
            yield slot, fields_PBF


def _read(
    blob_N: Tensor, fields_BF: list[list[int]], shape: tuple[int, int], group_size: int
) -> list[BandTensors]:
    plan = tuple(Band(f[BITS], f[COUNT]) for f in fields_BF if f[COUNT])
    if not plan:
        return []
    start = fields_BF[0][V]  # a blob begins with the V of its first band
    nbytes = bands_nbytes(shape, plan, group_size)
    return read_bands(blob_N[start : start + nbytes], shape, plan, group_size)
