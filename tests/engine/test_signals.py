"""Signals: complete steps are saved, partial files are removed, no process is left, exit codes name the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastnce
from fastnce.commands.main import main
from fastnce.common import writing
from fastnce.engine import launch, stop
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.loop import _Run
from fastnce.engine.step import Step
from fastnce.training import run as training
from tests.ends import left, write
from tests.engine.test_engine import SMALL
from tests.forked import Forked

pytestmark = [pytest.mark.usefixtures("few_blocks"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
ALL = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]


@pytest.fixture
def command(tmp_path) -> list[str]:
    data = write(tmp_path / "data", "trainA/1.png", "trainB/1.png")
    return ["train", "fastcut", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]


def saved(tmp_path: Path) -> int:
    found = Checkpoints(tmp_path / "run" / "checkpoints").load()
    return 0 if found is None else found[1]["step"]


@pytest.mark.parametrize("name", ALL)
def test_a_signal_saves_and_exits_cleanly(name, command, tmp_path):
    process = Forked(lambda: main(command))
    process.wait_for_line("step 2/")
    process.send(getattr(signal, name))
    assert process.end() == 0
    done = saved(tmp_path)
    assert done >= 2
    assert f"{name}: stopped after step {done:,} and saved" in process.out.read_text()
    assert process.err.read_text().strip() == f"fastnce: {name}: the step is finished and saved first"


def slow(seconds: float = 60.0):
    def wait(*_, **__):
        print("waiting", flush=True)
        time.sleep(seconds)

    return wait


@pytest.mark.parametrize("place", ["pictures", "networks", "first step"])
@pytest.mark.parametrize("name", ALL)
def test_where_nothing_is_done_yet_it_ends_at_once(name, place, command, tmp_path, monkeypatch):
    if place == "pictures":
        monkeypatch.setattr(training, "open_checked", slow())
    elif place == "networks":
        monkeypatch.setattr(_Run, "_resume", slow())
    else:
        monkeypatch.setattr(Step, "run", slow())
    process = Forked(lambda: main(command))
    process.wait_for_line("waiting")
    process.send(getattr(signal, name))
    assert process.end(10) == 128 + getattr(signal, name)
    told = "Ctrl-C" if name == "SIGINT" else name
    when = "" if place == "pictures" else " before the first step: nothing was trained"
    assert process.err.read_text() == f"fastnce: stopped by {told}{when}\n"
    assert [name for name in left(tmp_path / "run") if ".fastnce" in name] == []


def test_a_second_signal_ends_at_once_but_not_one_that_a_launcher_doubles(command, tmp_path, monkeypatch):
    run = Step.run

    def second_is_slow(self, *arguments):
        if self.steps:
            print("waiting", flush=True)
            time.sleep(3)
        self.steps = True
        return run(self, *arguments)

    monkeypatch.setattr(Step, "run", second_is_slow)
    monkeypatch.setattr(Step, "steps", False, raising=False)
    process = Forked(lambda: main(command))
    process.wait_for_line("waiting")
    process.send(signal.SIGINT)
    process.send(signal.SIGTERM)
    assert process.end() == 0
    assert saved(tmp_path) == 2
    process = Forked(lambda: main(command))
    process.wait_for_line("waiting")
    process.send(signal.SIGTERM)
    time.sleep(stop.ONE_SIGNAL + 0.2)
    process.send(signal.SIGTERM)
    assert process.end(1.5) == 143
    assert saved(tmp_path) == 2


def test_what_was_ignored_stays_ignored(command, tmp_path):
    """As SIGHUP under nohup."""
    process = Forked(lambda: main([*command, "run.steps=4"]), ignore=(signal.SIGHUP,))
    process.wait_for_line("step 1/")
    process.send(signal.SIGHUP)
    assert process.end() == 0
    assert saved(tmp_path) == 4
    assert "SIGHUP" not in process.out.read_text()


@pytest.mark.parametrize("name", ALL)
def test_other_commands_remove_what_they_have_begun(name, tmp_path, monkeypatch):
    photos = write(tmp_path / "photos", "a.png", "b.png")
    out = tmp_path / "out"
    flush, count = writing.flush_to_disk, iter(range(100))
    monkeypatch.setattr(writing, "flush_to_disk", lambda path: flush(path) if next(count) < 1 else slow()())
    process = Forked(lambda: main(["rain", str(photos), "--out", str(out)]))
    process.wait_for_line("waiting")
    process.send(getattr(signal, name))
    assert process.end(10) == 128 + getattr(signal, name)
    assert process.err.read_text().startswith("fastnce: stopped by ")
    assert not out.exists()


# ---- several processes ----


RANK = """
import os, signal, sys, time
folder = sys.argv[1]
rank = os.environ["RANK"]
def handle(number, frame):
    open(f"{folder}/{rank}-{signal.Signals(number).name}", "w").close()
    if number == signal.SIGTERM:
        sys.exit(0)
    if number == signal.SIGHUP:
        sys.exit(143)
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), handle)
open(f"{folder}/{rank}-started-{os.getpid()}-{os.environ['WORLD_SIZE']}-{os.environ['LOCAL_RANK']}", "w").close()
while True:
    time.sleep(0.05)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Launched:
    """Three ranks that record the signals they receive."""

    def __init__(self, tmp_path, monkeypatch):
        monkeypatch.setattr(launch, "COMMAND", [sys.executable, "-I", "-c", RANK])
        self.folder = tmp_path / "marks"
        self.folder.mkdir()
        self.process = Forked(lambda: launch.start(3, [str(self.folder)]))
        self.process.wait_for(lambda: len(self.marks("*-started-*-3-*")) == 3)
        self.pids = [int(name.split("-")[2]) for name in self.marks("*-started-*")]

    def marks(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))

    def gone(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while any(map(alive, self.pids)):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


@pytest.fixture
def launched(tmp_path, monkeypatch):
    found = Launched(tmp_path, monkeypatch)
    yield found
    for pid in found.pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_signals_reach_every_rank_once_and_exit_codes_come_back(launched):
    for name in ("SIGUSR1", "SIGINT"):
        launched.process.send(getattr(signal, name))
        launched.process.wait_for(lambda name=name: launched.marks(f"*-{name}") == [f"{r}-{name}" for r in range(3)])
    assert all(map(alive, launched.pids))
    launched.process.send(signal.SIGTERM)
    assert launched.process.end(10) == 0
    assert launched.gone(0)


def test_a_failing_code_comes_back(launched):
    launched.process.send(signal.SIGHUP)
    assert launched.process.end(10) == 143
    assert launched.gone(0)


def test_a_rank_that_is_killed_ends_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    launched = Launched(tmp_path, monkeypatch)
    os.kill(launched.pids[1], signal.SIGKILL)
    assert launched.process.end(launch.GRACE + 10) == 137
    assert launched.gone(0)


class Library:
    """Python drops errors raised in `__del__`, and those in the reference callbacks of compilers alike."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def dropping_library() -> None:
    Library()
    assert not torch.is_anomaly_enabled()


def test_a_signal_whose_error_a_library_drops_raises_again(monkeypatch, capfd):
    monkeypatch.setattr(stop, "INSIST", 0.1)

    def work():
        with stop.StopRequest():
            dropping_library()
            time.sleep(60)

    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(stop.Stopped, match="SIGTERM before the first step"):
            work()
        assert torch.is_anomaly_enabled()
    assert capfd.readouterr().err == ""


def test_a_signal_whose_error_is_dropped_until_a_step_is_done_waits_for_its_end(monkeypatch):
    monkeypatch.setattr(stop, "INSIST", 0.1)
    with stop.StopRequest() as request:
        dropping_library()
        request.wait_for_steps()
        time.sleep(0.5)
    assert request.name == "SIGTERM"


def test_a_rank_ends_itself_when_its_launcher_is_killed(tmp_path):
    def rank():
        request = stop.StopRequest(verbose=False)
        with request:
            request.wait_for_steps()
            stop.end_with_parent(os.getppid())
            (tmp_path / "pid").write_text(str(os.getpid()))
            while not request.name:
                time.sleep(0.02)
        (tmp_path / "asked").write_text(request.name)
        return 0

    def launcher():
        Forked(rank)
        time.sleep(60)
        return 0

    outer = Forked(launcher)
    outer.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    outer.send(signal.SIGKILL)
    assert outer.end() == -9
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (tmp_path / "asked").read_text() == "SIGTERM"


def test_two_real_ranks_save_when_their_launcher_is_killed(command, tmp_path):
    run = [sys.executable, "-m", "fastnce", *command, "--nproc", "2"]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/" in line:
            break
    process.kill()
    rest = process.stdout.read()  # until the last process has closed it
    assert " stopped after step" in rest  # SIGTERM: or, where the other one noticed first, another process was asked
    process.wait()
    assert saved(tmp_path) >= 3


# ---- imports ----


def test_importing_the_package_does_not_import_pytorch():
    """The command handles a Ctrl-C during the seconds in which PyTorch is imported."""
    code = "import sys, fastnce; assert 'torch' not in sys.modules; print(set(fastnce.__all__) - set(dir(fastnce)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (found.stdout, found.stderr) == ("set()\n", "")


def test_names_of_the_package_are_there_when_asked_for():
    for name in fastnce.__all__:
        assert getattr(fastnce, name) is not None
    assert fastnce.PatchNCELoss is __import__("fastnce.nce", fromlist=["PatchNCELoss"]).PatchNCELoss
    assert fastnce.data.load_image is not None
    with pytest.raises(AttributeError, match="has no attribute 'PatchNCE'"):
        fastnce.PatchNCE  # noqa: B018


def test_ctrl_c_while_pytorch_is_imported_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from fastnce.__main__ import entry; entry()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stderr) == (130, "fastnce: stopped by Ctrl-C\n")


def test_the_most_of_several_values_alone():
    from fastnce.engine.distributed import Ranks

    assert Ranks().most([0.0, 2.5], torch.device("cpu")) == [0.0, 2.5]


def test_a_library_that_makes_another_error_of_a_signal():
    def swallow():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            raise ValueError("could not import") from None

    with pytest.raises(stop.Stopped, match="stopped by SIGTERM"), stop.raising():
        swallow()
