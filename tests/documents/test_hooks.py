"""Links between the files of the repository become links between the pages of the site."""

from __future__ import annotations

import pytest

from tests.test_docs import slug

pytest.importorskip("mkdocs", reason="mkdocs (extra docs) is not installed")
from tools.site import hooks


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "README.md",
            "[a](docs/training.md#speed) ![b](docs/images/x.jpg)",
            "[a](training.md#speed) ![b](images/x.jpg)",
        ),
        ("README.md", "[a](CONTRIBUTING.md#tests)", "[a](contributing.md#tests)"),
        (
            "docs/python.md",
            "[a](../README.md#train) [b](training.md) [c](#train)",
            "[a](index.md#train) [b](training.md) [c](#train)",
        ),
        ("docs/api/index.md", "[a](../../CHANGELOG.md) [b](../python.md)", "[a](../changelog.md) [b](../python.md)"),
        ("docs/extending.md", "[a](../examples/own_loop.py)", "[a](files/examples/own_loop.md)"),
        ("docs/deraining.md", "![a](../benchmarks/x.png)", "![a](files/benchmarks/x.png)"),
        ("tools/standin/README.md", "[a](../../docs/proof.md)", "[a](../../../proof.md)"),
        ("README.md", "[a](https://example.org/x.md) [b](mailto:a@b)", "[a](https://example.org/x.md) [b](mailto:a@b)"),
        ("README.md", "`x[0](docs/a.md)` [`y`](docs/a.md)", "`x[0](docs/a.md)` [`y`](a.md)"),
        ("README.md", "```python\nx[0](docs/a.md)\n```\n[b](docs/a.md)", "```python\nx[0](docs/a.md)\n```\n[b](a.md)"),
    ],
)
def test_links(path, text, expected):
    assert hooks.rewritten(text, path) == expected


def test_anchors_are_those_of_github():
    for heading in ("Where do I ...", "What is `exact`", "Step 1: train", "A & B", "0.1.0 (unreleased)"):
        assert hooks.slug(heading) == slug(heading.replace("`", ""))


def test_files_outside_the_documents_are_pages():
    needed = hooks.outside({"docs/a.md": "[x](../examples/own_loop.py) [y](../tools/standin/README.md) [z](gone.md)"})
    assert {"README.md", "CONTRIBUTING.md", "examples/own_loop.py", "tools/standin/README.md"} <= needed
    assert not [path for path in needed if path.startswith("docs/")]
    code = hooks.page_of("examples/own_loop.py")
    assert code.startswith("# own_loop.py\n")
    assert (hooks.ROOT / "examples" / "own_loop.py").read_text() in code
