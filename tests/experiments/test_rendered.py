"""Training on rendered pairs, and the folder of photographs from Debian packages, at their smallest sizes."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastnce
from experiments import photographs, rendered
from fastnce.config import resolve
from fastnce.data import load_image
from fastnce.data.rain import RainOptions, parse_ranges, render_rain
from fastnce.evaluate.pairs import find_pairs
from fastnce.evaluate.quality import ssim
from fastnce.methods import Batch, Draws, NetworkOptions
from fastnce.translate.exported import network_options, read_details

HERE = Path(rendered.__file__)
HEAVY = "density=0.5,opacity=0.7"
SMALL = {"network.generator": "restorer", "network.width": 4, "network.norm": "none", "data.preprocess": "crop"}
SMALL |= {"data.load_size": 32, "data.crop_size": 32, "data.batch": 2, "data.rain": 1.0, "run.device": "cpu"}


def package(folder: Path, name: str, version: str, pictures: dict[str, tuple[int, int]]) -> None:
    """Write a Debian package that holds pictures below usr/share, by (height, width)."""
    root = folder / name
    for file, size in pictures.items():
        path = root / "usr/share" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)
    (root / "DEBIAN").mkdir()
    fields = {"Package": name, "Version": version, "Architecture": "all", "Maintainer": "A <a@example.org>"}
    text = "".join(f"{key}: {value}\n" for key, value in {**fields, "Description": "pictures"}.items())
    (root / "DEBIAN/control").write_text(text)
    file = folder / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", str(root), str(file)], check=True, capture_output=True)


@pytest.fixture
def two(monkeypatch) -> None:
    """Two photographs of two packages, one of them held out, at small sizes."""
    Photograph = photographs.Photograph
    first = Photograph("one", "backgrounds/Meadow.jpg", "A. Author", "CC0-1.0")
    second = Photograph("other", "wallpapers/Lake/contents/images/2560x1600.jpg", "B. Author", "GPL-2.0-or-later", True)
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", [first, second])
    monkeypatch.setattr(photographs, "SIDES", (32, 40))
    monkeypatch.setattr(photographs, "HELD_OUT_SIDE", 24)


def test_photographs_come_from_packages(two, tmp_path, capsys):
    package(tmp_path, "one", "1.0-1", {"backgrounds/Meadow.jpg": (50, 60)})
    package(tmp_path, "other", "2.0-1", {"wallpapers/Lake/contents/images/2560x1600.jpg": (48, 96)})
    out = tmp_path / "photographs"
    assert photographs.main(["--packages", str(tmp_path), "--out", str(out)]) == 0
    assert sorted(p.name for p in (out / "trainB").iterdir()) == ["Meadow-32.png", "Meadow-40.png"]
    assert load_image(out / "trainB/Meadow-32.png").shape == (3, 32, 38)
    pairs = find_pairs(out / "test")
    assert [pair.name for pair in pairs] == [f"Lake-{kind}" for kind in range(len(photographs.RAIN))]
    rainy, clean = pairs[0].load()
    assert clean.shape == (3, 24, 48)
    assert not torch.equal(rainy, clean)
    rows = list(csv.DictReader((out / "SOURCES.csv").open(encoding="utf-8")))
    assert [(row["name"], row["author"], row["licence"], row["held_out"], row["version"]) for row in rows] == [
        ("Meadow", "A. Author", "CC0-1.0", "False", "1.0-1"),
        ("Lake", "B. Author", "GPL-2.0-or-later", "True", "2.0-1"),
    ]


def test_a_missing_package_is_named(two, tmp_path, capsys):
    package(tmp_path, "one", "1.0-1", {"backgrounds/Meadow.jpg": (50, 60)})
    with pytest.raises(SystemExit) as left:
        photographs.main(["--packages", str(tmp_path), "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert "holds no other_VERSION_all.deb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    package(tmp_path, "other", "3.0-1", {"wallpapers/Lake/contents/images/1x1.jpg": (4, 4)})
    for out, sentence in (
        ("out", "other 3.0-1 holds no usr/share/wallpapers/Lake/"),
        ("one", "is not an empty folder"),
    ):
        with pytest.raises(SystemExit):
            photographs.main(["--packages", str(tmp_path), "--out", str(tmp_path / out)])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_photographs_are_licensed_and_distinct():
    found = photographs.PHOTOGRAPHS
    assert len({photograph.file for photograph in found}) == len(found)
    assert all(photograph.author and photograph.licence for photograph in found)
    assert sum(photograph.held_out for photograph in found) == len(photographs._HELD_OUT)


def method(**options: object) -> rendered.Rendered:
    network = NetworkOptions(generator="restorer", width=4, norm="none")
    return rendered.Rendered(rendered.RenderedOptions(**options), network)


def test_the_loss_compares_with_the_clean_image():
    """A fresh restorer returns its input: without rain the loss is 0, with rain it is not."""
    clean = torch.rand(2, 3, 32, 32) * 2 - 1
    weights = {"lambda_frequency": 0.1, "lambda_ssim": 0.1}
    for dry, expected in ((1.0, True), (0.0, False)):
        model = method(dry=dry, **weights)
        batch = Batch(clean, clean)
        loss, losses = model.loss(batch, model.generate(batch, Draws()), Draws())
        assert (loss.item() < 1e-6) == expected
        assert losses["SSIM"] <= 1 + 1e-6


def test_ssim_is_that_of_the_evaluation():
    x, y = torch.rand(2, 1, 3, 32, 40, dtype=torch.float64) * 2 - 1
    found = rendered.ssim(x, y)
    torch.testing.assert_close(found, ssim((x + 1) * 127.5, (y + 1) * 127.5).mean(), rtol=1e-9, atol=1e-9)


def test_it_learns_to_remove_rain(tmp_path):
    folder = tmp_path / "data/trainB"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 160, 64, dtype=np.uint8)
    for i in range(2):
        image = np.stack([np.roll(np.broadcast_to(ramp, (48, 64)), 9 * i * c, 1) for c in range(3)], 2)
        Image.fromarray(image).save(folder / f"{i}.png")
    options = {**SMALL, "run.steps": 30, "optim.lr": 5e-3, "loss.dry": 0.0, "loss.rain": HEAVY}
    options |= dict.fromkeys(("run.sample_every", "run.save_every", "run.log_every"), 0)
    run = fastnce.train(f"{HERE}:Rendered", tmp_path / "data", tmp_path / "run", quiet=True, **options)
    clean = load_image(folder / "0.png")[None]
    rainy = render_rain(clean, RainOptions(**parse_ranges("rain", HEAVY)), torch.Generator().manual_seed(0))
    restored = run.load(trust_code=True)(rainy)
    assert (restored - clean).abs().mean() < 0.9 * (rainy - clean).abs().mean()


def test_the_configuration_of_the_shipped_model(tmp_path, monkeypatch):
    """It builds the network whose weights are shipped."""
    monkeypatch.chdir(HERE.parents[1])
    config = resolve("", HERE.with_name("derain_model.toml"), [f"data.dir={tmp_path}"])
    shipped = read_details(fastnce.models.folder("derain"))["network"]
    assert network_options(config.network) == shipped
