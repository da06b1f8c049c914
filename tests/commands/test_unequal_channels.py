"""Grey A and colour B, from the files to the report: read, trained, monitored, validated, translated, evaluated."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.common.imports import CodeError
from fastnce.data import DataError, UnpairedData, load_image
from fastnce.data.own import open_own
from fastnce.data.rained import RainedData
from fastnce.data.single import SinglePictureData
from fastnce.engine.monitor import Monitor
from fastnce.evaluate.pairs import find_pairs
from fastnce.evaluate.quality import DerainingMetrics
from fastnce.methods import Batch

pytestmark = pytest.mark.usefixtures("few_blocks")

TINY = [
    *("network.generator=resnet_4blocks", "network.width=2", "network.discriminator_width=2"),
    *("network.discriminator=n_layers", "network.discriminator_layers=1", "run.device=cpu"),
    *("data.load_size=36", "data.crop_size=32", "run.steps=2", "run.samples=2", "--quiet"),
]
CYCLEGAN = ["cyclegan", "loss.lambda_identity=0", "loss.pool_size=2"]
DCLGAN = ["dclgan", "loss.lambda_idt=0", "loss.nce_layers=4,8", "loss.patches=8", "loss.projection=8"]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Grey pictures in A, colour in B, and test pairs of a grey input and a colour truth."""
    root, rng = tmp_path_factory.mktemp("grey to colour"), np.random.default_rng(1)
    for name, channels in (("trainA", 1), ("trainB", 3), ("testA", 1), ("testB", 3), ("test/input", 1), ("test/gt", 3)):
        (root / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (40, 44, channels), np.uint8)
            Image.fromarray(pixels.squeeze()).save(root / name / f"{i}.png")
    return root


def test_each_domain_is_read_with_its_own_channels(coloured, tmp_path):
    for channels in ((1, 3), (3, 1)):
        data = UnpairedData(coloured, load_size=36, crop_size=32, batch=2, channels=channels, cache_dir=tmp_path)
        for batch in (data.batch(0), data.batch(1, decaying=True), data.samples(2)):
            assert tuple(images.shape[1] for images in batch) == channels
    both = UnpairedData(coloured, load_size=36, crop_size=32, batch=2, channels=3, cache_dir=tmp_path)
    data = UnpairedData(coloured, load_size=36, crop_size=32, batch=2, channels=(1, 3), cache_dir=tmp_path)
    (grey, colour), (repeated, same) = data.batch(5), both.batch(5)
    assert torch.equal(grey.expand(-1, 3, -1, -1), repeated)  # the files of A are grey
    assert torch.equal(colour, same)


def test_a_pair_has_two_numbers_of_channels(coloured, tmp_path):
    for pair in find_pairs(coloured / "test"):
        rainy, truth = pair.load(1, 3)
        assert torch.equal(rainy, load_image(pair.rainy, 1))
        assert torch.equal(truth, load_image(pair.clean, 3))
    strip = np.random.default_rng(2).integers(0, 256, (30, 60, 3), np.uint8)
    (tmp_path / "strips").mkdir()
    for name in "ab":
        Image.fromarray(np.concatenate([strip[:, :30]] * 2, axis=1)).save(tmp_path / "strips" / f"{name}.png")
    grey, colour = find_pairs(tmp_path / "strips")[0].load(1, 3)
    assert grey.shape == (1, 30, 30)
    assert torch.equal(colour, load_image(tmp_path / "strips" / "a.png")[:, :, :30])


@pytest.mark.parametrize("method", [CYCLEGAN, DCLGAN])
def test_from_grey_files_to_a_report(coloured, tmp_path, method, capsys):
    run, words = tmp_path / "run", ["--data", str(coloured), "network.in_channels=1", *TINY]
    watched = [
        f"data.validate={coloured}/test",
        "run.validate_every=1",
        "run.sample_every=2",
        "run.monitor_every=1",
        "run.log_every=1",
    ]
    assert main(["train", *method, "--out", str(run), *words, *watched]) == 0
    assert (run / "samples" / "step-00000002.png").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-2] | rows[-1]
    assert "response" in last
    assert "identity_psnr" not in last  # G_A cannot take colour

    for generator, source, mode in (("G_A", "testA", "RGB"), ("G_B", "testB", "L")):
        out = tmp_path / generator
        words = ["--generator", generator, "--out", str(out), "--device", "cpu"]
        assert main(["translate", str(run), str(coloured / source), *words]) == 0
        assert [Image.open(file).mode for file in sorted(out.rglob("*.png"))] == [mode, mode]

    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    words = ["--json", str(report), "--sheet", str(sheet), "--checkpoint", "last", "--device", "cpu"]
    assert main(["evaluate", str(run), "--data", str(coloured / "test"), *words]) == 0
    found = json.loads(report.read_text())
    assert found["mean"]["psnr_rgb"] == pytest.approx(last["held_out_psnr_rgb"], rel=1e-4)
    inputs = DerainingMetrics()
    for pair in find_pairs(coloured / "test"):
        inputs.update(load_image(pair.rainy, 3)[None], load_image(pair.clean, 3)[None])
    assert found["inputs"] == pytest.approx(inputs.compute())
    assert sheet.exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cut"], "must be equal, or loss.nce_idt=false"),
        (["cyclegan"], "must be equal, or loss.lambda_identity=0"),
        ([*CYCLEGAN, "data.rain=0.5"], "rain is rendered on pictures of 1 or 3 channels, the same for A and B"),
    ],
)
def test_what_needs_equal_channels_is_one_sentence(coloured, tmp_path, capsys, words, message):
    arguments = ["train", *words, "--data", str(coloured), "--out", str(tmp_path / "run"), "network.in_channels=1"]
    assert main([*arguments, *TINY]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rain_and_single_pictures(coloured, tmp_path):
    for channels in ((1, 3), 2, (2, 2)):
        with pytest.raises(DataError, match="the same for A and B, not"):
            RainedData(coloured, channels=channels)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("trainA", "trainB"):
        (tmp_path / name).mkdir()
        Image.fromarray(noise).save(tmp_path / name / "one.png")
    a, b = SinglePictureData(tmp_path, crop_size=16, batch=2, channels=(1, 3)).batch(0)
    assert (a.shape[1], b.shape[1]) == (1, 3)


def test_the_monitor_leaves_out_what_the_generator_cannot_take():
    method = SimpleNamespace(translate=lambda x: x.expand(-1, 3, -1, -1).contiguous(), eval=lambda: None)
    watch = Monitor({}, (), Batch(torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)))
    assert watch.look(method) == []
    assert list(watch.metrics()) == ["response", "warnings"]


def test_an_own_data_set_is_told_both_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "greyness.py").write_text(
        "import torch\n"
        "class Data:\n"
        "    steps_per_epoch = 1\n"
        "    def __init__(self, options, *, channels, **rest): self.channels = channels\n"
        "    def batch(self, step, *, decaying=False):\n"
        "        return tuple(torch.zeros(1, c, 8, 8) for c in self.channels)\n"
        "    samples = batch\n"
        "    def digest(self): return ''\n"
        "class Same(Data):\n"
        "    def batch(self, step, *, decaying=False): return torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)\n"
    )
    options = {"batch": 1, "seed": 0, "rank": 0, "world": 1, "device": torch.device("cpu")}
    data = open_own("greyness.py:Data", SimpleNamespace(batch=1), channels=(1, 3), **options)
    assert [images.shape[1] for images in data.batch(0)] == [1, 3]
    with pytest.raises(CodeError, match=r"two float32 tensors \(1, 1 and 3, height, width\)"):
        open_own("greyness.py:Same", SimpleNamespace(batch=1), channels=(1, 3), **options)
