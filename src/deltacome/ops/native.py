"""The library behind the CPU implementations: C++ that reads packed codes, called through ctypes.

At decode a delta is some hundred thousand to some million codes per layer, each used once. The
alternatives, and what speaks against them:

- torch has packed-weight products for CPUs, but only for int4 and int8 weights in its own layouts. Bands
  have six widths, and a second copy in another layout would cost the memory that packing saves.
- `torch.compile` of the reference still writes decoded codes to memory, takes seconds for each plan,
  and needs a compiler at run time.
- numba brings LLVM along, and leaves it to LLVM how a shift by a lane-dependent amount is compiled.
- torch's C++ extensions compile against its headers, slowly, and their wheel fits one version of torch.

So `native.cpp` has a plain C interface and no dependencies. The wheel's build hook compiles it in
seconds with the system's compiler, into one library per instruction set, and one of them is loaded here.
The choice follows `torch.backends.cpu.get_cpu_capability()`, so the variable `ATEN_CPU_CAPABILITY`, which
lowers torch's own kernels, lowers these too. Without a compiler the package still installs, and asking
for this implementation is an error that says why.

Threads are those of the OpenMP runtime that torch has loaded, as many as `torch.get_num_threads()`; a
call too small to be worth waking one stays on the caller's thread. With many tenants in a call each
thread takes whole tenants; with few, their tasks are shared out. Sums are taken in the same order for
any number of threads.

Activations in float32 and bfloat16 are read and written in place; other dtypes, and outputs with gaps
between columns, are converted by torch and copied back, a cost that a float16 model pays.

Rows in bfloat16 are multiplied as bytes where the CPU has dot products of bytes (AVX-512 VNNI):
`native_bytes.h`. That keeps 16 bits of what the codes are multiplied by, with a unit for each group;
bfloat16 has 8. Rows in float32 are not rounded.

An op that torch calls in Python, and that calls C through ctypes, costs more than the delta of a small
layer: twenty to fifty microseconds, more where other code has been in the caches. So the library takes
the ops over from Python where torch lets it (`native_torch.h`), for plain batches; others, and those to
be refused, still go to Python.

The cost: each direction is decoded again for every four rows of a tenant, so beyond some number of rows
a layer's delta takes longer than the layer itself in bfloat16 (`benchmarks/cpu_bands.py`);
`bands/many.py` is for prompts, which have more.

Legend: T tokens, N columns.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deltacome.errors import MismatchError, UnsupportedError

_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}
_I, _P = ctypes.c_int64, ctypes.c_void_p
_MATRIX = (_P, _I, _I)
_SLOTS = (_P, _I)
_POOL = (_P, _I, _P, _I)
_FUNCTIONS = {
    "bands": (*_MATRIX, *_MATRIX, *_SLOTS, *_POOL, _I, _I, _P, _I, _I, _I),
    "factor": (_P, *(_I,) * 6, *_POOL, _I, _I, _P, _I, _I, _I),
    "band_rows": (*_MATRIX, _P, *_SLOTS, *_POOL, _I, _I, _I, _I, ctypes.c_float, _I),
    "signs": (*_MATRIX, *_MATRIX, *_SLOTS, *_POOL, _I, _P, _I, _I),
    "norm": (*_MATRIX, *_MATRIX, *_SLOTS, _P, _I, _I, ctypes.c_double),
}
_NATIVE = (torch.float32, torch.bfloat16)
_TORCH = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "torch_call_dispatcher",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dtype",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_data_ptr",
    "torch_list_size",
    "torch_list_get_item",
    "torch_string_c_str",
    "aoti_torch_delete_tensor_object",
    "torch_delete_list",
    "torch_delete_string",
    "torch_get_num_threads",
)
"""Functions of torch's stable C interface, in the order of `Torch` in native_torch.h."""

_noted = threading.local()


@functools.cache
def default_isa() -> str:
    """The instruction set to use: that of torch's own kernels in this process."""
    isa = _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "portable")
    bytes_too = isa == "avx512" and torch.cpu.get_capabilities().get("avx512_vnni")
    return "avx512_vnni" if bytes_too else isa


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """The native library for an instruction set: `avx512_vnni`, `avx512`, `avx2` or `portable`.

    Calling one for instructions that the CPU lacks ends the process.

    Raises:
        UnsupportedError: it was not built, or cannot be loaded.
    """
    file = Path(__file__).with_name(f"_native_{isa}.so")
    if not file.is_file():
        raise UnsupportedError(
            f"impl 'cpu' needs {file.name}, which was not built when deltacome was installed; "
            "install a C++ compiler with OpenMP (g++) and then deltacome again, or use impl "
            "'reference'"
        )
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise UnsupportedError(f"impl 'cpu': cannot load {file}: {error}") from error
    for name, arguments in _FUNCTIONS.items():
        function = getattr(loaded, f"deltacome_{name}")
        function.argtypes = arguments
        function.restype = _I
    loaded.deltacome_source.restype = ctypes.c_char_p
    loaded.deltacome_few_rows.argtypes = (_I,)
    loaded.deltacome_few_rows.restype = _I
    loaded.deltacome_take_over.restype = _I
    return loaded


@functools.cache
def missing() -> UnsupportedError | None:
    """Why the library cannot run here; None if it can."""
    try:
        library(default_isa())
    except UnsupportedError as error:
        return error
    return None


@functools.cache
def taken_over() -> ctypes.CDLL | None:
    """Lets torch call the library for `bands`, `signs` and `norm` of tensors on the CPU, without Python.

    Returns:
        The library, or None where there is none, or where torch has no such file or function.
    """
    if missing():
        return None
    try:
        of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        addresses = [ctypes.cast(getattr(of_torch, name), _P).value for name in _TORCH]
    except (OSError, AttributeError):
        return None
    taking = library(default_isa())
    return None if taking.deltacome_take_over((_P * len(_TORCH))(*addresses)) else taking


def few_rows(rows: int) -> int:
    """Sets from how many rows on Python handles a batch (0: always); returns the previous number."""
    taken = taken_over()
    return taken.deltacome_few_rows(rows) if taken else 0


def noting(op: Callable[..., None]) -> Callable[..., None]:
    """The op in Python; what it raises, an interruption too, would be lost on the way back through C."""

    @functools.wraps(op)
    def noted(*arguments: object) -> None:
        try:
            op(*arguments)
        except BaseException as error:
            _noted.error = error
            raise

    return noted


def run(op: str, *arguments: object) -> None:
    """Runs an op that the library may have taken over.

    Raises:
        MismatchError, UnsupportedError: as the op raises them in Python. Compiled models get torch's
            RuntimeError, with the same words on stderr.
    """
    if torch.compiler.is_compiling():
        getattr(torch.ops.deltacome, op)(*arguments)
        return
    try:
        getattr(torch.ops.deltacome, op)(*arguments)
    except RuntimeError as error:
        if f"{op}_python refused" not in str(error):
            raise
        raise vars(_noted).pop("error", error) from None


def readable(a: Tensor) -> Tensor:
    """The matrix itself where C can walk it (rows apart, columns together), else a float32 copy."""
    if a.is_contiguous() and a.dtype in _NATIVE:
        return a
    apart = a.shape[0] <= 1 or a.stride(0) >= a.shape[1]  # rows that overlap are torch's to refuse
    together = a.shape[1] == 1 or a.stride(1) == 1
    if a.dtype in _NATIVE and apart and together:
        return a
    return a.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def matrix(a_TN: Tensor) -> tuple[int, int, bool]:
    """Address, stride of rows, and whether it is bfloat16, of a matrix that is `readable`."""
    return a_TN.data_ptr(), a_TN.stride(0), a_TN.dtype == torch.bfloat16


def check(op: str, y: Tensor, slot_T: Tensor, *tables: Tensor) -> None:
    """Refuses what C could not walk: other devices, slots of another dtype, tables with gaps.

    Raises:
        MismatchError: says what was expected.
    """
    if not y.is_cpu:
        raise MismatchError(f"{op}: impl 'cpu': expected tensors on the CPU, got {y.device}")
    if y.dtype == torch.float64:  # rows without a slot would come back rounded
        raise MismatchError(f"{op}: impl 'cpu': expected at most 32 bits, got {y.dtype}")
    if slot_T.dtype != torch.int32 or not slot_T.is_contiguous():
        raise MismatchError(f"{op}: expected contiguous int32 slots, got {slot_T.dtype}")
    for table in tables:
        if not table.is_contiguous():
            raise MismatchError(
                f"{op}: expected contiguous tables and blobs, got strides {table.stride()}"
            )


def check_result(op: str, result: int, slots: int) -> None:
    """Raises MismatchError where C found a slot that does not exist."""
    if result == -1:
        raise MismatchError(f"{op}: slots: expected each in [-1, {slots}), got another")


@functools.lru_cache(maxsize=4096)
def sizes(outs: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Sizes as C reads them."""
    return (ctypes.c_int64 * len(outs))(*outs)
