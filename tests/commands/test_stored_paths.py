"""The configuration that a run writes works from every folder; values in Python; the method of a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.imports import same_object
from fastnce.config import resolve
from fastnce.config.paths import absolute
from tests.engine.test_engine import SMALL


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working directory with pictures and code, named by relative paths."""
    place = tmp_path / "here"
    place.mkdir()
    shutil.copytree(folder, place / "pictures")
    for side in ("rain", "norain"):
        shutil.copytree(folder / "testA", place / "pairs" / side)
    (place / "mine.py").write_text(
        "import fastnce.methods as m\n\nclass Mine(m.CUT):\n    Options = m.CUTOptions\n\n"
        "def measure(a, b):\n    return float((a - b).abs().mean())\n"
    )
    monkeypatch.chdir(place)
    return place


def test_config_of_a_run_works_from_another_folder(here, tmp_path, monkeypatch, capsys):
    words = ["--data", "pictures", "--quiet", *SMALL, "run.steps=1", "data.cache_dir=cache", "run.best=mine.py:measure"]
    words += ["run.validate_every=1", "data.validate=pairs"]
    assert main(["train", "mine.py:Mine", *words, "--out", "run", "loss.nce_idt=false"]) == 0
    written = resolve("", here / "run" / "config.toml")
    assert written.method == f"{here}/mine.py:Mine"
    assert written.data.dir == str(here / "pictures")
    assert written.data.cache_dir == str(here / "cache")
    assert written.data.validate == str(here / "pairs")
    assert written.run.best == f"{here}/mine.py:measure"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--out", str(here / "run"), "run.steps=2"]) == 2
    assert "this run uses code of its own" in capsys.readouterr().err
    assert main(["train", "--out", str(here / "run"), "--trust-code", "--quiet", "run.steps=2"]) == 0
    config = str(here / "run" / "config.toml")
    assert main(["train", "--config", config, "--out", "second", "--quiet"]) == 0
    again = ["train", "--config", config, "--out", str(here / "run"), "--quiet"]
    assert main([*again, "run.steps=3"]) == 0  # the same run
    monkeypatch.chdir(here)
    assert main(["train", "mine.py:Mine", *words, "--out", "run", "loss.nce_idt=false", "run.steps=4"]) == 0
    assert main(["train", "mine.py:Mine", *words, "--out", "run", "loss.nce_idt=true", "run.steps=5"]) == 2


def test_what_the_user_wrote_stays_relative(here, capsys):
    (here / "c.toml").write_text('method = "cut"\n[data]\ndir = "pictures"\n')
    assert main(["train", "--config", "c.toml", "--dry-run"]) == 0
    assert '\ndir = "pictures" ' in capsys.readouterr().out
    assert resolve("", Path("c.toml")).data.dir == "pictures"


def test_absolute_leaves_names_and_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data.dataset=sub/../my.py:Data", "run.best=pack.age:f", "run.metrics=fid, b.py:g,niqe", "data.dir=x"]
    config = resolve("cut", overrides=words)
    found = absolute(config)
    assert (found.method, found.network.generator, found.run.best) == ("cut", "resnet_9blocks", "pack.age:f")
    assert (found.data.dataset, found.data.dir) == (f"{tmp_path}/my.py:Data", f"{tmp_path}/x")
    assert found.run.metrics == f"fid,{tmp_path}/b.py:g,niqe"
    assert (config.data.dataset, config.data.dir) == ("sub/../my.py:Data", "x")
    assert found.data.validate == found.run.start_from == ""


def test_own_code_is_compared_by_what_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other, same in (
        ("a.py:X", "a.py:X", True),
        ("a.py:X", f"{tmp_path}/a.py:X", True),
        ("a.py:X", "./b/../a.py:X", True),
        ("a.py:X", "/elsewhere/a.py:X", True),  # begun in another folder
        ("b/a.py:X", "/elsewhere/b/a.py:X", True),
        ("b/a.py:X", "/elsewhere/a.py:X", False),
        ("a.py:X", "/elsewhere/aa.py:X", False),
        ("../a.py:X", "/elsewhere/a.py:X", False),
        ("/one/a.py:X", "/two/a.py:X", False),
        ("a.py:X", f"{tmp_path}/a.py:Y", False),
        ("pack.age:X", "other.age:X", False),
        ("cut", "a.py:X", False),
        ("cut", "cut", True),
        (1, 2, False),
    ):
        assert same_object(one, other) is same is same_object(other, one), (one, other)


def test_values_in_python(tmp_path):
    config = resolve(
        "fastcut", None, ["data.batch=2"], values={"data.batch": 4, "data.dir": tmp_path, "loss.nce_layers": (0, 4)}
    )
    assert (config.data.batch, config.data.dir, config.loss.nce_layers) == (4, str(tmp_path), [0, 4])
    assert resolve("fastcut", values={"optim.lr": 1}).optim.lr == 1.0
    for values, sentence in (
        ({"data.bach": 4}, "unknown key 'data.bach'; did you mean 'data.batch'"),
        ({"data.batch": "4"}, "data.batch must be a whole number from 1 to 65,536, not '4'"),
        ({"data.batch": 0}, "data.batch must be"),
        ({"data.batch": None}, "data.batch must be"),
        ({3: 4}, "unknown key"),
        ({"data.crop_size": 30}, "multiples of 4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            resolve("fastcut", values=values)


def test_the_method_of_a_file(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text("[optim]\nlr = 1e-4\n")
    assert main(["train", "--config", str(file), "--dry-run"]) == 2
    assert "c.toml names no method: name one, such as fastcut" in capsys.readouterr().err
    file.write_text("method = 'cut'\n")
    assert resolve("", file).method == "cut"
    with pytest.raises(ValueError, match="is for another method than fastcut"):
        resolve("fastcut", file)
    file.write_text("method = 3\n")
    with pytest.raises(ValueError, match="unknown method"):
        resolve("", file)
