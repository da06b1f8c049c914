"""Image sizes are refused before training if, and only if, a training step fails with them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.data.rained import RainedData
from fastnce.data.single import SinglePictureData
from fastnce.engine.options import OptimOptions
from fastnce.engine.samples import padded
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.methods.checks import extremes
from tests.engine.test_engine import SMALL
from tests.methods.test_methods_more import build

UNET = {"network": {"generator": "unet_128", "width": 1}, "nce_layers": [0, 2]}
FEW = {"network": {"generator": "resnet_4blocks", "width": 2, "discriminator_width": 2}, "nce_layers": [4, 12]}
ALONE = {"nce_idt": False, "lambda_identity": 0.0}

# (preset, changes, sizes of A, sizes of B, part of the error; empty if every step succeeds)
CASES = [
    ("fastcut", FEW, [(32, 32), (48, 40)], [(40, 32)], ""),
    ("fastcut", FEW, [(32, 32)], [(8, 20)], "a picture of 8x20, do not fit network D, take others"),
    ("fastcut", FEW, [(32, 4)], [(32, 32)], "a picture of 32x4, do not fit network G, take others"),
    ("fastcut", UNET, [(128, 128)], [(40, 36)], ""),  # G never sees B
    ("fastcut", UNET, [(64, 128)], [(128, 128)], "do not fit generator G: both sides must be multiples of 128"),
    (
        "cut",
        FEW,
        [(32, 48)],
        [(48, 32)],
        "cannot go through G in one batch, as loss.nce_idt=true needs: take others, or",
    ),
    ("cut", FEW, [(32, 48), (32, 32)], [(32, 48)], "a picture of 32x32, cannot go through G in one batch"),
    ("cut", FEW | {"lambda_nce": 0.0}, [(32, 48)], [(48, 32)], ""),
    ("sincut", ALONE, [(32, 32)], [(64, 32)], "a picture of 64x32, do not fit network D"),
    ("dclgan", FEW, [(32, 32)], [(64, 48), (48, 32)], ""),
    (
        "dclgan",
        FEW | {"patches": 256},
        [(32, 32)],
        [(64, 48)],
        "but both directions contrast as many: lower loss.patches",
    ),
    (
        "simdcl",
        FEW | {"patches": 65},
        [(32, 32)],
        [(32, 32)],
        "pictures such as a picture of 32x32, have only 64 locations at layer",
    ),
    ("cyclegan", FEW, [(32, 32), (48, 32)], [(32, 32)], "loss.pool_size=50 remembers fakes of one size"),
    ("cyclegan", FEW, [(32, 32)], [(32, 32), (48, 32)], "loss.pool_size=50 remembers fakes of one size"),
    ("cyclegan", FEW | {"pool_size": 0}, [(32, 32), (48, 32)], [(40, 36)], ""),
    (
        "cyclegan",
        FEW | {"pool_size": 0, "gan_mode": "wgangp"},
        [(32, 32)],
        [(40, 36)],
        "WGAN-GP needs real and fake",
    ),
    ("cyclegan", FEW | {"pool_size": 0, "gan_mode": "wgangp"}, [(32, 40)], [(32, 40)], ""),
]


def named(sizes):
    return {size: f"pictures such as a picture of {size[0]}x{size[1]}," for size in sizes}


def picture(size):
    return torch.rand(1, 3, *size) * 2 - 1


@pytest.mark.parametrize(("preset", "changes", "a", "b", "message"), CASES)
def test_sizes_are_refused_if_and_only_if_a_step_fails(preset, changes, a, b, message):
    method = build(preset, **changes).float()
    method.check_options(1 if preset != "sincut" else 2)
    images = 2 if preset == "sincut" else 1
    if message:
        with pytest.raises(ValueError, match=message) as caught:
            method.check_sizes(images, named(a), named(b), "take others")
        assert "\n" not in str(caught.value)
        assert ",:" not in str(caught.value)
    else:
        method.check_sizes(images, named(a), named(b), "take others")
    step = Step(method, OptimOptions())
    pairs = [Batch(*(picture(size).expand(images, -1, -1, -1) for size in pair)) for pair in itertools.product(a, b)]
    failed = []
    for batch in pairs:
        try:
            losses = step.run(batch, Draws())
            failed.append(not all(bool(value.isfinite()) for value in losses.values()))
        except (RuntimeError, ValueError):
            failed.append(True)
    assert any(failed) == bool(message)


def test_a_layer_of_one_location_has_nothing_to_contrast():
    """The map of the deepest layer has one pixel. With one row, the loss is log(1) = 0, whatever G does."""
    deep = {"network": {"generator": "unet_128"}, "nce_layers": [0, 7]}
    with pytest.raises(ValueError, match="have a single location at layer 7 of loss.nce_layers, which leaves nothing"):
        build("fastcut", **deep).check(1, 128, 128)
    build("fastcut", **deep, negatives="batch").check(2, 128, 128)
    build("fastcut", **deep).check(1, 128, 256)


def test_ranks_that_exchange_keys_need_equal_numbers():
    method = build("fastcut", **FEW, patches=256, negatives="batch", gather_negatives=True)
    one, two = named([(32, 32)]), named([(32, 32), (64, 48)])
    method.check_sizes(1, one, two, "take others")
    with pytest.raises(ValueError, match=r"loss\.gather_negatives=true exchanges as many with every rank"):
        method.check_sizes(1, two, one, "take others")


def test_extremes_equal_their_definition():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 40):
        sizes = {(int(h), int(w)) for h, w in rng.integers(1, 12, (count, 2))}
        expected = {
            size
            for size in sizes
            if not any(o != size and o[0] <= size[0] and o[1] <= size[1] for o in sizes)
            or not any(o != size and o[0] >= size[0] and o[1] >= size[1] for o in sizes)
        }
        found = extremes(sizes)
        assert set(found) == expected
        assert len(found) == len(expected)


@pytest.mark.parametrize("size", [(32, 32), (30, 33), (5, 2), (130, 4)])
def test_samples_of_any_size_are_padded_like_numpys_edge_mode(size):
    method = build("cyclegan")  # multiples of 4, at least 8
    a, b = picture(size), picture((16, 16))
    high, wide = (max(-(-side // 4) * 4, 8) for side in size)
    edges = ((0, 0), (0, 0), (0, high - size[0]), (0, wide - size[1]))
    made = padded(method, a, b)
    assert np.array_equal(made.a.numpy(), np.pad(a.numpy(), edges, mode="edge"))
    assert torch.equal(made.b, b)


def write(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = height * 1000 + width
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def odd(tmp_path) -> Path:
    """Whole pictures: A of 37x50 and 64x40, B of 33x34; their sides become multiples of 4."""
    root = tmp_path / "odd"
    for name, size in (("trainA/a", (37, 50)), ("trainA/b", (64, 40)), ("trainB/c", (33, 34))):
        write(root / f"{name}.png", *size)
    return root


NONE = [*SMALL, "data.preprocess=none"]


def refused(capsys, run: Path, *arguments: str) -> str:
    assert main([*arguments, "--out", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    assert not run.exists()
    return message


def test_whole_pictures_are_checked_before_training(odd, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "fastcut", "--data", str(odd), *NONE, "run.steps=1"]
    message = refused(capsys, run, *train, "network.generator=unet_128", "loss.nce_layers=0,2")
    where = odd / "trainA" / "a.png"
    assert f"pictures of 48x36, such as {where}, do not fit generator G: both sides must be multiples of 128" in message
    assert "resize the pictures or set data.preprocess=resize_and_crop" in message
    assert "nothing to contrast with loss.patches=1" in refused(capsys, run, *train, "loss.patches=1")
    message = refused(capsys, run, "train", "cut", *train[2:])
    assert f"pictures of 48x36, such as {where}, and pictures of 40x64, such as {odd / 'trainA' / 'b.png'}" in message
    write(odd / "trainB" / "thin.png", 40, 9)
    message = refused(capsys, run, *train)
    assert f"pictures of 8x40, such as {odd / 'trainB' / 'thin.png'}, do not fit network D" in message


def test_whole_pictures_and_samples_of_odd_sizes_train(odd, tmp_path, capsys):
    """The sides of samples of 30x30 are not multiples of 4; without padding G would fail after the first step."""
    run = tmp_path / "run"
    train = ["train", "fastcut", "--data", str(odd), "--out", str(run), "--quiet", *NONE]
    more = ["data.crop_size=30", "run.steps=4", "run.sample_every=2", "run.monitor_every=2"]
    more += ["optim.n_epochs=1", "optim.n_epochs_decay=1"]
    assert main([*train, *more]) == 0
    grid = Image.open(run / "samples" / "step-00000004.png")
    assert grid.size == (3 * 32 + 4 * 4, 14 + (32 + 4) + 4)  # one picture, as B has one


def test_later_errors_of_a_run_are_found_before_it_writes(odd, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "fastcut", "--data", str(odd), *SMALL, "run.steps=1"]
    message = refused(capsys, run, *train, "run.validate_every=1", f"data.validate={odd}")
    assert str(odd) in message
    assert "data.batch=2 cannot be computed in optim.accumulate=4 equal parts" in refused(
        capsys, run, *train, "data.batch=2", "optim.accumulate=4"
    )
    assert "every term has weight 0" in refused(capsys, run, *train, "loss.lambda_gan=0", "loss.lambda_nce=0")
    write(odd / "testA" / "t.png", 20, 20)
    (odd / "testB").mkdir()
    (odd / "testB" / "t.png").write_bytes(b"no picture")
    message = refused(capsys, run, *train, "run.sample_every=500")
    assert f"{odd / 'testB' / 't.png'} is not a picture" in message
    assert main([*train, "--out", str(run), "--quiet", "run.monitor_every=0"]) == 0  # nothing reads the broken sample


def test_sizes_of_rained_pictures_are_those_of_both_domains(odd, tmp_path):
    options = {"preprocess": "none", "cache_dir": tmp_path / "cache"}
    a, b = RainedData(odd, share=0.5, **options).sizes()
    assert set(a) == {(36, 48), (64, 40), (32, 32)}
    assert set(b) == {(32, 32)}
    assert a[36, 48] == odd / "trainA" / "a.png"
    a, b = RainedData(odd, share=1.0, **options).sizes()
    assert a == b == {(32, 32): odd / "trainB" / "c.png"}
    a, b = RainedData(odd, share=0.5, load_size=20, crop_size=(16, 20), cache_dir=tmp_path / "cache").sizes()
    assert list(a) == list(b) == [(16, 20)]


def test_the_samples_of_a_single_picture_suit_any_generator(tmp_path):
    for domain in "AB":
        write(tmp_path / f"train{domain}" / "one.png", 70, 90)
    data = SinglePictureData(tmp_path, crop_size=16, batch=2)
    method = build("fastcut", **UNET).float()
    made = padded(method, *data.samples(1))
    assert made.a.shape == made.b.shape == (1, 3, 128, 128)
    assert torch.equal(made.a[:, :, :68, :88], data.samples(1)[0])
