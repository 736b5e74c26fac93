"""Host memory for what a slot holds of a tenant: one mapping, which is freed when the tenant goes.

malloc would keep pieces of it. So would torch's allocator of pinned memory, which rounds sizes up to a
power of two and gives nothing back. So where a GPU is to copy it, the mapping itself is registered with
CUDA; if that fails, vLLM says so in the log, and the copy is slower.
"""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from deltacome.vllm import compat


def new_image(owner: object, nbytes: int, device: torch.device) -> Tensor:
    """Allocates zeros, uint8 (nbytes,), that a device can copy as fast as possible.

    Args:
        owner: the object that they belong to; once it is gone, they are ordinary memory.
        nbytes: how many.
        device: the device that copies them.
    """
    if not nbytes:
        return torch.zeros(0, dtype=torch.uint8)
    image = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    if device.type == "cuda":
        with torch.cuda.device(device):  # a new thread's default is the first GPU
            if compat.host_register(image.data_ptr(), nbytes):
                # It keeps the memory until then: pages that are unmapped could not be unregistered.
                weakref.finalize(owner, _unregister, image, device).atexit = False
    return image


def _unregister(image: Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # a copy from it into a slot may still be running
        compat.host_unregister(image.data_ptr())
