"""The blocks of Python in the documents that are marked as runnable run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastnce.config import resolve
from tests.documents.blocks import Block, blocks, pages, run

ROOT = Path(__file__).resolve().parents[2]
MARKED = {
    path.relative_to(ROOT).as_posix(): found
    for path in pages(ROOT)
    if (found := blocks(path.read_text(), path.relative_to(ROOT).as_posix()))
}


def run_page(page: list[Block], fixture) -> dict[str, Any]:
    """Run the blocks of a page in one namespace. `fixture` returns the value of a fixture by its name."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in page:
        if block.setup:
            try:
                made = fixture(block.setup)
            except pytest.FixtureLookupError:
                raise AssertionError(f"{block.page}:{block.line}: no setup is called {block.setup}") from None
            names.update({name: value for name, value in (made or {}).items() if name not in names})
        run(block, names)
    return names


@pytest.mark.parametrize("page", MARKED)
def test_the_blocks_of_a_page_run(page, request, page_folder, capsys):
    run_page(MARKED[page], request.getfixturevalue)


def test_the_first_pages_have_blocks_that_run():
    assert {"README.md", "docs/python.md", "docs/extending.md"} <= set(MARKED)


PAGE = """# A page

<!-- runs -->
```python
x = 1
```

Text.

```python
not run at all
```

<!-- runs -->
```python
y = x + 1

{}
```
"""


def test_blocks_share_their_names_and_others_are_not_run(request):
    names = run_page(blocks(PAGE.format("z = y"), "page.md"), request.getfixturevalue)
    assert names["z"] == 2


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("missing", "page.md:18: NameError: name 'missing' is not defined"),
        ("y = = 1", "page.md:18: SyntaxError: invalid syntax"),
        ("import json; json.loads('x')", "page.md:18: JSONDecodeError"),
        ("raise SystemExit(2)", "page.md:18: SystemExit: 2"),
        ("assert y == 3, y", "page.md:18: AssertionError: 2"),
    ],
)
def test_a_wrong_block_is_named_by_page_and_line(statement, error, request):
    with pytest.raises(AssertionError, match="^page.md:18") as raised:
        run_page(blocks(PAGE.format(statement), "page.md"), request.getfixturevalue)
    assert str(raised.value).startswith(error)


def test_an_unknown_setup_is_named(request):
    page = blocks("<!-- runs: nothing -->\n```python\n```\n", "page.md")
    with pytest.raises(AssertionError, match="^page.md:3: no setup is called nothing$"):
        run_page(page, request.getfixturevalue)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<!-- runs -->\nText.\n", 1),
        ("\n<!-- runs -->\n\n```python\n```\n", 2),
        ("<!-- runs -->\n```bash\nls\n```\n", 1),
        ("<!-- runs -->", 1),
        ("<!--runs-->\n```python\n```\n", 1),
        ("<!-- run -->\n```python\n```\n", 1),
        ("Text.\n  <!-- runs -->\n```python\n```\n", 2),
        ("<!-- runs: two words -->\n```python\n```\n", 1),
    ],
)
def test_a_marker_without_its_fence_is_an_error(text, line):
    with pytest.raises(ValueError, match=f"^page.md:{line}: "):
        blocks(text, "page.md")


def test_a_marker_in_a_fence_is_text():
    assert blocks("```\n<!-- runs -->\n```\n", "page.md") == []


def test_a_setup_does_not_replace_what_a_block_has_made(request):
    page = "<!-- runs -->\n```python\nfeat_q = 5\n```\n<!-- runs: features -->\n```python\nshape = feat_k.shape\n```\n"
    names = run_page(blocks(page, "page.md"), request.getfixturevalue)
    assert names["feat_q"] == 5
    assert names["shape"] == (64, 16)


def test_presets_are_small_where_a_setup_says_so(request):
    assert resolve("cut", None, []).network.width == 64
    request.getfixturevalue("small")
    for method in ("cut", "dclgan", "dcdgan"):
        made = resolve(method, None, [])
        assert (made.run.steps, made.network.width) == (2, 2)
    assert resolve("cut", None, ["run.steps=5"]).run.steps == 5
