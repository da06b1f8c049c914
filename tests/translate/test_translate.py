"""Translation: exact and fast tiles, memory, folders, and the metadata of files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from fastnce.commands.main import main
from fastnce.common.streams import ProgressLine
from fastnce.engine.memory import available_memory
from fastnce.networks import AffineInstanceNorm, ResnetGenerator, Restorer, UnetGenerator, init_weights
from fastnce.networks.published import save_published
from fastnce.translate import files
from fastnce.translate import translator as translator_module
from fastnce.translate.files import translate_files
from fastnce.translate.load import load_translator
from fastnce.translate.photographs import read_photograph
from fastnce.translate.tiles import Tiler, translate_exact, translate_fast
from fastnce.translate.translator import Translator
from fastnce.translate.windows import operations_of

NETWORKS = {
    "antialias": {},
    "strided": {"antialias": False},
    "strided down, blurred up": {"antialias": False, "antialias_up": True},
    "blurred down, transposed up": {"antialias_up": False},
    "batch norm": {"norm": "batch"},
    "no norm": {"norm": "none"},
    "dropout": {"dropout": True},
    "affine norm": {"norm_affine": True},
}


def resnet(**options) -> ResnetGenerator:
    network = ResnetGenerator(width=6, blocks=2, **options)
    init_weights(network, "normal", 0.2)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, AffineInstanceNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return network.eval()


def restorer() -> Restorer:
    network = Restorer(width=4, middle=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


def smooth(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 5, 6) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") + 0.1 * torch.randn(
        1, 3, height, width
    )


# ---- tiles ----


@pytest.mark.parametrize("tile", [32, 60, 500])
@pytest.mark.parametrize("name", [*NETWORKS, "restorer"])
def test_exact_tiles_equal_the_whole_image(name, tile):
    network = (restorer() if name == "restorer" else resnet(**NETWORKS[name])).double()
    picture = smooth(100, 132).double()
    with torch.no_grad():
        whole = network(picture)
    result = translate_exact(network, picture.clone(), tile, "cpu")
    torch.testing.assert_close(result, whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_independent_tiles_differ_from_the_whole_image():
    """The error that exact tiles avoid: each tile normalised by its own statistics."""
    network, picture = resnet().double(), smooth(100, 128).double()
    alone = torch.cat([network(part) for part in picture.split(64, dim=3)], dim=3)
    assert (alone - network(picture)).abs().mean() > 0.01


def test_exact_tiles_in_single_precision_differ_by_rounding():
    network, picture = resnet(), smooth(100, 132)
    with torch.no_grad():
        whole = network(picture)
        wanted = network.double()(picture.double())
    rounding = (whole - wanted).abs().max().item()
    network.float()
    assert (translate_exact(network, picture, 48, "cpu") - wanted).abs().max() <= 4 * rounding


def test_large_maps_are_not_stored(monkeypatch):
    network, picture = resnet(), smooth(128, 160)
    rooms = []
    room = Tiler._room
    monkeypatch.setattr(Tiler, "_room", lambda self, shape, dtype: rooms.append(shape) or room(self, shape, dtype))
    before = picture.clone()
    translate_exact(network, picture, 32, "cpu")
    assert torch.equal(picture, before)
    # a whole pass makes maps of 12 channels at full size; the largest stored one has 3 (12 at half the sides)
    assert max(shape[1] * shape[2] * shape[3] for shape in rooms) == 3 * 128 * 160


def test_fast_tiles_with_the_pictures_own_statistics_are_exact():
    for network in (resnet().double(), resnet(norm_affine=True).double(), restorer().double()):
        picture = smooth(64, 64).double()
        with torch.no_grad():
            whole = network(picture)
        result, apart = translate_fast(network, picture, 64, "cpu")  # one tile: not downscaled
        torch.testing.assert_close(result, whole, rtol=1e-9, atol=1e-9)
        assert apart.largest < 1e-6
        assert apart.crop == (64, 64)


def test_tiles_join_without_seams():
    """With the same statistics, the tile size does not change the result."""
    network, picture = resnet().double(), smooth(96, 128).double()
    statistics = {}
    operations = operations_of(network, statistics)
    for module in network.modules():
        if type(module).__name__ == "InstanceNorm":
            mean, variance = torch.randn(1, module.channels, 1, 1), torch.rand(1, module.channels, 1, 1) + 0.5
            statistics[module] = (mean.double(), variance.double())
    with torch.no_grad():
        results = [Tiler(picture, tile, torch.device("cpu")).whole(picture, operations) for tile in (32, 200)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_fast_tiles_report_their_error():
    network, picture = resnet(), smooth(300, 360)
    result, apart = translate_fast(network, picture, 128, "cpu")
    assert result.shape == picture.shape
    assert apart.crop == (256, 256)
    assert 0 < apart.mean < apart.largest
    assert str(apart).endswith("on a crop of 256x256")


def test_generators_without_tiles():
    unet = UnetGenerator(3, 3, 5, 4)
    with pytest.raises(ValueError, match="not UnetGenerator"):
        translate_exact(unet, torch.zeros(1, 3, 64, 64), 32, "cpu")
    with pytest.raises(ValueError, match="not UnetGenerator"):
        Translator(unet, tiles="exact")
    with pytest.raises(ValueError, match="tiles must be auto, exact or fast, not 'some'"):
        Translator(resnet(), tiles="some")
    with pytest.raises(ValueError, match="tile_size must be at least 128, not 64"):
        Translator(resnet(), tile_size=64)


# ---- memory ----


class Small(ResnetGenerator):
    """A generator that runs out of memory above `limit` pixels."""

    limit = 20_000

    def forward(self, x, *args, **kwargs):
        if x.shape[0] * x.shape[2] * x.shape[3] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().forward(x, *args, **kwargs)


def small() -> Small:
    network = Small(width=4, blocks=1)
    init_weights(network, "normal", 0.1)
    return network.eval()


def test_tiles_if_memory_is_too_small(monkeypatch):
    network, messages = small(), []
    translator = Translator(network, say=messages.append)
    picture = smooth(142, 201)
    result = translator(picture)
    network.limit = 10**9
    torch.testing.assert_close(result, Translator(network)(picture), rtol=1e-4, atol=1e-4)
    assert messages == ["a picture of 204x144 does not fit into memory as a whole: using exact tiles of 128"]

    monkeypatch.setattr(translator_module, "available_memory", lambda: 0)  # a CPU checks before it tries
    torch.testing.assert_close(translator(picture), result, rtol=1e-4, atol=1e-4)
    assert len(messages) == 2


def test_a_batch_that_does_not_fit_is_split():
    network, messages = small(), []
    pictures = torch.cat([smooth(80, 100) for _ in range(4)])
    result = Translator(network, say=messages.append)(pictures)
    assert messages == []
    torch.testing.assert_close(result[2:3], Translator(network)(pictures[2:3]))


def test_tiles_that_do_not_fit_are_halved(monkeypatch):
    tried, messages = [], []

    def out_of_memory(generator, picture, tile, device):
        tried.append(tile)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(translator_module, "translate_exact", out_of_memory)
    translator = Translator(resnet(), tiles="exact", tile_size=512, say=messages.append)
    with pytest.raises(ValueError, match="a picture of 600x16 does not fit into memory, not even in tiles of 128"):
        translator(torch.zeros(1, 3, 16, 600))
    assert tried == [512, 256, 128]
    assert messages[0] == "tiles of 512 do not fit into memory: using tiles of 256"


def test_other_errors_are_raised(monkeypatch):
    network = resnet()
    monkeypatch.setattr(network, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        Translator(network)._whole(torch.zeros(1, 3, 8, 8))


def test_a_unet_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(translator_module, "available_memory", lambda: 0)
    with pytest.raises(ValueError, match="does not fit into memory as a whole, and tiles are for the ResNet"):
        Translator(UnetGenerator(3, 3, 5, 4))(torch.zeros(1, 3, 64, 64))


def test_available_memory():
    room = available_memory()
    assert room is None or room > 0


@pytest.mark.gpu
def test_tiles_on_a_gpu():
    device = torch.accelerator.current_accelerator()
    network, picture = resnet().double(), smooth(516, 388).double()
    wanted_of = {
        "exact": Translator(copy.deepcopy(network), device)(picture),
        "fast": Translator(copy.deepcopy(network), tiles="fast", tile_size=128)(picture),
    }
    for tiles, wanted in wanted_of.items():
        result = Translator(network, device, tiles=tiles, tile_size=128)(picture)
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


# ---- files ----


@pytest.fixture
def colour(tmp_path) -> Path:
    return save_published({"G": ResnetGenerator(width=4, blocks=1)}, tmp_path / "colour")[0]


@pytest.fixture
def grey(tmp_path) -> Path:
    return save_published({"G": ResnetGenerator(1, 1, width=4, blocks=1)}, tmp_path / "grey")[0]


def noise(seed: int, height: int, width: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def translate(*arguments: object) -> None:
    assert main(["translate", *map(str, arguments), "--device", "cpu"]) == 0


def test_batches_of_one_size(tmp_path, monkeypatch):
    network = resnet()
    source = tmp_path / "in"
    source.mkdir()
    for i, size in enumerate([(16, 20), (24, 20), (16, 20), (16, 20), (24, 20), (12, 12)]):
        noise(i, *size).save(source / f"{i}.png")
    translator, lines = Translator(network), []
    singles = translate_files(translator, source, tmp_path / "one")
    calls = []
    whole = Translator._whole
    monkeypatch.setattr(Translator, "_whole", lambda self, x: calls.append(len(x)) or whole(self, x))
    written = translate_files(translator, source, tmp_path / "two", batch=2, progress=lines.append)
    assert sorted(calls) == [1, 1, 2, 2]
    assert sorted(p.name for p in written) == sorted(p.name for p in singles)
    for path in singles:
        a, b = (
            np.asarray(Image.open(folder / path.name)).astype(int) for folder in (tmp_path / "one", tmp_path / "two")
        )
        assert abs(a - b).max() <= 1
    assert lines[-1].startswith("6/6 pictures, ")
    assert lines[-1].endswith(" images/s")
    with pytest.raises(ValueError, match="batch must be from 1 to 1,024 pictures, not 0"):
        translate_files(translator, source, tmp_path / "two", batch=0)


def test_pictures_of_many_sizes_are_written_early(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(12):
        noise(i, 12 + i, 12).save(source / f"{i:02}.png")
    held, translator = [], Translator(resnet())
    read = files.read_photograph
    done = []
    monkeypatch.setattr(files, "read_photograph", lambda *a: held.append(len(done)) or read(*a))
    assert len(translate_files(translator, source, tmp_path / "out", batch=2, progress=done.append)) == 12
    assert held[-1] >= 3  # pictures were written before the last one was read


def test_orientation_profile_and_alpha(colour, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = tmp_path / "in"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    noise(0, 20, 32).save(source / "turned.jpg", exif=exif, icc_profile=profile)
    noise(1, 20, 32, 4).save(source / "alpha.png", icc_profile=profile)
    noise(2, 20, 32).quantize(8).save(source / "palette.png", transparency=0)
    noise(3, 20, 32, 1).save(source / "plain.png")
    for suffix in ("png", "webp", "tiff", "jpg", "bmp"):
        out = tmp_path / suffix
        translate(colour, source, "--out", out, "--format", suffix)
        with Image.open(out / f"turned.{suffix}") as turned, Image.open(out / f"alpha.{suffix}") as alpha:
            assert turned.size == (20, 32)
            assert turned.getexif().get(0x0112, 1) == 1
            assert (turned.info.get("icc_profile") == profile) == (suffix != "bmp")
            assert alpha.mode == ("RGB" if suffix in ("jpg", "bmp") else "RGBA")
            if alpha.mode == "RGBA":
                with Image.open(source / "alpha.png") as original:
                    assert (np.asarray(alpha.getchannel("A")) == np.asarray(original.getchannel("A"))).all()
                    # fully transparent pixels are translated too
                    result = read_photograph(out / f"alpha.{suffix}", 3).pixels
                wanted = read_photograph(tmp_path / "png" / "alpha.png", 3).pixels
                assert torch.equal(result, wanted)
        with Image.open(out / f"plain.{suffix}") as plain:
            assert plain.mode == "RGB"
            assert "icc_profile" not in plain.info
    with Image.open(tmp_path / "png" / "palette.png") as palette:
        assert palette.mode == "RGBA"
        assert set(np.unique(np.asarray(palette.getchannel("A")))) == {0, 255}


def test_a_colour_profile_is_not_put_on_grey(grey, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise(0, 16, 16).save(tmp_path / "a.png", icc_profile=profile)
    noise(0, 16, 16, 4).save(tmp_path / "b.png")
    translate(grey, tmp_path / "a.png", "--out", tmp_path / "out")
    translate(grey, tmp_path / "b.png", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "a.png") as written:
        assert written.mode == "L"
        assert "icc_profile" not in written.info
    with Image.open(tmp_path / "out" / "b.png") as written:
        assert written.mode == "LA"


def test_sixteen_bits(grey, colour, tmp_path, capsys):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 48), np.uint16)
    source = tmp_path / "deep.png"
    Image.fromarray(deep).save(source)
    wanted = load_translator(grey)(read_photograph(source, 1).pixels[None])[0, 0]
    for suffix in ("png", "tiff", "npy"):
        translate(grey, source, "--out", tmp_path / "out", "--format", suffix)
        path = tmp_path / "out" / f"deep.{suffix}"
        found = np.load(path)[:, :, 0] if suffix == "npy" else np.asarray(Image.open(path))
        assert found.dtype == np.uint16
        assert abs(found - (wanted.numpy() + 1) * 32767.5).max() <= 0.51
    translate(grey, source, "--out", tmp_path / "eight", "--bits", 8)
    assert np.asarray(Image.open(tmp_path / "eight" / "deep.png")).dtype == np.uint8
    translate(grey, source, "--out", tmp_path / "eight", "--format", "jpg")
    assert Image.open(tmp_path / "eight" / "deep.jpg").mode == "L"
    noise(0, 16, 16).save(tmp_path / "c.png")
    translate(colour, tmp_path / "c.png", "--out", tmp_path / "out", "--format", "npy", "--bits", 16)
    assert np.load(tmp_path / "out" / "c.npy").dtype == np.uint16
    for model, suffix, channels in ((colour, "png", 3), (grey, "webp", 1)):
        out = tmp_path / "refused"
        arguments = ["translate", str(model), str(source), "--out", str(out), "--format", suffix, "--bits", "16"]
        assert main([*arguments, "--device", "cpu"]) == 2
        message = capsys.readouterr().err
        assert f"16 bits cannot be written as {suffix} with {channels} channels" in message
        assert "--format npy" in message
        assert not out.exists()


def test_tiles_from_the_command_line(colour, tmp_path, capsys):
    noise(0, 140, 300).save(tmp_path / "a.png")
    for name, options in (("whole", []), ("exact", ["--tiles", "exact"]), ("fast", ["--tiles", "fast"])):
        translate(colour, tmp_path / "a.png", "--out", tmp_path / name, "--tile-size", 128, *options)
        out = capsys.readouterr().out
        assert ("fast tiles differ from exact ones by" in out) == (name == "fast")
    whole, exact = (np.asarray(Image.open(tmp_path / n / "a.png")).astype(int) for n in ("whole", "exact"))
    assert abs(whole - exact).max() <= 1


def test_progress_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(ProgressLine, "EVERY", 0.0)
    with ProgressLine() as line:
        line("1/2 pictures, 3.00 images/s")
        line.say("a sentence")
    captured = capsys.readouterr()
    assert captured.err == "1/2 pictures, 3.00 images/s\n"
    assert captured.out == "a sentence\n"


@torch.no_grad()
def test_large_pictures_keep_their_precision():
    """PyTorch's channels-last group norm on a CPU is imprecise: a low-contrast image would be wrong by about 1."""
    network, picture = resnet(), smooth(512, 768) * 0.05 + 0.9
    wanted = network.double()(picture.double())
    result = Translator(network.float())(picture)
    assert (result - wanted).abs().max() < 1e-2
