"""A working folder with a user's own code."""

import pytest

from tests.doors.own_code import CODE


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the code above."""
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "bad.py").write_text("import torch\nx = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
