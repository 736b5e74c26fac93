"""The colours of the report: each has a shade for a light page and one for a dark page.

Figures are drawn in the light shades. In the page each becomes a CSS variable, so that one drawing serves
both. Widths have the hues of Okabe and Ito's palette, which can be told apart with any colour vision,
darkened or lightened to a contrast with the page of at least 3:1 (WCAG 2.2, 1.4.11), or 4.5:1 for text.
"""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.colors import to_hex

STEPS = 8
"""Shades of a ramp; more could not be told apart in a legend."""


def _ramp(name: str, map_name: str, light: tuple[float, float], dark: tuple[float, float]) -> dict:
    """`name-0` … `name-7`: a piece of a colour map on a light page, another on a dark one."""
    colours = {}
    for step in range(STEPS):
        at = [low + (high - low) * step / (STEPS - 1) for low, high in (light, dark)]
        colours[f"{name}-{step}"] = tuple(to_hex(colormaps[map_name](x)) for x in at)
    return colours


COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f4f5f7", "#0f1216"),
    "paper": ("#fffffe", "#181c22"),
    "ink": ("#1c1f24", "#e9ebee"),
    "muted": ("#5a606a", "#a8b0bb"),
    "line": ("#d5d9df", "#363d47"),
    "fog": ("#878e99", "#79828f"),
    "accent": ("#0a5f99", "#6cbcf0"),
    "kind-16": ("#2d3036", "#e4e6ea"),
    "kind-8": ("#00528a", "#3d90d2"),
    "kind-4": ("#009064", "#22b98d"),
    "kind-3": ("#3495cc", "#97d6f8"),
    "kind-2": ("#d15c00", "#ef8440"),
    "kind-1": ("#c0689a", "#e5a6c8"),
    "kind-signs": ("#8f7c00", "#efe250"),
    "kind-exact": ("#7d5f41", "#c8a381"),
    "kind-rest": ("#80868f", "#8b94a0"),
    **_ramp("depth", "plasma", (0.0, 0.6), (0.42, 0.95)),
    **_ramp("heat", "Blues", (0.12, 1.0), (1.0, 0.1)),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def kind_colour(kind: str) -> str:
    """Colour of a kind of bytes on a light page; kinds without one of their own share a grey."""
    return LIGHT.get(f"kind-{kind}", LIGHT["kind-rest"])


def ramp(name: str) -> list[str]:
    """The shades of a ramp on a light page."""
    return [LIGHT[f"{name}-{step}"] for step in range(STEPS)]
