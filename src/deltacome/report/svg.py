"""A figure as SVG inside of a page: text stays text, colours become the page's variables."""

from __future__ import annotations

import io
import re

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from deltacome.report.colours import LIGHT

_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(LIGHT.values()))
_ATTRIBUTE = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_FRACTION = re.compile(r"(\d+\.\d)\d+")
_FONT = re.compile(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*|font-family: [^;\"]*;?")
_NO_DATES = {"Creator": None, "Date": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """`<svg>…</svg>`, as XML and as HTML.

    Args:
        figure: drawn in light shades.
        key: what its ids begin with, as those of a page must differ.
        title, description: what a screen reader says of it.
    """
    stream = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "deltacome", "text.parse_math": False}
    ):
        figure.savefig(stream, format="svg", metadata=_NO_DATES, transparent=True)
    text = stream.getvalue()
    _, _, body = text[text.index("<svg") :].partition(">")
    width, height = (round(72 * side) for side in figure.get_size_inches())
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    for name in used:
        for before, after in ((' id="', '"'), ("url(#", ")"), ('href="#', '"')):
            body = body.replace(f"{before}{name}{after}", f"{before}{key}-{name}{after}")
    body = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = _ATTRIBUTE.sub(lambda m: _FRACTION.sub(r"\1", m[0]), body.replace("xlink:href", "href"))
    body = _COLOUR.sub(lambda match: _VARIABLES[match[0]], _FONT.sub(_font, body))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-text">{escape(description)}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body))


def _font(match: re.Match[str]) -> str:
    """The page's own typeface in place of the one that the layout was measured with."""
    return f"font-size: {match[1]}" if match[1] else ""
