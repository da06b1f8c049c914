"""The report in a browser: its script draws, answers to the controls, and fetches nothing.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastnce.watch import write_report
from tests.watch.made import Page, grid, lines, run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000")

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page's script is not run")

FIRST = "<script>onerror = (text) => { document.documentElement.dataset.error = text; };"
FIRST += (
    "addEventListener('securitypolicyviolation', (e) => { document.documentElement.dataset.refused = e.blockedURI; });"
)
FIRST += "</script>"


def shown(file: Path, script: str = "", size: str = "1440,900") -> Page:
    """The page after its script and `script` have run, as the browser has it in the end."""
    page = file.read_text(encoding="utf-8").replace("<style>", f"{FIRST}<style>", 1)
    changed = file.with_name("changed.html")
    changed.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    profile = file.with_name("profile")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", f"--window-size={size}", "--dump-dom"]
    ended = subprocess.run([*command, changed.as_uri()], capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("<!DOCTYPE html>"), ended.stderr[-2000:]
    file.with_name("dom.html").write_text(ended.stdout, encoding="utf-8")
    return Page(file.with_name("dom.html"))


def root(page: Page) -> dict[str, Any]:
    return dict(page.tags)["html"]


def test_nothing_is_fetched(tmp_path):
    """No address in the page, which has no other files, and a policy that forbids them."""
    page = Page(write_report([run(tmp_path / "mine")]))
    assert len(page.data["images"]) > 10
    without_pictures = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.html)
    assert not re.search(r"https?:|ftp:|//[a-z]", without_pictures, re.IGNORECASE)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert tag != "script" or set(attributes) <= {"type", "id"}
    assert "@import" not in page.html
    assert "url(" not in page.html.replace("url(#clip-", "")
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:;")


@browser
def test_the_script_draws(tmp_path):
    page = shown(write_report([run(tmp_path / "mine")]))
    assert "data-error" not in root(page)
    assert "data-refused" not in root(page)
    assert root(page)["data-drawn"] == "6"  # two measures, two losses, speed and learning rate
    curves = [
        attributes["d"] for tag, attributes in page.tags if tag == "path" and "curve" in (attributes["class"] or "")
    ]
    assert len(curves) == 6
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+", str(path)) for path in curves)
    assert len(str(curves[2]).split("L")) == 40  # a loss
    assert "G_GAN 0.025" in page.texts["losses"]  # the newest value, not the smoothed one
    assert "Learning rate 2e-4 2e-4 " in page.texts["speed"].replace(
        "\N{MINUS SIGN}", "-"
    )  # one tick of a constant rate
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels[2] == "G_GAN from 1 to 0.025 at step 40, lowest 0.025, highest 1"
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "path"]
    assert kinds.count("base") == kinds.count("best") == 2  # in the charts of the measures
    assert kinds.count("change") == 6
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4 + 8  # the strip, and two rows of both directions
    assert all(str(one["src"]).startswith("data:image/") for one in pictures)


@browser
def test_the_controls(tmp_path):
    script = """
      const put = (id, value, kind) => {
        const control = document.getElementById(id);
        control.value = value;
        control.dispatchEvent(new Event(kind));
      };
      const before = document.querySelectorAll('.raw').length;
      put('smooth', 0, 'input');
      put('axis', 'epoch', 'change');
      document.getElementById('log').click();
      document.querySelector('.samples input').value = 0;
      document.querySelector('.samples input').dispatchEvent(new Event('input'));
      const svg = document.querySelectorAll('.chart svg')[2], box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right - 10, clientY: box.top + 50 }));
      document.documentElement.dataset.raw = `${before} ${document.querySelectorAll('.raw').length}`;
      document.documentElement.dataset.ticks = [...svg.querySelectorAll('text')].map((t) => t.textContent).join(' ');
    """
    page = shown(write_report([run(tmp_path / "mine")]), script)
    found = root(page)
    assert "data-error" not in found
    assert found["data-raw"] == "3 0"  # two losses and the speed; without smoothing there is nothing behind a curve
    ticks = str(found["data-ticks"]).split()
    assert {"0.05", "0.1", "0.2", "0.5", "1"} <= set(ticks)  # logarithmic
    assert ticks[-1] == "4"  # epochs
    tip = next(
        i
        for i, (_, attributes) in enumerate(page.tags)
        if attributes.get("role") == "status" and "hidden" not in attributes
    )
    assert tip
    assert "step 40: 0.025" in page.texts["losses"]
    assert "step 10" in page.texts["samples"]
    current = [a["data-step"] for t, a in page.tags if t == "button" and a.get("aria-current") == "true"]
    assert current == ["10"]
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "path"]
    assert kinds.count("sampled") == 6


@browser
def test_a_comparison(tmp_path):
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "data.batch=2", steps=30)]
    hide = "document.querySelector('[data-run=\"0\"]').click();"
    for script, count in (("", 2), (hide, 1)):
        page = shown(write_report(runs, tmp_path / "both.html"), script)
        assert "data-error" not in root(page)
        curves = [
            attributes for tag, attributes in page.tags if tag == "path" and "curve" in (attributes["class"] or "")
        ]
        assert len(curves) == 6 * count
        blocks = [attributes for _, attributes in page.tags if "data-of" in attributes]
        assert ["hidden" in one for one in blocks] == [count == 1, False]
    assert "b: NCE from" in str(
        next(a["aria-label"] for t, a in page.tags if t == "svg" and "NCE" in str(a["aria-label"]))
    )


@browser
def test_odd_runs(tmp_path):
    """One line; values of 0, below 0 and not finite; a name that is HTML; a grid of unknown layout."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.toml").write_text('method = "cut"\n')
    grid(folder / "samples" / "step-00000001.png", 1, text=None)
    lines(folder / "metrics.jsonl", [{"step": 5, "G": 0.0, "D": -3.0, "lost": "nan", "</script><img src=x>": 1e300}])
    page = shown(write_report([folder]), "document.getElementById('log').click();", "390,900")
    assert "data-error" not in root(page)
    assert root(page)["data-drawn"] == "3"
    assert "</script><img src=x>" in page.texts["losses"]
    assert "NaN" not in "".join(str(attributes) for tag, attributes in page.tags if tag in ("path", "circle", "text"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.toml").write_text('method = "cut"\n')
    assert "data-error" not in root(shown(write_report([empty])))


@browser
def test_ticks_that_are_close_have_enough_digits(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text('method = "cut"\n')
    values = ((1.9e-4, 2.1e-4), (0.123451, 0.123499), (12_340_000.0, 12_350_000.0), (-5.0, 5.0))
    for step in (1, 2):
        lines(
            folder / "metrics.jsonl", [{"step": step, **{f"loss_{i}": pair[step - 1] for i, pair in enumerate(values)}}]
        )
    script = """
      const root = document.documentElement;
      const upright = (svg) => [...svg.querySelectorAll('text')].filter((t) => t.getAttribute('y') < 180);
      const all = [...document.querySelectorAll('.chart svg')].map(upright);
      root.dataset.ticks = JSON.stringify(all.map((texts) => texts.map((t) => t.textContent)));
      root.dataset.cut = all.flat().filter((t) => t.getBBox().x < 0).length;
    """
    found = root(shown(write_report([folder]), script))
    assert found["data-cut"] == "0"
    ticks = json.loads(str(found["data-ticks"]).replace("\N{MINUS SIGN}", "-"))
    assert ticks[0] == ["1.9e-4", "1.95e-4", "2e-4", "2.05e-4", "2.1e-4"]
    assert ticks[1] == ["0.12345", "0.12346", "0.12347", "0.12348", "0.12349", "0.1235"]
    assert "12.342M" in ticks[2]
    assert ticks[3] == ["-4", "-2", "0", "2", "4"]
    assert all(len(set(one)) == len(one) for one in ticks)


@browser
def test_a_configuration_on_a_phone(tmp_path):
    """Keys stand on one line; nothing of the table is cut off."""
    script = """
      const root = document.documentElement, table = document.querySelector('.config').parentElement;
      document.getElementById('only').click();
      root.dataset.high = Math.max(...[...document.querySelectorAll('.config th code')].map((one) => one.offsetHeight));
      root.dataset.cut = table.scrollWidth - table.clientWidth;
    """
    for size in ("500,900", "1440,900"):  # a headless window is at least 500 wide
        found = root(shown(write_report([run(tmp_path / size)]), script, size))
        assert 10 < int(str(found["data-high"])) < 30
        assert int(str(found["data-cut"])) <= 0


@browser
def test_a_phone_needs_no_scrolling_to_the_side(tmp_path):
    script = "document.documentElement.dataset.wide = document.documentElement.scrollWidth - innerWidth;"
    long = run(tmp_path / ("long-name-" * 12))
    page = shown(write_report([long]), script, "500,900")  # a headless window is at least 500 wide
    assert int(str(root(page)["data-wide"])) <= 0
