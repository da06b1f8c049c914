"""Trackers with their real libraries: what they wrote is read back. Without a library its tests are skipped."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.callbacks import Callbacks, RunInfo
from fastnce.watch.trackers import make_trackers
from tests.engine.test_engine import SMALL
from tests.engine.test_validate import lines

pytestmark = pytest.mark.usefixtures("few_blocks")

WARNING = "a discriminator has won"


def needs(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")


def picture(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shown(seed: int) -> np.ndarray:
    """`picture` as (8, 12, 3) uint8."""
    return np.concatenate([((one.permute(1, 2, 0).numpy() + 1) * 127.5).round() for one in picture(seed)], axis=1)


def part(folder: Path, track: str, start: int, stop: int, lr: float = 2e-4, state: str = "stopped") -> list[str]:
    """The steps from `start` to `stop` of a run; returns the sentences for the user."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    callbacks = Callbacks(make_trackers(track, said.append), say=said.append)
    config = resolve("cut", None, [f"optim.lr={lr}"]).as_dict()
    callbacks.begin(RunInfo(folder, config, start, 10, "cpu", 1))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in range(start + 1, stop + 1):
            callbacks.step = step
            callbacks.log(step, {"G": 1 / step, "lr": lr})
            file.write(json.dumps({"step": step}) + "\n")
            if step % 2 == 0:
                callbacks.samples(step, {"A": picture(step), "fake_B": picture(-step)})
    callbacks.warn(WARNING)
    callbacks.end(stop, state, "")
    return said


def two_parts(folder: Path, track: str) -> None:
    """A run that ends after step 4, and continues from its checkpoint of step 2 with another learning rate."""
    assert part(folder, track, 0, 4) == []
    assert part(folder, track, 2, 6, lr=1e-4, state="finished") == []


# TensorBoard


def board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_tensorboard(tmp_path):
    needs("tensorboard")
    two_parts(tmp_path / "mine", "tensorboard")
    found = board(tmp_path / "mine")
    assert [(one.step, one.value) for one in found.Scalars("G")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]
    assert [one.value for one in found.Scalars("lr")] == pytest.approx([2e-4] * 2 + [1e-4] * 4)  # the later one counts
    images = found.Images("samples/A")
    assert [one.step for one in images] == [2, 4, 6]
    (tmp_path / "a.png").write_bytes(images[-1].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), shown(6))
    warnings = found.Tensors("warnings/text_summary")
    assert [(one.step, one.tensor_proto.string_val[0].decode()) for one in warnings][-1] == (6, WARNING)
    tables = [one.tensor_proto.string_val[0].decode() for one in found.Tensors("configuration/text_summary")]
    assert "| optim.lr | 0.0001 |" in tables[-1]
    assert "| data.batch | 1 |" in tables[-1]


def test_tensorboard_has_the_hyperparameters(tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    part(tmp_path / "mine", "tensorboard", 0, 1)
    (file,) = (tmp_path / "mine" / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                found = dict(content.session_start_info.hparams.items())
    assert found["method"].string_value == "cut"
    assert found["optim.lr"].number_value == 2e-4
    assert found["data.flip"].number_value == 1


def test_a_training_that_continues(folder, tmp_path, capsys):
    """Killed after step 4, it continues from step 2: TensorBoard shows each step once, with the numbers of the log."""
    needs("tensorboard")
    out = tmp_path / "run"
    train = ["train", "fastcut", "--data", str(folder), "--out", str(out), *SMALL, "run.track=tensorboard"]
    assert main([*train, "run.steps=4", "run.save_every=2", "run.sample_every=2"]) == 0
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    assert main([*train, "run.steps=6", "run.save_every=2", "run.sample_every=2"]) == 0
    assert "tracker" not in capsys.readouterr().out.lower()
    found = board(out)
    logged = lines(out, "G")
    assert [one.step for one in found.Scalars("G")] == list(logged) == [1, 2, 3, 4, 5, 6]
    assert [one.value for one in found.Scalars("G")] == pytest.approx(list(logged.values()))
    assert [one.step for one in found.Images("samples/A")] == [2, 4, 6]


# Weights & Biases


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then chunks in blocks of 32 KiB, as LevelDB writes its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        if at + 7 + length > len(raw):  # still being written
            return
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last chunk
            yield Record.FromString(record)
            record = b""


def finished_files(folder: Path) -> list[Path]:
    """The .wandb files, oldest first. wandb's own process writes their end a little after `finish` has returned."""
    for _ in range(600):
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))  # by their times
        if all(any(record.HasField("exit") for record in wandb_records(file)) for file in files):
            return files
        time.sleep(0.1)
    raise AssertionError("a file of wandb has no end")


def history(file: Path) -> dict[int, dict[str, Any]]:
    """The values of a .wandb file by step."""
    found = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            row = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
            found[row["_step"]] = row
    return found


@pytest.fixture
def without_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def test_wandb_without_a_login(tmp_path, without_login):
    needs("wandb")
    folder = tmp_path / "mine"
    (hint,) = part(folder, "wandb", 0, 4)
    assert hint.startswith(f"Weights & Biases: not logged in, so the run is written to {folder / 'wandb'} alone")
    assert part(folder, "wandb", 2, 6, lr=1e-4, state="finished") == [hint]
    first, second = finished_files(folder)
    assert first.name == second.name  # of the same run
    (run,) = [record.run for record in wandb_records(first) if record.HasField("run")]
    assert (run.project, run.display_name) == ("fastnce", "mine")
    config = {one.key: json.loads(one.value_json) for one in run.config.update}
    assert (config["method"], config["optim.lr"], config["data.batch"]) == ("cut", 2e-4, 1)
    begun, continued = history(first), history(second)
    assert list(begun) == [1, 2, 3, 4]
    assert [row["G"] for row in begun.values()] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert list(continued) == [5, 6]
    assert continued[5]["lr"] == 1e-4
    (image,) = first.parent.glob("files/media/images/samples/A_2_*.png")
    assert np.array_equal(np.asarray(Image.open(image)), shown(2))
    (alert,) = [record.alert for record in wandb_records(first) if record.HasField("alert")]
    assert (alert.text, alert.level) == (WARNING, "WARN")


@pytest.fixture
def silent_server():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_wandb_with_a_server_that_never_answers(tmp_path, without_login, silent_server, monkeypatch):
    needs("wandb")
    from fastnce.watch.wandb import WandbTracker

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setattr(WandbTracker, "wait", 1.0)
    (said,) = part(tmp_path / "mine", "wandb", 0, 2)
    assert said.startswith("WandbTracker fails (CommError: ")
    assert said.endswith("): training goes on without it")


# trackio


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def trackio_folder(tmp_path, monkeypatch):
    """trackio reads the name of its folder when it is imported, so it is imported anew."""
    needs("trackio")
    for name in ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)
    return tmp_path / "trackio"


def test_trackio(tmp_path, trackio_folder, capsys):
    two_parts(tmp_path / "mine", "trackio")
    assert capsys.readouterr().out == ""
    database = trackio_folder / "fastnce.db"
    metrics = [
        (run, step, json.loads(values))
        for run, step, values in rows(database, "select run_id, step, metrics from metrics order by id")
    ]
    assert len({run for run, *_ in metrics}) == 1
    numbers = [(step, values["G"], values["lr"]) for _, step, values in metrics if "G" in values]
    assert numbers == [(step, pytest.approx(1 / step), 2e-4 if step < 5 else 1e-4) for step in range(1, 7)]
    images = {step: values["samples/A"] for _, step, values in metrics if "samples/A" in values}
    assert list(images) == [2, 4, 6]
    (file,) = trackio_folder.rglob(Path(images[6]["file_path"]).name)
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), shown(6))  # it is stored with alpha
    assert rows(database, "select step, text, level from alerts") == [(4, WARNING, "warn"), (6, WARNING, "warn")]
    config = json.loads(rows(database, "select config from configs")[0][0])
    assert (config["method"], config["data.batch"]) == ("cut", 1)


def test_trackio_and_two_folders_of_one_name(tmp_path, trackio_folder):
    """The later run has the name of the first, but the first does not continue it."""
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        assert part(tmp_path / parent / "mine", "trackio", 0, 2) == []
    assert part(tmp_path / "one" / "mine", "trackio", 2, 3) == []
    found = rows(trackio_folder / "fastnce.db", "select distinct run_id, run_name from metrics order by id")
    assert [name for _, name in found] == ["mine"] * 3
    assert json.loads((tmp_path / "one" / "mine" / "trackers.json").read_text())["trackio"]["id"] == found[2][0]


# MLflow


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_mlflow(tmp_path, monkeypatch, kind):
    needs("mlflow")
    if kind == "sqlite" and find_spec("sqlalchemy") is None:
        pytest.skip("mlflow-skinny writes to a database only if sqlalchemy and alembic are installed")
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db" if kind == "sqlite" else (tmp_path / "store").as_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    two_parts(tmp_path / "mine", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fastnce").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    found = client.get_metric_history(run.info.run_id, "G")
    assert [(one.step, one.value) for one in found] == [(step, 1 / step) for step in range(1, 7)]
    assert (run.data.params["method"], run.data.params["optim.lr"]) == ("cut", "0.0002")
    assert run.data.tags["optim.lr from step 2"] == "0.0001"  # a parameter cannot change
    assert [one.path for one in client.list_artifacts(run.info.run_id, "warnings")] == [
        f"warnings/step-0000000{step}.txt" for step in (4, 6)
    ]
    kept = Path(client.download_artifacts(run.info.run_id, "images", str(tmp_path)))
    images = sorted(kept.glob("samples A+step+*.png"))
    assert [file.name.split("+")[2] for file in images] == ["2", "4", "6"]
    assert np.array_equal(np.asarray(Image.open(images[-1])), shown(6))


def test_mlflow_with_no_server(tmp_path, monkeypatch):
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (said,) = part(tmp_path / "mine", "mlflow", 0, 2)
    assert said.startswith("MLflowTracker fails (MlflowException: ")
    assert said.endswith("): training goes on without it")
