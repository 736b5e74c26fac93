"""The page and the PNG files: whole, alone, and with the artifact's numbers in them."""

import json
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from report_helpers import HOSTILE, PROJECTIONS, evaluated, layers, save

from deltacome.errors import ArtifactError, DeltaError, OutputError
from deltacome.format.artifact import Artifact
from deltacome.format.clip import clip
from deltacome.report import figures, write_report
from deltacome.report.colours import COLOURS, LIGHT
from deltacome.report.facts import gather
from deltacome.report.scores import read_scores
from deltacome.report.sections import sections
from deltacome.report.svg import inline_svg
from deltacome.report.words import number, share, short_names, size

H = "{http://www.w3.org/1999/xhtml}"
S = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact, the file of its scores, the page as a tree, the folder of PNG files."""
    folder = tmp_path_factory.mktemp("report")
    artifact, _ = save(folder / "delta", layers(3))
    models = [
        ("base", None, None, None, 0.1),
        ("tuned", None, None, None, 0.9),
        ("delta", "random", artifact.bytes_on_disk(), artifact.ratio(), 0.8),
        ("other", "low-rank", 100, 64.0, 0.25),
    ]
    file = evaluated(folder / "scores.json", models, digest=artifact.digest)
    write_report(artifact, folder / "page.html", scores=[file], png=folder / "png")
    names = {"scores": [str(file)], "png": str(folder / "again")}
    write_report(str(folder / "delta"), str(folder / "again.html"), **names)
    assert (folder / "again.html").read_bytes() == (folder / "page.html").read_bytes()
    return artifact, file, folder / "page.html", folder / "png"


def contrast(one, other):
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance of sRGB)."""
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def tree(page):
    return ET.fromstring(page.read_text(encoding="utf-8").replace("<!DOCTYPE html>", ""))


def rows(root, key):
    """The table below a heading."""
    (section,) = (s for s in root.iter(f"{H}section") if s.get("aria-labelledby") == key)
    return [[cell.text for cell in row] for row in section.iter(f"{H}tr")][1:]


def test_the_page_is_well_formed_and_alone(made):
    text = made[2].read_text(encoding="utf-8")
    root = tree(made[2])
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        assert element.tag.partition("}")[2] not in ("script", "img", "iframe", "object", "image")
        for key, value in element.attrib.items():
            name = key.rpartition("}")[2]
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert value == "data:," or value.removeprefix("#") in ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert set(re.findall(r"https?://[^\"' <]*", text)) == {H[1:-1], S[1:-1]}  # namespaces
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_figures_have_words_for_those_who_cannot_see_them(made):
    root = tree(made[2])
    known = {e.get("id"): "".join(e.itertext()) for e in root.iter()}
    drawn = list(root.iter(f"{S}svg"))
    assert len(drawn) == 10  # five figures, at two widths
    for svg in drawn:
        assert svg.get("role") == "img"
        title, description = (known[key] for key in svg.get("aria-labelledby").split())
        assert title
        assert len(description) > 20
    assert len(list(root.iter(f"{H}table"))) == 5
    assert root.get("lang") == "en"


def test_tables_hold_the_artifact_s_numbers(made):
    artifact, root = made[0], tree(made[2])
    tensors = {t["name"]: t for t in artifact.describe()["tensors"] if t["plan"]}
    kinds = {kind: int(n.replace(",", "")) for kind, n, _ in rows(root, "bytes")}
    assert kinds.pop("total") == sum(kinds.values()) == artifact.bytes_on_disk()
    widths = {(name, depth): cells for name, depth, *cells in rows(root, "widths")}
    errors = {(name, depth): error for name, depth, error in rows(root, "errors")}
    assert len(widths) == len(errors) == len(tensors) == 10
    for name, tensor in tensors.items():
        parts = name.split(".")
        key = parts[-2], parts[2] if "layers" in name else "–"
        *directions, nbytes, bits = widths[key]
        assert [int(d) for d in directions] == [1, 1, 1, 2, 2, 3]
        assert int(nbytes.replace(",", "")) == tensor["bytes"]
        assert float(bits) == pytest.approx(
            8 * tensor["bytes"] / np.prod(tensor["shape"]), abs=1e-3
        )
        assert float(errors[key]) == pytest.approx(tensor["error"], rel=1e-3)
    (mine,) = (row for row in rows(root, "scores") if row[1] == "delta")
    assert mine[:4] == [
        "folder/questions.jsonl",
        "delta",
        "random",
        f"{artifact.bytes_on_disk():,}",
    ]
    assert mine[4:7] == [f"{artifact.ratio():.2f}", "80.0 %", "70.0 % to 90.0 %"]
    words = " ".join("".join(root.itertext()).split())
    assert "base 10.0 %, tuned 90.0 %, this artifact 80.0 %." in words
    assert f"{artifact.ratio():.2f} ratio" in words or f"ratio of {artifact.ratio():.2f}" in words


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_drawn_is_what_the_artifact_holds(made, wide):
    artifact = made[0]
    facts = gather(artifact)
    records = artifact.manifest.records
    group = artifact.manifest.group_size
    names = sorted(f"model.layers.*.{p}" for p in PROJECTIONS)

    drawn = figures.draw(figures.bytes_by_kind, wide, facts)
    bars = [p for p in drawn.axes[0].patches if getattr(p, "get_height", float)() == 38]
    part = sum(p.get_width() for p in bars) / figures.WIDTH[wide]
    assert part == pytest.approx(1)
    (scaled,) = (p for p in drawn.axes[0].patches if getattr(p, "get_y", float)() == 50)
    assert figures.WIDTH[wide] / scaled.get_width() == pytest.approx(artifact.ratio())

    drawn = figures.draw(figures.widths, wide, facts)
    for axes, name in zip(drawn.axes, names, strict=False):
        highest = axes.patches[-1].get_data().values  # the last of a stack reaches the sum
        mine = [records[f"{name.replace('*', str(i))}.weight"] for i in range(3)]
        expected = [8 * r.nbytes(group) / np.prod(r.shape) for r in mine]
        np.testing.assert_allclose(highest, expected)

    drawn = figures.draw(figures.errors, wide, facts)
    cells = next(axes for axes in drawn.axes if axes.collections)
    grid = np.asarray(cells.collections[0].get_array()).reshape(-1)
    values = np.array(
        [[records[f"{n.replace('*', str(i))}.weight"].error for i in range(3)] for n in names]
    )
    np.testing.assert_allclose(grid, (values if wide else values.T).reshape(-1))

    drawn = figures.draw(figures.spectra, wide, facts)
    for axes, name in zip(drawn.axes, names, strict=False):
        for line, place in zip(axes.lines, facts.of(name), strict=True):
            np.testing.assert_allclose(line.get_ydata(), place.spectrum)

    drawn = figures.draw(figures.scores, wide, read_scores([made[1]]), facts)
    points = {(x, y) for line in drawn.axes[0].lines for x, y in zip(*line.get_data(), strict=True)}
    assert {(artifact.ratio(), 80.0), (64.0, 25.0)} <= points


def test_png_files_are_the_same_figures(made):
    shown = sections(gather(made[0]), read_scores([made[1]]))
    assert sorted(f.stem for f in made[3].iterdir()) == sorted(section.key for section in shown)
    root = tree(made[2])
    boxes = {
        svg.get("aria-labelledby").split("-title")[0]: svg.get("viewBox")
        for svg in root.iter(f"{S}svg")
    }
    for section in shown:
        pixels = matplotlib.image.imread(made[3] / f"{section.key}.png")
        height, width, _ = pixels.shape
        _, _, *sides = map(int, boxes[f"{section.key}-wide"].split())
        assert (width, height) == pytest.approx([2 * side for side in sides], abs=2)
        assert 0.02 < pixels[..., :3].std() < 0.5  # something is drawn


def test_the_largest_error_is_the_largest_of_all(tmp_path):
    artifact, _ = save(tmp_path / "delta", layers(2))
    facts = gather(artifact)
    (said,) = (s.finding for s in sections(facts, []) if s.key == "errors")
    assert facts.outside[0].error == max(p.error for p in facts.places)  # the embedding's
    assert f"{number(facts.outside[0].error)} at most: embed_tokens" in said


@pytest.mark.parametrize(
    ("terms", "names"),
    [("bands", layers(1)), ("one", layers(1)), ("rows+bands", layers(1)[-1:]), ("bands", [])],
)
def test_small_artifacts(tmp_path, terms, names):
    artifact, _ = save(tmp_path / "a", names, terms=terms, errors=len(names) > 1)
    write_report(artifact, tmp_path / "page.html")
    keys = [s.get("aria-labelledby") for s in tree(tmp_path / "page.html").iter(f"{H}section")]
    expected = ["bytes"]
    expected += ["widths"] if names else []
    expected += ["errors"] if len(names) > 1 else []
    expected += ["spectra"] if names and "bands" in terms else []
    assert keys == expected


def test_what_a_plan_left_out_is_said(tmp_path):
    names = layers(2)
    artifact, _ = save(tmp_path / "a", names, dropped=names[1:3])
    errors = [r.error for r in artifact.manifest.records.values() if r.error is not None]
    facts = gather(artifact)
    assert facts.dropped == 2
    assert facts.mean_error == pytest.approx(sum(errors) / len(errors))
    assert facts.nbytes.total() == artifact.bytes_on_disk()
    write_report(artifact, tmp_path / "page.html")
    root = tree(tmp_path / "page.html")
    words = " ".join(" ".join(root.itertext()).split())
    assert f"mean error of a matrix, 2 left as in the base {number(facts.mean_error)}" in words
    assert f"matrices packed, of {len(names) + 1} tensors {len(names) - 2}" in words
    assert f"{number(facts.mean_error)} on average, 1 at most" in words
    assert "Matrices left as in the base, with an error of 1: 2." in words
    assert sorted(float(row[-1]) for row in rows(root, "widths"))[:2] == [0, 0]
    assert [row[-1] for row in rows(root, "errors")].count("1") == 2
    # Where nothing is packed there are no widths.
    artifact, _ = save(tmp_path / "b", names[:1], dropped=names)
    assert [section.key for section in sections(gather(artifact), [])] == ["bytes", "errors"]


def test_what_has_no_room_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PANELS", 2)
    monkeypatch.setattr(figures, "BESIDE", 1)
    outside = [f"extra_{i}.weight" for i in range(7)]
    artifact, _ = save(tmp_path / "a", [*layers(2), *outside])
    facts = gather(artifact)
    drawn = {section.key: section for section in sections(facts, [])}
    both = "Drawn are 2 of 3 projections and 1 of 8 matrices outside blocks"
    assert both in drawn["widths"].note
    assert both in drawn["spectra"].note
    assert "Drawn are 2 of 3 projections; the numbers below have all." in drawn["errors"].note
    assert "and 2 more." in drawn["errors"].finding
    # Totals and means are those of all, not of what is drawn.
    (panel,) = [
        axes
        for axes in figures.draw(figures.widths, True, facts).axes
        if axes.get_title("left") == "outside blocks"
    ]
    assert panel.get_title("right") == size(sum(p.nbytes.total() for p in facts.outside))
    bars = figures.draw(figures.errors, True, facts).axes[0].patches
    of_first = [p.error for p in facts.places if p.depth == 0]
    assert bars[0].get_height() == pytest.approx(sum(of_first) / len(of_first))


def test_names_from_outside_stay_text(tmp_path):
    artifact, _ = save(tmp_path / "a", [f"model.layers.0.{HOSTILE}.weight", f"{HOSTILE}.weight"])
    write_report(artifact, tmp_path / "page.html")
    root = tree(tmp_path / "page.html")
    assert not list(root.iter(f"{H}script")) + list(root.iter(f"{S}script"))
    cells = ["".join(row) for row in rows(root, "errors")]
    assert any("<script>alert(1)</script>$x_1$" in cell for cell in cells)
    assert not any(c in "".join(root.itertext()) for c in "\u202e\x01")


def test_text_of_a_figure_stays_as_it_is():
    """Even where names look like what is edited in the tags around them."""
    said = f'font-family: y; {LIGHT["ink"]} d="1.2345" id="z" href="#z" xlink:href <!-- x -->'
    figure = Figure()
    figure.text(0.1, 0.5, said)
    figure.text(0.1, 0.6, 'style="font-family: z"', color=LIGHT["ink"])
    text = str(inline_svg(figure, "key", "title", "words"))
    assert [e.text for e in ET.fromstring(text).iter(f"{S}text")] == [
        said,
        'style="font-family: z"',
    ]
    styles = re.findall(r' style="([^"]*)"', re.sub(">[^<]*<", "><", text))
    assert any("var(--ink)" in style for style in styles)
    assert not any("font-family" in style or "font:" in style for style in styles)


def test_nothing_is_left_where_something_is_refused(tmp_path):
    artifact, _ = save(tmp_path / "a", layers(1))
    before = sorted(tmp_path.rglob("*"))
    page, png = tmp_path / "page.html", tmp_path / "png"
    with pytest.raises(DeltaError, match=r"none\.json: cannot be read"):
        write_report(artifact, page, scores=[tmp_path / "none.json"], png=png)
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(artifact, tmp_path / "a" / "tokenizer.json" / "page.html")
    with pytest.raises(OutputError, match="expected another place for PNG files"):
        write_report(artifact, page, png=tmp_path / "a" / ".." / page.name)
    assert sorted(tmp_path.rglob("*")) == before
    page.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_report(artifact, page, png=png)
    assert page.read_text() == "mine"
    assert not png.exists()
    (shard,) = artifact.path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match="SHA-256"):
        write_report(Artifact.open(artifact.path), tmp_path / "other.html", png=png)
    assert not png.exists()
    assert not (tmp_path / "other.html").exists()


def test_equal_artifacts_give_equal_pages(tmp_path, made):
    write_report(made[0], tmp_path / "page.html", scores=[made[1]])
    assert (tmp_path / "page.html").read_bytes() == made[2].read_bytes()


def test_colours_stand_out():
    for shade in (0, 1):
        colours = {name: pair[shade] for name, pair in COLOURS.items()}
        for ground in ("paper", "page"):
            for text in ("ink", "muted", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, shade)
        for name, colour in colours.items():
            if name.startswith(("kind", "depth", "fog")):
                assert contrast(colour, colours["paper"]) >= 3, (name, shade)
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)  # they are found by value
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_classes_cover_what_they_sort():
    for values in (
        [0.5],
        [0.0, 0.5],
        [1e-9, 1.0],
        [0.2, 0.21],
        [0.3] * 3,
        [1.0, 10.0, 100.0],
        [2e-5, 0.5],
    ):
        bounds = figures._classes(np.array(values))
        assert bounds == sorted(set(bounds))
        assert 2 <= len(bounds) <= 9
        assert bounds[0] == 0
        assert max(values) <= bounds[-1]


def test_words():
    sizes = [
        (0, "0 B"),
        (999, "999 B"),
        (4_202_005, "4.20 MB"),
        (999_999, "1.00 MB"),
        (2.5e9, "2.50 GB"),
    ]
    for nbytes, word in sizes:
        assert size(nbytes) == word
    assert (share(0.0381), number(None), number(0.012345)) == ("3.8 %", "–", "0.0123")
    assert clip("a\x00b", 3) == "a�b"
    assert clip("abcdef", 4) == "abc…"
    names = ["a.layers.*.x.q", "b.layers.*.x.q", "a.layers.*.y.k", "c.*.s.o", "c.*.t.o"]
    assert list(short_names(names).values()) == ["q · a", "q · b", "k", "s.o · c", "t.o · c"]


def test_scores_of_others_are_said_to_be_so(tmp_path):
    artifact, _ = save(tmp_path / "a", layers(1))
    dense = {"name": "base", "score": 0.5, "score_low": 0.4, "score_high": 0.6}
    other = dense | {"name": "b", "artifact": "0" * 64, "method": "m", "bytes": 9, "ratio": 16.0}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"task": "sums", "n": 9, "models": [dense]}))
    with pytest.raises(DeltaError, match=r"scores\.json: expected scores of a delta"):
        write_report(artifact, tmp_path / "page.html", scores=[file])
    file.write_text(json.dumps({"task": "sums", "n": 9, "models": [dense, other]}))
    write_report(artifact, tmp_path / "page.html", scores=[file])
    assert "This artifact is not among them." in (tmp_path / "page.html").read_text()
