"""The ops on a CPU: a small C++ library that reads packed codes, called through ctypes.

At decode a delta is some hundred thousand to some million codes a layer, each used once. What could
run them, and why it does not:

- torch has packed-weight products for CPUs, but for int4 and int8 weights in layouts of its own. Bands
  have six widths, and a second copy in another layout would cost the memory that packing saves.
- `torch.compile` of the reference still writes decoded codes to memory, takes seconds for each plan,
  and needs a compiler at run time.
- numba brings LLVM along, and leaves to it what a shift by an amount that depends on the lane becomes.
- torch's C++ extensions compile against its headers, slowly, and a wheel of them fits one version.

So `cpu.cpp` has a plain C interface and no dependency. The wheel's build hook compiles it in seconds
with the system's compiler, once for each instruction set, into libraries of which one is loaded
here. Which one follows `torch.backends.cpu.get_cpu_capability()`, so that the variable
`ATEN_CPU_CAPABILITY` that lowers torch's own kernels lowers these too. Without a compiler the package
installs as before, and asking for this implementation is an error that says why.

Threads are OpenMP's, of the runtime that torch has loaded, as many as `torch.get_num_threads()`; a call
too small to be worth waking one stays on the caller's. Sums are ordered alike for any number.

Activations of float32 and bfloat16 are read and written as they lie; other dtypes and outputs with
gaps between columns are converted by torch and copied back, which a float16 model pays for.

What it costs: each direction is decoded again for every four tokens, and sums are float32 where the
CPU may have bfloat16 products twice as fast. So with many tokens a layer's delta takes longer than
the layer itself in bfloat16 (`benchmarks/cpu_bands.py`).

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from deltacome.errors import ArtifactError, MismatchError, UnsupportedError
from deltacome.format.spec import BLOCK, Band, band_sections

_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}
_I, _P = ctypes.c_int64, ctypes.c_void_p
_NATIVE = (torch.float32, torch.bfloat16)


def default_isa() -> str:
    """The instruction set to use: that of torch's own kernels in this process."""
    return _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "portable")


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """The native library for an instruction set: `avx512`, `avx2` or `portable`.

    Raises:
        UnsupportedError: it was not built, or cannot be loaded.
    """
    file = Path(__file__).with_name(f"_cpu_{isa}.so")
    if not file.is_file():
        raise UnsupportedError(
            f"bands: impl 'cpu' needs {file.name}, which was not built when deltacome was "
            "installed; install a C++ compiler with OpenMP (g++) and then deltacome again, "
            "or use impl 'reference'"
        )
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise UnsupportedError(f"bands: impl 'cpu': cannot load {file}: {error}") from error
    output = (_P, _I, _I)
    term = (_P, _P, _I)
    loaded.deltacome_bands.argtypes = (*output, *output, *term, *[_I] * 4, _P, _I)
    loaded.deltacome_bands.restype = None
    loaded.deltacome_source.restype = ctypes.c_char_p
    rows = (*output, _P, *term, *[_I] * 4, ctypes.c_float, _P, _I)
    loaded.deltacome_band_rows.argtypes = rows
    loaded.deltacome_band_rows.restype = _I
    return loaded


@functools.cache
def missing() -> UnsupportedError | None:
    """Why this implementation cannot run here; None if it can."""
    try:
        library(default_isa())
    except UnsupportedError as error:
        return error
    return None


def bands(
    y_TO: Tensor,
    x_TI: Tensor,
    blob: Tensor,
    bits: list[int],
    counts: list[int],
    group_size: int,
    *,
    isa: str | None = None,
) -> None:
    """`y += Σ_g ((x V̂_gᵀ) · s_g) Û_g`, summed in float32, as `api.bands` says.

    Args:
        isa: instruction set, if not `default_isa()`; one that the CPU lacks ends the process.
    """
    native = library(isa or default_isa())
    (tokens, out_size), in_size = y_TO.shape, x_TI.shape[1]
    layout, rank = _checked(blob, y_TO, (out_size, in_size), bits, counts, group_size)
    if not tokens or not bits:
        return
    y, x = _rows(y_TO), _rows(x_TI)
    padded = -(-in_size // BLOCK) * BLOCK
    scratch = torch.empty(tokens * (padded + rank), dtype=torch.float32)
    native.deltacome_bands(
        *(y.data_ptr(), y.stride(0), y.dtype == torch.bfloat16),
        *(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16),
        *(blob.data_ptr(), layout, len(bits)),
        *(tokens, out_size, in_size, group_size),
        *(scratch.data_ptr(), torch.get_num_threads()),
    )
    if y is not y_TO:
        y_TO.copy_(y)


def band_rows(
    y_TI: Tensor,
    ids_T: Tensor,
    blob: Tensor,
    rows: int,
    bits: list[int],
    counts: list[int],
    group_size: int,
    scale: float,
    *,
    isa: str | None = None,
) -> None:
    """`y += scale · Σ_g Û_g[:, ids]ᵀ diag(s_g) V̂_g`, summed in float32, as `api.band_rows` says.

    Args:
        isa: as `bands`.
    """
    native = library(isa or default_isa())
    tokens, in_size = y_TI.shape
    layout, rank = _checked(blob, y_TI, (rows, in_size), bits, counts, group_size)
    if not tokens or not bits:
        return
    y, ids = _rows(y_TI), ids_T.to(torch.int64).contiguous()
    scratch = torch.empty(tokens * rank, dtype=torch.float32)
    failed = native.deltacome_band_rows(
        *(y.data_ptr(), y.stride(0), y.dtype == torch.bfloat16),
        *(ids.data_ptr(), blob.data_ptr(), layout, len(bits)),
        *(tokens, rows, in_size, group_size, scale),
        *(scratch.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise IndexError(
            f"ids: expected each in [0, {rows}), got {int(ids.min())} to {int(ids.max())}"
        )
    if y is not y_TI:
        y_TI.copy_(y)


def _rows(a: Tensor) -> Tensor:
    """The matrix itself where C can walk it (rows apart, columns together), else a copy."""
    apart = a.shape[0] == 1 or a.stride(0) >= a.shape[1]  # rows that overlap are torch's to refuse
    together = a.shape[1] == 1 or a.stride(1) == 1
    if a.dtype in _NATIVE and apart and together:
        return a
    return a.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _checked(
    blob: Tensor,
    y: Tensor,
    shape: tuple[int, int],
    bits: list[int],
    counts: list[int],
    group_size: int,
) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """The layout of the blob as C reads it, and the rank, once the blob is what it should be."""
    if y.device.type != "cpu":
        raise MismatchError(f"bands: impl 'cpu': expected tensors on the CPU, got {y.device}")
    layout, nbytes, rank = _layout(shape, tuple(bits), tuple(counts), group_size)
    if blob.shape != (nbytes,) or not blob.is_contiguous():
        raise ArtifactError(
            f"packed bands of shape {shape}: expected {nbytes} bytes of uint8 in one piece, got "
            f"{tuple(blob.shape)} with stride {blob.stride()}"
        )
    return layout, rank


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, int], bits: tuple[int, ...], counts: tuple[int, ...], group_size: int
) -> tuple[ctypes.Array[ctypes.c_int64], int, int]:
    """Per band: bits, count, offsets of V's and U's codes, high plane, scales, zeros; of s."""
    plan = tuple(Band(b, count) for b, count in zip(bits, counts, strict=True))
    layouts, nbytes = band_sections(shape, plan, group_size)
    numbers = []
    for band, sections in zip(plan, layouts, strict=True):
        at = {section.name: section.offset for section in sections}
        numbers += [band.bits, band.count]
        for side in "vu":
            # Three bits: the plane of 2 comes first, that of 1 is the high one.
            names = ("codes2", "codes1") if band.bits == 3 else (_codes(band.bits), "")
            names = (*names, "scale", "zero")
            numbers += [at.get(f"{side}.{name}", 0) for name in names]
        numbers.append(at["s"])
    return (ctypes.c_int64 * len(numbers))(*numbers), nbytes, sum(counts)


def _codes(bits: int) -> str:
    return "values" if bits == 16 else f"codes{bits}"
