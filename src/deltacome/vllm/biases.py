"""The op `deltacome::biases`: adds to each row what its tenant changes in a linear's bias.

Plain torch would do, except in compiled code, which would gather a vector for each row and add it in
every step, all zeros if the batch has no tenant. An op looks at the batch when it runs.

Legend: T tokens, O out, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.ops.rows import nobody


def add_biases(y_TO: Tensor, slot_T: Tensor, bias_SO: Tensor) -> None:
    """Adds to each row its slot's change, in place; the last row of `bias_SO` (slot −1) must be zero."""
    torch.ops.deltacome.biases(y_TO, slot_T, bias_SO)


_library = torch.library.Library("deltacome", "FRAGMENT")
_library.define("biases(Tensor(a!) y, Tensor slot, Tensor bias) -> ()")


@torch.library.impl(_library, "biases", "CompositeExplicitAutograd")
def _biases(y: Tensor, slot: Tensor, bias: Tensor) -> None:
    if not nobody(slot):
        y.add_(bias[slot.long()].to(y.dtype))


@torch.library.register_fake("deltacome::biases", lib=_library)
def _(y: Tensor, slot: Tensor, bias: Tensor) -> None:
    pass
