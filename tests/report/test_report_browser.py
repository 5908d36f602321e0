"""The page in a real browser: phone and laptop, light and dark; no console line, no network,
nothing cut off; axe where it is.

Needs Chromium (`apt install chromium`); the accessibility check also needs axe-core (`npm install
--no-save axe-core`).
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from matplotlib.image import imread

from greenvis.report import page, report

BROWSER = next(
    (b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)),
    None,
)
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Loads the page in a frame as wide as a phone or a laptop, and writes what it finds into its own
# document.
PROBE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre id="found"></pre>
<iframe id="f" width="%(width)d" height="900" src="%(page)s"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = async () => {
  const d = frame.contentDocument, root = d.documentElement;
  const small = [...d.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height).filter(h => h > 0);
  const out = {
    scroll: root.scrollWidth, client: root.clientWidth, ground: frame.contentWindow.getComputedStyle(d.body).backgroundColor,
    text: Math.min(...small), loaded: frame.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
  };
  if (%(axe)d) {
    const s = d.createElement("script");
    s.src = "/axe.min.js";
    await new Promise(done => { s.onload = done; d.head.append(s); });
    const result = await frame.contentWindow.axe.run(d);
    // text in a figure: axe cannot tell what lies under it; test_colours_can_be_read computes it
    const unsure = result.incomplete.flatMap(v => v.nodes.map(n => [v.id, n.html, String(n.any[0]?.message)]));
    out.incomplete = unsure.filter(([id, html]) => !/^<(text|tspan)/.test(html)).map(x => x.map(t => t.slice(0, 300)));
    out.violations = result.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]);
  }
  document.getElementById("found").textContent = JSON.stringify(out);
};
</script>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A served folder with a report of a usual study and one of hostile names."""
    folder = tmp_path_factory.mktemp("site")
    runs = tmp_path_factory.mktemp("runs")
    report(synthetic.study(runs / "study"), out=folder / "study")
    for seed in range(2):
        facts = {"task_accuracy": [[0.9, 0.1], [0.4, 0.8]]}
        synthetic.write(runs / "nasty", "baseline", seed, name=synthetic.NASTY, facts=facts)
        synthetic.write(
            runs / "nasty",
            "n" * 90,
            seed,
            name=synthetic.NASTY,
            notes=(synthetic.NASTY * 4,),
            facts=facts,
        )
    report(runs / "nasty", out=folder / "nasty")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def _probe(
    site: tuple[str, Path], page: str, width: int, *, dark: bool = False, axe: bool = False
) -> tuple[dict[str, Any], str]:
    url, folder = site
    (folder / "probe.html").write_text(PROBE % {"page": page, "width": width, "axe": axe})
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    command += [
        "--window-size=1500,1000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"{url}/probe.html"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.S)
    assert found, done.stderr[-2000:]
    assert found[1], done.stderr[-2000:]
    return json.loads(unescape(found[1])), done.stderr


FIRST = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre id="found"></pre>
<iframe id="f" width="%(width)d" height="%(height)d" src="%(page)s"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => {
  const d = frame.contentDocument;
  const at = what => [...d.querySelectorAll(what)].map(e => { const r = e.getBoundingClientRect(); return [r.top, r.bottom, r.left, r.right]; });
  const head = d.querySelector("table.brief th:nth-child(3) button");
  const order = () => [...d.querySelectorAll("table.brief tbody tr")].map(r => Number(r.dataset.position));
  const before = order();
  head?.click();
  document.getElementById("found").textContent = JSON.stringify({
    tiles: at(".tile"), sentence: at(".verdict"), figure: at(".lead svg"), table: at("table.brief"), before, after: order(),
    values: [...d.querySelectorAll("table.brief tbody tr")].map(r => r.cells[2].dataset.value ?? null),
  });
};
</script>"""


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_first_screen_holds_the_sentence_three_tiles_and_the_figure(
    site: tuple[str, Path], tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    """On a phone the figure is within two screens. Tables can be sorted."""
    url, folder = site
    (folder / "first.html").write_text(
        FIRST % {"page": "study/index.html", "width": width, "height": height}
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
               "--enable-logging=stderr", "--hide-scrollbars", "--window-size=1500,1000",
               *(["--blink-settings=preferredColorScheme=0"] if dark else [])]  # fmt: skip
    done = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", f"{url}/first.html"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    found = json.loads(unescape(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[0]))
    assert "CONSOLE" not in done.stderr
    screens = 1 if width > 1000 else 2
    assert len(found["tiles"]) == 3
    for top, bottom, left, right in (*found["tiles"], *found["sentence"], *found["figure"]):
        assert 0 <= top < bottom <= screens * height
        assert 0 <= left < right <= width
    assert found["sentence"][0][1] <= height  # on the first, whatever the screen
    assert found["before"] != found["after"]
    known = [float(v) for v in found["values"] if v is not None]
    assert known == sorted(known)
    # from a file, and what it looks like: something is drawn in each quarter
    shot = tmp_path / "first.png"
    page = (folder / "study" / "index.html").as_uri()
    subprocess.run(
        [*command, f"--window-size={max(width, 500)},{height}", f"--screenshot={shot}", page],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    pixels = imread(shot)[:, :width, :3]
    assert (pixels.mean() < 0.5) == dark
    for part in np.array_split(pixels, 2):
        assert all(quarter.std() > 0.02 for quarter in np.array_split(part, 2, axis=1))


def test_a_file_without_script_shows_the_same(site: tuple[str, Path], tmp_path: Path) -> None:
    """From a folder; no frame, whose content may be drawn after the picture is taken."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--virtual-time-budget=20000", "--window-size=1280,2400"]  # fmt: skip
    moving = site[1] / "study" / "index.html"
    text = moving.read_text()
    still = moving.with_name("still.html")
    ban = """<meta http-equiv="Content-Security-Policy" content="script-src 'none'">"""
    still.write_text(text.replace("<meta", ban + "<meta", 1))
    shots, buttons = [], []
    for shown in (still, moving):
        shot = tmp_path / f"{shown.stem}.png"
        subprocess.run([*command, f"--screenshot={shot}", shown.as_uri()], check=True,
                       capture_output=True, timeout=600)  # fmt: skip
        shots.append(imread(shot)[..., :3])
        dom = subprocess.run([*command, "--dump-dom", shown.as_uri()], check=True,
                             capture_output=True, text=True, timeout=600)  # fmt: skip
        buttons.append(dom.stdout.count("<button"))
    assert buttons[0] == 0 < buttons[1]  # one page's script ran, the other's did not
    assert all(part.std() > 0.02 for part in np.array_split(shots[0], 6))  # nothing is empty
    assert np.array_equal(*shots)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("page", ["study", "nasty"])
@pytest.mark.parametrize("width", [360, 1366])
def test_nothing_is_cut_off_and_nothing_complains(
    site: tuple[str, Path], page: str, width: int
) -> None:
    found, log = _probe(site, f"{page}/index.html", width)
    assert found["scroll"] <= found["client"]
    assert "CONSOLE" not in log, log
    assert found["loaded"] == []  # one file, no network
    assert found["text"] >= 8  # px: the smallest text in a figure can still be read


@pytest.mark.slow
def test_dark_is_dark(site: tuple[str, Path]) -> None:
    light, _ = _probe(site, "study/index.html", 1366)
    dark, _ = _probe(site, "study/index.html", 1366, dark=True)
    assert light["ground"] == "rgb(245, 246, 248)"
    assert dark["ground"] == "rgb(18, 22, 29)"


@pytest.mark.skipif(
    not AXE.exists(), reason="axe-core is not installed: npm install --no-save axe-core"
)
@pytest.mark.parametrize(
    ("page", "width", "dark"), [("study", 1366, False), ("study", 360, True), ("nasty", 360, False)]
)
def test_axe_finds_nothing(site: tuple[str, Path], page: str, width: int, dark: bool) -> None:
    shutil.copy(AXE, site[1] / "axe.min.js")
    text = (site[1] / page / "index.html").read_text()
    open_page = site[1] / page / "open.html"  # the page forbids other scripts, axe too
    open_page.write_text(re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", text))
    found, _ = _probe(site, f"{page}/open.html", width, dark=dark, axe=True)
    assert found["violations"] == []
    assert found["incomplete"] == []


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read(theme: str) -> None:
    """WCAG 2.1: 4.5:1 for text on the card, 3:1 for the marks of figures."""
    css = (page.TEMPLATES / "style.css").read_text()
    block = css.split("prefers-color-scheme: dark")[theme == "dark"].split("}")[0]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    assert len(colours) > 12
    card = _luminance(colours["card"])
    for name, least in {
        "ink": 4.5,
        "muted": 4.5,
        "accent": 4.5,
        "warn": 4.5,
        **{f"s{i}": 3.0 for i in range(8)},
        **{f"p{i}": 3.0 for i in range(7)},
    }.items():
        light, dark = sorted([card, _luminance(colours[name])], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("page", ["study", "nasty"])
def test_prints_on_pages_of_paper(site: tuple[str, Path], page: str, tmp_path: Path) -> None:
    """The print style gives a PDF of several pages."""
    pdf = tmp_path / "page.pdf"
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--print-to-pdf={pdf}",
        f"{site[0]}/{page}/index.html",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 40
