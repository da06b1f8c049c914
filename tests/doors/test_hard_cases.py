"""Methods and networks that are right in an unusual way, and wrong ones that would be noticed late."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.methods.weighting import find_weighting
from fastnce.networks import build_generator
from fastnce.translate import Translator, load_translator
from tests.doors.own_code import SMALL, refused, train

KEEP = [s for s in SMALL if not s.startswith("loss.")]


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "training.safetensors")


def go(folder, here, name, *settings, out="run", steps=2):
    run = ["--data", str(folder), "--out", str(here / out), *KEEP, *settings, f"run.steps={steps}"]
    return main(["train", f"mine.py:{name}", *run])


def test_translation_is_what_the_method_says(folder, here):
    assert go(folder, here, "Residual") == 0
    image = torch.rand(1, 3, 33, 40) * 2 - 1
    translator = load_translator(here / "run", trust_code=True)
    found = translator(image)
    generator = translator.generator.method.generator
    padded = torch.nn.functional.pad(image, (0, 0, 0, 3), mode="reflect")  # to multiples of 4
    with torch.no_grad():
        wanted = (padded - 0.5 * generator(padded))[:, :, :33]
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, generator(padded)[:, :, :33].clamp(-1, 1), atol=1e-2)


def test_validation_measures_the_translation(folder, here, tmp_path):
    """A method that subtracts almost nothing returns its input, so equal pairs have an SSIM of 1."""
    pairs = tmp_path / "pairs"
    for side in ("rain", "norain"):
        (pairs / side).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pairs / side / "1.png")
    settings = [f"data.validate={pairs}", "run.validate_every=1", "optim.lr=1e-12", "network.init_gain=1e-6"]
    assert go(folder, here, "Residual", *settings, steps=1) == 0
    lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["held_out_ssim_y"] for line in lines if line["step"] == 1 and "held_out_ssim_y" in line]
    assert measured == [pytest.approx(1.0, abs=1e-3)]  # the generator alone gives a grey image


@pytest.mark.parametrize(("name", "moves"), [("Frozen", False), ("Keep", True)])
def test_frozen_parameters_stay(folder, here, name, moves):
    for out, steps in (("run", 2), ("run", 4), ("whole", 4)):
        assert go(folder, here, name, out=out, steps=steps) == 0
    one, other = weights(here / "run", 4), weights(here / "whole", 4)
    assert all(torch.equal(one[key], other[key]) for key in one)
    first = "network/Gen/model.1.weight"
    torch.manual_seed(0)
    config = resolve("mine.py:Keep", None, KEEP)
    start = config.network.build_generator().state_dict()["model.1.weight"]
    assert torch.equal(one[first], start) != moves


def test_a_group_whose_rate_is_zero_stays(folder, here):
    assert go(folder, here, "Still") == 0
    torch.manual_seed(0)
    start = resolve("mine.py:Keep", None, KEEP).network.build_generator().state_dict()
    stored = weights(here / "run", 2)
    assert all(torch.equal(stored[f"network/Gen/{key}"], value) for key, value in start.items())


def test_tied_weights_and_parts_with_two_names(folder, here):
    """They are stored, continue bit for bit, and stay tied."""
    settings = ["network.generator=mine.py:Tied"]
    for out, steps in (("run", 2), ("run", 4), ("whole", 4)):
        assert go(folder, here, "Keep", *settings, out=out, steps=steps) == 0
    one, other = weights(here / "run", 4), weights(here / "whole", 4)
    assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("second.weight", "encoder.0.weight"):
        assert torch.equal(one[f"network/Gen/{name}"], one["network/Gen/first.weight"])
    generator = load_translator(here / "run", trust_code=True).generator
    assert generator.second.weight is generator.first.weight


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Homeless", "group G trains parameters that no network holds"),
        ("OddName", "generators() names a network 'G 1': a name must be a Python identifier"),
        ("NoGenerator", "generators() must name at least one network"),
        ("NotADict", "generators() must return a dict of networks by name, not a list of 1"),
        ("BareGroup", "groups() must return a dict of fastnce.methods.Group by name"),
        ("UnknownGroup", "a phase updates ('Q',); its groups must be a tuple of names out of G"),
        ("OnePhase", "phases() must return a tuple of fastnce.methods.Phase"),
        ("NoPhase", "phases() must return a tuple of fastnce.methods.Phase, at least one"),
        ("ListState", "extra_state_modules() must return a dict"),
        ("OddSections", "sections must be a dict of options by section"),
        ("WrongDefault", "its network.width must be a whole number from 1 to 65,536, not '4'"),
        ("TextRate", "group G has lr='1e-3', which must be None or a number of at least 0"),
        ("TwoGroups", "groups G and H train the same parameters"),
        ("AllFrozen", "group G has no parameters to train"),
        ("Smaller", "translate() of Smaller returns (2, 3, 32, 68) instead of (2, channels, 64, 68)"),
    ],
)
def test_wrong_members_are_refused_before_training(folder, here, capsys, name, sentence):
    run = ["--data", str(folder), "--out", str(here / "run"), *KEEP]
    assert f"method=mine.py:{name}: {sentence}" in refused(capsys, "train", f"mine.py:{name}", *run)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("FloatLoss", "FloatLoss.loss must return (loss, losses to log): a scalar tensor"),
        ("DetachedLoss", "its loss is a torch.float32 tensor of shape () on cpu without a gradient"),
        ("OnlyLoss", "it returned a torch.float32 tensor of shape ()"),
        ("LoggedMap", "its losses to log are {'map': 'a torch.float32 tensor of shape (1, 3, 32, 32) on cpu'}"),
        ("Failing2", "too many values to unpack (expected 2) (mine.py, line "),
    ],
)
def test_wrong_losses_are_named(folder, here, capsys, name, sentence):
    run = ["--data", str(folder), "--out", str(here / "run"), *KEEP]
    assert sentence in refused(capsys, "train", f"mine.py:{name}", *run)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("SmallerValues", "translate() of SmallerValues returns (3, 32, 32) instead of (1, channels, 32, 32)"),
        (
            "OddPictures",
            "pictures() of OddPictures must return a dict of images (1, channels, height, width), "
            "not {'A': 'a torch.float32 tensor of shape (1, 3, 32, 32) on cpu', 'loss': 'a torch.float32 tensor of",
        ),
    ],
)
def test_wrong_images_are_named(folder, here, capsys, name, sentence):
    run = ["--data", str(folder), "--out", str(here / "run"), *KEEP, "run.monitor_every=1", "run.sample_every=1"]
    assert sentence in refused(capsys, "train", f"mine.py:{name}", *run)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["network.generator=mine.py:Half"], "first.weight is torch.float16; build float32"),
        (["network.generator=mine.py:Lazy"], "more.weight has no shape yet; give lazy modules their sizes"),
        (["network.generator=mine.py:OddFactor"], "factor must be a whole number of at least 1, not 'two'"),
        (["network.generator=mine.py:KeywordOnly"], "forward must take (x, layers=(), encode_only=False)"),
        (["network.generator=mine.py:NestedFeatures"], "must return a list of feature maps"),
        (["network.generator=mine.py:Dense"], "mine.py:Dense has no convolution"),
        (["network.generator=mine.py:WrongWhenWide"], "forward of (2, 3, 64, 66) returns (2, 3, 64, 65) instead of"),
        (["network.discriminator=mine.py:MixedBatch"], "returns (1, 1, 64, 64) instead of scores (2, ...)"),
        (["network.generator=leave.py:Net"], "leave.py:Net cannot be imported: SystemExit at leave.py line 2"),
        (
            ["network.generator=mine.py:FeatureNet", "loss.nce_layers=0,4"],
            "feature_channels gives [2, 2], and the feature maps have [2] channels",
        ),
    ],
)
def test_networks_that_would_fail_late_are_refused(folder, here, capsys, settings, sentence):
    (here / "leave.py").write_text("import sys\nsys.exit(0)\n")
    options = [s for s in SMALL if not s.startswith(settings[0].split("=")[0])]
    layers = [] if any("nce_layers" in s for s in settings) else ["loss.nce_layers=0"]
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(here / "run"), *options, *layers]
    assert sentence in refused(capsys, *arguments, *settings)


def test_the_first_weight_need_not_take_the_image(folder, here):
    options = [s for s in KEEP if not s.startswith("network.generator")]
    run = ["--data", str(folder), "--out", str(here / "run"), *options]
    assert main(["train", "mine.py:Keep", *run, "network.generator=mine.py:LateStart"]) == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("infinite", "pair_weight must be finite numbers"),
        ("arrays", r"pair_weight must be \(groups, rows, rows\), here \(2, 4, 4\), not a numpy.ndarray"),
        ("whole_numbers", "pair_weight must be floats on the device of the queries, not torch.int64 on cpu"),
        ("elsewhere", "pair_log_weight must be floats on the device of the queries, not torch.float32 on meta"),
        ("unsure", "decoupled must be True or False, not 'yes'"),
        ("leaves", "fails on queries and keys of 8 rows in 2 groups: SystemExit"),
    ],
)
def test_weightings_that_would_fail_late_are_refused(here, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_weighting(f"mine.py:{name}")
    with pytest.raises(ValueError, match="power must be finite, not nan"):
        find_weighting("mine.py:weight", "power=nan")


def test_a_weighting_may_leave_the_diagonal_undefined(here):
    assert find_weighting("mine.py:diagonal") is not None


def test_errors_of_feature_channels_name_the_option(here):
    network = build_generator("mine.py:FeatureNet", width=2)
    network.first = None
    with pytest.raises(
        ValueError, match=r"feature_channels\(\[0, 4\]\) fails: AttributeError.*loss.nce_layers chooses"
    ):
        network.feature_channels([0, 4])


def test_tile_layers_are_compared_with_the_network(here):
    image = torch.zeros(1, 3, 160, 160)
    for name in ("Blocks", "WrongTiles"):
        translator = Translator(
            build_generator(f"mine.py:{name}", width=4, init_gain=1.0), tiles="exact", tile_size=128
        )
        if name == "Blocks":
            assert translator(image).shape == image.shape
            continue
        with pytest.raises(
            ValueError, match=r"tile_layers\(\) of WrongTiles does not compute what its forward computes"
        ):
            translator(image)


@pytest.mark.parametrize("tiles", ["auto", "exact", "fast"])
@pytest.mark.parametrize("size", [(33, 40), (51, 130), (300, 140)])
def test_sides_are_padded_to_what_a_generator_takes(here, tiles, size):
    translator = Translator(build_generator("mine.py:Sixths", width=2), tiles=tiles, tile_size=132)
    assert translator(torch.zeros(1, 3, *size)).shape == (1, 3, *size)


def test_samples_are_padded_to_what_a_generator_takes(folder, here):
    options = [s for s in KEEP if not s.startswith(("network.generator", "data.", "run."))]
    more = ["network.generator=mine.py:Sixths", "data.load_size=60", "data.crop_size=60", "run.steps=2"]
    run = ["--data", str(folder), "--out", str(here / "run"), *options, *more]
    assert main(["train", "mine.py:Keep", *run, "run.monitor_every=1", "run.sample_every=1"]) == 0


def test_a_subclass_keeps_the_defaults_of_its_paper(here, capsys):
    assert main(["train", "cut", "--dry-run"]) == 0
    plain = capsys.readouterr().out
    assert main(["train", "mine.py:Longer", "--dry-run"]) == 0
    assert capsys.readouterr().out == plain.replace('"cut"', '"mine.py:Longer"')


def test_the_configuration_of_any_help_text_is_toml(here, capsys):
    code = (here / "mine.py").read_text().replace("keeps the input", "keeps\\nthe input")
    (here / "lines.py").write_text(code)
    assert main(["train", "lines.py:Keep", "--dry-run"]) == 0
    (here / "config.toml").write_text(capsys.readouterr().out)
    assert resolve("lines.py:Keep", here / "config.toml").loss.strength == 3.0
    (here / "umlaut.py").write_text(code.replace("strength", "stärke"))
    assert "stärke must have a name in ASCII" in refused(capsys, "train", "umlaut.py:Keep", "--dry-run")


def test_code_that_changed_is_named(folder, here, capsys):
    assert train(folder, here, "mine.py:Keep") == 0
    code = (here / "mine.py").read_text()
    (here / "moved").mkdir()
    (here / "moved" / "mine.py").write_text(code.replace('{"Gen": self.generator}', '{"Other": self.generator}'))
    capsys.readouterr()
    import os

    os.chdir(here / "moved")
    sentence = refused(capsys, "translate", str(here / "run"), str(folder / "testA"), "--out", "out", "--trust-code")
    assert "now has Other: has its code changed?" in sentence
    assert "remove this one" not in sentence


def test_a_library_that_replaced_exit_is_not_named(folder, here, capsys, monkeypatch):
    """As wandb does: its function is then the last one in the traceback."""
    (here / "leave.py").write_text("import sys\nsys.exit(0)\n")
    names: dict = {}
    exec(compile("def leave(code=None):\n    raise SystemExit(code)\n", "/x/site-packages/hooks.py", "exec"), names)
    monkeypatch.setattr(sys, "exit", names["leave"])
    arguments = [
        "train",
        "fastcut",
        "--data",
        str(folder),
        "--out",
        str(here / "run"),
        "network.generator=leave.py:Net",
    ]
    assert "leave.py:Net cannot be imported: SystemExit at leave.py line 2" in refused(capsys, *arguments)
