"""The progress bar on a real terminal, and plain lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import sys

import pytest

from fastnce.commands.main import main
from fastnce.engine.bar import Bar
from tests.ends import tiny
from tests.forked import Forked
from tests.logs import log_lines

CODES = re.compile(r"\x1b\[[0-9;]*m")
"""Colours and other styles."""


def on_terminal(command: list[str], **environment: str) -> tuple[int, str]:
    """Run `fastnce COMMAND` on a pseudo-terminal of 160 columns; return its exit code and all that it printed."""
    master, slave = pty.openpty()

    def on_the_slave() -> int:
        os.environ |= {"TERM": "xterm", "COLUMNS": "160", "LINES": "40", **environment}
        for number in (0, 1, 2):
            os.dup2(slave, number)
        os.close(master)
        os.close(slave)
        return main(command)

    process = Forked(on_the_slave)
    os.close(slave)
    found = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        found += part
    os.close(master)
    return process.end(), found.decode()


@pytest.fixture
def command(folder, tmp_path) -> list[str]:
    more = ["run.steps=6", "run.save_every=4", f"data.cache_dir={tmp_path / 'cache'}"]
    return tiny(folder, tmp_path / "run", *more)


def test_a_terminal_shows_a_bar_that_redraws(command, tmp_path):
    code, text = on_terminal(command)
    assert code == 0
    lines = [part.rstrip() for part in re.split(r"[\r\n]+", text)]
    bars = [line for line in lines if re.search(r"\d+%\|", line)]
    assert re.match(r" +0%\|.{16}\| 0/6 \[00:00<\?, \? images/s\]$", bars[0])
    assert re.match(r"epoch 2/200 100%\|.{16}\| 6/6 \[\d\d:\d\d<00:00, [\d.]+ images/s\] D_real ", bars[-1])
    assert any(", checkpoint in 00:0" in line for line in bars)
    assert not CODES.search(text)
    assert not [line for line in lines if line.startswith("epoch") and " step " in line]  # those of log.txt
    assert len([line for line in log_lines(tmp_path / "run") if " step " in line and line.startswith("epoch")]) == 6


@pytest.mark.parametrize("how", ["dumb", "quiet", "without tqdm"])
def test_other_terminals_get_plain_lines_or_none(command, how, monkeypatch):
    if how == "without tqdm":
        monkeypatch.setattr("fastnce.engine.bar._Tqdm", object)
    terminal = "xterm" if how == "without tqdm" else "dumb"
    code, text = on_terminal([*command, "--quiet"] if how == "quiet" else command, TERM=terminal)
    assert code == 0
    if how == "quiet":
        assert text == ""
        return
    assert "\x1b" not in text
    assert len([line for line in text.splitlines() if line.startswith("epoch ")]) == 6


def test_the_bar_outlives_its_terminal(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    lost = []
    monkeypatch.setattr(sys, "stdout", Gone())
    bar = Bar(0, 10, 1, 5, lambda: lost.append(1))
    for done in range(1, 11):
        bar.step(done)
        bar.show("epoch 1/1 ", "G 1.0")
    with bar.hidden():
        pass
    bar.close()
    assert lost == [1]


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40, 20])
def test_a_narrow_terminal_shows_whole_values(width, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", str(width))
    bar = Bar(0, 1000, 1, 50, lambda: None)
    bar._bar.n = 123
    bar.show("epoch 4/200 ", "D_real 0.010 D_fake 0.020 G_GAN 1.000 NCE 5.250 G 6.250")
    text = str(bar._bar)
    assert len(text) <= width
    assert re.match(r"(epoch 4/200 )? 12%", text)
    if width >= 40:
        assert text.endswith(" G 6.250")
    if width >= 120:
        assert text.endswith(" D_real 0.010 D_fake 0.020 G_GAN 1.000 NCE 5.250 G 6.250")
    assert ("checkpoint in" in text) == (width == 200)
    bar.close()


def test_the_next_checkpoint_and_the_speed(monkeypatch):
    """8 steps of 3 images in 4 seconds; the next of 5 steps is 2 steps away."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    bar = Bar(0, 100, 3, 5, lambda: None)
    line = bar._bar
    monkeypatch.setattr(type(line), "format_dict", type(line).format_dict)
    line.n, line.last_print_n = 8, 8
    line.start_t -= 4.0
    known = line.format_dict
    assert known["steps"] == "8/100"
    assert known["speed"].startswith("6.0") or known["speed"].startswith("5.9")
    assert known["checkpoint"] == ", checkpoint in 00:01"
    bar.close()
