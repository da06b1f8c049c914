"""How commands end after Ctrl-C, with closed or full streams, and without memory."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings

import pytest
import torch
from PIL import Image

from fastnce.commands import main as cli
from fastnce.commands import translate
from fastnce.commands.main import main
from fastnce.common.streams import ProgressLine
from fastnce.translate.files import translate_files
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator
from tests.ends import FULL, NO_ROOM, commands, failing_second, left, one_sentence, write
from tests.forked import Forked

pytestmark = pytest.mark.usefixtures("few_blocks")

# ---- Ctrl-C ----


@pytest.mark.parametrize("name", ["translate", "rain", "unpair"])
def test_ctrl_c_within_a_file(name, model, photos, pairs, tmp_path, monkeypatch, capsys):
    failing_second(monkeypatch, KeyboardInterrupt())
    out = tmp_path / "out"
    assert main(commands(model, photos, pairs, out)[name]) == 130
    assert one_sentence(capsys) == "fastnce: stopped by Ctrl-C\n"
    assert left(tmp_path / "out") == (["a.png"] if name == "translate" else [])


@pytest.mark.parametrize("command", ["train", "evaluate", "cache", "export", "demo", "doctor", "bench", "methods"])
def test_ctrl_c_in_every_command(command, monkeypatch, capsys):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, stopped)
    assert main([command]) == 130
    assert one_sentence(capsys) == "fastnce: stopped by Ctrl-C\n"


def test_ctrl_c_in_a_process(model, tmp_path):
    out, source = tmp_path / "out", tmp_path / "many"
    write(source, "0.png")
    for i in range(1, 3000):
        (source / f"{i}.png").symlink_to(source / "0.png")
    process = Forked(lambda: main(["translate", str(model), str(source), "--out", str(out), "--device", "cpu"]))
    process.wait_for(lambda: (out / "0.png").exists())
    process.send(signal.SIGINT)
    ended = (process.end(), process.out.read_text(), process.err.read_text())
    assert ended == (130, "", "fastnce: stopped by Ctrl-C\n")
    made = left(out)
    assert 0 < len(made) < 3000
    for name in made:
        Image.open(out / name).load()  # the file is complete


# ---- streams ----


def test_closed_streams_in_a_process(model, photos, tmp_path):
    """Messages must not be written into a file that got the descriptor of a closed stream."""
    out = tmp_path / "out"

    def without_streams() -> int:
        for number in (0, 1, 2):
            os.close(number)
        sys.stdin = sys.stdout = sys.stderr = None  # as an interpreter does
        return main(["translate", str(model), str(photos), "--out", str(out)])

    assert Forked(without_streams).end() == 0
    expected = translate_files(load_translator(model), photos, tmp_path / "expected")
    assert left(out) == ["a.png", "b.png", "c.png"]
    assert [(out / path.name).read_bytes() for path in expected] == [path.read_bytes() for path in expected]


def test_closed_streams(model, photos, pairs, tmp_path, monkeypatch):
    for name in ("translate", "rain", "unpair", "evaluate"):
        arguments = commands(model, photos, pairs, tmp_path / name)[name]
        with monkeypatch.context() as patch:
            for stream in ("stdin", "stdout", "stderr"):
                patch.setattr(sys, stream, None)
            assert main(arguments) == 0
            assert main(["translate", "absent", "absent", "--out", "x"]) == 2


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["--version", "help", "methods", "rain", "train"])
def test_a_full_stdout(command, photos, tmp_path, monkeypatch, capsys):
    arguments = {
        "rain": ["rain", str(photos), "--out", str(tmp_path / "out")],
        "train": ["train", "fastcut", "--dry-run"],
    }.get(command, [command])
    with monkeypatch.context() as patch, FULL.open("w") as full:
        patch.setattr(sys, "stdout", full)
        assert main(arguments) == 2
    assert one_sentence(capsys) == f"fastnce: standard output: {NO_ROOM}\n"
    if command == "rain":
        assert len(left(tmp_path / "out")) == 6  # the files were written


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_help_on_a_full_stdout(monkeypatch, capsys):
    with monkeypatch.context() as patch, FULL.open("w") as full:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stopped:
            main(["rain", "--help"])
    assert stopped.value.code == 2
    assert one_sentence(capsys) == f"fastnce: standard output: {NO_ROOM}\n"


def broken_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def test_a_reader_that_stops_early(photos, tmp_path, monkeypatch, capsys):
    for arguments, code in (
        (["--help"], 0),
        (["rain", str(photos), "--out", str(tmp_path / "o")], 0),
    ):
        with monkeypatch.context() as patch, broken_pipe() as pipe:
            patch.setattr(sys, "stdout", pipe)
            assert main(arguments) == code
        assert capsys.readouterr().err == ""

    def prints(arguments):
        print("half of it", flush=True)

    for command, code in (("methods", 0), ("doctor", 141)):  # unfinished work must not give exit code 0
        monkeypatch.setitem(cli.COMMANDS, command, prints)
        with monkeypatch.context() as patch, broken_pipe() as pipe:
            patch.setattr(sys, "stdout", pipe)
            assert main([command]) == code
        assert capsys.readouterr().err == ""


def test_a_broken_stderr_is_ignored(monkeypatch):
    monkeypatch.setattr(ProgressLine, "EVERY", 0.0)
    with monkeypatch.context() as patch, broken_pipe() as pipe:
        patch.setattr(sys, "stderr", pipe)
        with ProgressLine() as line:
            line("1/2")
            line.say("a sentence")
        assert main(["nonsense"]) == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())


def test_training_outlives_its_terminal(folder, tmp_path, monkeypatch, capsys):
    small = ["network.generator=restorer", "network.width=2", "network.discriminator_width=2", "loss.nce_layers=0,4"]
    small += ["data.load_size=36", "data.crop_size=32", "loss.patches=8", "loss.projection=8", "run.device=cpu"]
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / "run"), *small, "run.steps=2"]
    with monkeypatch.context() as patch, broken_pipe() as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert main(arguments) == 0
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002"
    assert "step" in (tmp_path / "run" / "log.txt").read_text()
    assert capsys.readouterr().err == ""


# ---- memory ----


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 1 bytes."),
    ],
)
def test_not_enough_memory(error, model, photos, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(translate, "translate_files", fails)
    assert main(["translate", str(model), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "there is not enough memory (" in one_sentence(capsys)


def test_other_errors_keep_their_traceback(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Translator, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["translate", str(model), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"])


def test_a_reader_that_stops_early_without_buffering(capsys, monkeypatch):
    """Unbuffered streams, as in containers, keep no unwritten text that a later flush would report."""
    with broken_pipe() as pipe, monkeypatch.context() as patch:
        unbuffered = io.TextIOWrapper(io.FileIO(pipe.fileno(), "w", closefd=False), write_through=True)
        patch.setattr(sys, "stdout", unbuffered)
        assert [main(["methods"]), main(["train", "cut", "--dry-run"])] == [0, 141]
    assert capsys.readouterr().err == ""


def test_a_warning_is_a_sentence(capsys, monkeypatch):
    def warn(arguments):
        warnings.warn("something looks odd", stacklevel=1)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "doctor", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *w, **_: print(warnings.formatwarning(*w[:4]), end="", file=sys.stderr)
        assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "fastnce: warning: something looks odd\n"
