"""Asymmetric grids: where the codes of one group of weights lie.

A group is `group_size` consecutive entries of one row. It shares one float16 scale and one uint8
zero point, and a code means `(code − zero) · scale` in float32. The scale is rounded to float16
*before* the zero point and the codes are chosen, so that these refer to the scale that is stored.

Min–max is the grid of GPTQ (Frantar et al. 2023, arXiv 2210.17323) and so of Delta-CoMe. The range
always includes 0: the zero point is then a code, and zero weights (rows of an embedding that were
never touched) come back as exact zeros. The cost: a group far from 0 wastes levels, but singular
vectors, being centred, have no such groups. Rejected: clipping the range to where the squared error is
least. With GPTQ on such grids the model's answers got worse (DESIGN.md).

R rows, N entries of a row, G = ⌈N / group_size⌉ groups of a row (the last may be short).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltacome.errors import MismatchError, PlanError, UnsupportedError
from deltacome.format.spec import GROUP, PLANES

WIDTHS = tuple(PLANES)  # those that have a grid: 16 bits are float16 values
_HALF = torch.finfo(torch.float16)
_HALF_UNIT = 2.0**-24  # the smallest subnormal, of which all others are multiples


def min_max_grid(
    w_RN: Tensor, bits: Tensor | int, group_size: int = GROUP
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each group: scale_RG float16, zero_RG uint8.

    `w_RN` is float32; `bits` is one width or one per row (R,), each of 1, 2, 3, 4, 8.

    A group of zeros gets scale 1 and zero point 0. Where the step is below float16's normal
    numbers it is rounded *up* to a subnormal, so that the range is still covered: no scale is 0,
    and no weight is off by more than 2⁻²⁴ there. A step above float16's largest number is refused.

    Raises `PlanError` for an unknown width, `UnsupportedError` for NaN, Inf or a range too wide.
    """
    levels_R1 = _levels(bits, w_RN)
    groups_RGN = _groups(w_RN, group_size)
    low_RG = groups_RGN.amin(-1).clamp_(max=0)
    high_RG = groups_RGN.amax(-1).clamp_(min=0)
    step_RG = (high_RG - low_RG) / levels_R1
    _check_steps(step_RG, low_RG, high_RG)
    up_RG = (step_RG / _HALF_UNIT).ceil() * _HALF_UNIT
    step_RG = torch.where(step_RG < _HALF.tiny, up_RG, step_RG)
    scale_RG = torch.where(step_RG > 0, step_RG, 1.0).to(torch.float16)
    # At most the highest code: float16 rounds a scale by less than half a step of 255.
    zero_RG = (-low_RG / scale_RG.float()).round_()
    return scale_RG, zero_RG.to(torch.uint8)


def round_to_grid(
    w_RN: Tensor, scale_RG: Tensor, zero_RG: Tensor, bits: Tensor | int, group_size: int = GROUP
) -> Tensor:
    """The nearest code of each weight, uint8 (R, N); weights outside the grid take its nearest end.

    Halves round to even, as `torch.round` does. Raises `PlanError` for an unknown width,
    `MismatchError` where the shapes do not fit.
    """
    n = w_RN.shape[1]
    expected = (w_RN.shape[0], -(-n // group_size))
    if scale_RG.shape != expected or zero_RG.shape != expected:
        raise MismatchError(
            f"weights of shape {tuple(w_RN.shape)} in groups of {group_size} need scales and zero "
            f"points of shape {expected}, got {tuple(scale_RG.shape)} and {tuple(zero_RG.shape)}"
        )
    scale_RN = spread(scale_RG.float(), group_size, n)
    zero_RN = spread(zero_RG.float(), group_size, n)
    steps_RN = (w_RN / scale_RN).round_().add_(zero_RN)
    return torch.minimum(steps_RN.clamp_(min=0), _levels(bits, w_RN)).to(torch.uint8)


def spread(x_RG: Tensor, group_size: int, n: int) -> Tensor:
    """One value per group → one value per entry: (R, G) → (R, n)."""
    return x_RG.repeat_interleave(group_size, dim=1)[:, :n]


def _levels(bits: Tensor | int, w_RN: Tensor) -> Tensor:
    """The highest code of each row, float32 (R, 1) or (1, 1)."""
    bits_R = torch.as_tensor(bits, device=w_RN.device).reshape(-1)
    if len(bits_R) not in (1, len(w_RN)):
        raise MismatchError(f"{len(w_RN)} rows need 1 or as many bit widths, got {len(bits_R)}")
    unknown = set(bits_R.unique().tolist()) - set(WIDTHS)
    if unknown:
        raise PlanError(f"a grid has one of {WIDTHS} bits, got {sorted(unknown)}")
    return (2.0 ** bits_R.float() - 1)[:, None]


def _groups(w_RN: Tensor, group_size: int) -> Tensor:
    """(R, N) → (R, G, group_size). Zeros fill the last group: every range includes 0 anyway."""
    rest = -w_RN.shape[1] % group_size
    w_RN = pad(w_RN, (0, rest)) if rest else w_RN
    return w_RN.reshape(w_RN.shape[0], -1, group_size)


def _check_steps(step_RG: Tensor, low_RG: Tensor, high_RG: Tensor) -> None:
    bad_RG = ~(step_RG <= _HALF.max)  # NaN compares false
    if bad_RG.any():
        r, g = (int(i) for i in bad_RG.nonzero()[0])
        raise UnsupportedError(
            f"group {g} of row {r} spans {low_RG[r, g]:g} to {high_RG[r, g]:g}: its step must be "
            f"finite and at most {_HALF.max:g}, the largest float16, got {step_RG[r, g]:g}"
        )
