"""A figure as SVG inside a page: text stays text, colours become the page's variables."""

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
_TAG = re.compile(r"<[^<>]*>")
_FRACTION = re.compile(r"(\d+\.\d)\d+")
_USED = re.compile(r'url\(#([^)]+)\)|href="#([^"]+)"')
_FONT = re.compile(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*|font-family: [^;\"]*;?")
_NO_DATES = {"Creator": None, "Date": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """`<svg>…</svg>`, valid as XML and as HTML.

    Args:
        figure: drawn in light shades.
        key: prefix of its ids, which must be unique in a page.
        title, description: what a screen reader says about it.
    """
    stream = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "deltacome", "text.parse_math": False}
    ):
        figure.savefig(stream, format="svg", metadata=_NO_DATES, transparent=True)
    text = re.sub(
        r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", stream.getvalue(), flags=re.DOTALL
    )
    _, _, body = text[text.index("<svg") :].partition(">")
    width, height = (round(72 * side) for side in figure.get_size_inches())
    used = {name for tag in _TAG.findall(body) for pair in _USED.findall(tag) for name in pair}
    body = _TAG.sub(lambda tag: _for_a_page(tag[0], key, used), body)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-text">{escape(description)}</desc>'
    )
    return Markup(head + re.sub(r"\n\s*", "\n", body))


def _for_a_page(tag: str, key: str, used: set[str]) -> str:
    """A tag with fewer digits, the page's colours and typeface, and ids that no other figure has.

    What is between tags, including names from an artifact, stays as it is.
    """
    tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", tag)
    tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", tag.replace("xlink:href", "href"))
    tag = _ATTRIBUTE.sub(lambda m: _FRACTION.sub(r"\1", m[0]), tag)
    return _COLOUR.sub(lambda match: _VARIABLES[match[0]], _FONT.sub(_font, tag))


def _font(match: re.Match[str]) -> str:
    """The page's own typeface in place of the one that the layout was measured with."""
    return f"font-size: {match[1]}" if match[1] else ""
