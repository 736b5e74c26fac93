"""First look at a pair of checkpoints: what changed, what it is, and whether it can be used at all.

One pass over both models, tensor by tensor. It costs reading both once more, and buys that bad input
(NaN, another base, a huge exact part) is refused in seconds instead of after hours, and that every
size is known before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from deltacome.arch.checkpoint import (
    Checkpoint,
    Pair,
    check_finite,
    full_digest,
    sample_digest,
)
from deltacome.arch.layout import Layout
from deltacome.errors import MismatchError
from deltacome.format.artifact import dtype_name
from deltacome.format.manifest import Record
from deltacome.skeleton import Target


def survey(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Iterable[Pair],
    layout: Layout,
    where: Mapping[str, Target],
    on_tensor: Callable[[str], None],
) -> tuple[dict[str, Record], set[str]]:
    """Reads every pair once.

    Args:
        base, tuned, pairs: what is compared.
        layout: of the tuned model.
        where: each tensor of the tuned checkpoint in it.
        on_tensor: called with the name of each tensor that was read.

    Returns:
        Records without plans (what is the same as the base, which rows will be exact), and the
        names of the matrices that are to be compressed.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
        MismatchError: the two models have no tensor in common, up to fine-tuning.
    """
    records, matrices = {}, set()
    far: list[str] = []
    for pair in pairs:
        tuned_tensor = tuned.read(pair.name)
        check_finite(pair.name, tuned_tensor, "tuned model")
        dtype, rows = dtype_name(tuned_tensor.dtype), (pair.shape[0] if pair.shape else 1)
        if pair.base_name is None:
            exact = (0, rows) if rows else None
            records[pair.name] = Record(
                pair.name, pair.shape, dtype, None, None, None, None, exact_rows=exact
            )
            on_tensor(pair.name)
            continue
        base_tensor = base.read(pair.base_name)
        check_finite(pair.base_name, base_tensor, "base")
        assert pair.base_shape is not None
        common = min(rows, pair.base_shape[0]) if pair.shape else 1
        before, after = _common(base_tensor, common), _common(tuned_tensor, common)
        same = _same_values(before, after)
        target = where[pair.name]
        known = target.parameter in layout.matrices or target.expert is not None
        compressible = known and tuned_tensor.ndim == 2 and tuned_tensor.is_floating_point()
        transposed = target.parameter in layout.transposed
        # Rows of a transposed matrix are inputs: more of them are no words that were added.
        compressible &= not (transposed and pair.shape != pair.base_shape)
        if compressible and not same:
            matrices.add(pair.name)
            if (after.float() - before.float()).norm() > before.float().norm():
                far.append(pair.name)
        start = common if same or compressible else 0
        records[pair.name] = Record(
            pair.name,
            pair.shape,
            dtype,
            pair.base_name,
            pair.base_shape,
            sample_digest(base_tensor),
            full_digest(base_tensor),
            exact_rows=(start, rows) if start < rows else None,
            transposed=transposed and compressible and not same,
        )
        on_tensor(pair.name)
    if far and len(far) > len(matrices) / 2:
        raise MismatchError(
            f"{tuned.path}: in {len(far)} of {len(matrices)} changed matrices, {far[0]} the first, "
            f"the difference to {base.path} is larger than the base itself: this is not a "
            "fine-tune of this base"
        )
    return records, matrices


def _same_values(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two tensors, perhaps of different dtypes, hold the same numbers.

    A base of a wider dtype that merely rounds to the tuned value is not the same.
    """
    if before.dtype == after.dtype and before.dtype.itemsize > 1:
        return torch.equal(before, after)
    return torch.equal(before.double(), after.double())


def _common(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor[:rows] if tensor.ndim else tensor
