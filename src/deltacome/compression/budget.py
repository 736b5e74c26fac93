"""From a ratio to plans: how many bytes each matrix gets.

The ratio is a promise about bytes on disk. What cannot shrink (exact rows, headers, the manifest) is
subtracted first; the rest is shared in proportion to size, every matrix at the same ratio, as the
paper does. Sizes follow from plans to the byte, so the share is found by bisection, and what rounding
to whole directions leaves over is dealt out one direction at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deltacome.errors import PlanError
from deltacome.format.artifact import overhead_nbytes
from deltacome.format.manifest import Manifest, Record
from deltacome.format.spec import Plan, bands_nbytes
from deltacome.methods.template import Template

TOLERANCE = 0.02
"""How far the ratio on disk may be from the one that was asked for."""
_ERROR = 0.1234
"""Stands for the errors not yet measured when a manifest's size is computed."""


def make_plans(
    manifest: Manifest, matrices: set[str], template: Template, ratio: float | None
) -> dict[str, Plan]:
    """Plans for all matrices such that the artifact meets the ratio.

    Args:
        manifest: with records of all tensors, without plans.
        matrices: names of those to be compressed.
        template: filled for each matrix; where it has no hole, the plans follow from it alone.
        ratio: tuned bytes ÷ bytes on disk; None takes what the template gives.

    Raises:
        PlanError: the ratio cannot be met; the message holds the table that shows why.
    """
    if ratio is not None and not ratio > 0:
        raise PlanError(f"ratio: expected a number above 0, got {ratio}")
    shapes = {name: manifest.records[name].bands_shape for name in sorted(matrices)}
    if not template.has_hole:
        plans = {name: template.fill(shape, 0) for name, shape in shapes.items()}
        if ratio is not None:
            _check_fixed(manifest, plans, template, ratio)
        return plans
    if ratio is None:
        raise PlanError(f"plan {template}: expected a ratio that says how large * may be, got none")
    if not shapes:
        return {}
    target = manifest.tuned_nbytes() / ratio
    # With 1 direction of each matrix the manifest has all its fields, only digits are missing.
    seed_plans = {name: template.fill(shape, float("inf")) for name, shape in shapes.items()}
    fixed = _total(manifest, seed_plans) - sum(
        bands_nbytes(shapes[name], plan) for name, plan in seed_plans.items()
    )
    available = target - fixed
    plans = _bisect(shapes, template, available)
    if available <= 0 or not all(plans.values()):
        raise PlanError(_refusal(manifest, shapes, template, ratio, target, fixed))
    return _deal_out(shapes, plans, template, available)


def with_plans(manifest: Manifest, plans: Mapping[str, Plan]) -> Manifest:
    """The manifest as it will be, errors apart."""
    records = dict(manifest.records)
    for name, plan in plans.items():
        records[name] = replace(records[name], plan=plan, error=_ERROR)
    return replace(manifest, records=records)


def _total(manifest: Manifest, plans: Mapping[str, Plan]) -> int:
    """Bytes on disk of the whole artifact."""
    planned = with_plans(manifest, plans)
    terms = sum(record.nbytes(planned.group_size) for record in planned.records.values())
    return terms + overhead_nbytes(planned)


def _bisect(
    shapes: Mapping[str, tuple[int, int]], template: Template, available: float
) -> dict[str, Plan]:
    """Plans at the largest common ratio of bytes that fits."""

    def plans_at(share: float) -> dict[str, Plan]:
        by_shape = {s: template.fill(s, share * 2 * s[0] * s[1]) for s in set(shapes.values())}
        return {name: by_shape[shape] for name, shape in shapes.items()}

    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        plans = plans_at(middle)
        size = sum(bands_nbytes(shapes[name], plan) for name, plan in plans.items())
        low, high = (middle, high) if size <= available else (low, middle)
    return plans_at(low)


def _deal_out(
    shapes: Mapping[str, tuple[int, int]],
    plans: dict[str, Plan],
    template: Template,
    available: float,
) -> dict[str, Plan]:
    """Spends what is left on single directions, one for each matrix in turn."""
    left = available - sum(bands_nbytes(shapes[name], plan) for name, plan in plans.items())
    for name, shape in shapes.items():
        grown = template.grow(shape, plans[name])
        if grown is None:
            continue
        cost = bands_nbytes(shape, grown) - bands_nbytes(shape, plans[name])
        if cost <= left:
            plans[name] = grown
            left -= cost
    return plans


def _check_fixed(
    manifest: Manifest, plans: Mapping[str, Plan], template: Template, ratio: float
) -> None:
    got = manifest.tuned_nbytes() / _total(manifest, plans)
    if abs(got / ratio - 1) > TOLERANCE:
        raise PlanError(
            f"plan {template} gives a ratio of {got:.2f} on disk, expected {ratio:g} within "
            f"{TOLERANCE:.0%}; give the plan a band with * or leave the ratio out"
        )


def _refusal(
    manifest: Manifest,
    shapes: Mapping[str, tuple[int, int]],
    template: Template,
    ratio: float,
    target: float,
    fixed: int,
) -> str:
    """The table that shows why a ratio cannot be met."""
    least = {name: template.fill(shape, float("inf"))[:1] for name, shape in shapes.items()}
    least = {name: (replace(plan[0], count=1),) for name, plan in least.items()}
    bands = sum(bands_nbytes(shapes[name], plan) for name, plan in least.items())
    best = manifest.tuned_nbytes() / (fixed + bands)
    exact = [record for record in manifest.records.values() if record.exact_rows]
    exact.sort(key=Record.nbytes, reverse=True)
    rows = [
        ("target", target),
        ("exact tensors", sum(record.nbytes() for record in exact)),
        *((f"  {record.name} {list(record.exact_shape)}", record.nbytes()) for record in exact[:8]),
        ("headers, index, manifest", fixed - sum(record.nbytes() for record in exact)),
        (f"{len(shapes)} matrices, one direction each", bands),
    ]
    lines = [f"  {name:<60} {nbytes:>14,.0f} bytes" for name, nbytes in rows]
    return "\n".join(
        [f"ratio {ratio:g} cannot be met, the largest possible is about {best:.1f}:", *lines]
    )
