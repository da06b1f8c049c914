"""`data.preprocess` compared with a plain writing of the published transform in PIL, pixel by pixel."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.config.options import batch_sizes
from fastnce.data import DataError
from fastnce.data.target import PREPROCESS, SINGLE, Target, named
from fastnce.data.unpaired import UnpairedData
from fastnce.engine.stored import follow
from tests.engine.test_engine import SMALL

BICUBIC = Image.Resampling.BICUBIC
SIZES = [(23, 37), (41, 30), (30, 30), (17, 64), (33, 18), (26, 16)]
THIN = [(9, 37), (38, 13), (11, 7)]  # a side or both are below the crop
LOAD, CROP = 22, 16


def published(image: Image.Image, words: str, load: int, crop: int, place: tuple[float, float], mirrored: bool):
    """The published transform for one image; `place` are the draws in [0, 1) of its random position, x and y."""

    def taken(positions: int, draw: float) -> int:
        return int(draw * positions)  # randint over `positions` values

    width, height = image.size
    if "resize" in words:
        image = image.resize((load, load), BICUBIC)
    elif "scale_width" in words:
        if not (width == load and height >= crop):
            image = image.resize((load, int(max(load * height / width, crop))), BICUBIC)
    elif "scale_shortside" in words and min(width, height) < load:
        scale = load / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), BICUBIC)
    width, height = image.size
    if "crop" in words:
        x, y = taken(width - crop + 1, place[0]), taken(height - crop + 1, place[1])
        image = image.crop((x, y, x + crop, y + crop))
    width, height = image.size
    if "trim" in words:
        x = taken(width - crop, place[0]) if width > crop else 0
        y = taken(height - crop, place[1]) if height > crop else 0
        image = image.crop((x, y, x + min(width, crop), y + min(height, crop)))
    width, height = image.size
    even = (int(round(width / 4) * 4), int(round(height / 4) * 4))
    if even != (width, height):
        image = image.resize(even, BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def write(path: Path, height: int, width: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = height * 1000 + width
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def folder(root: Path, sizes: list[tuple[int, int]], other: list[tuple[int, int]] | None = None) -> Path:
    for domain, each in (("A", sizes), ("B", other or sizes)):
        for number, size in enumerate(each):
            write(root / f"train{domain}" / f"{number}.png", *size)
    return root


def pixels(one: torch.Tensor) -> np.ndarray:
    """(height, width, 3) uint8 of one image in [-1, 1]."""
    return one.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", PREPROCESS)
def test_every_mode_gives_the_published_pixels(mode, late, tmp_path):
    sizes = SIZES + THIN if mode != "crop" else SIZES  # published cropping fails on smaller images
    data = UnpairedData(folder(tmp_path, sizes), load_size=LOAD, crop_size=CROP, preprocess=mode, seed=3)
    load = CROP if late else LOAD
    shapes = set()
    for step in range(2 * len(sizes)):
        for domain, draw, batch in zip("AB", data.order.draw(step), data.batch(step, decaying=late), strict=True):
            image = Image.open(tmp_path / f"train{domain}" / f"{draw.index[0]}.png")
            place = (draw.left[0], draw.top[0])
            wanted = published(image, mode, load, CROP, place, bool(draw.flip[0]))
            assert np.array_equal(pixels(batch[0]), np.asarray(wanted)), (image.size, place)
            shapes.add(tuple(batch.shape[2:]))
    found = data.sizes(decaying=late)
    assert shapes <= {*found[0], *found[1]}
    fixed = (data.target.decaying() if late else data.target).fixed
    assert fixed is None or shapes == {fixed}
    assert data.one_size == (data.target.fixed is not None and data.target.fixed == data.target.decaying().fixed)


def test_a_trim_never_takes_the_last_position_and_a_crop_does(tmp_path):
    """The published trim draws from one position fewer than there are."""
    folder(tmp_path, [(18, 17)])
    seen = {}
    for mode in ("trim", "crop"):
        data = UnpairedData(tmp_path, load_size=16, crop_size=16, preprocess=mode, flip=False, batch=64)
        image = np.asarray(Image.open(tmp_path / "trainA" / "0.png"))
        windows = {(y, x): image[y : y + 16, x : x + 16] for y in range(3) for x in range(2)}
        batch = [pixels(one) for one in data.batch(0)[0]]
        seen[mode] = {at for one in batch for at, window in windows.items() if np.array_equal(one, window)}
    assert seen == {"trim": {(0, 0), (1, 0)}, "crop": {(y, x) for y in range(3) for x in range(2)}}


def test_the_size_after_two_resizes_is_the_published_one():
    """Sizes only, for many images: which modes round, trim and keep."""
    for mode, (height, width) in itertools.product(PREPROCESS, itertools.product(range(6, 70, 5), repeat=2)):
        if mode == "crop" and min(height, width) < CROP:
            continue
        target = Target.checked(mode, LOAD, CROP, 3)
        shown = target.shown(*target.size(height, width))
        wanted = published(Image.new("L", (width, height)), mode, LOAD, CROP, (0.3, 0.6), False)
        assert shown == (wanted.height, wanted.width), (mode, height, width)
        assert target.fixed in (None, shown)


def operations(words: str) -> list[str]:
    """The operations that the published transform finds in a value, in its order."""
    scaling = [word for word in ("resize", "scale_width", "scale_shortside") if word in words][:1]
    return scaling + [word for word in ("zoom", "crop", "patch", "trim") if word in words]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_published_value_has_a_name_here(count):
    words = ("resize", "scale_width", "scale_shortside", "crop", "trim", "and", "none", "scale_longside")
    for chosen in itertools.permutations(words, count):
        value = "_".join(chosen)
        assert named(value) in PREPROCESS
        wanted = operations(value)
        if "crop" in wanted and "trim" in wanted:
            wanted.remove("trim")  # the crop has the size to which it would be trimmed
        assert operations(named(value)) == wanted
    assert named("") == "none"
    assert all(named(mode) == mode for mode in (*PREPROCESS, SINGLE))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fixsize", "fixsize needs a size that the published data sets do not give; data.preprocess=resize"),
        ("zoom_and_crop", "zoom and patch are only known together, as zoom_and_patch of SinCUT"),
        ("patch", "data.random_scale_max=1 leaves the zoom out"),
        ("resize_zoom_patch", "--preprocess resize_zoom_patch: zoom and patch"),
    ],
)
def test_a_value_that_has_no_name_is_refused_with_the_reason(value, words):
    with pytest.raises(ValueError, match=words):
        named(value)


def test_batches_need_one_size_in_both_halves(tmp_path):
    options = {"load_size": 24, "crop_size": 4, "preprocess": "scale_width", "batch": 2}
    folder(tmp_path / "far", [(40, 48), (36, 48)])
    with pytest.raises(DataError, match=r"batch=2 should be 1 with .*scale_width, which gives pictures of several"):
        UnpairedData(tmp_path / "far", **options)
    near = folder(tmp_path / "near", [(30, 48), (32, 48)])
    data = UnpairedData(near, **{**options, "batch": 1})
    assert [list(sizes) for sizes in data.sizes()] == [[(16, 24)], [(16, 24)]]
    assert not data.one_size  # 16x24 at first, then 4x4
    assert [list(sizes) for sizes in data.sizes(decaying=True)] == [[(4, 4)], [(4, 4)]]
    late = folder(tmp_path / "late", [(60, 48), (66, 48)])  # both are 24x40 at first: crop_size is the least height
    with pytest.raises(DataError, match=r"trainA/0\.png 40x48, .*trainA/1\.png 40x56"):
        UnpairedData(late, **{**options, "crop_size": 40})


def test_images_of_one_size_may_be_batched_whole(tmp_path):
    root = folder(tmp_path, [(22, 30), (22, 30), (22, 30)])
    for mode, shape in (("none", (24, 32)), ("trim", (16, 16)), ("scale_shortside", (24, 32))):
        data = UnpairedData(root, load_size=16, crop_size=16, preprocess=mode, batch=3)
        a, b = data.batch(0)
        assert a.shape == b.shape == (3, 3, *shape), mode
        assert data.one_size


def test_modes_with_the_same_pixels_share_a_cache_and_others_do_not(tmp_path):
    root = folder(tmp_path, SIZES)
    files = {}
    for mode in PREPROCESS:
        data = UnpairedData(root, load_size=LOAD, crop_size=CROP, preprocess=mode)
        files[mode] = set(data.cached())
    for scaling in ("resize", "scale_width", "scale_shortside"):
        assert files[f"{scaling}_and_trim"] == files[f"{scaling}_and_crop"]
    assert len(set().union(*files.values())) == 2 * (len(PREPROCESS) - 3)


RUN = [*SMALL, "run.steps=2", "optim.n_epochs=1", "optim.n_epochs_decay=1", "run.sample_every=0", "run.monitor_every=0"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cut", ["data.preprocess=resize", "data.load_size=34"]),
        ("fastcut", ["data.preprocess=scale_width_and_trim"]),
        ("fastcut", ["data.preprocess=trim", "data.crop_size=32"]),
        ("fastcut", ["data.preprocess=scale_width", "data.batch=1"]),
    ],
)
def test_a_run_trains_in_both_halves(method, options, tmp_path):
    root = folder(tmp_path / "data", [(50, 48)], [(44, 64)])  # an epoch is one step
    assert main(["train", method, "--data", str(root), "--out", str(tmp_path / "run"), "--quiet", *RUN, *options]) == 0
    assert follow(tmp_path / "run" / "checkpoints" / "latest").name == "step-00000002"


def refused(capsys, tmp_path: Path, method: str, *arguments: str) -> str:
    options = [option for option in RUN if method != "cyclegan" or "loss." not in option]
    assert main(["train", method, "--out", str(tmp_path / "run"), *options, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    return message


def test_sizes_of_both_halves_are_checked_before_training(tmp_path, capsys):
    root = folder(tmp_path / "data", [(50, 48), (40, 48)])
    train = ("--data", str(root), "data.preprocess=resize")
    message = refused(capsys, tmp_path, "cyclegan", *train, "data.load_size=40", "data.crop_size=32")
    assert "images of 32x32 beside images of 40x40: set data.load_size and data.crop_size to one value" in message
    unet = ("network.generator=unet_128", "loss.nce_layers=0,2", "data.load_size=128", "data.crop_size=32")
    assert "images of 32x32 do not fit generator G" in refused(capsys, tmp_path, "fastcut", *train, *unet)
    train = ("--data", str(root), "data.preprocess=scale_width", "data.crop_size=32", "data.load_size=128")
    message = refused(capsys, tmp_path, "fastcut", *train, *unet[:2])
    assert f"pictures of 128x132, such as {root / 'trainA' / '0.png'}, do not fit generator G" in message
    assert "data.preprocess must be one of" in refused(capsys, tmp_path, "cut", "data.preprocess=zoom_and_crop")
    assert "multiples of 4" in refused(capsys, tmp_path, "cut", "data.preprocess=trim", "data.crop_size=30")


def test_the_sizes_of_batches_are_known_from_the_options():
    def sizes(*options: str) -> list[tuple[int, int]]:
        return batch_sizes(resolve("cut", overrides=options).data)

    assert sizes() == sizes("data.preprocess=resize_and_trim") == [(256, 256)]
    assert sizes("data.preprocess=resize") == [(288, 288), (256, 256)]
    assert sizes("data.preprocess=resize", "data.load_size=256") == [(256, 256)]
    assert sizes("data.preprocess=none") == sizes("data.preprocess=trim") == sizes("data.preprocess=scale_width") == []
    assert batch_sizes(resolve("sincut").data) == [(64, 64)]
