"""From a ratio to plans: how many bytes there are for terms, and whether they suffice.

The ratio is a promise about bytes on disk. What cannot shrink (exact rows, headers, the manifest) is
subtracted first; how the rest is shared among matrices is up to the method (`methods.method`). Plans
determine sizes to the byte, so the promise is kept or refused before the first weight is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deltacome.errors import PlanError
from deltacome.format.manifest import Manifest, Record
from deltacome.format.writer import overhead_nbytes
from deltacome.methods.method import Matrix, Method, Terms

TOLERANCE = 0.02
"""How far the ratio on disk may be from the one that was asked for."""
_ERROR = 0.1234
"""Stands for errors not yet measured when a manifest's size is computed."""


def make_plans(
    manifest: Manifest, method: Method, matrices: Mapping[str, Matrix], ratio: float | None
) -> dict[str, Terms]:
    """Plans for all matrices such that the artifact meets the ratio.

    Args:
        manifest: with records of all tensors, without plans.
        method: makes the plans.
        matrices: those to be compressed.
        ratio: tuned bytes ÷ bytes on disk; None takes what the method's options give.

    Raises:
        PlanError: the ratio cannot be met; the message holds the table that shows why.
    """
    name = method.options()["name"]
    if ratio is not None and not ratio > 0:
        raise PlanError(f"ratio: expected a number above 0, got {ratio}")
    if ratio is None and method.default_ratio is not None:
        raise PlanError(f"{name}: expected a ratio, which its plans adapt to, got none")
    if not matrices:
        # An artifact that stores nothing is as small as can be.
        stored = any(record.exact_rows for record in manifest.records.values())
        if ratio is not None and stored and _exceeds(manifest, {}, ratio):
            raise PlanError(_refusal(manifest, {}, {}, ratio))
        return {}
    planner = method.planner(matrices)
    if ratio is None or method.default_ratio is None:
        plans = planner(0)
        if ratio is not None:
            _check_fixed(manifest, plans, name, ratio)
        return plans
    target = manifest.tuned_nbytes() / ratio
    around, plans = total_nbytes(manifest, {}), {}
    for _ in range(3):  # what surrounds the terms depends on them, by some digits
        plans = planner(target - around)
        # Never less than before: plans that leave matrices out need less, which the next would fill.
        needed = max(around, total_nbytes(manifest, plans) - _terms_nbytes(matrices, plans))
        if needed == around:  # equal bytes give equal plans, and a program may be solved for each
            break
        around = needed
    if _exceeds(manifest, plans, ratio):
        raise PlanError(_refusal(manifest, matrices, planner(0), ratio))
    return plans


def with_plans(manifest: Manifest, plans: Mapping[str, Terms]) -> Manifest:
    """The manifest as it will be, apart from the errors."""
    records = dict(manifest.records)
    for name, plan in plans.items():
        terms = {"plan": plan.bands, "sign_scales": plan.sign_scales}
        records[name] = replace(records[name], **terms, error=_ERROR)
    return replace(manifest, records=records)


def _terms_nbytes(matrices: Mapping[str, Matrix], plans: Mapping[str, Terms]) -> int:
    return sum(plan.nbytes(matrices[name].shape) for name, plan in plans.items())


def total_nbytes(manifest: Manifest, plans: Mapping[str, Terms]) -> int:
    """Bytes on disk of the whole artifact."""
    planned = with_plans(manifest, plans)
    terms = sum(record.nbytes(planned.group_size) for record in planned.records.values())
    return terms + overhead_nbytes(planned)


def _exceeds(manifest: Manifest, plans: Mapping[str, Terms], ratio: float) -> bool:
    """Whether the artifact would be larger than the ratio allows."""
    return total_nbytes(manifest, plans) > manifest.tuned_nbytes() / ratio * (1 + TOLERANCE)


def _check_fixed(manifest: Manifest, plans: Mapping[str, Terms], name: str, ratio: float) -> None:
    got = manifest.tuned_nbytes() / total_nbytes(manifest, plans)
    if abs(got / ratio - 1) > TOLERANCE:
        raise PlanError(
            f"{name}: with these options it gives a ratio of {got:.2f} on disk, expected {ratio:g} "
            f"within {TOLERANCE:.0%}; give a plan a band with * or leave the ratio out"
        )


def _refusal(
    manifest: Manifest, matrices: Mapping[str, Matrix], least: Mapping[str, Terms], ratio: float
) -> str:
    """The table that shows why a ratio cannot be met."""
    total, terms = total_nbytes(manifest, least), _terms_nbytes(matrices, least)
    exact = [record for record in manifest.records.values() if record.exact_rows]
    exact.sort(key=Record.nbytes, reverse=True)
    exact_nbytes = sum(record.nbytes() for record in exact)
    rows = [
        ("target", manifest.tuned_nbytes() / ratio),
        ("exact tensors", exact_nbytes),
        *((f"  {record.name} {list(record.exact_shape)}", record.nbytes()) for record in exact[:8]),
        ("headers, index, manifest", total - terms - exact_nbytes),
        (f"{len(matrices)} matrices, each at its smallest", terms),
    ]
    lines = [f"  {name:<60} {nbytes:>14,.0f} bytes" for name, nbytes in rows]
    best = manifest.tuned_nbytes() / total
    return "\n".join(
        [f"ratio {ratio:g} cannot be met, the largest possible is about {best:.1f}:", *lines]
    )
