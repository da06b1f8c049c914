"""The environment variables of a launcher, and messages about wrong ones."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from fastnce.commands import main as cli
from fastnce.commands import train
from fastnce.commands.main import main
from fastnce.engine.distributed import RankLost, Ranks, ranks_of_launcher, read_ranks
from tests.engine.test_engine import SMALL

GOOD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables; connecting fails the test."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it tried to connect"))

    def put(**changes: str) -> None:
        for name in GOOD:
            monkeypatch.delenv(name, raising=False)
        for name, value in {**GOOD, **changes}.items():
            if value != "unset":
                monkeypatch.setenv(name, value)

    return put


WRONG = [
    ({"RANK": "2"}, "RANK='2' must be a whole number from 0 to 1 (WORLD_SIZE=2)"),
    ({"RANK": "-1"}, "RANK='-1' must be a whole number from 0 to 1"),
    ({"RANK": "first"}, "RANK='first' must be a whole number"),
    ({"RANK": ""}, "RANK='' must be a whole number"),
    ({"RANK": "0.5"}, "RANK='0.5' must be a whole number"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK='1' must be a whole number from 0 to 0 (WORLD_SIZE=1)"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be a whole number from 1 on"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' must be a whole number from 1 on"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be a whole number from 1 on"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK='2' must be a whole number from 0 to 1"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' must be a whole number"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http' must be a whole number from 1 to 65535"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT='0' must be a whole number from 1 to 65535"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' must be a whole number from 1 to 65535"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR='' names no machine"),
    ({"MASTER_ADDR": "no machine"}, "MASTER_ADDR='no machine' names no machine"),
    ({"MASTER_PORT": "unset", "RANK": "unset"}, "WORLD_SIZE=2, but RANK, MASTER_PORT is not set: start with torchrun"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG)
def test_variables_that_make_no_sense(changes, sentence, environment, folder, tmp_path, capsys, monkeypatch):
    environment(**changes)
    if "MASTER_ADDR" in changes:  # replaces the name server

        def lookup(address, port):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
    run = tmp_path / "run"
    assert main(["train", "fastcut", "--data", str(folder), "--out", str(run), *SMALL]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fastnce: {sentence}")
    assert message.endswith("start with torchrun\n")
    assert message.count("\n") == 1
    assert not run.exists()


def test_variables_that_do(environment, monkeypatch):
    environment()
    assert read_ranks() == Ranks(1, 2, 1)
    environment(LOCAL_RANK="unset")
    assert read_ranks() == Ranks(1, 2, 0)
    environment(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_PORT="unset")
    assert read_ranks() == Ranks()
    environment(WORLD_SIZE="unset")  # RANK alone belongs to another program
    assert read_ranks() == Ranks()

    def late(address, port):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    environment(MASTER_ADDR="node-1")
    monkeypatch.setattr(socket, "getaddrinfo", late)
    assert read_ranks().world == 2  # a later lookup may succeed


def test_more_ranks_than_accelerators(environment, monkeypatch):
    environment()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: pytest.fail("there is no such device"))
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but 1 accelerators are here"), ranks_of_launcher("auto"):
        pass


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {**GOOD, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} is another program's"), ranks_of_launcher("cpu"):
            pass


def test_others_that_never_start(environment, monkeypatch):
    environment()

    def silent(*_, **__):
        raise dist.DistStoreError("Timed out after 301 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(dist, "init_process_group", silent)
    with (
        pytest.raises(RankLost, match=r"waited for the others to start \(Timed out after 301"),
        ranks_of_launcher("cpu"),
    ):
        pass


@pytest.mark.parametrize(("asked", "world", "code"), [("2", "1", 2), ("3", "2", 2), ("1", "1", 0), ("2", "2", 0)])
def test_processes_asked_for_beside_a_launcher(asked, world, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(train, "train_run", lambda *_, **__: 0)
    run = ["train", "cut", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--nproc", asked]
    assert cli.main(run) == code
    assert ("leave --nproc out, or unset WORLD_SIZE" in capsys.readouterr().err) == (code == 2)
