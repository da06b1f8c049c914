"""Folders, decoding, the cache, the order of pictures and the device-side augmentation."""

import errno
import multiprocessing
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import DataError, build_cache, find_images, load_image, save_image
from fastnce.data import cache as cache_module
from fastnce.data.augment import PictureStore, gather_crops
from fastnce.data.cache import Target, cache_place, open_cache
from fastnce.data.folder import Folder, domain_folders, read_picture, resize_picture
from fastnce.data.order import Order
from fastnce.data.unpaired import UnpairedData

SMALL = {"load_size": 20, "crop_size": 16}


def noise(height, width, channels=3, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """5 pictures in A and 7 in B, all of different sizes."""
    folder = tmp_path / "set"
    for domain, count in (("trainA", 5), ("trainB", 7)):
        for i in range(count):
            write(folder / domain / f"{i}.png", noise(24 + 3 * i, 40 - 2 * i, seed=100 * count + i))
    return folder


def normalised(picture):
    """(H, W, C) to (C, H, W) as ToTensor and Normalize(0.5, 0.5) do it."""
    top = 255.0 if picture.dtype == np.uint8 else 65535.0
    return torch.from_numpy((picture.astype(np.float64) / top - 0.5) / 0.5).permute(2, 0, 1).float()


def close(got, expected):
    """Equal up to float32 rounding in the conversion to [-1, 1]; one step of 16 bits is 3e-5."""
    return got.shape == expected.shape and (got - expected).abs().max().item() <= 2e-7


def by_hand(file, load, crop, top, left, mirrored):
    """Resize, crop at a relative position, mirror and normalise with PIL and NumPy only."""
    image = Image.open(file).convert("RGB").resize((load[1], load[0]), Image.Resampling.BICUBIC)
    y, x = int(top * (load[0] - crop[0] + 1)), int(left * (load[1] - crop[1] + 1))
    image = image.crop((x, y, x + crop[1], y + crop[0]))
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return normalised(np.asarray(image))


# --- files ------------------------------------------------------------------------------------------------------------


def test_find_images_sorted_recursive_hidden_ignored(tmp_path):
    names = ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tiff", "e.npy", "f.bmp"]
    for name in [*names, ".hidden.png", ".fastnce-cache/x.png", "notes.txt", "b.png.bak"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".npy"])
def test_lossless_formats_round_trip(tmp_path, suffix):
    picture = noise(9, 13)
    save_image(normalised(picture), tmp_path / f"x{suffix}")
    assert np.array_equal(read_picture(tmp_path / f"x{suffix}"), picture)
    assert close(load_image(tmp_path / f"x{suffix}"), normalised(picture))
    assert os.listdir(tmp_path) == [f"x{suffix}"]


def test_jpeg_is_what_pil_decodes(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8)[:, :, None].repeat(3, 2)
    save_image(normalised(smooth), tmp_path / "x.jpg")
    assert np.array_equal(read_picture(tmp_path / "x.jpg"), np.asarray(Image.open(tmp_path / "x.jpg")))
    assert np.abs(read_picture(tmp_path / "x.jpg").astype(int) - smooth).max() <= 3


def test_save_rounds_clips_and_makes_folders(tmp_path):
    values = torch.tensor([-3.0, -1.0, -1 + 0.6 / 127.5, -1 + 1.4 / 127.5, 1.0, 7.0, float("nan")]).view(1, 1, -1)
    save_image(values, tmp_path / "new" / "x.png")
    assert np.asarray(Image.open(tmp_path / "new" / "x.png")).tolist() == [[0, 0, 1, 1, 255, 255, 0]]


def test_save_leaves_nothing_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(self, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("shape", "name", "words"),
    [((4, 4), "x.png", "channels, height, width"), ((3, 4, 4), "x.gif", "written as"), ((5, 4, 4), "x.png", "npy")],
)
def test_save_errors(tmp_path, shape, name, words):
    with pytest.raises(DataError, match=words):
        save_image(torch.zeros(shape), tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_three_channels_and_luma_are_pils(tmp_path, mode):
    image = Image.fromarray(noise(8, 12, 4), "RGBA").convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    assert np.array_equal(read_picture(path, 3), np.asarray(image.convert("RGB")))
    assert np.array_equal(read_picture(path, 1)[:, :, 0], np.asarray(image.convert("L")))


def test_four_and_more_channels(tmp_path):
    rgba = noise(8, 12, 4)
    write(tmp_path / "x.png", rgba)
    assert np.array_equal(read_picture(tmp_path / "x.png", 4), rgba)
    assert np.array_equal(read_picture(tmp_path / "x.png", 3), rgba[:, :, :3])  # alpha dropped, not blended
    six = noise(8, 12, 6)
    write(tmp_path / "x.npy", six)
    assert np.array_equal(read_picture(tmp_path / "x.npy", 6), six)
    resized = resize_picture(rgba, 5, 7)
    for c in range(4):
        alone = Image.fromarray(rgba[:, :, c]).resize((7, 5), Image.Resampling.BICUBIC)
        assert np.array_equal(resized[:, :, c], np.asarray(alone))


def test_array_luma_is_pils(tmp_path):
    picture = noise(8, 12)
    write(tmp_path / "x.npy", picture)
    write(tmp_path / "y.npy", picture.astype(np.uint16) * 257)
    luma = np.asarray(Image.fromarray(picture).convert("L"))
    assert np.array_equal(read_picture(tmp_path / "x.npy", 1)[:, :, 0], luma)
    deep = read_picture(tmp_path / "y.npy", 1)[:, :, 0]
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - luma).max() <= 0.51


def test_sixteen_bits_are_kept(tmp_path):
    grey = noise(8, 12, 0, np.uint16)
    for name in ("x.png", "x.tif", "x.npy"):
        read = read_picture(write(tmp_path / name, grey), 1)
        assert read.dtype == np.uint16
        assert np.array_equal(read[:, :, 0], grey)
        assert np.array_equal(read_picture(tmp_path / name, 3), grey[:, :, None].repeat(3, 2))
        expected = torch.from_numpy(grey / 32767.5 - 1).float()
        assert close(load_image(tmp_path / name, 1)[0], expected)


def test_sixteen_bits_are_resized_rounded_and_clipped():
    step = np.where(np.arange(64) < 32, 0, 65535)[None].repeat(4, 0)  # bicubic overshoots on both sides of it
    for deep, height, width in ((step.astype(np.uint16), 4, 160), (noise(9, 14, 0, np.uint16), 13, 31)):
        exact = np.asarray(Image.fromarray(deep.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
        resized = resize_picture(deep[:, :, None], height, width)
        assert resized.dtype == np.uint16
        assert np.abs(resized[:, :, 0] - exact.clip(0, 65535)).max() <= 0.5
    shallow = Image.fromarray((step // 257).astype(np.uint8)).resize((160, 4), Image.Resampling.BICUBIC)
    grown = resize_picture(step.astype(np.uint16)[:, :, None], 4, 160)[:, :, 0]
    assert (grown.min(), grown.max()) == (0, 65535)
    assert np.abs(grown / 257 - np.asarray(shallow)).max() <= 0.51


def test_sixteen_bit_colour_png_warns_and_reads_the_high_byte(tmp_path):
    picture = noise(5, 6, 3, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in picture)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0))
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.warns(UserWarning, match="read at 8 bits"):
        assert np.array_equal(read_picture(path), (picture >> 8).astype(np.uint8))
    assert np.array_equal(read_picture(write(tmp_path / "x.npy", picture)), picture)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif"])
def test_exif_orientation_is_applied(tmp_path, name):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / name, exif=exif)
    shown = read_picture(tmp_path / name)
    assert shown.shape == (32, 16, 3)
    assert shown[:14].min() > 200
    assert shown[18:].max() < 50


def test_load_image_size_is_pils_bicubic(tmp_path):
    picture = noise(33, 21)
    path = write(tmp_path / "x.png", picture)
    for size, (height, width) in ((16, (16, 16)), ((12, 40), (12, 40))):
        expected = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        assert close(load_image(path, size=size), normalised(expected))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_folder_errors(tmp_path, root):
    with pytest.raises(DataError, match=r"no folder .*nowhere.*trainA and trainB"):
        UnpairedData(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder testA in .*set, which holds trainA, trainB"):
        UnpairedData(root, "test")
    (root / "testA").mkdir()
    (root / "testB").mkdir()
    with pytest.raises(DataError, match=r"no picture in .*testA"):
        UnpairedData(root, "test")
    for function in (find_images, build_cache):
        with pytest.raises(DataError, match="no folder"):
            function(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_size": 12, "crop_size": 16}, "data.load_size=12 is too small"),
        ({"load_size": (40, 12), "crop_size": 16}, r"data.load_size=\[40, 12\] is too small for data.crop_size=16"),
        ({"load_size": 20, "crop_size": 15}, "multiples of 4"),
        ({"preprocess": "zoom"}, "data.preprocess=zoom is none of resize_and_crop"),
        ({"crop_size": (16, 16, 16)}, "crop_size should be"),
        ({"load_size": 0}, "load_size should be"),
        ({"load_size": 28.6}, "load_size should be"),
        ({"channels": 0}, "channels should be"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 2, "preprocess": "none"}, "preprocess=none, which gives pictures of several sizes"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_setting_errors(root, options, words):
    with pytest.raises(DataError, match=words):
        UnpairedData(root, **options)


def bad_pictures(folder):
    """Write one file per kind of defect, for channels=3."""
    whole = write(folder / "ok.png", noise(40, 40)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(noise(64, 64)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    Image.fromarray(noise(8, 8, 0).astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(folder / "deep.tif")
    write(folder / "five.npy", noise(8, 8, 5))
    write(folder / "float.npy", np.zeros((8, 8)))
    write(folder / "none.npy", np.zeros((0, 8), np.uint8))
    (folder / "cut.npy").write_bytes((folder / "five.npy").read_bytes()[:150])
    return {
        "cut.png": "cannot be decoded: .*truncated",
        "cut.jpg": "cannot be decoded: .*truncated",
        "empty.png": r"is empty \(0 bytes\)",
        "text.png": "is not a picture",
        "gone.png": "there is no file",
        "float.tif": "32-bit floats",
        "deep.tif": "holds 32-bit signed integers",
        "five.npy": "has 5 channels, which cannot be made to match the 3 that the network takes",
        "float.npy": r"holds float64 of shape \(8, 8\)",
        "none.npy": "no pixels",
        "cut.npy": "cannot be decoded",
    }


def test_the_error_of_each_kind_of_bad_file(tmp_path):
    for name, words in bad_pictures(tmp_path).items():
        with pytest.raises(DataError, match=words) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        DataError,
        match=r"3 channels \(RGB\), which cannot be made to match the 4 that the network takes",
    ):
        read_picture(tmp_path / "ok.png", 4)


def test_enormous_pictures(tmp_path, monkeypatch):
    write(tmp_path / "x.png", noise(64, 64))
    write(tmp_path / "x.npy", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("x.png", "x.npy"):
        with pytest.raises(DataError, match=r"too large.*limit of 2,000;.*FASTNCE_MAX_PIXELS=4096 "):
            read_picture(tmp_path / name)


def test_all_bad_files_of_both_domains_are_named_before_training(root, tmp_path):
    bad = bad_pictures(root / "trainA")
    (root / "trainB" / "void.jpg").touch()
    with pytest.raises(DataError) as caught:
        UnpairedData(root, cache_dir=tmp_path / "c", **SMALL)
    text = str(caught.value)
    assert all(str(root / "trainA" / name) in text for name in bad)
    assert "11 of 17 pictures" in text
    assert str(root / "trainB" / "void.jpg") in text
    assert not list((tmp_path / "c").glob("*.bin*"))


def test_skip_bad_skips_and_records(root, tmp_path):
    clean = UnpairedData(root, cache_dir=tmp_path / "clean", **SMALL)
    expected = [clean.batch(step, decaying=d)[0] for step in range(9) for d in (False, True)]
    names = ["0a.png", "zz.jpg"]
    for name in names:
        (root / "trainA" / name).write_text("broken")
    for _ in range(2):  # built, then from the cache
        data = UnpairedData(root, cache_dir=tmp_path / "c", skip_bad=True, **SMALL)
        assert [path for path, _ in data.skipped] == [root / "trainA" / name for name in names]
        assert all("is not a picture" in reason for _, reason in data.skipped)
        assert (data.size_a, data.size_b) == (5, 7)
        got = [data.batch(step, decaying=d)[0] for step in range(9) for d in (False, True)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(DataError, match="2 of 7 pictures"):  # without skip_bad, the cache does not hide them
        UnpairedData(root, cache_dir=tmp_path / "c", **SMALL)


def test_nothing_usable(root, tmp_path):
    for file in (root / "trainB").iterdir():
        file.write_text("broken")
    with pytest.raises(DataError, match="7 of 7 pictures"):
        UnpairedData(root, cache_dir=tmp_path, skip_bad=True, **SMALL)


def test_tiny_picture_without_resizing(root, tmp_path):
    write(root / "trainA" / "tiny.png", noise(2, 9))
    with pytest.raises(DataError, match=r"tiny.png is 9x2"):
        UnpairedData(root, cache_dir=tmp_path, preprocess="none")


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_is_a_fresh_permutation_each_epoch():
    order = Order(5, 12, 2, seed=3)
    assert (order.epoch_size, order.steps_per_epoch) == (12, 6)
    epochs = []
    for epoch in range(3):
        seen = np.concatenate([order.draw(epoch * 6 + i)[0].index for i in range(6)])
        assert sorted(seen) == sorted(i % 5 for i in range(12))
        assert sorted(order.permutation(epoch)) == list(range(12))
        assert np.array_equal(seen, order.permutation(epoch) % 5)
        epochs.append(tuple(order.permutation(epoch)))
    assert len(set(epochs)) == 3
    assert tuple(Order(5, 12, 2, seed=4).permutation(0)) != epochs[0]


def test_partial_batch_is_dropped_and_a_small_set_still_gives_a_step():
    order = Order(10, 7, 3, seed=0, world=2)
    assert order.steps_per_epoch == 1
    assert len(set(order.permutation(0)[:6])) == 6
    tiny = Order(2, 1, 5, seed=0)
    assert tiny.steps_per_epoch == 1
    assert set(tiny.draw(0)[0].index) == {0, 1}
    assert tiny.draw(1)[1].index.tolist() == [0] * 5


def test_draws_are_uniform_and_independent():
    order = Order(4, 8, 64, seed=11)
    draws = [order.draw(step) for step in range(250)]
    count = 250 * 64
    a = {name: np.concatenate([getattr(d[0], name) for d in draws]) for name in ("index", "top", "left", "flip")}
    b = {name: np.concatenate([getattr(d[1], name) for d in draws]) for name in ("index", "top", "left", "flip")}
    # chi-square with 7 degrees of freedom: one seed in a thousand exceeds 24.3, and this seed is fixed
    assert ((np.bincount(b["index"], minlength=8) - count / 8) ** 2 / (count / 8)).sum() < 24.3
    columns = [a["top"], a["left"], a["flip"], b["index"], b["top"], b["left"], b["flip"], a["index"]]
    for uniform in (a["top"], a["left"], b["top"], b["left"]):
        assert uniform.min() >= 0
        assert uniform.max() < 1
        assert ((np.histogram(uniform, 8, (0, 1))[0] - count / 8) ** 2 / (count / 8)).sum() < 24.3
    for flip in (a["flip"], b["flip"]):
        assert abs(flip.mean() - 0.5) < 3.3 * 0.5 / count**0.5
    correlation = np.corrcoef(np.stack(columns).astype(float))
    assert np.abs(correlation - np.eye(8)).max() < 4 / count**0.5
    later = np.corrcoef(columns[0][64:], columns[0][:-64])[0, 1]  # from one step to the next
    assert abs(later) < 4 / count**0.5


def test_the_streams_never_change():
    """Recorded values: a resumed run must see the same pictures with any later version of fastnce and NumPy."""
    a, b = Order(5, 9, 4, seed=1).draw(3)
    assert a.index.tolist() == [3, 1, 2, 4]
    assert b.index.tolist() == [2, 5, 2, 7]
    assert a.top[0] == 0.4318818072459355
    assert b.flip.tolist() == [False, True, True, False]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decaying", [False, True])
@pytest.mark.parametrize(("load", "crop"), [(20, 16), ((24, 18), (12, 16))])
def test_batches_equal_pil_and_numpy(root, tmp_path, load, crop, decaying):
    data = UnpairedData(root, load_size=load, crop_size=crop, batch=3, seed=5, cache_dir=tmp_path)
    load, crop = ((s, s) if isinstance(s, int) else s for s in (load, crop))
    if decaying:
        load = crop
    flips = set()
    for step in range(5):
        for images, draw, domain in zip(
            data.batch(step, decaying=decaying), data.order.draw(step), ("trainA", "trainB"), strict=True
        ):
            assert images.shape == (3, 3, *crop)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            for i in range(3):
                file = root / domain / f"{draw.index[i]}.png"
                flips.add(bool(draw.flip[i]))
                expected = by_hand(file, load, crop, draw.top[i], draw.left[i], draw.flip[i])
                assert close(images[i], expected)
    assert flips == {False, True}


def test_gather_places_by_hand():
    pictures = [noise(6, 9, seed=1), noise(8, 5, seed=2)]
    flat = torch.from_numpy(np.concatenate([p.ravel() for p in pictures]))
    places = torch.tensor([[0, 54, 54], [9, 5, 5], [2, 4, 0], [4, 0, 1], [0, 1, 0]])
    got = gather_crops(flat, places, 4, 4, 3)
    expected = [pictures[0][2:6, 4:8], pictures[1][4:8, 0:4][:, ::-1], pictures[1][0:4, 1:5]]
    for i in range(3):
        assert close(got[i], normalised(expected[i].copy()))


def test_every_crop_position_occurs_and_none_outside(root, tmp_path):
    data = UnpairedData(root, load_size=(18, 19), crop_size=16, batch=16, cache_dir=tmp_path)
    places = set()
    for step in range(30):
        for draw in data.order.draw(step):
            places |= set(zip((draw.top * 3).astype(int), (draw.left * 4).astype(int), strict=True))
        data.batch(step)
    assert places == {(y, x) for y in range(3) for x in range(4)}


def test_without_flip(root, tmp_path):
    data = UnpairedData(root, load_size=16, crop_size=16, flip=False, batch=7, cache_dir=tmp_path)
    _, b = data.batch(0)
    index = data.order.draw(0)[1].index
    for i in range(7):
        assert close(b[i], by_hand(root / "trainB" / f"{index[i]}.png", (16, 16), (16, 16), 0, 0, False))


def test_two_ranks_see_what_one_sees(root, tmp_path):
    whole = UnpairedData(root, batch=4, seed=2, cache_dir=tmp_path, **SMALL)
    ranks = [UnpairedData(root, batch=2, seed=2, rank=r, world=2, cache_dir=tmp_path, **SMALL) for r in range(2)]
    assert ranks[0].steps_per_epoch == whole.steps_per_epoch == 1
    for step in range(6):
        parts = [rank.batch(step) for rank in ranks]
        for domain, expected in enumerate(whole.batch(step)):
            assert torch.equal(torch.stack([part[domain] for part in parts], 1).flatten(0, 1), expected)


def child_batch(root, place, queue):
    torch.set_num_threads(1)
    a, b = UnpairedData(root, batch=2, seed=9, cache_dir=place, **SMALL).batch(41)
    queue.put((a.numpy(), b.numpy()))


def test_a_batch_depends_on_seed_and_step_alone(root, tmp_path):
    data = UnpairedData(root, batch=2, seed=9, cache_dir=tmp_path, **SMALL)
    for step in (3, 100, 7):  # a history that differs from the other process's
        data.batch(step)
    a, b = data.batch(41)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=child_batch, args=(root, tmp_path, queue))
    child.start()
    other_a, other_b = queue.get(timeout=120)
    child.join()
    assert np.array_equal(a.numpy(), other_a)
    assert np.array_equal(b.numpy(), other_b)
    assert not torch.equal(a, data.batch(42)[0])
    assert not torch.equal(a, UnpairedData(root, batch=2, seed=8, cache_dir=tmp_path, **SMALL).batch(41)[0])


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.uint8), (1, np.uint16), (5, np.uint16)])
def test_depths_and_channels(tmp_path, channels, dtype, staged):
    for domain in ("trainA", "trainB"):
        for i in range(2):
            write(tmp_path / domain / f"{i}.npy", noise(16, 16 + 4 * i, channels, dtype, seed=i))
    target = Target.checked("crop", 8, 8, channels)
    cache = open_cache(Folder.listed(tmp_path / "trainA"), target, tmp_path)
    assert cache.pixels.dtype == dtype
    store = PictureStore(cache, torch.device("cpu"), resident=True)
    if staged:
        store.flat = None  # as on a device that cannot hold the cache
    draw = Order(2, 2, 6, seed=1).draw(0)[0]
    images = store.crops(draw, (8, 8), True)
    assert images.shape == (6, channels, 8, 8)
    for i in range(6):
        picture = np.load(tmp_path / "trainA" / f"{draw.index[i]}.npy")
        y, x = int(draw.top[i] * 9), int(draw.left[i] * (picture.shape[1] - 7))
        window = picture[y : y + 8, x : x + 8]
        assert close(images[i], normalised(window[:, ::-1].copy() if draw.flip[i] else window))


def test_a_folder_of_both_depths_is_cached_at_sixteen(tmp_path):
    shallow, deep = noise(16, 16, 0), noise(16, 16, 0, np.uint16)
    write(tmp_path / "f" / "a.png", shallow)
    write(tmp_path / "f" / "b.png", deep)
    cache = open_cache(Folder.listed(tmp_path / "f"), Target.checked("none", 8, 8, 1), tmp_path)
    assert np.array_equal(cache.pixels, np.concatenate([shallow.ravel() * np.uint16(257), deep.ravel()]))


@pytest.mark.parametrize(
    ("preprocess", "size", "expected"),
    [
        ("resize_and_crop", (30, 50), (20, 20)),
        ("crop", (30, 50), (30, 50)),
        ("crop", (8, 50), (16, 100)),
        ("crop", (30, 12), (40, 16)),
        ("scale_width_and_crop", (30, 50), (16, 20)),  # 12 rows would not hold the crop
        ("scale_width_and_crop", (50, 30), (33, 20)),
        ("scale_width_and_crop", (31, 20), (31, 20)),
        ("scale_shortside_and_crop", (30, 50), (30, 50)),
        ("scale_shortside_and_crop", (10, 15), (20, 30)),
        ("none", (30, 50), (32, 48)),  # ties to even multiples, as Python rounds
        ("none", (29, 51), (28, 52)),
    ],
)
def test_sizes_before_the_crop(preprocess, size, expected):
    assert Target.checked(preprocess, 20, 16, 3).size(*size) == expected


@pytest.mark.parametrize("preprocess", ["crop", "scale_width_and_crop", "scale_shortside_and_crop"])
def test_other_modes_crop_at_the_pictures_size(root, tmp_path, preprocess):
    data = UnpairedData(root, batch=4, preprocess=preprocess, cache_dir=tmp_path, **SMALL)
    target = data.target
    for step in range(4):
        draw, images = data.order.draw(step)[0], data.batch(step)[0]
        for i in range(4):
            file = root / "trainA" / f"{draw.index[i]}.png"
            width, height = Image.open(file).size
            place = (draw.top[i], draw.left[i], draw.flip[i])
            assert close(images[i], by_hand(file, target.size(height, width), (16, 16), *place))


def test_none_takes_whole_pictures(root, tmp_path):
    data = UnpairedData(root, preprocess="none", flip=False, cache_dir=tmp_path)
    shapes = set()
    for step in range(data.steps_per_epoch):
        index, image = data.order.draw(step)[0].index[0], data.batch(step)[0]
        picture = Image.open(root / "trainA" / f"{index}.png")
        width, height = round(picture.width / 4) * 4, round(picture.height / 4) * 4
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        assert close(image[0], normalised(np.asarray(resized)))
        shapes.add(tuple(image.shape))
    assert len(shapes) == 5


def test_samples(root, tmp_path):
    data = UnpairedData(root, cache_dir=tmp_path, **SMALL)
    a, b = data.samples(6)  # no test folders: the training pictures, as many as the smaller domain has
    assert a.shape == b.shape == (5, 3, 16, 16)
    assert torch.equal(b[1], load_image(root / "trainB" / "1.png", size=16))
    for name in ("valA", "valB"):
        write(root / name / "v.png", noise(20, 20, seed=len(name)))
    assert torch.equal(data.samples(1)[0][0], load_image(root / "valA" / "v.png", size=16))
    for name in ("testA", "testB"):
        write(root / name / "t.png", noise(20, 20, seed=7))
        (root / name / "s.png").touch()
    with pytest.raises(DataError, match=r"s\.png is empty"):
        data.samples(2)
    data.skip_bad = True
    assert torch.equal(data.samples(2)[0], load_image(root / "testA" / "t.png", size=16)[None])


def test_phase_test_falls_back_to_val(root):
    for name in ("valA", "valB"):
        write(root / name / "v.png", noise(20, 20))
    assert [folder.path.name for folder in domain_folders(root, "test")] == ["valA", "valB"]


def test_digest(root, tmp_path):
    data = UnpairedData(root, cache_dir=tmp_path, **SMALL)
    moved = root.rename(tmp_path / "elsewhere")
    assert UnpairedData(moved, cache_dir=tmp_path, **SMALL).digest() == data.digest()
    os.utime(moved / "trainB" / "3.png", ns=(1, 1))
    assert UnpairedData(moved, cache_dir=tmp_path, **SMALL).digest() == data.digest()
    (moved / "trainB" / "3.png").rename(moved / "trainB" / "3a.png")
    assert UnpairedData(moved, cache_dir=tmp_path, **SMALL).digest() != data.digest()


# --- cache ------------------------------------------------------------------------------------------------------------


def cache_state(place):
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes())
        for file in [*place.glob("*.bin"), *place.glob("*.index")]
    }


def test_cache_is_used_again_and_rebuilt_when_a_source_changes(root, tmp_path):
    place = tmp_path / "c"
    messages = []
    UnpairedData(root, cache_dir=place, progress=messages.append, **SMALL)
    assert len(messages) == 2
    assert "decoding 5 pictures" in messages[0]
    before = cache_state(place)
    UnpairedData(root, cache_dir=place, progress=messages.append, **SMALL)
    assert cache_state(place) == before
    assert len(messages) == 2
    write(root / "trainA" / "2.png", noise(33, 30, seed=77))
    data = UnpairedData(root, cache_dir=place, **SMALL)
    after = cache_state(place)
    assert len(after) == 4  # two files per domain: the old ones are removed
    assert len(after.keys() & before.keys()) == 2  # B's files are unchanged
    fresh = UnpairedData(root, cache_dir=tmp_path / "d", **SMALL)
    assert all(torch.equal(data.batch(s)[0], fresh.batch(s)[0]) for s in range(7))


def test_build_cache_makes_all_that_training_needs(root, tmp_path, monkeypatch):
    files = build_cache(root, cache_dir=tmp_path, **SMALL)
    assert [size for _, size in files] == [5 * 1200, 5 * 768, 7 * 1200, 7 * 768]
    assert all(path.stat().st_size == size for path, size in files)

    def no_build(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache_module, "decode_all", no_build)
    data = UnpairedData(root, cache_dir=tmp_path, **SMALL)
    data.batch(0)
    data.batch(0, decaying=True)
    assert len(build_cache(root, cache_dir=tmp_path, load_size=16, crop_size=16)) == 2


def test_crop_mode_has_one_cache_for_both_phases(root, tmp_path):
    (root / "trainA" / "bad.png").touch()
    data = UnpairedData(root, cache_dir=tmp_path, preprocess="crop", skip_bad=True, **SMALL)
    before = cache_state(tmp_path)
    assert torch.equal(data.batch(3)[0], data.batch(3, decaying=True)[0])
    assert cache_state(tmp_path) == before


def test_a_picture_that_breaks_later_is_named(root, tmp_path):
    data = UnpairedData(root, cache_dir=tmp_path, skip_bad=True, **SMALL)
    (root / "trainA" / "1.png").write_text("broken")
    with pytest.raises(DataError, match=r"1 of 5 pictures.*\n.*1.png is not a picture"):
        data.batch(0, decaying=True)


def test_cache_place(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_place(root, None) == root / ".fastnce-cache"
    assert UnpairedData(root, **SMALL).size_a == 5
    assert len(list((root / ".fastnce-cache").glob("*.bin"))) == 2
    root.chmod(0o555)
    try:
        (tmp_path / "file").touch()
        assert cache_place(root, tmp_path / "mine") == tmp_path / "mine"
        assert cache_place(root, None) == tmp_path / "xdg" / "fastnce"
        with pytest.raises(DataError, match=r"no cache can be written in .*file.*cache_dir"):
            cache_place(root, tmp_path / "file")
    finally:
        root.chmod(0o755)


def test_disk_full_is_one_sentence_and_leaves_nothing(root, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free._replace(free=100))
        with pytest.raises(DataError, match=r"trainA.*\.bin needs 6000 bytes, but the disk has 100"):
            UnpairedData(root, cache_dir=tmp_path, **SMALL)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"\.bin, 6000 bytes, cannot be written: No space left on device"):
        UnpairedData(root, cache_dir=tmp_path, **SMALL)
    assert not [
        file for file in tmp_path.iterdir() if file.suffix in (".bin", ".index") or file.name.startswith(".fastnce-")
    ]


def child_build(root, place, gate):
    torch.set_num_threads(1)
    gate.wait()
    build_cache(root, cache_dir=place, **SMALL)


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_build_at_once(root, tmp_path, locks, monkeypatch):
    expected = {path.name: path.read_bytes() for path, _ in build_cache(root, cache_dir=tmp_path / "alone", **SMALL)}
    place = tmp_path / "both"
    if not locks:
        monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks here")))
    context = multiprocessing.get_context("fork")  # each opens the locks itself
    gate = context.Barrier(2)
    children = [context.Process(target=child_build, args=(root, place, gate)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert {file.name: file.read_bytes() for file in place.glob("*.bin")} == expected
    assert not [file for file in place.iterdir() if file.suffix not in (".bin", ".index")]


def test_the_files_of_a_killed_builder_are_removed(root, tmp_path):
    first = build_cache(root, cache_dir=tmp_path, **SMALL)[0][0]
    rest = tmp_path / f"{first.name}.123-abc.tmp"
    rest.write_bytes(b"half")
    first.unlink()
    build_cache(root, cache_dir=tmp_path, **SMALL)
    assert first.exists()
    assert not rest.exists()


# --- devices and real pictures ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_a_device_gives_the_cpus_batches(root, tmp_path, budget):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    data = UnpairedData(root, batch=3, device="cuda", cache_budget=budget, cache_dir=tmp_path, **SMALL)
    here = UnpairedData(root, batch=3, cache_dir=tmp_path, **SMALL)
    data.prepare(decaying=False)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            images = data.batch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for x, y in zip(images, here.batch(step), strict=True):
            assert x.is_cuda
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert close(x.cpu(), y)
    assert close(data.batch(1, decaying=True)[0].cpu(), here.batch(1, decaying=True)[0])


def test_published_pictures(tmp_path):
    shared = Path(os.environ.get("FASTNCE_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    published = shared / "data" / "horse2zebra"
    if not published.is_dir():
        pytest.skip(f"no {published}; set FASTNCE_SHARED")
    files = find_images(published / "testA")
    assert len(files) == 120
    (tmp_path / "trainA").mkdir()
    (tmp_path / "trainB").mkdir()
    for i, file in enumerate(files[:12]):
        (tmp_path / ("trainA" if i < 8 else "trainB") / file.name).symlink_to(file)
    data = UnpairedData(tmp_path, cache_dir=tmp_path / "c")
    for step in range(3):
        for images, draw, names in zip(data.batch(step), data.order.draw(step), (files[:8], files[8:12]), strict=True):
            where = (draw.top[0], draw.left[0], draw.flip[0])
            expected = by_hand(names[draw.index[0]], (286, 286), (256, 256), *where)
            assert close(images[0], expected)


def test_batches_made_ahead_equal_the_others(root):
    """In order, out of order, twice, and across the change to the decaying sizes. Each is made once."""
    plain = UnpairedData(root, **SMALL, batch=2, seed=3)
    ahead = UnpairedData(root, **SMALL, batch=2, seed=3, ahead=True)
    made = []
    real = ahead.staging.make
    ahead.staging.make = lambda step, decaying: made.append((step, decaying)) or real(step, decaying)
    steps = [(0, False), (1, False), (2, False), (3, True), (4, True), (9, True), (9, True), (10, True)]
    for step, decaying in steps:
        for one, other in zip(plain.batch(step, decaying=decaying), ahead.batch(step, decaying=decaying), strict=True):
            assert torch.equal(one, other)
    ahead.close()
    decaying = [(step, True) for step in (3, 4, 5, 9, 10, 9, 10)]
    assert made[:11] == [*((step, False) for step in range(4)), *decaying]  # one more may follow
    assert plain.staging is None


def test_an_error_in_a_batch_made_ahead_is_raised_when_it_is_taken(root):
    data = UnpairedData(root, **SMALL, ahead=True)
    data.batch(0)
    data.batch(1)
    real = data.staging.make

    def broken(step, decaying):
        if step == 3:
            raise DataError("the disk is gone")
        return real(step, decaying)

    data.staging.make = broken
    data.batch(2)
    with pytest.raises(DataError, match="the disk is gone"):
        data.batch(3)
    data.staging.make = real
    for one, other in zip(data.batch(3), UnpairedData(root, **SMALL).batch(3), strict=True):
        assert torch.equal(one, other)
    data.close()
