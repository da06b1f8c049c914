"""Measures compared with scikit-image, pairing of test sets, reports, and the published figure of Rain100L's inputs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastnce import DerainingMetrics
from fastnce.commands.main import main
from fastnce.data import DataError
from fastnce.evaluate import luma, psnr, ssim
from fastnce.evaluate.pairs import find_pairs
from fastnce.evaluate.report import evaluate
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published


def picture(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth image with some noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None]


def y_of(array: np.ndarray) -> np.ndarray:
    return 16 + array.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    _, full = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    return full[5:-5, 5:-5].mean()


# ---- measures ----


def test_measures_equal_scikit_images():
    a, b = picture(0), picture(1)
    (row,) = DerainingMetrics().update(tensor(a), tensor(b))
    ya, yb = y_of(a), y_of(b)
    assert row["psnr_y"] == pytest.approx(peak_signal_noise_ratio(yb, ya, data_range=255), abs=1e-9)
    assert row["ssim_y"] == pytest.approx(skimage_ssim(ya, yb), abs=1e-9)
    assert row["psnr_rgb"] == pytest.approx(peak_signal_noise_ratio(b, a), abs=1e-9)
    channels = [skimage_ssim(a[:, :, c].astype(float), b[:, :, c].astype(float)) for c in range(3)]
    assert row["ssim_rgb"] == pytest.approx(np.mean(channels), abs=1e-9)


def test_luma_equals_matlabs():
    white, black, green = (tensor(np.full((11, 11, 3), v, np.uint8)).double() for v in (255, 0, (0, 255, 0)))
    assert luma(white).unique().tolist() == pytest.approx([235])
    assert luma(black).unique().tolist() == [16]
    assert luma(green).unique().tolist() == pytest.approx([16 + 128.553])


def test_kinds_of_pictures():
    a, b = tensor(picture(0)), tensor(picture(1))
    wanted = DerainingMetrics().update(a, b)
    as_float = DerainingMetrics().update(a / 127.5 - 1, b / 127.5 - 1)
    unit = DerainingMetrics(value_range=(0, 1)).update((a / 255)[0], (b / 255)[0])
    assert wanted == as_float == unit
    # rounded to 8 bits as in a file: a third of a level, or values above the range, change nothing
    moved = (a + 0.3) / 127.5 - 1
    moved[a == 255] = 1.5
    assert DerainingMetrics().update(moved, b / 127.5 - 1) == wanted
    grey = a[:, :1]
    assert DerainingMetrics().update(grey, b[:, :1]) == DerainingMetrics().update(
        grey.expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)
    )


def test_a_batch_and_the_mean():
    a, b = (torch.cat([tensor(picture(s)) for s in seeds]) for seeds in ((0, 1, 2), (3, 4, 5)))
    metrics = DerainingMetrics()
    rows = metrics.update(a, b)
    for row, x, y in zip(rows, a.split(1), b.split(1), strict=True):
        # some processors sum a batch in another order
        assert row == pytest.approx(DerainingMetrics().update(x, y)[0], rel=1e-12)
    metrics.update(b[:1], b[1:2])
    assert len(metrics.pictures) == 4
    assert metrics.compute()["ssim_y"] == pytest.approx(np.mean([row["ssim_y"] for row in metrics.pictures]))
    metrics.reset()
    with pytest.raises(ValueError, match="nothing was measured"):
        metrics.compute()


def test_equal_and_impossible_pictures():
    a = tensor(picture(0))
    assert DerainingMetrics().update(a, a) == [{"psnr_y": math.inf, "ssim_y": 1, "psnr_rgb": math.inf, "ssim_rgb": 1}]
    assert psnr(a.double(), a.double() + 1).item() == pytest.approx(10 * math.log10(255**2))
    with pytest.raises(ValueError, match="must have the same shape"):
        DerainingMetrics().update(a, a[:, :, 1:])
    with pytest.raises(ValueError, match=r"must be \(images, 1 or 3, height, width\)"):
        DerainingMetrics().update(a[:, :2], a[:, :2])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(a[:, :, :10].double(), a[:, :, :10].double())
    for value_range in ((1, 0), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ValueError, match="ascending"):
            DerainingMetrics(value_range=value_range)


# ---- pairs ----


def write(root: Path, names: dict[str, int], size: tuple[int, int] = (40, 56)) -> Path:
    for name, seed in names.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed, *size)).save(path)
    return root


LAYOUTS = {
    "same stem": {"rain/a.png": "norain/a.jpg", "rain/b.png": "norain/b.png"},
    "Rain100L": {"rain/rain-001.png": "norain/norain-001.png", "rain/rain-010.png": "norain/norain-010.png"},
    "Rain200": {"rain/1x2.png": "norain/1.png", "rain/11x2.png": "norain/11.png"},
    "Rain100H": {
        "rain/X2/norain-001x2.png": "norain/norain-001.png",
        "rain/X2/norain-002x2.png": "norain/norain-002.png",
    },
    "several rainy for one": {"input/901_1.jpg": "GT/901.jpg", "input/901_14.jpg": "GT/901.jpg"},
    "numbers with and without zeros": {"rain/rain-7.png": "norain/007.png"},
    "above": {"rainy/rain-001.png": "norain-001.png", "rainy/rain-002.png": "norain-002.png"},
    "one folder": {"rain-001.png": "norain-001.png", "rain-002.png": "norain-002.png"},
    "SPA": {"rain/000.png": "gt/000gt.png", "rain/001.png": "gt/001gt.png"},
    "raindrop": {"data/0_rain.png": "gt/0_clean.png"},
    "same name in subfolders": {"rain/a.png": "norain/a.png", "rain/deep/a.png": "norain/deep/a.png"},
    "test folder": {"test/input/x.png": "test/target/x.png"},
    "names that only look marked": {"rain/terrain.png": "norain/terrain.png", "rain/ter.png": "norain/ter.png"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    wanted = LAYOUTS[layout]
    write(tmp_path, dict.fromkeys([*wanted, *wanted.values()], 0))
    found = {str(p.rainy.relative_to(tmp_path)): str(p.clean.relative_to(tmp_path)) for p in find_pairs(tmp_path)}
    assert found == wanted


def test_all_pictures_without_a_partner_are_listed(tmp_path):
    write(tmp_path, {"rain/a.png": 0, "norain/a.png": 0, "rain/lonely.png": 0, "norain/single.png": 0})
    write(tmp_path, {"rain/small.png": 0}, (30, 30))
    write(tmp_path, {"norain/small.png": 0})
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    message = str(caught.value)
    assert "3 pictures do not pair" in message
    assert "rain/lonely.png has no truth" in message
    assert "norain/single.png has no rainy picture" in message
    assert "rain/small.png is 30x30, its truth norain/small.png is 56x40" in message
    assert "\n" not in message


def test_two_truths_for_one(tmp_path):
    write(tmp_path, dict.fromkeys(["rain/rain-1.png", "norain/1.png", "norain/norain-1.png"], 0))
    with pytest.raises(DataError, match=r"rain/rain-1.png has 2 truths"):
        find_pairs(tmp_path)


def test_strips(tmp_path):
    clean, rainy = picture(0), np.clip(picture(0).astype(int) + 30, 0, 255).astype(np.uint8)
    Image.fromarray(np.concatenate([clean, rainy], axis=1)).save(tmp_path / "1.png")
    with pytest.warns(UserWarning, match="1 of 1 strips look as if it rained on their left half"):  # it is brighter
        (pair,) = find_pairs(tmp_path)
    assert pair.strip
    loaded = [((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for p in pair.load()]
    assert (loaded[0] == rainy).all()
    assert (loaded[1] == clean).all()


def test_no_test_set(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        find_pairs(tmp_path / "absent")
    with pytest.raises(DataError, match="holds nothing"):
        find_pairs(tmp_path)
    write(tmp_path, {"photo.png": 0, "other.png": 1})  # their halves do not agree
    with pytest.raises(DataError, match="holds other.png, photo.png"):
        find_pairs(tmp_path)
    (tmp_path / "rain").mkdir()
    (tmp_path / "norain").mkdir()
    with pytest.raises(DataError, match="0 rainy and 0 clean"):
        find_pairs(tmp_path)


# ---- reports ----


@pytest.fixture
def small_set(tmp_path) -> Path:
    return write(tmp_path / "set", {"rain/a.png": 0, "norain/a.png": 1, "rain/b.png": 2, "norain/b.png": 3})


def test_reports_of_the_inputs(small_set, tmp_path, capsys):
    files = [tmp_path / name for name in ("m.json", "m.csv", "m.png")]
    options = [o for pair in zip(("--json", "--csv", "--sheet"), map(str, files), strict=True) for o in pair]
    assert main(["evaluate", "--inputs-only", "--data", str(small_set), *options, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("2 pictures: Y ")
    found = json.loads(files[0].read_text())
    assert [p["name"] for p in found["pictures"]] == ["a", "b"]
    for key in ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"):
        assert found["mean"][key] == pytest.approx(np.mean([p[key] for p in found["pictures"]]))
    assert found["pictures"][0]["psnr_rgb"] == pytest.approx(peak_signal_noise_ratio(picture(1), picture(0)))
    rows = list(csv.DictReader(files[1].open()))
    assert [row["name"] for row in rows] == ["a", "b", "mean"]
    assert float(rows[2]["ssim_y"]) == pytest.approx(found["mean"]["ssim_y"], abs=1e-6)
    assert Image.open(files[2]).width > 4 * 56
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.csv", "m.json", "m.png", "set"]


def test_a_model_is_measured(small_set, tmp_path, capsys):
    model = save_published({"G": ResnetGenerator(width=4, blocks=4)}, tmp_path)[0]
    out = tmp_path / "m.json"
    assert main(["evaluate", str(model), "--data", str(small_set), "--json", str(out), "--device", "cpu"]) == 0
    assert "(inputs: Y " in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["mean"] != found["inputs"]
    # measuring the files that the model writes gives the same figures
    assert (
        main(
            ["translate", str(model), str(small_set / "rain"), "--out", str(tmp_path / "o" / "rain"), "--device", "cpu"]
        )
        == 0
    )
    (tmp_path / "o" / "norain").symlink_to(small_set / "norain")
    assert evaluate(tmp_path / "o").mean == pytest.approx(found["mean"])


def test_equal_pictures_make_valid_json(tmp_path):
    write(tmp_path, {"rain/a.png": 0, "norain/a.png": 0})
    report = evaluate(tmp_path, json_file=tmp_path / "m.json", csv_file=tmp_path / "m.csv")
    assert report.mean["psnr_y"] == math.inf
    found = json.loads((tmp_path / "m.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert float(found["mean"]["psnr_y"]) == math.inf


def error_of(capsys, *arguments: str) -> str:
    assert main(["evaluate", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    return message


def test_mistakes(small_set, tmp_path, capsys):
    data = ["--data", str(small_set)]
    assert "either a model or --inputs-only" in error_of(capsys, *data)
    assert "either a model or --inputs-only" in error_of(capsys, "model.pth", "--inputs-only", *data)
    nowhere = str(tmp_path / "absent" / "m.json")
    assert "there is no folder" in error_of(capsys, "--inputs-only", *data, "--json", nowhere)
    assert "name it m.png" in error_of(capsys, "--inputs-only", *data, "--sheet", str(tmp_path / "m.jpg"))
    assert "is a folder" in error_of(capsys, "--inputs-only", *data, "--csv", str(tmp_path))
    write(tmp_path / "unpaired", {"testA/a.png": 0, "testB/b.png": 1})
    assert "not paired" in error_of(capsys, "--inputs-only", "--data", str(tmp_path / "unpaired"))
    (small_set / "rain" / "a.png").write_bytes(b"broken")
    out = tmp_path / "m.json"
    assert "a.png is not a picture" in error_of(capsys, "--inputs-only", *data, "--json", str(out))
    assert not out.exists()


# ---- the published figure ----


def test_the_inputs_of_rain100l(shared, tmp_path):
    """26.901 dB / 0.8384 on Y, the figure recorded with the data set."""
    data = shared / "data" / "Rain100L" / "test"
    if not data.is_dir():
        pytest.skip(f"no Rain100L in {shared}")
    out = tmp_path / "m.json"
    assert main(["evaluate", "--inputs-only", "--data", str(data), "--json", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    assert len(found["pictures"]) == 100
    assert found["mean"]["psnr_y"] == pytest.approx(26.901, abs=5e-4)
    assert found["mean"]["ssim_y"] == pytest.approx(0.8384, abs=5e-5)


def test_the_strips_of_rain800(shared):
    folder = shared / "data" / "Rain800" / "test_strips"
    if not folder.is_dir():
        pytest.skip(f"no Rain800 in {shared}")
    pairs = find_pairs(folder)
    assert len(pairs) == 100
    assert all(pair.strip for pair in pairs)
