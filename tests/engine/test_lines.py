"""log.txt and metrics.jsonl on failing disks and after a kill: lines are complete or absent."""

from __future__ import annotations

import errno
import json
import os

import pytest

from fastnce.engine.lines import Lines
from fastnce.engine.log import RunLog
from tests.ends import FULL, NO_ROOM, largest_file
from tests.logs import log_lines

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EACCES]


def failing_write(monkeypatch, code: int, takes: int) -> list[bool]:
    """While the returned list holds True, `os.write` takes so many bytes of a line, then fails."""
    real, fails = os.write, [True]
    taken = []

    def write(number, data):
        if not fails[0]:
            return real(number, data)
        if taken:
            taken.clear()
            raise OSError(code, os.strerror(code))
        taken.append(real(number, bytes(data)[:takes]))
        return taken[0]

    monkeypatch.setattr(os, "write", write)
    return fails


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_what_a_disk_took_of_a_line_is_cut_off(code, tmp_path, monkeypatch):
    lines = Lines(tmp_path / "m")
    assert lines.write("first") is None
    with monkeypatch.context() as patch:
        failing_write(patch, code, takes=3)
        error = lines.write("second")
        assert error is not None
        assert (error.errno, error.filename) == (code, str(tmp_path / "m"))
        assert lines.write("third") is not None
    assert lines.lost == 2
    assert (tmp_path / "m").read_bytes() == b"first\n"
    assert lines.write("fourth") is None
    assert lines.lost == 0
    assert (tmp_path / "m").read_bytes() == b"first\nfourth\n"


def test_a_part_that_cannot_be_cut_off_ends_its_line(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "m")
    with monkeypatch.context() as patch:
        failing_write(patch, errno.EIO, takes=3)
        patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        assert lines.write("second") is not None
    assert lines.write("third") is None
    assert (tmp_path / "m").read_bytes() == b"sec\nthird\n"


def test_a_limit_of_the_system(tmp_path):
    """RLIMIT_FSIZE: the write that reaches the limit is short, and the next one fails."""
    lines = Lines(tmp_path / "m")
    with largest_file(100):
        errors = [lines.write("x" * 29) for _ in range(5)]
    assert [error and error.errno for error in errors] == [None, None, None, errno.EFBIG, errno.EFBIG]
    assert (tmp_path / "m").read_bytes() == (b"x" * 29 + b"\n") * 3


def test_a_torn_last_line_is_cut_off(tmp_path):
    """A record cut at any byte, as after a kill or a power cut."""
    path = tmp_path / "m"
    record = json.dumps({"step": 3, "G": 0.5, "name": "é"}, ensure_ascii=False).encode()
    for end in range(1, len(record) + 1):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + record[:end])
        lines = Lines(path, json_only=True)
        assert lines.cut == (end if end < len(record) else 0)
        lines.write('{"step": 4}')
        lines.close()
        steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
        assert steps == ([1, 2, 4] if end < len(record) else [1, 2, 3, 4])
    path.write_bytes(b"\0" * 5000)  # blocks that were not written to the disk
    Lines(path, json_only=True)
    assert path.read_bytes() == b""


def test_the_log_begins_a_new_line(tmp_path):
    (tmp_path / "log.txt").write_text("whole\ntor")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    log = RunLog(tmp_path, quiet=True)
    log.say("more")
    log.metrics(2, {"G": 1.0})
    log.close()
    cut = f"{tmp_path / 'metrics.jsonl'}: its last line was not finished, its 4 bytes are cut off"
    assert log_lines(tmp_path) == ["whole", "tor", cut, "more"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "G": 1.0}\n'


def test_a_last_line_that_is_nested_too_deeply_is_cut_off(tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b'{"a":' * 50_000)
    RunLog(tmp_path, quiet=True).close()
    assert (tmp_path / "history.jsonl").read_bytes() == b""


def test_a_fault_is_told_once_and_its_end_too(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)
    with monkeypatch.context() as patch:
        fails = failing_write(patch, errno.ENOSPC, takes=0)
        for step in (1, 2, 3):
            log.metrics(step, {"G": 1.0})
        log.say("a sentence")
        fails[0] = False
        log.metrics(4, {"G": 1.0})
    goes_on = f"{NO_ROOM}; training goes on, and its lines are lost until it can be written"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path / 'metrics.jsonl'}: {goes_on}",
        f"{tmp_path / 'log.txt'}: {goes_on}",
        "a sentence",
        f"{tmp_path / 'metrics.jsonl'} is written again, 3 lines were lost",
        f"{tmp_path / 'log.txt'} is written again, 2 lines were lost",
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4, "G": 1.0}\n'


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_log_on_a_device_that_is_full(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to(FULL)
    log = RunLog(tmp_path, quiet=True)
    log.say("a sentence")
    log.say("another one")
    log.close()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1  # the only place of a quiet run
    assert f"{tmp_path / 'log.txt'}: {NO_ROOM}" in told.err
    assert FULL.is_char_device()


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        RunLog(tmp_path)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_names_that_are_no_unicode_are_logged(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.say(os.fsdecode(b"\xff.png"))
    assert log_lines(tmp_path) == ["\\udcff.png"]
