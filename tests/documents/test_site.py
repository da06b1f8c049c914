"""The built site: strict, whole, offline; every public name has its entry. Skipped without mkdocs (extra docs)."""

from __future__ import annotations

import fcntl
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from functools import cached_property
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_structure import PUBLIC

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "docs" / "api"
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_mkdocs = pytest.mark.skipif(
    not all(map(installed, NEEDED)), reason="mkdocs-material or mkdocstrings (extra docs) is not installed"
)


def built(folder: Path) -> str:
    """Build the site into `folder`, and return what mkdocs says, with its exit code as the last line."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}  # what fetches something fails
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return f"{ended.stdout}{ended.stderr}\n{ended.returncode}"


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site, built once for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    said = base / "site.txt"
    with (base / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(built(base / "site"))
    text = said.read_text()
    assert text.endswith("\n0"), text
    return base / "site"


class Html(HTMLParser):
    """A page: its tags, its anchors and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.words.append(data)

    @cached_property
    def anchors(self) -> set[str]:
        return {tag[name] for _, tag in self.tags for name in ("id", "name") if name in tag}

    @cached_property
    def text(self) -> str:
        return plain("".join(self.words))


def plain(text: str) -> str:
    """Letters and digits alone: without the marks of Markdown, and wherever the lines break."""
    return re.sub(r"[\W_]+", "", text)


@pytest.fixture(scope="module")
def html(site) -> dict[Path, Html]:
    return {path: Html(path) for path in sorted(site.rglob("*.html"))}


def links_without_targets(pages: dict[Path, Html]) -> tuple[list[str], int]:
    """Return the links between pages that lead nowhere, and how many were checked."""
    wrong, checked = [], 0
    for path, page in pages.items():
        for tag, attributes in page.tags:
            address = attributes.get("href", attributes.get("src", ""))
            parts = urlsplit(address)
            if tag not in ("a", "img", "script", "link") or not address or parts.scheme or parts.netloc:
                continue
            if path.name == "404.html" and parts.path.startswith("/"):
                continue  # a server shows this page at any address
            target = (path.parent / unquote(parts.path)).resolve() if parts.path not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = target.is_file() and (
                not anchor or anchor.startswith("__") or anchor in pages[target].anchors  # "__": the theme's script
            )
            checked += 1
            if not known:
                wrong.append(f"{path.name} links to {address}")
    return wrong, checked


ELSEWHERE = re.compile(r"(https?:)?//")
IN_STYLES = re.compile(r"url\([\"']?((?:https?:)?//[^)\"']*)|@import\s+(?:url\()?[\"']?([^)\"';]+)")


def fetched_from_elsewhere(page: Html) -> list[str]:
    """Return the addresses of scripts, styles, fonts and pictures that are not in the folder of the site."""
    found = []
    for tag, attributes in page.tags:
        addresses = [attributes.get(name, "") for name in ("src", "srcset", "data", "poster")]
        if tag == "link" and attributes.get("rel") != "canonical":
            addresses.append(attributes.get("href", ""))
        found += filter(ELSEWHERE.match, addresses)
        if "mermaid" in attributes.get("class", "").split():
            found.append("the script of diagrams")
    return found + ["".join(one) for one in IN_STYLES.findall(page.source)]


@needs_mkdocs
def test_links_lead_to_pages_and_anchors(html):
    wrong, checked = links_without_targets(html)
    assert wrong == []
    assert checked > 1000


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere(html, site):
    for path, page in html.items():
        assert fetched_from_elsewhere(page) == [], path.name
    for path in site.rglob("*.css"):
        assert not IN_STYLES.search(path.read_text(encoding="utf-8")), path.name


def test_wrong_links_and_outside_addresses_are_found(tmp_path):
    texts = {
        "a.html": '<p id="here">x</p><a href="b.html#there">1</a><a href="#here">2</a><a href="https://x.org/y">3</a>',
        "b.html": '<p id="there">x</p><a href="a.html#gone">1</a><a href="c.html">2</a><img src="no.png">',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    wrong, checked = links_without_targets({tmp_path / name: Html(tmp_path / name) for name in texts})
    assert wrong == [f"b.html links to {address}" for address in ("a.html#gone", "c.html", "no.png")]
    assert checked == 5
    page = tmp_path / "c.html"
    page.write_text(
        '<script src="//x.org/a.js"></script><link rel="stylesheet" href="https://x.org/a.css"><img src="a.png">'
        '<style>@import "https://x.org/b.css"; p { background: url(http://x.org/c.png) }</style><pre class="mermaid">'
    )
    assert len(fetched_from_elsewhere(Html(page))) == 5


@needs_mkdocs
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the search is not tried")
def test_the_search_works_without_a_server(site, tmp_path):
    address = f"{(site / 'index.html').as_uri()}?q=PatchSampleF"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    ended = subprocess.run(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path}", address], capture_output=True, text=True, timeout=120
    )
    assert re.search(r"\d+ matching documents", ended.stdout), ended.stderr[-2000:]
    assert "fastnce.nce.PatchSampleF" in ended.stdout


@needs_mkdocs
def test_the_home_page_is_the_readme(html, site):
    page = html[site / "index.html"]
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert plain(heading) in page.text
    assert (site / "images" / "demo.jpg").is_file()
    assert "contributing.html" in {attributes.get("href") for _, attributes in page.tags}
    assert "fromfutureimportannotations" in html[site / "files" / "examples" / "own_method.html"].text


def entries(module: str) -> set[str]:
    """Return the names that the page of a module documents, or names with a link to where they are documented."""
    text = (API / f"{module.removeprefix('fastnce.')}.md").read_text()
    found = re.findall(r"^(?:::: |- \[`)([\w.]+)", text, re.MULTILINE)
    assert len(found) == len(set(found)), module
    return set(found)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_entry(module):
    assert entries(module) == {f"{module}.{name}" for name in PUBLIC[module]}


def test_every_page_of_the_api_is_of_a_public_module():
    pages = {path.stem for path in API.glob("*.md")} - {"index"}
    assert pages == {module.removeprefix("fastnce.") for module in PUBLIC}


@needs_mkdocs
@pytest.mark.parametrize("module", PUBLIC)
def test_entries_show_their_docstrings(module, html, site):
    page = html[site / "api" / f"{module.removeprefix('fastnce.')}.html"]
    source = (API / f"{module.removeprefix('fastnce.')}.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)", source, re.MULTILINE)
    for name in shown:
        assert name in page.anchors
        found = getattr(importlib.import_module(module), name.rpartition(".")[2])
        if inspect.isclass(found) or inspect.isfunction(found):
            docstring = inspect.cleandoc(found.__doc__ or "")
            first = plain(docstring.partition("\n\n")[0])
            assert first, name
            assert first in page.text, name
