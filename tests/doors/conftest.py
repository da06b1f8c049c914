"""The fixture `here`: a working folder with a user's own code."""

import pytest

from tests.doors.own_code import CODE


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder that contains `CODE` as mine.py, and a file that cannot be imported."""
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "bad.py").write_text("import torch\nx = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
