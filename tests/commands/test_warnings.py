"""Warnings of a command: one line each, the same kind once with the number of files, never inside a progress line."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.gathered import gathering, warn_of_file
from fastnce.common.streams import ProgressLine, warnings_through
from fastnce.data.opening import LOST
from fastnce.engine.history import read_history
from tests.data.test_opening import RNG, png
from tests.ends import tiny
from tests.logs import log_lines


@pytest.fixture(autouse=True)
def shown(monkeypatch) -> None:
    """Show warnings on stderr, as Python does outside of tests."""

    def show(message, category, file, line, *_):
        sys.stderr.write(warnings.formatwarning(message, category, file, line))

    monkeypatch.setattr(warnings, "showwarning", show)


def deep(folder: Path, *names: str) -> Path:
    """Write colour pictures of 16 bits."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        png(folder / name, RNG.integers(0, 2**16, (12, 16, 3)), 16, 2)
    return folder


@pytest.mark.parametrize("command", ["translate", "evaluate", "rain", "unpair", "cache", "train"])
def test_deep_colour_is_one_line_of_a_command(command, model, tmp_path, capsys):
    pictures = deep(tmp_path / "p", "rain/1.png", "rain/2.png", "norain/1.png", "norain/2.png")
    data = deep(tmp_path / "d", "trainA/1.png", "trainA/2.png", "trainB/1.png", "testA/1.png", "testB/1.png")
    line, number = {
        "translate": (["translate", model, pictures / "rain", "--device", "cpu", "--out", tmp_path / "o"], 2),
        "evaluate": (["evaluate", "--inputs-only", "--data", pictures, "--device", "cpu"], 4),
        "rain": (["rain", pictures / "rain", "--out", tmp_path / "o"], 2),
        "unpair": (["unpair", pictures, "--out", tmp_path / "o"], 4),
        "cache": (["cache", "fastcut", "--data", data, *tiny(data, tmp_path)[6:], "run.sample_every=1"], 5),
        "train": (tiny(data, tmp_path / "run", "run.steps=2", "run.sample_every=1"), 5),
    }[command]
    assert main([str(argument) for argument in line]) == 0
    told = capsys.readouterr()
    lines = (told.out if command == "train" else told.err).splitlines()
    if command == "train":  # the log of the run has it, and its history
        lines = [f"fastnce: {text}" for text in log_lines(tmp_path / "run") if text in lines]
        (event,) = (event for event in read_history(tmp_path / "run") if event["event"] == "warning")
        assert event["text"].startswith(f"warning: {LOST}")
    found = [text for text in lines if "16-bit" in text]
    first = r"/p/rain/1\.png" if number != 5 else r"/d/trainA/[12]\.png"
    assert len(found) == 1
    assert re.fullmatch(rf"fastnce: warning: {re.escape(LOST)}: {tmp_path}{first} and {number - 1} more", found[0])


def test_gathered_warnings_are_counted_by_file(capsys, tmp_path):
    odd = f"odd {tmp_path}"
    with gathering():
        for name in ("a", "b", "a"):
            warn_of_file(odd, name)
        with gathering():
            warn_of_file(odd, "c")
            warn_of_file(f"very {odd}", "d")
        assert capsys.readouterr().err == ""
    written = capsys.readouterr().err
    assert f"Warning: {odd}: a and 2 more\n" in written
    assert f"Warning: very {odd}: d\n" in written
    with gathering():
        warn_of_file(odd, "a")
    warn_of_file(odd, "b")  # said before
    assert capsys.readouterr().err == ""
    warn_of_file(odd, "e")
    assert f"Warning: {odd}\n" in capsys.readouterr().err


def test_gathered_warnings_come_also_after_an_error(capsys):
    def fail():
        with gathering():
            warn_of_file("odd before an error", "a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "odd before an error: a\n" in capsys.readouterr().err


def test_a_warning_clears_the_progress_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with ProgressLine() as line:
            line("1/2")
            warnings.warn("attention", stacklevel=1)
    written = capsys.readouterr().err
    assert written.startswith("\r1/2\x1b[K\r\x1b[K")
    assert "attention" in written.split("\x1b[K")[2]


def test_warnings_through_a_log_come_once_and_in_one_line():
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with warnings_through(said.append):
            for text in ("one\n  two", "three", "one two"):
                warnings.warn(text, stacklevel=1)
        assert warnings.showwarning is before
    assert said == ["warning: one two", "warning: three"]
