"""`deltacome report`: an artifact as one self-contained page, and its figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from deltacome.errors import DeltaError, OutputError
from deltacome.format.artifact import Artifact, opened
from deltacome.format.clip import clip
from deltacome.format.folder import check_output, new_file, new_folder
from deltacome.report.colours import COLOURS
from deltacome.report.facts import Facts, gather
from deltacome.report.figures import draw
from deltacome.report.scores import read_scores
from deltacome.report.sections import Section, sections
from deltacome.report.svg import inline_svg
from deltacome.report.words import number, size

DPI = 144
"""Of the PNG files: two dots per pixel of the page."""


def write_report(
    artifact: Artifact | str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    scores: Sequence[str | Path] = (),
    png: str | Path | None = None,
) -> None:
    """Writes the page, and the wide figures as PNG files into a folder of their own.

    Everything is drawn before anything is written, and each output is whole or absent.

    Args:
        artifact: opened, or its folder or name on the Hub; all of it is read.
        output: the HTML file.
        name: heading of the page; by default that of the artifact's folder.
        scores: files with what `deltacome eval --json` printed.
        png: folder for PNG files.

    Raises:
        ArtifactError: the artifact is damaged.
        DeltaError: a file of scores cannot be read, or there are no scores of a delta.
        OutputError: an output exists already or cannot be written, or both are the same.
    """
    output, png = Path(output), None if png is None else Path(png)
    files = [Path(score) for score in scores]
    for path in (output, png):
        if path is not None:
            check_output(path)
    if png is not None and png.resolve() == output.resolve():
        raise OutputError(f"{png}: expected another place for PNG files than that of the page")
    exams = read_scores(files)
    if files and not any(exam.deltas for exam in exams):
        raise DeltaError(f"{files[0]}: expected scores of a delta, got those of dense models only")
    artifact = opened(artifact)
    facts = gather(artifact)
    shown = [_drawn(section) for section in sections(facts, exams)]
    page = render(name or artifact.path.resolve().name, facts, shown)
    if png is not None:
        with new_folder(png) as folder:
            for part in shown:
                part.wide.savefig(folder / f"{part.section.key}.png", dpi=DPI)
    with new_file(output) as file:
        file.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Drawn:
    """A section with its figure in both widths."""

    section: Section
    wide: Figure
    narrow: Figure

    def svg(self, form: str) -> str:
        """The `wide` or `narrow` figure as SVG."""
        section = self.section
        figure = self.wide if form == "wide" else self.narrow
        return inline_svg(figure, f"{section.key}-{form}", section.title, section.finding)


def render(name: str, facts: Facts, shown: Sequence[Drawn]) -> str:
    """The page: HTML that is also XML, and refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("deltacome.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        name=clip(name, 80),
        colours=COLOURS,
        tiles=_tiles(facts),
        about=_about(facts),
        parts=shown,
    )


def _drawn(section: Section) -> Drawn:
    wide, narrow = (draw(section.draw, wide, *section.subject) for wide in (True, False))
    return Drawn(section, wide, narrow)


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """What people look for first."""
    packed = sum(place.matrices for place in facts.places) - facts.dropped
    left = f", {facts.dropped:,} left as in the base" if facts.dropped else ""
    return [
        (f"{facts.ratio:.2f}", "ratio, everything counted"),
        (size(facts.bytes_on_disk), f"on disk, for {size(facts.tuned_nbytes)}"),
        (number(facts.nominal_ratio), "nominal ratio: codes only"),
        (number(facts.mean_error), f"mean error of a matrix{left}"),
        (f"{packed:,}", f"matrices packed, of {facts.tensors.total():,} tensors"),
    ]


def _about(facts: Facts) -> dict[str, str]:
    options = [f"{key} {value}" for key, value in facts.method.items() if key != "name"]
    base = facts.base if not Path(facts.base).is_absolute() else Path(facts.base).name
    return {
        "method": clip(str(facts.method["name"]), 40),
        "options": clip(" · ".join(options), 160),
        "base": clip(base, 80),
    }
