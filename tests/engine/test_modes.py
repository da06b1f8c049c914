"""Files have the mode of the umask, also if they are written by a library or under another name first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastnce.commands.main import main
from tests.engine.test_engine import SMALL


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def make(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = 3 + seed % 2  # images with alpha take another path
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 36, channels), np.uint8)).save(path)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027], indirect=True)
def test_every_file_has_the_umasks_mode(umask, tmp_path):
    os.umask(0)
    for seed, name in enumerate(("trainA/0", "trainA/1", "trainB/0", "trainB/1", "test/rain/0", "test/norain/0")):
        make(tmp_path / "data" / f"{name}.png", seed)
    os.umask(umask)
    given = set(tmp_path.rglob("*"))
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    pictures = str(data / "trainA")
    options = ["run.steps=1", "run.sample_every=1", "run.samples=1", "run.validate_every=1"]
    on = ["--device", "cpu"]
    reports = ["--json", str(out / "r.json"), "--csv", str(out / "r.csv"), "--sheet", str(out / "r.png")]
    for arguments in (
        ["cache", "fastcut", "--data", str(data), *SMALL],
        ["train", "fastcut", "--data", str(data), "--out", str(run), "--quiet", *SMALL, *options],
        ["export", str(run), "--out", str(out / "export")],
        ["translate", str(run), pictures, "--out", str(out / "png"), *on],
        ["translate", str(run), pictures, "--out", str(out / "deep"), "--bits", "16", "--format", "npy", *on],
        ["evaluate", "--inputs-only", "--data", str(data / "test"), *reports, *on],
        ["rain", pictures, "--out", str(out / "rain")],
        ["unpair", str(out / "rain"), "--out", str(out / "unpair")],
    ):
        assert main(arguments) == 0, arguments
    written = set(tmp_path.rglob("*")) - given
    assert {".safetensors", ".json", ".jsonl", ".txt", ".toml", ".bin", ".pth", ".png", ".npy", ".csv"} <= {
        path.suffix for path in written
    }
    for path in sorted(written):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, (path.relative_to(tmp_path), oct(path.stat().st_mode))
