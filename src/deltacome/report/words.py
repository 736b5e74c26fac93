"""How the report writes numbers and names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

KIND_WORDS = {
    "16": "16-bit codes",
    "8": "8-bit codes",
    "4": "4-bit codes",
    "3": "3-bit codes",
    "2": "2-bit codes",
    "1": "1-bit codes",
    "signs": "signs",
    "scales": "scales, zero points",
    "singular": "singular values",
    "padding": "padding",
    "exact": "exact tensors",
    "headers": "shard headers",
    "manifest": "manifest, index",
}
"""What the page calls each of `facts.KINDS`."""


def size(nbytes: float) -> str:
    """`4.20 MB`: three digits and a decimal unit."""
    value, units = float(nbytes), ["kB", "MB", "GB", "TB"]
    if value < 1000:
        return f"{value:.0f} B"
    while (value := value / 1000) >= 999.5 and len(units) > 1:
        units.pop(0)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


def share(part: float) -> str:
    """`3.8 %`."""
    return f"{100 * part:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """With that many significant digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.{digits}g}"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without parts not needed to tell them apart: `model.layers.*.mlp.up_proj` → `up_proj`.

    Names that end alike also show how they begin, `q_proj · vision_tower`, then more of the end, and stay
    as they are where that is not enough.
    """
    names = list(names)
    short = {}
    for form in (_last, _last_and_first, _last_two_and_first):
        counts = Counter(map(form, names))
        short = {name: form(name) for name in names if counts[form(name)] == 1} | short
    return {name: short.get(name, name) for name in names}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _last_and_first(name: str) -> str:
    return f"{_last(name)} · {name.partition('.')[0]}"


def _last_two_and_first(name: str) -> str:
    return f"{'.'.join(name.split('.')[-2:])} · {name.partition('.')[0]}"
