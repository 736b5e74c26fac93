"""The page in a real browser: nothing sticks out, is covered or is too small; the console is silent."""

import pytest
from browser import BROWSER, WIDTHS, measure
from report_helpers import HOSTILE, evaluated, layers, save

from deltacome.report import write_report

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here (chromium, google-chrome): layout is not looked at"
)


NAMES = [*layers(12), *(f"a.{i}.{HOSTILE * 3}.b" for i in range(3)), HOSTILE]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    artifact, _ = save(folder / "delta", NAMES)
    mine = ("delta", "random", artifact.bytes_on_disk(), artifact.ratio(), 0.8)
    models = [("base", None, None, None, 0.1), ("tuned", None, None, None, 0.9), mine]
    file = evaluated(
        folder / "scores.json",
        [*models, ("b", "low-rank", 100, 64.0, 0.25)],
        digest=artifact.digest,
    )
    write_report(artifact, folder / "page.html", scores=[file])
    return folder / "page.html"


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_page_at_its_width(page, width):
    found = measure(page, width)
    assert not any(found.values()), found


def test_faults_are_found(page, tmp_path):
    # The test above can fail.
    fault = '<text x="-50" y="20" style="font-size: 5px">out</text><text x="60" y="60">one</text>'
    fault += '<text x="61" y="60">two</text></svg><p style="width: 3000px">wide</p>'
    fault += '<script>console.log("hello")</script><svg>'
    file = tmp_path / "page.html"
    file.write_text(page.read_text().replace("</svg>", fault + "</svg>", 1))
    found = measure(file, 1280)
    assert "out" in found["clipped"]
    assert "out" in found["small"]
    assert "one | two" in found["covered"]
    assert found["overflow"] > 1000
    assert found["wide"]
    assert any(
        "script" in line for line in found["console"]
    )  # the page's policy stops it, and says so
