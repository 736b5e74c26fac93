"""The op `deltacome::biases`: what tenants change in a linear's bias, added to each row.

Plain torch would do, but for code that is compiled: it would gather a vector for each row and add it in
every step, zeros for all where no tenant is in the batch. An op looks at the batch when it runs.

Legend: T tokens, O out, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltacome.ops.rows import nobody


def add_biases(y_TO: Tensor, slot_T: Tensor, bias_SO: Tensor) -> None:
    """Adds to each row its slot's change, in place; the last one, which slot −1 finds, is to be zero."""
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
