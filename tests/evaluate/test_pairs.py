"""Pairs with similar names, names that must stay different, and strips with rain on either half."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import DataError, find_images, load_image
from fastnce.data.rain import render_rain
from fastnce.engine.held_out import find_validation
from fastnce.evaluate.pairs import find_pairs, streaks
from fastnce.evaluate.report import evaluate
from fastnce.evaluate.unpair import write_unpaired

NFC, NFD = (unicodedata.normalize(form, "Café Ångström 雨가") for form in ("NFC", "NFD"))


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    return path


def names(root: Path) -> dict[str, str]:
    return {str(pair.rainy.relative_to(root)): str(pair.clean.relative_to(root)) for pair in find_pairs(root)}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        {f"rain/{NFC}.png": f"norain/{NFD}.png"},
        {f"rain/{NFD}_1.png": f"norain/{NFC}_1.jpg"},
        {f"rain/{NFD}/1.png": f"norain/{NFC}/1.png", "rain/1.png": "norain/1.png"},
        {f"rainy/rain-{NFC}1.png": f"norain-{NFD}1.png"},
        {f"rain-7{NFD}.png": f"norain-7{NFC}.png"},
    ],
)
def test_the_encoding_of_accents_does_not_matter(tmp_path, layout):
    for place in [*layout, *layout.values()]:
        write(tmp_path / place)
    assert names(tmp_path) == layout


def test_unpair_treats_both_encodings_as_one_scene(tmp_path):
    for place in (f"rain/{NFC}7_1.png", f"rain/{NFD}7_2.png", f"norain/{NFD}7.png", "rain/z.png", "norain/z.png"):
        write(tmp_path / "set" / place)
    assert write_unpaired(tmp_path / "set", tmp_path / "out") == {"trainA": 2, "trainB": 1}


@pytest.mark.parametrize("folder", ["rain", "norain"])
def test_names_that_look_the_same_in_one_folder(tmp_path, folder):
    for place in (f"rain/{NFC}.png", f"norain/{NFC}.png", f"{folder}/{NFD}.png"):
        write(tmp_path / place)
    with pytest.raises(DataError, match=r"look the same \(their accents are encoded differently\): rename") as caught:
        find_pairs(tmp_path)
    assert "\\u0301" in str(caught.value)  # the message shows the difference
    assert "\\xe9" in str(caught.value)


def test_case_decides_if_nothing_else_differs(tmp_path):
    wanted = {"rain/a.png": "norain/a.png", "rain/A.png": "norain/A.png", "rain/rain-B1.png": "norain/norain-B1.png"}
    wanted |= {"rain/rain-b1.png": "norain/norain-b1.png", "rain/C.png": "norain/c.png"}
    for place in [*wanted, *wanted.values()]:
        write(tmp_path / place)
    assert names(tmp_path) == wanted
    (tmp_path / "norain" / "A.png").unlink()
    with pytest.raises(DataError, match=r"rain/a.png and A.png differ only in case and share a truth"):
        find_pairs(tmp_path)


def test_names_are_unique(tmp_path):
    """Files that differ only in their suffix are several rainy pictures of one scene; none overwrites another."""
    rainy = ["1.png", "1.jpg", "2.png", "3.png", "3.bmp", "3.bmp.png"]
    for seed, name in enumerate(rainy):
        write(tmp_path / "set/rain" / name, seed)
    for name in ("1.png", "2.png", "3.png", "3.bmp.png"):
        write(tmp_path / "set/norain" / name)
    pairs = find_pairs(tmp_path / "set")
    assert [pair.rainy.name for pair in pairs] == sorted(rainy)
    assert len({pair.name.lower() for pair in pairs}) == len(rainy)
    counts = write_unpaired(str(tmp_path / "set"), str(tmp_path / "out"))  # scenes: 1, 2, 3.bmp, 3 in turn
    assert counts == {"trainA": 3, "trainB": 2}
    written = [load_image(file) for file in find_images(tmp_path / "out" / "trainA")]
    for name in ("1.jpg", "1.png", "3.bmp.png"):
        assert any(torch.equal(load_image(tmp_path / "set/rain" / name), picture) for picture in written)


# --- strips -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six scenes, rainy and clean: smooth like photographs, with the rain of `fastnce rain`."""
    made = []
    for seed in range(6):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
        clean = np.asarray(Image.fromarray(noise).resize((72, 64), Image.Resampling.BICUBIC)).astype(np.float32)
        picture = torch.from_numpy(clean / 127.5 - 1).permute(2, 0, 1)
        made.append((render_rain(picture[None], generator=torch.Generator().manual_seed(seed))[0], picture))
    return made


def strips(folder: Path, scenes, side: str, suffix: str = ".png", count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for number, (rainy, clean) in enumerate(scenes[:count]):
        halves = (rainy, clean) if side == "left" else (clean, rainy)
        levels = torch.cat(halves, dim=2).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / f"{number}{suffix}")
    return folder


def levels(picture: torch.Tensor) -> np.ndarray:
    return picture.add(1).mul(127.5).round().numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_either_half_may_be_rainy(tmp_path, scenes, side, suffix):
    root = strips(tmp_path / "strips", scenes, side, suffix)
    other = {"left": "right", "right": "left"}[side]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = find_pairs(root, side)
    with pytest.warns(
        UserWarning, match=rf"6 of 6 strips look as if it rained on their {side} half.*--rain-side {side}"
    ):
        wrong = find_pairs(root, other)
    for pair, mirrored, (rainy, clean) in zip(pairs, wrong, scenes, strict=True):
        if suffix == ".png":
            assert np.array_equal(levels(pair.load()[0]), levels(rainy))
            assert np.array_equal(levels(pair.load()[1]), levels(clean))
        for one, two in zip(pair.load(), mirrored.load()[::-1], strict=True):  # a warning changes nothing
            assert torch.equal(one, two)


def test_the_side_reaches_every_command(tmp_path, scenes, capsys):
    root = strips(tmp_path / "strips", scenes, "left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            main(["unpair", str(root), "--out", str(tmp_path / "set"), "--rain-side", "left", "--test", str(root)]) == 0
        )
        pairs = find_validation("", str(root), rain_side="left")
        report = evaluate(root, rain_side="left")
    for place, (rainy, clean) in enumerate(scenes):
        half, want = (f"trainA/{place}", rainy) if place % 2 == 0 else (f"trainB/{place}", clean)
        assert np.array_equal(levels(load_image(tmp_path / "set" / f"{half}.png")), levels(want))
        assert np.array_equal(levels(load_image(tmp_path / "set/test/rain" / f"{place}.png")), levels(rainy))
        assert np.array_equal(levels(pairs[place].load()[0]), levels(rainy))
    # PSNR is symmetric in the halves, so it does not depend on the side; only the contact sheet does
    capsys.readouterr()
    assert main(["evaluate", "--inputs-only", "--data", str(root), "--rain-side", "left", "--device", "cpu"]) == 0
    assert f"{report.mean['psnr_y']:.2f} dB" in capsys.readouterr().out


def test_an_invalid_side(tmp_path):
    for call in (
        lambda: find_pairs(tmp_path, "top"),
        lambda: find_validation(str(tmp_path), "", rain_side="top"),
        lambda: write_unpaired(tmp_path, tmp_path / "out", rain_side="top"),
    ):
        with pytest.raises(DataError, match="rain_side='top' should be one of right, left"):
            call()


def test_no_warning_for_a_minority_of_strips(tmp_path, scenes):
    """Two of six strips are in the opposite order."""
    root = strips(tmp_path / "strips", [*scenes[:4], *((clean, rainy) for rainy, clean in scenes[4:])], "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_pairs(root)) == 6


def test_strips_of_two_folders_keep_their_names_apart(tmp_path, scenes):
    for name in ("strips_a", "strips_b"):
        strips(tmp_path / "set" / name, scenes, "right", count=3)
    pairs = find_pairs(tmp_path / "set")
    assert len(pairs) == len({pair.name for pair in pairs}) == 6
    counts = write_unpaired(tmp_path / "set", tmp_path / "out")
    assert counts == {"trainA": 3, "trainB": 3}
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6


def test_strips_whose_names_look_the_same(tmp_path, scenes):
    root = strips(tmp_path / "strips", scenes, "right", count=2)
    (root / "0.png").rename(root / f"{NFC}.png")
    (root / "1.png").rename(root / f"{NFD}.png")
    with pytest.raises(DataError, match="look the same"):
        find_pairs(root)


def test_equal_halves_are_undecided():
    flat = torch.zeros(1, 12, 8)
    assert streaks(flat, flat) == 0
    noise = torch.rand(1, 12, 8, generator=torch.Generator().manual_seed(0))
    assert streaks(noise, noise) == 0
    assert abs(streaks(noise, noise / 2)) < 1e-9  # contrast alone is not rain


def test_real_strips(shared):
    folder = shared / "data" / "Rain800" / "test_strips"
    if not folder.is_dir():
        pytest.skip(f"no Rain800 in {shared}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = find_pairs(folder)[::5]
    assert sum(streaks(*pair.load(1)) > 0 for pair in pairs) >= 18  # of 20; of all 389 strips, 5 are classified wrongly
    with pytest.warns(UserWarning, match=r"20 strips look as if it rained on their right half"):
        find_pairs(folder, "left")


def test_training_and_test_pictures_are_not_mixed(tmp_path, scenes):
    for name in ("train_strips", "test_strips"):
        strips(tmp_path / "set" / name, scenes, "right", count=3)
    for split in ("test", "train"):
        with pytest.warns(UserWarning, match=rf"holds test_strips, train_strips: only {split}_strips is taken"):
            pairs = find_pairs(tmp_path / "set", split=split)
        assert {pair.rainy.parent.name for pair in pairs} == {f"{split}_strips"}
    with pytest.warns(UserWarning, match="only train_strips is taken"):
        assert write_unpaired(tmp_path / "set", tmp_path / "out") == {"trainA": 2, "trainB": 1}
    for split in ("test", "train"):
        strips(tmp_path / "split" / split, scenes, "right", count=2)
        assert {pair.rainy.parent.name for pair in find_pairs(tmp_path / "split", split=split)} == {split}
    assert len(find_pairs(tmp_path / "split")) == 2
