"""`data.direction`, `phase`, `max_images` and `shuffle`: which images a run reads, and in which order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.common.imports import CodeError
from fastnce.config import resolve
from fastnce.config.options import exchanges_pairs
from fastnce.data import DataError
from fastnce.data.folder import Folder, clean_folder, domain_folders
from fastnce.data.order import Order
from fastnce.data.own import OwnData, open_own
from fastnce.data.rained import RainedData
from fastnce.data.single import SinglePictureData
from fastnce.data.unpaired import UnpairedData
from fastnce.engine.distributed import Ranks
from fastnce.engine.held_out import find_unpaired, find_validation
from fastnce.engine.stored import follow, load_generators, read_state
from fastnce.evaluate.pairs import find_pairs
from fastnce.evaluate.report import evaluate
from fastnce.training.data import open_data
from fastnce.translate.load import load_translator
from tests.engine.test_engine import SMALL

TINY = [*SMALL, "data.load_size=20", "data.crop_size=16", "loss.nce_layers=0,4", "run.monitor_every=0"]
TINY += ["network.discriminator=n_layers", "network.discriminator_layers=1"]
SIZES = {"load_size": 20, "crop_size": 16}


def write(path: Path, seed: int, height: int = 24, width: int = 28) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """3 images in trainA, 5 in trainB; 2 in testA, 3 in testB."""
    for seed, (domain, count) in enumerate((("trainA", 3), ("trainB", 5), ("testA", 2), ("testB", 3))):
        for number in range(count):
            write(tmp_path / "set" / domain / f"{number}.png", 10 * seed + number)
    return tmp_path / "set"


@pytest.fixture
def exchanged(root) -> Path:
    """The same images with the names of the folders exchanged."""
    other = root.parent / "exchanged"
    for phase in ("train", "test"):
        shutil.copytree(root / f"{phase}A", other / f"{phase}B")
        shutil.copytree(root / f"{phase}B", other / f"{phase}A")
    return other


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UnpairedData, RainedData])
def test_the_other_direction_is_that_of_exchanged_folders(kind, root, exchanged):
    more = {"share": 0.5} if kind is RainedData else {}
    there = kind(root, direction="BtoA", batch=2, seed=3, **SIZES, **more)
    here = kind(exchanged, batch=2, seed=3, **SIZES, **more)
    before = kind(root, batch=2, seed=3, **SIZES, **more)
    assert (there.size_a, there.size_b) == (5, 3)
    for step in range(4):
        assert same(there.batch(step, decaying=step > 1), here.batch(step, decaying=step > 1))
    assert same(there.samples(2), here.samples(2))
    assert not same(there.samples(2), before.samples(2))
    assert there.digest() == here.digest() != before.digest()
    assert set(there.cached()) == set(before.cached())  # the same pixels


def test_rain_is_rendered_on_the_domain_that_is_b(root):
    shutil.rmtree(root / "trainB")
    shutil.rmtree(root / "testA")
    data = RainedData(root, direction="BtoA", share=1, flip=False, preprocess="none")
    clean = [np.asarray(Image.open(root / "trainA" / f"{number}.png")) for number in range(3)]
    a, b = data.batch(0)
    shown = b[0].add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert any(np.array_equal(shown, image) for image in clean)
    assert a.shape == b.shape
    assert clean_folder(root, "train", "BtoA").path == root / "trainA"
    with pytest.raises(DataError, match="there is no folder .*trainB; it should hold clean pictures"):
        RainedData(root, share=1)


def test_a_single_image_per_domain_follows_the_direction(tmp_path):
    for seed, name in enumerate(("oneA", "oneB")):
        write(tmp_path / name / "x.png", seed, 40, 40)
        write(tmp_path / name / "y.png", seed + 5, 40, 40)
    options = {"crop_size": 16, "batch": 2, "phase": "one", "max_images": 1}
    there, here = (SinglePictureData(tmp_path, direction=way, **options) for way in ("BtoA", "AtoB"))
    assert same(there.samples(1), here.samples(1)[::-1])
    assert torch.equal(here.samples(1)[0][0].add(1).mul(127.5).round().to(torch.uint8), pixels(tmp_path / "oneA/x.png"))
    with pytest.raises(DataError, match="holds 2 pictures"):
        SinglePictureData(tmp_path, crop_size=16, batch=2, phase="one")


def pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)


def test_an_unknown_direction_is_refused(root):
    with pytest.raises(DataError, match="data.direction=both is none of AtoB, BtoA"):
        UnpairedData(root, direction="both")


def test_an_own_data_set_is_exchanged_too():
    own = SimpleNamespace(
        steps_per_epoch=1,
        one_size=True,
        size_a=7,
        batch=lambda step, decaying: (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 4 + 4 * (step < 2), 12)),
        samples=lambda count: (torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 12)),
        digest=lambda: "mine",
    )
    options = {"batch": 1, "channels": (3, 3), "device": torch.device("cpu")}
    there, here = (OwnData(own, "data.dataset=x", exchanged=way, **options) for way in (True, False))
    assert same(there.batch(1), here.batch(1)[::-1])
    assert same(there.samples(2), here.samples(2)[::-1])
    assert [tuple(size) for size in there.first_sizes] == [(8, 12), (8, 8)]
    assert (there.size_b, here.size_a, hasattr(there, "size_a")) == (7, 7, False)
    assert there.digest() != here.digest() == "mine"
    with pytest.raises(CodeError, match=r"batch\(2\) returns A and B of 8x8 and 12x4, batch\(0\) of 8x8 and 12x8"):
        there.batch(2)


def test_channels_belong_to_the_domains_of_the_run(root, tmp_path):
    """A of a run is what the other folder holds, read with the channels of A."""
    data = UnpairedData(root, direction="BtoA", channels=(1, 3), **SIZES)
    assert [one.shape[1] for one in data.batch(0)] == [one.shape[1] for one in data.samples(1)] == [1, 3]
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Mine:\n    steps_per_epoch = 1\n\n    def __init__(self, options, channels, **_):\n"
        "        self.channels = channels\n\n    def digest(self):\n        return 'mine'\n\n"
        "    def batch(self, step, decaying=False):\n"
        "        return tuple(torch.zeros(1, count, 8, 8) for count in self.channels)\n\n    samples = batch\n"
    )
    options = {"batch": 1, "seed": 0, "rank": 0, "world": 1, "device": torch.device("cpu")}
    own = open_own(f"{tmp_path}/mine.py:Mine", None, channels=(1, 3), exchanged=True, **options)
    assert own._data.channels == (3, 1)
    assert [one.shape[1] for one in own.batch(0)] == [1, 3]


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = follow(run / "checkpoints" / "latest")
    return next(iter(load_generators(folder, read_state(folder, ())).values()))


def train(root: Path, run: Path, *options: str) -> int:
    return main(["train", "fastcut", "--data", str(root), "--out", str(run), "--quiet", *TINY, *options])


def test_a_run_trains_in_the_direction_and_refuses_the_other(root, exchanged, tmp_path, capsys):
    options = ["run.steps=2", "run.samples=1"]
    assert train(root, tmp_path / "there", *options, "data.direction=BtoA") == 0
    assert train(exchanged, tmp_path / "here", *options) == 0
    there, here = weights(tmp_path / "there"), weights(tmp_path / "here")
    assert all(torch.equal(there[key], here[key]) for key in here)
    assert train(root, tmp_path / "there", "run.steps=3", "run.samples=1") == 2
    assert "data.direction: BtoA, now AtoB" in capsys.readouterr().err
    back = ["--out", str(tmp_path / "there"), "--change", "data.direction=AtoB"]
    assert main(["train", "--data", str(root), *back]) == 2
    assert "was trained on other pictures than data.direction gives now" in capsys.readouterr().err
    translator = load_translator(tmp_path / "there")
    assert (translator.direction, translator.paired_direction) == ("BtoA", "BtoA")


def test_a_run_of_a_version_without_these_options_has_their_defaults():
    stored = resolve("fastcut").as_dict()
    for key in ("direction", "phase", "max_images", "shuffle", "random_scale_max"):
        del stored["data"][key]
    assert resolve("fastcut").differences(stored) == []
    changed = ["data.direction=BtoA", "data.phase=day", "data.max_images=2", "data.shuffle=false"]
    assert resolve("fastcut", overrides=changed).differences(stored) == [
        "data.direction: AtoB, now BtoA",
        "data.phase: train, now day",
        "data.max_images: 0, now 2",
        "data.shuffle: True, now False",
    ]


# --- held-out images --------------------------------------------------------------------------------------------------


def strips(folder: Path) -> None:
    scene = np.kron(np.random.default_rng(0).integers(0, 200, (6, 6)), np.ones((4, 4))).astype(np.uint8)
    folder.mkdir(parents=True)
    Image.fromarray(np.hstack([scene, scene + 20])).save(folder / "one.png")


def pairs(folder: Path) -> None:
    write(folder / "rain" / "1.png", 1)
    write(folder / "norain" / "1.png", 2)


@pytest.mark.parametrize("layout", [pairs, strips])
def test_the_truths_of_pairs_are_the_inputs(layout, tmp_path):
    layout(tmp_path / "test")
    (here,), (there,) = (find_validation(str(tmp_path), "", exchanged=way) for way in (False, True))
    assert same(there.load(), here.load()[::-1])
    assert not torch.equal(*here.load())
    assert there.exchanged() == here == find_pairs(tmp_path)[0]


def test_unpaired_held_out_images_follow_the_direction(root):
    lone, reference = find_unpaired(str(root), 0, "BtoA")
    assert [item.file for item in lone] == [root / "testB" / f"{number}.png" for number in range(3)]
    assert reference == [root / "testA" / f"{number}.png" for number in range(2)]
    assert {item.domain for item in lone} == {"testB"}
    write(root / "testA" / "deep" / "x.png", 0)
    lone, _ = find_unpaired(str(root))
    assert {item.domain for item in lone} == {"testA"}


def test_rendered_rain_keeps_the_order_of_pairs():
    """With data.rain, A is rainy in either direction, and so are the inputs of pairs."""
    for options, expected in (
        ([], False),
        (["data.direction=BtoA"], True),
        (["data.direction=BtoA", "data.rain=0.5"], False),
    ):
        assert exchanges_pairs(resolve("fastcut", overrides=options).data) is expected


def test_an_evaluation_takes_the_direction_of_the_run_or_the_given_one(tmp_path):
    pairs(tmp_path)
    seen = []

    def model(images):
        seen.append(images)
        return images

    rainy, clean = find_pairs(tmp_path)[0].load()
    for run, given, expected in (
        ("AtoB", "", rainy),
        ("BtoA", "", clean),
        ("BtoA", "AtoB", rainy),
        ("AtoB", "BtoA", clean),
    ):
        model.paired_direction = run
        evaluate(tmp_path, model, direction=given)
        assert torch.equal(seen[-1][0], expected)
    with pytest.raises(DataError, match="direction=left"):
        evaluate(tmp_path, None, direction="left")


@pytest.mark.parametrize(("direction", "inputs", "truths"), [("AtoB", "testA", "testB"), ("BtoA", "testB", "testA")])
def test_sets_without_pairs_are_compared_in_the_direction_of_the_run(direction, inputs, truths, root, monkeypatch):
    def means(folder: str) -> list[float]:
        files = sorted((root / folder).iterdir())
        return [pixels(file).float().div(127.5).sub(1).mean().item() for file in files]

    seen = []
    mean = SimpleNamespace(  # in place of a network of 90 MB
        features=lambda image: image.mean().view(1),
        compute=lambda made, truth: seen.append((made, truth)) or {},
        measures={"fid": None},
        width=1,
    )
    monkeypatch.setattr("fastnce.evaluate.networks.Inception", lambda *_: mean)

    def model(images):
        return images / 2

    model.direction = direction
    evaluate(root, model, fid=True)
    ((made, truth),) = seen
    assert made.flatten().tolist() == pytest.approx([value / 2 for value in means(inputs)], abs=1e-6)
    assert truth.flatten().tolist() == pytest.approx(means(truths), abs=1e-6)


def test_the_command_evaluates_in_a_given_direction(tmp_path, capsys):
    pairs(tmp_path)
    assert main(["evaluate", "--data", str(tmp_path), "--inputs-only", "--direction", "BtoA", "--device", "cpu"]) == 0
    assert "dB" in capsys.readouterr().out


# --- phase ------------------------------------------------------------------------------------------------------------


def test_the_phase_names_the_folders(root):
    for phase in ("", "night/"):
        for domain in "AB":
            shutil.copytree(root / f"train{domain}", root / f"{phase}{domain}")
        wanted, found = UnpairedData(root, **SIZES), UnpairedData(root, phase, **SIZES)
        assert same(wanted.batch(0), found.batch(0))
        assert set(wanted.cached()).isdisjoint(found.cached())
    with pytest.raises(DataError, match="there is no folder dayA in"):
        UnpairedData(root, "day")


def test_a_run_reads_the_folders_of_its_phase(root, tmp_path, capsys):
    (root / "trainA").rename(root / "dayA")
    (root / "trainB").rename(root / "dayB")
    assert main(["cache", "fastcut", "--data", str(root), *SMALL, "data.phase=day"]) == 0
    assert "/dayA-" in capsys.readouterr().out
    assert main(["cache", "fastcut", "--data", str(root), *SMALL]) == 2
    assert "there is no folder trainA" in capsys.readouterr().err
    assert main(["cache", "fastcut", "--data", str(root), *SMALL, "data.phase=../set/day"]) == 2
    assert "data.phase=../set/day must begin the names of folders in the data set" in capsys.readouterr().err
    for read in (domain_folders, clean_folder):
        with pytest.raises(DataError, match=r"phase=\.\./set/day must begin the names"):
            read(root, "../set/day")


# --- max_images -------------------------------------------------------------------------------------------------------


def walked(folder: Path, limit: int) -> list[str]:
    """The published choice, on a disk that lists names in their order."""
    files = []
    for here, _, names in sorted(os.walk(folder)):
        files += [os.path.relpath(os.path.join(here, name), folder) for name in sorted(names)]
    return sorted(files[:limit])


def test_the_first_images_are_the_published_ones(tmp_path):
    names = ["b.png", "a/c.png", "a/b.png", "a-b/c.png", "a/d/e.png", "z.png", "c/a.png"]
    for name in names:
        write(tmp_path / name, 1, 4, 4)
    for limit in range(1, len(names) + 2):
        folder = Folder.listed(tmp_path, limit)
        assert folder.names == walked(tmp_path, limit)
        assert len(folder.sizes) == len(folder.times) == min(limit, len(names))
        assert folder.first == (limit if limit < len(names) else 0)
    assert Folder.listed(tmp_path, 0).names == sorted(names)


def test_a_limited_run_has_a_cache_of_its_own(root):
    whole = UnpairedData(root, **SIZES)
    files = whole.cached()
    few = UnpairedData(root, max_images=3, **SIZES)
    assert (few.size_a, few.size_b, few.epoch_size) == (3, 3, 3)
    assert all(path.exists() for path in files)  # a run that reads them goes on
    mine = list(few.cached())
    assert mine[0] == next(iter(files))  # trainA has no more than 3
    assert mine[1] not in files
    assert whole.digest() != few.digest() == UnpairedData(root, max_images=3, **SIZES).digest()
    assert whole.digest() == UnpairedData(root, max_images=5, **SIZES).digest()


def test_a_damaged_image_counts_among_the_first(root):
    (root / "trainB" / "1.png").write_bytes(b"no picture")
    data = UnpairedData(root, max_images=2, skip_bad=True, **SIZES)
    assert (data.size_a, data.size_b) == (2, 1)
    assert [path.name for path, _ in data.skipped] == ["1.png"]
    again = UnpairedData(root, max_images=2, skip_bad=True, **SIZES)
    assert not again.built
    assert again._folders[1].first == 2


# --- shuffle ----------------------------------------------------------------------------------------------------------


def serial(size_a: int, size_b: int, batch: int, epochs: int) -> list[tuple[list[int], list[int]]]:
    """The batches of the published loader with --serial_batches."""
    length = max(size_a, size_b)
    batches = []
    for _ in range(epochs):
        for first in range(0, length - batch + 1, batch):  # drop_last
            places = range(first, first + batch)
            batches.append(([place % size_a for place in places], [place % size_b for place in places]))
    return batches


@pytest.mark.parametrize(("size_a", "size_b", "batch"), [(3, 5, 1), (7, 4, 2), (5, 5, 3), (2, 9, 4)])
def test_without_shuffling_the_order_is_the_published_one(size_a, size_b, batch):
    order = Order(size_a, size_b, batch, seed=1, shuffle=False)
    wanted = serial(size_a, size_b, batch, epochs=3)
    assert order.steps_per_epoch == len(wanted) // 3
    found = [tuple(domain.index.tolist() for domain in order.draw(step)) for step in range(len(wanted))]
    assert found == wanted


def test_without_shuffling_crops_and_flips_are_those_of_the_seed():
    plain, ordered = (Order(6, 9, 2, seed=4, shuffle=shuffle) for shuffle in (True, False))
    for step in (0, 3, 11):
        for one, other in zip(plain.draw(step), ordered.draw(step), strict=True):
            for name in ("top", "left", "flip"):
                assert np.array_equal(getattr(one, name), getattr(other, name))


def test_without_shuffling_ranks_share_the_global_batch():
    whole = Order(5, 8, 4, seed=2, shuffle=False)
    parts = [Order(5, 8, 2, seed=2, rank=rank, world=2, shuffle=False) for rank in range(2)]
    for step in range(5):
        for domain in range(2):
            joined = np.stack([part.draw(step)[domain].index for part in parts], axis=1).ravel()
            assert np.array_equal(joined, whole.draw(step)[domain].index)


def test_an_epoch_smaller_than_the_batch_wraps_around():
    order = Order(2, 3, 4, seed=0, shuffle=False)
    a, b = order.draw(5)
    assert a.index.tolist() == [0, 1, 0, 0]
    assert b.index.tolist() == [0, 1, 2, 0]


def test_a_run_in_order_resumes_bit_for_bit(root, tmp_path, capsys):
    for steps in ("run.steps=1", "run.steps=2"):
        assert train(root, tmp_path / "parts", "data.shuffle=false", steps) == 0
    assert train(root, tmp_path / "whole", "data.shuffle=false", "run.steps=2") == 0
    parts, whole = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert train(root, tmp_path / "parts", "run.steps=3") == 2
    assert "data.shuffle: False, now True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sincut", ["data.shuffle=false"], "data.shuffle=false has no meaning here, because data.preprocess=zoom_and"),
        ("cut", ["data.shuffle=false", "data.rain=1"], "because data.rain draws the images it renders on"),
        ("cut", ["data.random_scale_max=2"], "data.random_scale_max=2 has no effect with data.preprocess=resize_and"),
        ("sincut", ["data.random_scale_max=0.5"], "data.random_scale_max must be a number from 1 to"),
        ("cut", ["data.direction=AtoA"], 'data.direction must be one of "AtoB", "BtoA", not'),
        ("cut", ["data.max_images=-1"], "data.max_images must be"),
        ("cut", ["data.phase=/etc/x"], "data.phase=/etc/x must begin the names of folders"),
    ],
)
def test_options_without_a_meaning_are_refused(method, options, words, capsys):
    assert main(["train", method, "--dry-run", *options]) == 2
    assert words in capsys.readouterr().err


# --- random_scale_max -------------------------------------------------------------------------------------------------


def zoomed(width: int, height: int, crop: int, factor: tuple[float, float]) -> tuple[int, int]:
    """The size after the published zoom; width before height."""
    return round(max(crop, width * factor[0])), round(max(crop, height * factor[1]))


@pytest.mark.parametrize("most", [1.0, 1.5, 3.0, 8.0])
def test_the_zoom_is_the_published_formula(most, tmp_path):
    for domain in "AB":
        write(tmp_path / f"train{domain}" / "one.png", 1, 70, 90)
    data = SinglePictureData(tmp_path, crop_size=16, batch=1, zoom=1 / most)
    widths = []
    for x, y in np.random.default_rng(0).random((200, 2)):
        factor = tuple(1 / most + (1 - 1 / most) * draw for draw in (x, y))  # uniform(1 / most, 1)
        width, height = zoomed(90, 70, 16, factor)
        assert data.zoomed(70, 90, y, x) == (height, width)
        widths.append(width)
    least = max(16, 90 / most)
    assert least <= min(widths) <= least + 90 * (1 - 1 / most) * 0.1 + 1
    assert max(widths) >= 88


def test_a_run_zooms_as_far_as_its_option_says(tmp_path, monkeypatch):
    for domain in "AB":
        write(tmp_path / "set" / f"train{domain}" / "one.png", 1, 70, 90)
    seen = []
    monkeypatch.setattr("fastnce.training.data.SinglePictureData", lambda *_, zoom, **__: seen.append(zoom))
    for options in ([], ["data.random_scale_max=1.25"]):
        overrides = [f"data.dir={tmp_path / 'set'}", *options]
        open_data(resolve("sincut", overrides=overrides), torch.device("cpu"), Ranks())
    assert seen == [1 / 3, 0.8]
