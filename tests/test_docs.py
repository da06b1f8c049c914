"""The files, links, modules and commands that the documents name exist."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastnce
from fastnce.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TOP = ("fastnce", "kernels", "benchmarks", "experiments", "tests", "docs", "examples", "tools")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code(document: Path) -> list[str]:
    """Return the lines of code blocks, and the inline code."""
    blocks = re.split(r"^```.*$", document.read_text(), flags=re.MULTILINE)
    lines = [line for block in blocks[1::2] for line in block.splitlines()]
    return lines + [span for text in blocks[::2] for span in re.findall(r"`([^`]+)`", text)]


def section(document: Path, title: str) -> str:
    return re.split(r"^## ", document.read_text().split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\s-]", "", heading.strip().lower()).replace(" ", "-")


def test_the_architecture_names_every_file():
    named: dict[str, list[str]] = {}
    text = ARCHITECTURE.read_text()
    for heading, body in re.findall(r"^### `([\w/]+)/`\n(.*?)(?=^#)", text, re.MULTILINE | re.DOTALL):
        named[heading] = re.findall(r"^\| `(\w+\.py)` \|", body, re.MULTILINE)
    on_disk: dict[str, list[str]] = {}
    for path in (path for top in ("fastnce", "kernels") for path in (ROOT / top).rglob("*.py")):
        on_disk.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    assert {folder: sorted(files) for folder, files in named.items()} == {
        folder: sorted(files) for folder, files in on_disk.items()
    }


def test_public_modules_list_what_they_export():
    modules = re.findall(r"^- `([\w.]+)`$", section(ARCHITECTURE, "Public names"), re.MULTILINE)
    assert "fastnce" in modules
    assert "fastnce.nce" in modules
    for name in modules:
        module = importlib.import_module(name)
        assert len(set(module.__all__)) == len(module.__all__) > 0, name
        missing = [public for public in module.__all__ if not hasattr(module, public)]
        assert not missing, f"{name}.__all__ lists {missing}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_have_targets(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{document.name} links to {target}"


@each_document
def test_named_files_exist(document):
    for text in code(document):
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./*-]+", text):
            if not re.search(r"[A-Z]{2,}", path):  # NAME, DATE: placeholders
                assert list(ROOT.glob(path.rstrip("/.,"))), f"{document.name} names {path}"


@each_document
def test_named_modules_and_commands_exist(document):
    for text in code(document):
        for module in re.findall(r"python3? -m ([\w.]+)", text):
            assert find_spec(module), f"{document.name} runs {module}"
        for command in re.findall(r"(?<![\w./-])(?<!from )fastnce ([a-z]+(?:-[a-z]+)*)", text.split("#")[0]):
            assert command in COMMANDS, f"{document.name} runs fastnce {command}"
        for name in re.findall(r"(?<![\w./-])fastnce(?:\.[A-Za-z_]\w*)+(?![\w/])", text):
            assert resolves(name), f"{document.name} names {name}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    found: object = fastnce
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and not find_spec(".".join(parts[:i])):
            return False
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:i]))
    return True
