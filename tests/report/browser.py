"""A page in headless Chromium at the widths of a phone and a desktop, in light and in dark.

    python tests/report/browser.py report.html [--pictures FOLDER]

Measured in the browser: whether anything is wider than the page, figure texts that leave their figure or
cover each other, letters too small to read, and what the console says.
"""

import argparse
import html
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = {"phone": 390, "desktop": 1280}
SMALLEST = 9
"""The smallest font size in a figure, in pixels."""
POLICY = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
PROBE = """<script>
const boxes = [], out = {wide: [], clipped: [], covered: [], small: [], width: innerWidth};
const page = document.documentElement;
out.overflow = page.scrollWidth - innerWidth;
for (const e of document.querySelectorAll("body *:not(.scroll *)"))
  if (e.getBoundingClientRect().right > innerWidth + 1) out.wide.push(e.tagName + " " + e.className);
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  if (!frame.width) continue;
  const scale = frame.width / svg.viewBox.baseVal.width;
  const seen = [];
  for (const text of svg.querySelectorAll("text")) {
    const b = text.getBoundingClientRect(), said = text.textContent;
    if (!b.width) continue;
    const beside = b.left < frame.left - 1 || b.right > frame.right + 1;
    if (beside || b.top < frame.top - 2 || b.bottom > frame.bottom + 2) out.clipped.push(said);
    if (scale * parseFloat(getComputedStyle(text).fontSize) < SMALLEST) out.small.push(said);
    for (const [other, o] of seen) {
      const x = Math.min(b.right, o.right) - Math.max(b.left, o.left);
      const y = Math.min(b.bottom, o.bottom) - Math.max(b.top, o.top);
      if (x > 1 && y > 4) out.covered.push(other + " | " + said);
    }
    seen.push([said, b]);
  }
}
parent.document.getElementById("found").textContent = JSON.stringify(out);
</script>"""


def chromium(page, width, *options, height=900, dark=False):
    """Runs the browser on a page → (stdout, stderr)."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0"]
        command += [f"--window-size={width},{height}"]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", *options]
        done = subprocess.run(
            [*command, Path(page).resolve().as_uri()], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def measure(page, width):
    """What is wrong with a page at a width: empty lists and an overflow of 0 in a good page."""
    text = Path(page).read_text(encoding="utf-8")
    _, _, after = text.partition(POLICY)
    assert after, "the page forbids scripts and network"
    probed = text.replace(POLICY, '<meta name="probed" content="')
    probed = probed.replace("</body>", PROBE.replace("SMALLEST", str(SMALLEST)) + "</body>")
    # Not every system's windows can be as narrow as a phone; a frame in one can.
    style = f"width: {width}px; height: 900px; border: 0"
    frame = f'<iframe style="{style}" srcdoc="{html.escape(probed)}"></iframe>'
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
        file.write(f'<meta charset="utf-8"><pre id="found"></pre>{frame}')
        file.flush()
        said, _ = chromium(file.name, width + 100, "--dump-dom")
    found = json.loads(html.unescape(said.split('<pre id="found">')[1].split("</pre>")[0]))
    assert found.pop("width") == width
    _, log = chromium(page, width, "--dump-dom")
    found["console"] = [line for line in log.splitlines() if "CONSOLE" in line]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--pictures", type=Path, help="Folder for screenshots.")
    options = parser.parse_args()
    if BROWSER is None:
        sys.exit("no Chromium found: chromium, chromium-browser or google-chrome")
    wrong = False
    for name, width in WIDTHS.items():
        found = measure(options.page, width)
        wrong |= any(found.values())
        print(f"{name}, {width} px: {json.dumps(found, ensure_ascii=False)}")
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            height = 5200 if name == "phone" else 3400
            for form in ("", "-dark"):
                picture = options.pictures / f"{name}{form}.png"
                words = f"--screenshot={picture.resolve()}"
                chromium(options.page, width, words, height=height, dark=bool(form))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
