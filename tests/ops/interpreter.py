"""Triton's interpreter, mended where it treats the bits of bfloat16 as integers or truncates to them.

It stores bfloat16 as uint16. Products and conversions of integers take those bits for numbers, and
float32 is truncated, not rounded. A GPU does neither (`test_triton_aot.py` reads the rounding from the
PTX), so a test of bfloat16 could pass only if it were blind. With this module it is as strict as one of
float16.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widened(handle):
    """A bfloat16 handle as a float32 one; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _cast_impl(self, src, dst_type):
    if src.dtype.scalar == dst_type.scalar:
        return src
    wide = _widened(src)
    if dst_type.scalar != tl.bfloat16:
        return _cast(self, wide, dst_type)
    values = torch.from_numpy(np.ascontiguousarray(_cast(self, wide, tl.float32).data))
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(src.data.shape), tl.bfloat16)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def mend():
    """Replaces the builder's methods for the life of the process."""
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_dot = _create_dot
