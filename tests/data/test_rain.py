"""Rendered rain: its effect on an image, its reproducibility, and the files of the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import DataError, load_image
from fastnce.data.rain import RainOptions, parse_kinds, parse_range, render_rain, write_rain
from fastnce.data.rained import RainedData
from fastnce.data.unpaired import UnpairedData
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.engine.trained import count_parameters
from fastnce.evaluate.pairs import find_pairs
from fastnce.methods import DCDGAN, Batch, DCDGANOptions, Draws, NetworkOptions
from fastnce.networks import build
from fastnce.networks.restorer import Restorer

STREAKS_ONLY = {"haze": (0.0, 0.0)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rain_repeats_and_differs():
    clean = torch.rand(2, 3, 48, 64) * 2 - 1
    rainy = render_rain(clean, generator=seeded(1))
    assert rainy.shape == clean.shape
    assert rainy.dtype == clean.dtype
    assert rainy.abs().max() <= 1
    assert torch.equal(rainy, render_rain(clean, generator=seeded(1)))
    assert not torch.equal(rainy, render_rain(clean, generator=seeded(2)))
    same = render_rain(clean[:1].expand(2, -1, -1, -1), generator=seeded(1))
    assert not torch.equal(same[0], same[1])  # every image has different rain
    half = render_rain(clean.bfloat16(), generator=seeded(1))
    assert half.dtype == torch.bfloat16


def test_streaks_are_brighter_than_what_they_cover():
    clean = torch.full((1, 3, 96, 128), -0.6)
    rainy = render_rain(clean, RainOptions(**STREAKS_ONLY), seeded(0))
    assert (rainy >= clean - 1e-6).all()
    assert (rainy - clean).max() > 0.2
    assert torch.equal(rainy[:, 0], rainy[:, 1])  # colourless on grey
    bright = torch.ones(1, 3, 96, 128)
    torch.testing.assert_close(render_rain(bright, RainOptions(**STREAKS_ONLY), seeded(0)), bright)


def test_no_rain_leaves_the_image_unchanged():
    clean = torch.rand(1, 1, 32, 40) * 2 - 1
    nothing = RainOptions(density=(0, 0), **STREAKS_ONLY)
    torch.testing.assert_close(render_rain(clean, nothing, seeded(0)), clean)


def test_density_is_the_fraction_covered():
    clean = torch.full((4, 1, 256, 256), -1.0)
    covered = []
    for density in (0.03, 0.3):
        options = RainOptions(density=(density, density), **STREAKS_ONLY)
        covered.append((render_rain(clean, options, seeded(0)) > -0.9).float().mean().item())
    assert 0.015 < covered[0] < 0.045
    assert covered[1] > 4 * covered[0]


def test_additive_streaks_also_brighten_what_is_bright():
    """The values are almost 0, and not 0, so that both options draw the same rain."""
    clean = torch.full((1, 3, 64, 64), 0.9)
    covering, adding = (
        render_rain(clean, RainOptions(additive=(a, a), **STREAKS_ONLY), seeded(0)) for a in (1e-9, 1.0)
    )
    assert (adding >= covering - 1e-6).all()
    assert covering.max() < 1 - 1e-3  # no brighter than the light of the drops
    assert adding.max() == 1
    black = torch.full((1, 3, 64, 64), -1.0)
    one_layer = {"layers": 1, **STREAKS_ONLY}
    covering, adding = (render_rain(black, RainOptions(additive=(a, a), **one_layer), seeded(0)) for a in (1e-9, 1.0))
    torch.testing.assert_close(adding, covering)  # on black, adding light and covering with light are the same


def test_drizzle_covers_the_whole_image_with_thin_streaks():
    clean = torch.full((1, 1, 128, 128), -0.6)
    fine = RainOptions(density=(0, 0), drizzle=(0.8, 0.8), angle=(0, 0), **STREAKS_ONLY)
    change = (render_rain(clean, fine, seeded(0)) - clean)[0, 0]
    assert (change >= -1e-6).all()
    assert (change.unfold(0, 16, 16).unfold(1, 16, 16).amax((2, 3)) > 0.1).all()  # in every part of the image
    change = change - change.mean()
    down, right = (change[1:] * change[:-1]).mean(), (change[:, 3:] * change[:, :-3]).mean()
    assert down > 0.8 * change.square().mean()  # long
    assert right < 0.2 * change.square().mean()  # and thin
    assert render_rain(clean[..., :1, :1], fine, seeded(0)).isfinite().all()  # a pixel has no deviation


def test_fine_rain_has_soft_and_hard_edges():
    """The share of its lit pixels that have its full light differs from image to image."""
    clean = torch.full((30, 1, 64, 64), -1.0)
    fine = RainOptions(density=(0, 0), drizzle=(0.5, 0.5), additive=(1, 1), **STREAKS_ONLY)
    light = (render_rain(clean, fine, seeded(0)) + 1) / 2
    lit = (light > 0.01).sum((1, 2, 3))
    share = (light >= light.amax((1, 2, 3), keepdim=True) - 1e-4).sum((1, 2, 3)) / lit
    assert share.max() > 0.3
    assert share.min() < 0.05


def test_options_that_are_off_change_nothing():
    """The rain of earlier versions stays the same, number for number."""
    clean = torch.zeros(1, 1, 24, 24)
    plain = render_rain(clean, RainOptions(), seeded(0))
    with_fine = render_rain(clean, RainOptions(drizzle=(1e-9, 1e-9)), seeded(0))  # drawn after all others
    torch.testing.assert_close(plain, with_fine)


def test_each_image_draws_one_of_several_kinds():
    clean = torch.full((40, 1, 32, 32), -0.6)
    none, heavy = RainOptions(density=(0, 0), **STREAKS_ONLY), RainOptions(density=(0.8, 0.8), **STREAKS_ONLY)
    change = (render_rain(clean, [none, heavy], seeded(0)) - clean).abs().amax((1, 2, 3))
    assert 10 < (change < 1e-6).sum() < 30
    assert (change > 0.1).sum() == (change > 1e-6).sum()
    assert torch.equal(render_rain(clean, [heavy], seeded(0)), render_rain(clean, heavy, seeded(0)))
    with pytest.raises(ValueError, match="options holds no kind of rain"):
        render_rain(clean, [])


def test_kinds_of_rain_are_parsed():
    light, heavy = parse_kinds("here", "density=0.1; density=0.3:0.7,layers=3 ;")
    assert (light.density, heavy.density) == ((0.1, 0.1), (0.3, 0.7))
    assert parse_kinds("here", "") == [RainOptions()]
    with pytest.raises(ValueError, match=r"here: kinds of rain must have equally many layers, not \[3, 2\]"):
        parse_kinds("here", "density=0.1; layers=2")
    with pytest.raises(ValueError, match="here: 'wet=1' is not a range of rain"):
        parse_kinds("here", "density=0.1; wet=1")


@pytest.mark.parametrize("angle", [-40.0, 0.0, 30.0])
def test_the_angle_is_that_of_the_streaks(angle):
    clean = torch.full((1, 1, 128, 128), -1.0)
    options = RainOptions(angle=(angle, angle), length=(0.3, 0.3), width=(0.03, 0.03), layers=1, **STREAKS_ONLY)
    x = render_rain(clean, options, seeded(3))[0, 0]
    dy, dx = torch.gradient(x)
    # the gradient is largest across the streaks: an eigenvector of the structure tensor
    tensor = torch.tensor([[(dy * dy).sum(), (dy * dx).sum()], [(dy * dx).sum(), (dx * dx).sum()]])
    along = torch.linalg.eigh(tensor).eigenvectors[:, 0]  # (down, right)
    found = torch.rad2deg(torch.atan2(-along[1], along[0])).item()
    found = (found + 90) % 180 - 90  # a line has no direction
    assert found == pytest.approx(angle, abs=4)


def test_haze_lifts_the_dark_and_more_so_at_the_top():
    clean = torch.full((1, 3, 64, 64), -1.0)
    options = RainOptions(density=(0, 0), haze=(0.5, 0.5))
    rows = render_rain(clean, options, seeded(0)).mean(dim=(0, 1, 3))
    assert rows.min() > -0.95
    assert rows[:8].mean() > rows[-8:].mean() + 0.1


def test_one_scale_for_all_sizes():
    """Lengths are fractions of the shorter side: an image of twice the size has streaks of twice the length."""
    options = RainOptions(angle=(0, 0), length=(0.2, 0.2), width=(0.03, 0.03), layers=1, **STREAKS_ONLY)
    extent = []
    for side in (64, 256):
        x = render_rain(torch.full((8, 1, side, side), -1.0), options, seeded(0))[:, 0]
        x = x - x.mean()
        spectrum = torch.fft.rfft(x, dim=1).abs().square()
        correlation = torch.fft.irfft(spectrum, dim=1).mean(dim=(0, 2))
        extent.append((correlation > correlation[0] / 2).float().mean().item())
    assert extent[1] == pytest.approx(extent[0], rel=0.3)


def test_options_and_shapes_that_make_no_sense():
    with pytest.raises(ValueError, match="rain density must be LOW or LOW:HIGH between 0 and 0.9, not 0.5:0.2"):
        RainOptions(density=(0.5, 0.2))
    with pytest.raises(ValueError, match="rain angle"):
        RainOptions(angle=(0, 90))
    with pytest.raises(ValueError, match="layers must be from 1 to 8"):
        RainOptions(layers=0)
    with pytest.raises(ValueError, match=r"must be \(images, 1 or 3, height, width\)"):
        render_rain(torch.zeros(3, 8, 8))
    assert parse_range("haze", "0.1") == (0.1, 0.1)
    assert parse_range("angle", "-10:5") == (-10, 5)
    with pytest.raises(ValueError, match="--haze must be a number or LOW:HIGH, not 'much'"):
        parse_range("haze", "much")


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "a.bmp", "b.png", "c.png", "deep/a.png", "e.png"):
        Image.fromarray(rng.integers(0, 200, (32, 40, 3), np.uint8)).save(folder / name)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pairs_on_disk(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["rain", str(photos), "--out", str(out), "--angle", "-10:10", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"written to {out}: 6 in norain, 6 in rain\n"
    written = {"a.png", "a.png.png", "b.png", "c.png", "deep/a.png", "e.png"}
    assert names(out / "rain") == names(out / "norain") == written
    pairs = {pair.rainy.relative_to(out / "rain").as_posix(): pair for pair in find_pairs(out)}
    rainy, clean = pairs["b.png"].load()
    assert torch.equal(clean, load_image(photos / "b.png"))
    assert not torch.equal(rainy, clean)
    again = tmp_path / "again"
    assert main(["rain", str(photos), "--out", str(again), "--angle=-10:10", "--seed", "3"]) == 0
    assert all((again / name).read_bytes() == (out / name).read_bytes() for name in names(out))


def test_unpaired_never_shows_the_truth(photos, tmp_path):
    out = tmp_path / "out"
    assert main(["rain", str(photos), "--out", str(out), "--unpaired", "--test", "2"]) == 0
    a, b, test = names(out / "trainA"), names(out / "trainB"), names(out / "test" / "rain")
    assert (len(a), len(b), len(test)) == (2, 2, 2)
    assert len(a | b | test) == 6
    assert len(find_pairs(out)) == 2
    data = UnpairedData(out, load_size=32, crop_size=24)
    assert data.batch(0)[0].shape == (1, 3, 24, 24)


def error_of(capsys, *arguments: str) -> str:
    assert main(["rain", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    return message


def test_nothing_is_half_written(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "z.png").write_bytes(b"broken")
    assert "z.png is not a picture" in error_of(capsys, str(photos), "--out", str(out))
    assert not out.exists()
    (photos / "z.png").unlink()
    (out / "rain").mkdir(parents=True)
    assert "exists already" in error_of(capsys, str(photos), "--out", str(out))
    assert names(out) == set()
    assert "no such picture" in error_of(capsys, str(tmp_path / "absent"), "--out", str(out))
    assert "--density must be" in error_of(capsys, str(photos), "--out", str(out), "--density", "x")
    with pytest.raises(DataError, match="holds 1 picture; at least 2 are needed"):
        write_rain(photos / "b.png", tmp_path / "o", unpaired=True)


# ---- as an augmentation ----


@pytest.fixture
def clean_only(tmp_path) -> Path:
    root = tmp_path / "clean"
    (root / "trainB").mkdir(parents=True)
    for i in range(5):
        pixels = np.full((48, 60, 3), 30 + 20 * i, np.uint8)  # different levels, to tell rain from pictures
        Image.fromarray(pixels).save(root / "trainB" / f"{i}.png")
    return root


SIZES = {"load_size": 40, "crop_size": 32}


def test_clean_pictures_are_enough(clean_only):
    data = RainedData(clean_only, batch=4, **SIZES)
    assert (data.size_a, data.size_b) == (5, 5)
    levels = {round(30 + 20 * i) / 127.5 - 1 for i in range(5)}
    rained = 0
    for step in range(6):
        a, b = data.batch(step)
        assert a.shape == b.shape == (4, 3, 32, 32)
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert all(min(abs(p.mean().item() - level) for level in levels) < 1e-4 for p in b)  # B stays clean
        rained += sum(bool(p.std() > 0.01) for p in a)
        streaks = [p[0] > p[0].median() + 0.02 for p in a]
        shared = (streaks[0] & streaks[1]).sum() / (streaks[0] | streaks[1]).sum()
        assert shared < 0.8  # every image has different rain
        again = RainedData(clean_only, batch=4, **SIZES).batch(step)
        assert torch.equal(a, again[0])
        assert torch.equal(b, again[1])
    assert rained == 24
    assert not torch.equal(data.batch(0)[0], RainedData(clean_only, batch=4, seed=1, **SIZES).batch(0)[0])
    with pytest.raises(DataError, match="there is no folder trainA"):
        UnpairedData(clean_only, **SIZES)
    with pytest.raises(DataError, match="clean pictures to render rain on"):
        RainedData(clean_only / "trainB", **SIZES)


def test_rain_does_not_change_b(clean_only):
    (clean_only / "trainA").mkdir()
    Image.fromarray(np.zeros((48, 60, 3), np.uint8)).save(clean_only / "trainA" / "black.png")
    plain, mixed = UnpairedData(clean_only, batch=8, **SIZES), RainedData(clean_only, share=0.5, batch=8, **SIZES)
    wet = 0
    for step in range(8):
        (a, b), (rained, same) = plain.batch(step), mixed.batch(step)
        assert torch.equal(b, same)
        changed = [not torch.equal(one, other) for one, other in zip(a, rained, strict=True)]
        wet += sum(changed)
        for picture, is_wet in zip(rained, changed, strict=True):
            assert (picture.min() > -0.99) == is_wet  # the picture in A is black, those in B are not
    assert 20 < wet < 44  # 64 draws with probability 1/2


def test_rain_does_not_depend_on_the_number_of_ranks(clean_only):
    whole = RainedData(clean_only, batch=4, **SIZES)
    parts = [RainedData(clean_only, batch=2, rank=rank, world=2, **SIZES) for rank in (0, 1)]
    for step in range(3):
        a, b = whole.batch(step)
        halves = [part.batch(step) for part in parts]
        for rank, (half_a, half_b) in enumerate(halves):
            assert torch.equal(half_a, a[rank::2])
            assert torch.equal(half_b, b[rank::2])


def test_rain_on_crops_has_the_scale_of_the_photograph(clean_only):
    """Streaks are as long as on the whole picture."""
    clean = torch.full((1, 3, 64, 64), -1.0)
    options = RainOptions(length=(0.1, 0.1), width=(0.01, 0.01), angle=(0, 0), layers=1, **STREAKS_ONLY)
    own, photograph = (render_rain(clean, options, seeded(0), side=side)[0, 0] for side in (None, 512))
    wet = [(x > -0.9).float() for x in (own, photograph)]
    covered = [x.mean().item() for x in wet]
    continued = [(x[1:] * x[:-1]).mean().item() / share for x, share in zip(wet, covered, strict=True)]
    assert continued[1] > continued[0] + 0.05
    assert covered[1] == pytest.approx(covered[0], rel=0.6)  # the same density


def test_samples_are_rainy_too(clean_only):
    a, b = RainedData(clean_only, **SIZES).samples(2)
    assert a.std(dim=(2, 3)).min() > 0.01
    assert b.std(dim=(2, 3)).max() < 1e-6


def test_train_on_clean_pictures_alone(clean_only, tmp_path, capsys):
    small = ["network.generator=restorer", "network.width=4", "network.discriminator=pixel", "loss.patches=8"]
    small += ["network.discriminator_width=4", "loss.projection=8", "data.load_size=20", "data.crop_size=16"]
    arguments = ["train", "dcdgan", "--data", str(clean_only), "--out", str(tmp_path / "run"), *small]
    arguments += ["run.steps=2", "run.device=cpu"]
    assert main([*arguments, "data.rain=1", "data.rain_like=density=0.2:0.3, layers=2"]) == 0
    capsys.readouterr()
    for wrong, message in (
        ("data.rain=2", "data.rain must be a number from 0 to 1, not 2"),
        ("data.rain_like=wet=1:2", "data.rain_like: 'wet=1:2' is not a range of rain"),
        ("data.rain_like=haze=much", "haze must be a number or LOW:HIGH, not 'much'"),
    ):
        assert main([*arguments, "--dry-run", "data.rain=1", wrong]) == 2
        assert message in capsys.readouterr().err
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "other"), "data.rain=1", wrong]) == 2
        assert message in capsys.readouterr().err


def test_rendered_pairs_teach(clean_only, monkeypatch):
    """With this term alone, G_A's restoration of rendered rain approaches the clean picture."""
    monkeypatch.setattr(build, "Restorer", partial(Restorer, middle=1))
    network = NetworkOptions(generator="restorer", width=4, discriminator="pixel", discriminator_width=4)
    weights = {"lambda_gan": 0.0, "lambda_nce": 0.0, "lambda_idt": 0.0, "lambda_color": 0.0, "lambda_frequency": 0.0}
    layers = {"nce_layers": [4, 8]}
    with pytest.raises(ValueError, match="every term has weight 0"):
        DCDGAN(DCDGANOptions(**weights, **layers), network).check(1, 16, 16)
    weights |= {"lambda_rendered": 1.0, "rendered_rain": "haze=0,density=0.4"}
    method = DCDGAN(DCDGANOptions(**weights, **layers), network)
    assert list(method.networks()) == ["G_A"]  # nothing else is trained, stored or computed
    assert [phase.groups for phase in method.phases()] == [("G",)]
    assert count_parameters(method) == sum(p.numel() for p in method.generator_a.parameters())  # as a run says
    data = RainedData(clean_only, **SIZES)
    step = Step(method, OptimOptions(lr=1e-2))
    losses = []
    for i in range(20):
        torch.manual_seed(i % 2)
        losses.append(step.run(Batch(*data.batch(0)), Draws())["rendered"].item())
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    with_another = DCDGAN(DCDGANOptions(**{**weights, "lambda_color": 0.1}, **layers), network)
    assert list(with_another.networks()) == ["G_A", "G_B", "D_A", "D_B", "F1", "F2"]
    assert count_parameters(with_another) == sum(p.numel() for p in with_another.parameters())
    with pytest.raises(ValueError, match=r"loss\.rendered_rain: 'fog=1' is not a range"):
        DCDGAN(DCDGANOptions(rendered_rain="fog=1", **layers), network)


def test_rain_is_not_written_into_its_source_folder(photos, capsys):
    for out in (photos, photos / "wet"):
        assert main(["rain", str(photos), "--out", str(out)]) == 2
        assert "take another folder for --out" in capsys.readouterr().err
    assert not (photos / "rain").exists()
    assert not (photos / "wet").exists()
