"""Two gloo ranks on one machine, compared with one process of twice the batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine import launch
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.distributed import Ranks, ranks_of_launcher
from fastnce.engine.launch import processes, without
from fastnce.methods import CUT
from tests.engine.test_engine import SMALL, training_tensors
from tests.forked import Forked

pytestmark = [pytest.mark.usefixtures("few_blocks"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, world: int, port: int, work: Callable[[], int]) -> Forked:
    """Run `work()` in a process of its own, with the variables that a launcher sets for a rank."""

    def told() -> int:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in (variables | {"MASTER_PORT": port}).items()}
        return work()

    return Forked(told)


def start(rank: int, world: int, port: int, *arguments: str) -> Forked:
    """One rank of a command."""
    return as_rank(rank, world, port, lambda: main(list(arguments)))


def finish(processes: list[Forked], seconds: int = 120) -> list[tuple[int, str, str]]:
    return [(process.end(seconds), process.out.read_text(), process.err.read_text()) for process in processes]


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    return ["train", "cut", "--data", str(folder), "--out", str(run), *SMALL, *more]


def test_two_ranks_are_one_process_with_twice_the_batch(folder, tmp_path):
    assert main([*arguments(folder, tmp_path / "one", "data.batch=2", "run.steps=3"), "--quiet"]) == 0
    port = free_port()
    two = arguments(folder, tmp_path / "two", "data.batch=1", "run.steps=3", "run.save_every=2")
    for code, _, err in finish([start(rank, 2, port, *two) for rank in range(2)]):
        assert code == 0, err
    one, other = training_tensors(tmp_path / "one"), training_tensors(tmp_path / "two")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if key.startswith("network/"):
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6, msg=key)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(rows[1]) == 3  # only the first rank writes
    for line, other_line in zip(*rows, strict=True):
        first, second = json.loads(line), json.loads(other_line)
        for name in ("G", "NCE", "D_real", "D_fake"):
            assert second[name] == pytest.approx(first[name], rel=1e-5)


def test_ranks_with_batch_norm_save(folder, tmp_path):
    """Each rank normalises by its own images. The statistics that are stored are the first rank's."""
    port = free_port()
    norm = ["network.discriminator_norm=batch", "run.steps=2"]
    for code, _, err in finish([start(r, 2, port, *arguments(folder, tmp_path / "run", *norm)) for r in range(2)]):
        assert code == 0, err
    stored = training_tensors(tmp_path / "run")
    statistics = [tensor for key, tensor in stored.items() if key.endswith("running_mean")]
    assert len(statistics) == 3
    assert all(tensor.abs().max() > 0 for tensor in statistics)


def test_gathered_negatives_are_those_of_the_whole_batch(folder, tmp_path):
    """negatives=batch over two ranks: each also takes the other's images as negatives, as one process does."""
    batch = ["loss.negatives=batch", "run.steps=2"]
    assert main([*arguments(folder, tmp_path / "one", "data.batch=2", *batch), "--quiet"]) == 0
    port = free_port()
    two = arguments(folder, tmp_path / "two", *batch, "loss.gather_negatives=true")
    for code, _, err in finish([start(rank, 2, port, *two) for rank in range(2)]):
        assert code == 0, err
    losses = [
        [json.loads(line)["NCE"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = training_tensors(tmp_path / "one"), training_tensors(tmp_path / "two")
    for key, tensor in one.items():
        if key.startswith("network/"):
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_gathered_negatives_of_a_dual_method_are_those_of_the_whole_batch(folder, tmp_path):
    """Of the same domain and of the other branch, with augmentation, whose numbers the ranks draw as one process."""
    more = ["loss.negatives=batch", "loss.nce_layers=4,8", "loss.augment=color,translation,cutout", "run.steps=2"]
    more += ["network.discriminator=n_layers", "network.discriminator_layers=1", "--quiet"]
    words = ["train", "dcdgan", "--data", str(folder), *SMALL, *more]
    assert main([*words, "--out", str(tmp_path / "one"), "data.batch=2"]) == 0
    port, two = free_port(), [*words, "--out", str(tmp_path / "two"), "loss.gather_negatives=true"]
    for code, _, err in finish([start(rank, 2, port, *two) for rank in range(2)]):
        assert code == 0, err
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for line, other_line in zip(*rows, strict=True):
        first, second = json.loads(line), json.loads(other_line)
        for name in ("NCE1", "NCE2", "D_A", "D_B", "G"):
            assert second[name] == pytest.approx(first[name], rel=1e-5)
    one, other = training_tensors(tmp_path / "one"), training_tensors(tmp_path / "two")
    for group in ("D", "G", "F"):  # mean gradients, because Adam amplifies the rounding of those near 0
        means = {key: t for key, t in one.items() if key.startswith(f"adam/{group}/") and key.endswith("/exp_avg")}
        largest = max(float(t.abs().max()) for t in means.values())
        for key, tensor in means.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-5 * largest, msg=key)


def test_gathering_needs_a_batch_of_negatives():
    for change in ("loss.negatives=image", "loss.weighting=monce", "loss.symmetric=true"):
        config = resolve("cut", None, ["loss.negatives=batch", "loss.gather_negatives=true", change])
        with pytest.raises(ValueError, match=r"loss\.gather_negatives=true makes one batch of all ranks' pictures"):
            CUT(config.loss, config.network)


def test_others_come_rank_by_rank(monkeypatch):
    """(world - 1, ...), without the rank's own tensor and without gradient."""

    def gather(every, mine):
        every.copy_(torch.cat([mine + 10 * rank for rank in range(3)]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    mine = torch.arange(6.0, requires_grad=True).view(2, 3).t()
    for rank, theirs in ((0, (10, 20)), (1, (0, 20)), (2, (0, 10))):
        others = Ranks(rank, 3).others(mine)
        assert not others.requires_grad
        assert torch.equal(others, torch.stack([mine.detach() + offset for offset in theirs]))


class ForkedRank:
    """A rank as the launcher starts it, without the seconds that importing PyTorch takes."""

    def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool):
        assert command[: len(launch.COMMAND)] == launch.COMMAND
        assert start_new_session

        def work() -> int:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            return main(command[len(launch.COMMAND) :])

        self.process = Forked(work)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.returncode = self.process.end()
            sys.stderr.write(self.process.err.read_text())
        return self.returncode

    def kill(self) -> None:
        self.process.send(signal.SIGKILL)

    def wait(self) -> None:
        self.process.end()


def test_one_command_starts_a_process_for_each_device(folder, tmp_path, monkeypatch):
    """--nproc 2 on the CPU gives the weights of one process with twice the batch."""
    assert main([*arguments(folder, tmp_path / "one", "data.batch=2", "run.steps=2"), "--quiet"]) == 0
    command = [*arguments(folder, tmp_path / "two", "run.steps=2"), "--nproc", "2", "--quiet"]
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=ForkedRank))
    process = Forked(lambda: main(command))
    assert process.end() == 0, process.err.read_text()
    one, other = training_tensors(tmp_path / "one"), training_tensors(tmp_path / "two")
    for key, tensor in one.items():
        if key.startswith("network/"):
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_a_failure_of_several_processes_is_the_commands(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=ForkedRank))
    command = [*arguments(folder, tmp_path / "run", "optim.accumulate=3", "run.steps=1"), "--nproc=2"]
    process = Forked(lambda: main(command))
    assert process.end() == 2
    said = process.err.read_text()
    assert "fastnce: data.batch=1 cannot be computed in optim.accumulate=3 equal parts" in said
    assert "Traceback" not in said


def test_how_many_processes():
    assert processes("1", "auto") == 1
    assert processes("3", "cpu") == 3
    assert processes("auto", "cpu") == 1
    with pytest.raises(ValueError, match="--nproc must be auto or a number of processes from 1 on, not '0'"):
        processes("0", "cpu")
    with pytest.raises(ValueError, match=r"--nproc 4096 wants an accelerator for each process, and \d+ are there"):
        processes("4096", "auto")
    assert without(["cut", "--nproc", "2", "--out", "x", "a.b=1"], "--nproc") == ["cut", "--out", "x", "a.b=1"]
    assert without(["cut", "--nproc=2", "--out", "--nproc2"], "--nproc") == ["cut", "--out", "--nproc2"]


def test_a_rank_that_dies_ends_the_other_with_one_sentence_and_the_run_continues(folder, tmp_path):
    port, often = free_port(), "run.save_every=2"
    processes = [start(rank, 2, port, *arguments(folder, tmp_path / "run", often)) for rank in range(2)]
    processes[0].wait_for_line("step 3/")
    processes[1].send(signal.SIGKILL)
    began = time.monotonic()
    code, _, err = finish(processes[:1])[0]
    assert time.monotonic() - began < 100
    assert code == 1, err
    message = [line for line in err.splitlines() if line.startswith("fastnce:")]
    assert len(message) == 1
    assert "another rank is gone or silent: waited for" in message[0]
    assert processes[1].end() == -signal.SIGKILL
    end = Checkpoints(tmp_path / "run" / "checkpoints").load()[1]["step"] + 2
    for run in ("run", "undisturbed"):
        port, command = free_port(), arguments(folder, tmp_path / run, often, f"run.steps={end}")
        assert [code for code, _, _ in finish([start(rank, 2, port, *command) for rank in range(2)])] == [0, 0]
    wanted, found = training_tensors(tmp_path / "undisturbed"), training_tensors(tmp_path / "run")
    assert wanted.keys() == found.keys()
    assert not [key for key, tensor in wanted.items() if not torch.equal(tensor, found[key])]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder, tmp_path):
    port = free_port()
    processes = [start(rank, 2, port, *arguments(folder, tmp_path / "run")) for rank in range(2)]
    processes[0].wait_for_line("step 2/")
    processes[1].send(signal.SIGTERM)
    assert [code for code, _, _ in finish(processes)] == [0, 0]
    assert Checkpoints(tmp_path / "run" / "checkpoints").load()[1]["step"] >= 2


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks_of_launcher("cpu") as ranks:
        assert ranks == Ranks()
        tensors = [torch.ones(2), None]
        assert ranks.average(tensors, tensors)[0] is tensors[0]
        assert ranks.most([1.0], torch.device("cpu")) == [1.0]
        assert ranks.device("auto") == "auto"


def test_a_launcher_that_says_too_little(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ValueError, match=r"WORLD_SIZE=2, but RANK.* is not set: start with torchrun"),
        ranks_of_launcher("cpu"),
    ):
        pass


def drift() -> int:
    with ranks_of_launcher("cpu") as ranks:
        layer = torch.nn.Conv2d(2, 3, 3)
        torch.nn.init.normal_(layer.weight, std=1.0 + ranks.rank)
        ranks.broadcast([layer])
        ranks.check_drift([layer])
        gradients = [torch.full_like(p, float(ranks.rank)) for p in layer.parameters()]
        mean = ranks.average([gradients[0], None, gradients[1]], [gradients[0], gradients[0], gradients[1]])
        assert mean[1] is None
        assert all(bool((m == 0.5).all()) for m in (mean[0], mean[2]))
        if ranks.rank == 1:
            with torch.no_grad():
                layer.weight[0, 0, 0, 0] = torch.nextafter(layer.weight[0, 0, 0, 0], torch.tensor(9.0))
        try:
            ranks.check_drift([layer])
        except RuntimeError as error:
            print(error)
            return 7
    return 0


def test_drift_of_one_bit_is_noticed():
    port = free_port()
    for code, out, err in finish([as_rank(rank, 2, port, drift) for rank in range(2)]):
        assert code == 7, err
        assert "have drifted apart" in out
