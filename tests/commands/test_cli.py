"""The command line and the configuration: valid input, and the errors for invalid input."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce import __version__
from fastnce.__main__ import SPINS
from fastnce.commands.demo import write_folders
from fastnce.commands.main import main
from fastnce.common.options import describe
from fastnce.config import resolve
from fastnce.config.stored import from_dict
from fastnce.methods.presets import PRESETS, UNRECORDED
from fastnce.networks import PatchGAN, ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator, pad_to_multiple
from tests import replay
from tests.methods.test_family_replay import PRESET
from tests.programs import ROOT, run_program
from tests.vgg import narrow_vgg

pytestmark = pytest.mark.usefixtures("few_blocks")


def error_of(capsys, *arguments: str) -> str:
    """Run a command that must end with exit code 2 and exactly one sentence on stderr; return the sentence."""
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    return message


DASHES = (
    *("train cut --out=--", "train cut --nproc=--", "translate a b --out=--", "evaluate --data=-- --inputs-only"),
    *("rain a --out=--", "unpair a --out=--", "cache --data=--", "export a --out=--", "demo --out=--"),
)


@pytest.mark.parametrize("line", DASHES)
def test_two_dashes_are_not_a_value(line, capsys):
    message = error_of(capsys, *line.split())
    assert " needs a value, and -- is not one: for a file of this name, write ./--" in message


def test_presets_are_the_published_defaults():
    cut, fastcut = resolve("cut"), resolve("fastcut")
    assert (cut.loss.lambda_nce, cut.loss.nce_idt, cut.loss.flip_equivariance) == (1.0, True, False)
    assert (fastcut.loss.lambda_nce, fastcut.loss.nce_idt, fastcut.loss.flip_equivariance) == (10.0, False, True)
    assert (cut.optim.n_epochs, cut.optim.n_epochs_decay) == (200, 200)
    assert (fastcut.optim.n_epochs, fastcut.optim.n_epochs_decay) == (150, 50)
    for config in (cut, fastcut):
        assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (2e-4, 0.5, 0.999)
        assert (config.loss.nce_layers, config.loss.patches) == ([0, 4, 8, 12, 16], 256)
        assert (config.loss.temperature, config.loss.projection, config.loss.gan_mode) == (0.07, 256, "lsgan")
        assert (config.data.load_size, config.data.crop_size, config.data.batch) == (286, 256, 1)
        assert (config.network.generator, config.network.width) == ("resnet_9blocks", 64)


@pytest.mark.parametrize("method", PRESETS)
def test_a_configuration_survives_a_round_trip(method, tmp_path):
    config = resolve(method, None, ["optim.lr=1e-3", "data.crop_size=[64,96]", "data.dir=some where"])
    path = tmp_path / "config.toml"
    path.write_text(config.as_toml())
    again = resolve(method, path)
    assert again == config
    assert from_dict(config.as_dict()) == config
    assert config.differences(again.as_dict()) == []
    assert tomllib.loads(config.as_toml())["method"] == method


def test_overrides_come_last(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[optim]\nlr = 1e-3\n[loss]\nnce_layers = [4, 8]\n[data]\nbatch = 2\n")
    config = resolve("cut", path, ["optim.lr=5e-4", "loss.nce_idt=false", "data.crop_size=128", "loss.gan_mode=hinge"])
    assert (config.optim.lr, config.loss.nce_layers, config.data.batch) == (5e-4, [4, 8], 2)
    assert (config.loss.nce_idt, config.data.crop_size, config.loss.gan_mode) == (False, 128, "hinge")


OVERRIDES = [
    ("loss.lamda_nce=3", "unknown key 'loss.lamda_nce'; did you mean 'loss.lambda_nce'?"),
    ("lambda_nce=3", "unknown key 'lambda_nce'; did you mean 'loss.lambda_nce'?"),
    ("optim.lr", "optim.lr needs a value, such as optim.lr=0.0002"),
    ("optim.lr=fast", "optim.lr must be a number from 1e-12 to 1e+38, not 'fast'"),
    ("data.batch=1.5", "data.batch must be a whole number from 1 to 65,536, not 1.5"),
    ("loss.nce_idt=3", "loss.nce_idt must be true or false, not 3"),
    (
        "loss.nce_layers=0,four",
        "loss.nce_layers must be a list of whole numbers of at least 0, each larger than the one before, like "
        "[0, 4, 8, 12, 16], not '[0,four]'",
    ),
    ("data.crop_size=[1,2,3]", "data.crop_size must be a whole number or [height, width]"),
]


@pytest.mark.parametrize(("override", "sentence"), OVERRIDES)
def test_overrides_that_make_no_sense(override, sentence, capsys):
    assert sentence in error_of(capsys, "train", "cut", "--dry-run", override)


def test_configuration_files_that_make_no_sense(tmp_path, capsys):
    path = tmp_path / "c.toml"
    for text, sentence in (
        ("[loss]\nlambda_nse = 1\n", "unknown key 'loss.lambda_nse'; did you mean 'loss.lambda_nce'?"),
        ("lr = 1\n", "'lr' must be in a section; did you mean 'optim.lr'?"),
        ("[loss\n", "not TOML"),
        ("method = 'fastcut'\n", "is for another method than cut"),
        ("[optim]\nlr = 'x'\n", "optim.lr must be a number from 1e-12 to 1e+38, not 'x'"),
    ):
        path.write_text(text)
        message = error_of(capsys, "train", "cut", "--dry-run", "--config", str(path))
        assert sentence in message
        assert str(path) in message
    assert "No such file" in error_of(capsys, "train", "cut", "--dry-run", "--config", str(tmp_path / "absent.toml"))


def test_dry_run_prints_a_configuration_that_works(capsys, tmp_path):
    assert main(["train", "fastcut", "--dry-run", "--data", "pictures", "optim.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    stored = tomllib.loads(text)
    assert stored["optim"]["lr"] == 1e-3
    assert stored["data"]["dir"] == "pictures"
    assert "# weight of PatchNCE" in text


def test_unknown_things_are_named(capsys, tmp_path):
    assert "unknown method 'fastcat'; did you mean 'fastcut'?" in error_of(capsys, "train", "fastcat")
    assert "unknown command 'trian'" in error_of(capsys, "trian")
    assert "needs --data DIR" in error_of(capsys, "train", "cut", "--out", str(tmp_path / "r"))
    assert "needs --out RUN" in error_of(capsys, "train", "cut", "--data", str(tmp_path))
    assert "trainA" in error_of(capsys, "train", "cut", "--data", str(tmp_path), "--out", str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("")
    message = error_of(capsys, "train", "cut", "--data", str(tmp_path), "--out", str(tmp_path / "file"))
    assert "a file is in the way" in message


def test_channels_that_do_not_go_together(capsys, tmp_path):
    arguments = ["train", "cut", "--data", str(tmp_path), "--out", str(tmp_path / "r"), "network.out_channels=1"]
    assert "network.in_channels=3 and out_channels=1" in error_of(capsys, *arguments)


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "translate" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    run = run_program(["-m", "fastnce", "--version"])
    assert run.stdout == f"{__version__}\n"


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}])
def test_waiting_threads_sleep_early_unless_the_user_says_otherwise(own):
    environment = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}} | own
    code = (
        "import os, sys; from fastnce.__main__ import entry; sys.argv = ['fastnce', '--version']\n"
        "try: entry()\n"
        "finally: print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    *_, last = run_program(["-c", code], environment=environment).stdout.split()
    assert last == {"GOMP_SPINCOUNT": "77", "OMP_WAIT_POLICY": "None"}.get(next(iter(own), ""), SPINS)


def test_the_number_of_turns_reaches_gnu_openmp():
    """It reads the variable when PyTorch is loaded, so a real process shows what it took."""
    environment = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    run = subprocess.run(
        [sys.executable, "-m", "fastnce", "models"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("this PyTorch computes with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in run.stderr


@pytest.fixture
def published(tmp_path) -> Path:
    """A published weight file."""
    torch.manual_seed(0)
    network = ResnetGenerator(width=4, blocks=4)
    return save_published({"G": network, "D": PatchGAN(width=4)}, tmp_path / "published")[0]


@pytest.mark.parametrize("size", [(32, 48), (33, 50), (3, 2)])
def test_pictures_of_any_size(published, size, tmp_path):
    translator = load_translator(published)
    picture = torch.rand(1, 3, *size) * 2 - 1
    result = translator(picture)
    assert result.shape == picture.shape
    if size == (32, 48):
        with torch.no_grad():
            torch.testing.assert_close(result, translator.generator(picture), rtol=1e-5, atol=1e-6)
    padded = pad_to_multiple(picture, 4)
    assert padded.shape[2] % 4 == padded.shape[3] % 4 == 0
    assert torch.equal(padded[:, :, : size[0], : size[1]], picture)


def test_a_padded_picture_is_translated_as_its_reflection(published):
    translator = load_translator(published)
    picture = torch.rand(1, 3, 30, 40)
    reflected = torch.cat([picture, picture[:, :, [-2, -3]]], dim=2)
    torch.testing.assert_close(translator(picture), translator(reflected)[:, :, :30])


def test_translate_a_folder(published, tmp_path, capsys):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (21, 34, 3), np.uint8)).save(source / "a.png")
    Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(source / "a.jpg")
    Image.fromarray(rng.integers(0, 256, (20, 20, 4), np.uint8)).save(source / "deep" / "b.png")
    out = tmp_path / "out"
    assert main(["translate", str(published), str(source), "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"3 pictures written to {out}\n"
    sizes = {str(path.relative_to(out)): Image.open(path).size for path in sorted(out.rglob("*.png"))}
    assert sizes == {"a.jpg.png": (34, 21), "a.png": (16, 16), "deep/b.png": (20, 20)} or sizes == {
        "a.png": (34, 21) if "a.jpg.png" in sizes else (16, 16),
        "a.png.png": (34, 21),
        "deep/b.png": (20, 20),
    }
    (source / "broken.png").write_bytes(b"no picture")
    again = tmp_path / "again"
    message = error_of(capsys, "translate", str(published), str(source), "--out", str(again), "--device", "cpu")
    assert "broken.png" in message
    assert len(list(again.rglob("*.png"))) == 3


def test_translate_mistakes(published, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert "no pictures here" in error_of(capsys, "translate", str(published), str(tmp_path / "empty"), *out)
    assert "no such picture" in error_of(capsys, "translate", str(published), str(tmp_path / "absent"), *out)
    picture = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert "no such run or file" in error_of(capsys, "translate", str(tmp_path / "absent"), str(picture), *out)
    assert "no checkpoint here" in error_of(capsys, "translate", str(tmp_path / "empty"), str(picture), *out)
    discriminator = str(published.with_name("latest_net_D.pth"))
    assert "holds a discriminator" in error_of(capsys, "translate", discriminator, str(picture), *out)
    message = error_of(capsys, "translate", str(published), str(picture), *out, "--format", "gif")
    assert "--format must be png" in message
    with pytest.raises(ValueError, match=r"pictures must be \(images, 3, height, width\)"):
        Translator(ResnetGenerator(width=4, blocks=4))(torch.zeros(1, 1, 8, 8))


def test_train_translate_export_and_cache(tmp_path, capsys):
    """The commands in the order of a typical user, with the demo's photographs."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_folders(data, side=64)
    small = ["network.generator=resnet_4blocks", "network.width=4", "network.discriminator_width=4", "run.device=cpu"]
    sizes = ["data.load_size=36", "data.crop_size=32"]
    assert main(["cache", "--data", str(data), *sizes]) == 0
    assert "MiB" in capsys.readouterr().out
    layers = "loss.nce_layers=0,4,8"
    assert main(["train", "cut", "--data", str(data), "--out", str(run), *small, *sizes, layers, "run.steps=2"]) == 0
    photo = data / "testA" / "chelsea.png"
    for source, name in ((run, "from_run"), (run / "checkpoints" / "step-00000002", "from_checkpoint")):
        out = tmp_path / name
        assert main(["translate", str(source), str(photo), "--out", str(out), "--device", "cpu"]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "published")]) == 0
    names = ["README.md", "config.json", *(f"latest_net_{n}.pth" for n in "DFG")]
    assert sorted(p.name for p in (tmp_path / "published").iterdir()) == names
    file = tmp_path / "published" / "latest_net_G.pth"
    assert main(["translate", str(file), str(photo), "--out", str(tmp_path / "from_file"), "--device", "cpu"]) == 0
    pictures = [
        np.asarray(Image.open(tmp_path / n / "chelsea.png")) for n in ("from_run", "from_checkpoint", "from_file")
    ]
    assert pictures[0].shape == np.asarray(Image.open(photo)).shape
    assert all((p == pictures[0]).all() for p in pictures)


SIZES = {
    "sincut": ["data.crop_size=32", "data.batch=2", "network.resolution=32", "network.width=1", "loss.projection=8"],
    "cyclegan": ["loss.pool_size=2"],
    "simdcl": ["loss.nce_layers=4,8,12,14"],
}


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_trains_and_translates(method, folder, tmp_path, capsys):
    data, run = folder, tmp_path / "run"
    if method == "sincut":  # one picture per domain
        data = tmp_path / "pair"
        for domain in ("trainA", "trainB"):
            (data / domain).mkdir(parents=True)
            noise = np.random.default_rng(0).integers(0, 256, (120, 130, 3), np.uint8)
            Image.fromarray(noise).save(data / domain / "one.png")
        small = ["network.discriminator_width=1"]
    else:
        small = ["network.generator=resnet_4blocks", "network.width=4", "network.discriminator_width=4"]
        small += ["data.load_size=68", "data.crop_size=64"]
        if method in ("fsesim", "lsesim"):
            small += [f"loss.vgg_weights={narrow_vgg()}", "loss.patches=16"]
        elif method not in ("cyclegan", "simdcl"):
            small += ["loss.nce_layers=4,8", "loss.patches=16", "loss.projection=8"]
    overrides = [*small, *SIZES.get(method, []), "run.device=cpu", "run.steps=2", "run.sample_every=2", "run.samples=1"]
    assert main(["train", method, "--data", str(data), "--out", str(run), "--quiet", *overrides]) == 0
    assert (run / "samples" / "step-00000002.png").exists()
    assert main(["train", method, "--data", str(data), "--out", str(run), "--quiet", *overrides, "run.steps=3"]) == 0
    picture = next((data / "trainA").iterdir())
    out = tmp_path / "out"
    assert main(["translate", str(run), str(picture), "--out", str(out), "--device", "cpu"]) == 0
    assert Image.open(next(out.iterdir())).size == Image.open(picture).size


def test_methods_are_listed(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{printed}" for name in PRESETS)
    assert "G 11,378,179, F 560,384, D 2,764,737" in printed


def test_one_method_is_shown_with_its_options(tmp_path, capsys):
    assert main(["methods", "dclgan-paper"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dclgan-paper\n")
    assert "\ncut\n" not in printed
    assert "  recorded    no: there is no released code" in printed
    for key, (value, text) in describe(PRESETS["dclgan-paper"].options()).items():
        assert f"    loss.{key}={value}\n" in printed
        assert text in " ".join(printed.split())
    assert main(["methods", "cut"]) == 0
    assert "  recorded    yes: recordings of the published code" in capsys.readouterr().out
    assert main(["methods", "DCL"]) == 2
    assert "unknown method 'DCL'; did you mean 'dclgan'?" in capsys.readouterr().err


def test_recorded_presets_are_those_that_are_replayed():
    """Two of them are modes of a recorded model, and one is the learned form of F-LSeSim."""
    assert {*replay.MODELS.values(), *PRESET.values(), "fastcut", "lsesim"} == PRESETS.keys() - {*UNRECORDED}
