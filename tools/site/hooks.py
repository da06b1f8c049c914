"""Hooks of mkdocs (`mkdocs.yml`, `make docs`): files outside docs/ as pages, and GitHub's anchors.

README.md is the home page. CONTRIBUTING.md, CHANGELOG.md and SECURITY.md are pages of their names. Another file outside
docs/ that a page links to, such as an example, becomes a page below files/. Nothing is copied in the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files at the top of the repository, and the names of their pages."""

LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(\]\()([^)\s#]+)((?:#[^)\s]*)?\))", re.MULTILINE | re.DOTALL)
"""A block of code or inline code, in which nothing is a link; or the target of a link, without and with its anchor."""

ELSEWHERE = re.compile(r"[a-z]+:")
FENCES = {".py": "python", ".toml": "toml", ".csv": "text", ".txt": "text"}


def slug(heading: str, separator: str = "-") -> str:
    """Return the anchor that GitHub gives to a heading."""
    plain = re.sub(r"<[^>]*>", "", heading).strip().lower()
    return re.sub(r"[^\w\s-]", "", plain).replace(" ", separator)


def place(path: str) -> str:
    """Return where a file of the repository is in the site: `path` and the result are POSIX paths."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    stem, suffix = posixpath.splitext(path)
    return f"files/{stem}.md" if suffix in (*FENCES, ".md", ".ipynb") else f"files/{path}"


def links(text: str) -> list[str]:
    """Return the targets of the relative links of a page, without anchors."""
    return [target for _, target, _ in LINK.findall(text) if target and not ELSEWHERE.match(target)]


def rewritten(text: str, path: str) -> str:
    """Return a page's text with links for the site.

    Args:
        text: the Markdown of `path`.
        path: the file in the repository.
    """
    here = posixpath.dirname(place(path))

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if not target or ELSEWHERE.match(target):
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return f"{before}{posixpath.relpath(place(file), here or '.')}{after}"

    return LINK.sub(link, text)


def page_of(path: str) -> str:
    """Return a file of the repository as Markdown: a Markdown file itself, a notebook's cells, or code in a fence."""
    text = (ROOT / path).read_text(encoding="utf-8")
    suffix = posixpath.splitext(path)[1]
    if suffix == ".md":
        return text
    if suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(body if kind == "markdown" else f"```python\n{body}\n```" for kind, body in cells)
    return f"# {posixpath.basename(path)}\n\n`{path}`\n\n```{FENCES[suffix]}\n{text}```\n"


def outside(docs: dict[str, str]) -> set[str]:
    """Return the files outside docs/ that the site needs: those of `PAGES`, and what pages link to.

    Args:
        docs: the Markdown of every page in docs/, by its path in the repository.
    """
    needed: set[str] = set()
    texts = {**docs, **{path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}}
    while texts:
        path, text = texts.popitem()
        if path not in docs:
            needed.add(path)
        for target in links(text):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if file.startswith("docs/") or file in needed or not (ROOT / file).is_file():
                continue
            needed.add(file)
            if file.endswith(".md"):
                texts[file] = (ROOT / file).read_text(encoding="utf-8")
    return needed


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get GitHub's anchors, so that a link works in both places."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    docs = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path in sorted(outside(docs)):
        uri = place(path)
        if uri.endswith(".md"):
            made = File.generated(config, uri, content=rewritten(page_of(path), path))
        else:
            made = File.generated(config, uri, abs_src_path=str(ROOT / path))
        files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of the pages in docs/; those of generated pages are rewritten already."""
    if page.file.generated_by is not None:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}")
