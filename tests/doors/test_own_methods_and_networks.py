"""A user's own method and networks by import path, and the messages for wrong ones."""

import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.recompute import recompute_blocks
from fastnce.methods import CycleGAN, CycleGANOptions, NetworkOptions
from fastnce.networks import build_generator
from fastnce.training import train_run
from fastnce.translate import load_translator
from fastnce.translate.tiles import translate_exact
from tests.doors.own_code import CODE, SMALL, refused, train


def test_a_method_trains_continues_and_translates(folder, here, capsys):
    assert train(folder, here, "mine.py:Keep", "loss.strength=2") == 0
    assert train(folder, here, "mine.py:Keep", "loss.strength=2", "run.steps=4") == 0
    assert train(folder, here, "mine.py:Keep", "loss.strength=2", "run.steps=4", out="whole") == 0
    files = [here / run / "checkpoints" / "step-00000004" / "training.safetensors" for run in ("run", "whole")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(key.startswith("network/Gen/") for key in one)
    state = json.loads((files[0].parent / "state.json").read_text())
    assert (state["config"]["method"], state["generators"]) == ("mine.py:Keep", ["Gen"])
    capsys.readouterr()
    run, pictures = str(here / "run"), str(folder / "testA")
    sentence = refused(capsys, "translate", run, pictures, "--out", str(here / "out"))
    assert "this run uses code of its own, mine.py:Keep: if you trust it, add --trust-code to import it" in sentence
    assert "remove this one" not in sentence
    assert main(["translate", run, pictures, "--out", str(here / "out"), "--trust-code"]) == 0
    assert len(list((here / "out").glob("*.png"))) == 2
    assert main(["export", run, "--out", str(here / "files"), "--trust-code"]) == 0
    assert [path.name for path in (here / "files").glob("*.pth")] == ["latest_net_Gen.pth"]
    (here / "mine.py").unlink()
    sentence = refused(capsys, "translate", run, pictures, "--out", str(here / "out"), "--trust-code")
    assert f"method=mine.py:Keep: there is no file mine.py in {here}" in sentence


def test_options_of_a_method_are_shown_and_checked(here, capsys):
    assert main(["train", "mine.py:Keep", "--dry-run", "loss.strength=4", "loss.kind=square"]) == 0
    printed = capsys.readouterr().out
    assert 'method = "mine.py:Keep"' in printed
    strength = next(line for line in printed.splitlines() if line.startswith("strength = 4.0"))
    assert "weight of the L1 distance: keeps the input [at least 0]" in strength
    assert "lr = 0.001" in printed
    wrong = refused(capsys, "train", "mine.py:Keep", "--dry-run", "loss.strength=-1")
    assert wrong == "loss.strength must be a number of at least 0, not -1"
    assert "did you mean 'loss.strength'?" in refused(capsys, "train", "mine.py:Keep", "--dry-run", "loss.strenth=1")
    assert 'must be one of "plain", "square"' in refused(
        capsys, "train", "mine.py:Keep", "--dry-run", "loss.kind=cubed"
    )


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("nowhere.py:Keep", "method=nowhere.py:Keep: there is no file nowhere.py in {here}"),
        ("mine.py:Kept", "method=mine.py:Kept: mine.py has no Kept; it defines KeepOptions, Keep, "),
        ("mine.py:", "must be an import path such as mycode.py:Name or mypackage.module:Name"),
        ("..mine:Net", "must be an import path such as mycode.py:Name or mypackage.module:Name"),
        ("bad.py:Keep", "method=bad.py:Keep cannot be imported: ZeroDivisionError at bad.py line 2: division by zero"),
        ("nomodule.nets:Keep", "there is no module nomodule.nets: install it, add its folder to PYTHONPATH, or name"),
        ("mine.py:Net", "method=mine.py:Net must be a subclass of fastnce.methods.Method"),
        ("mine.py:NoPhases", "method=mine.py:NoPhases lacks phases(), translate(): see fastnce.methods.Method"),
        ("mine.py:Odd", "Odd.Options.table is of type dict: options are bool, int, float, str, Literal"),
        ("mine.py:Unbuilt", "method=mine.py:Unbuilt: Unbuilt(options, network) fails: TypeError: no luck"),
        ("mine.py:Misnamed", "method=mine.py:Misnamed: its sections name optim.learning_rate, which is no option"),
        ("kut", "unknown method 'kut'; did you mean 'cut'?; known: cut, fastcut"),
    ],
)
def test_wrong_methods_are_refused(here, capsys, method, sentence):
    assert sentence.format(here=here) in refused(capsys, "train", method, "--dry-run")


def test_a_method_of_a_package(folder, here, monkeypatch, capsys):
    package = here / "papers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "keep.py").write_text(CODE)
    monkeypatch.syspath_prepend(here)
    assert main(["train", "papers.keep:Keep", "--dry-run"]) == 0
    assert "papers.keep has no Kept" in refused(capsys, "train", "papers.keep:Kept", "--dry-run")
    assert "there is no module papers.kept" in refused(capsys, "train", "papers.kept:Keep", "--dry-run")


def test_a_generator_trains_and_translates(folder, here, capsys):
    settings = ["network.generator=mine.py:FeatureNet", "network.norm=none", "loss.nce_layers=0"]
    assert train(folder, here, "fastcut", *settings, "network.discriminator=mine.py:Judge") == 0
    with pytest.raises(ValueError, match="add --trust-code"):
        load_translator(here / "run")
    translator = load_translator(here / "run", trust_code=True)
    assert type(translator.generator).__name__ == "FeatureNet"
    assert (translator.generator.norm, translator.factor, translator.smallest) == ("none", 2, 2)
    assert translator(torch.zeros(1, 3, 33, 47)).shape == (1, 3, 33, 47)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["network.generator=mine.py:Plain"], "forward must take (x, layers=(), encode_only=False)"),
        (
            ["network.generator=mine.py:Halving"],
            "forward of (2, 3, 64, 66) returns (2, 3, 64, 33) instead of (2, 3, 64, 66)",
        ),
        (["network.generator=mine.py:Failing"], "network.generator=mine.py:Failing: Failing(3, 3, 2) fails: KeyError"),
        (["network.generator=mine.py:Net"], "network.generator=mine.py:Net has no feature_channels(layers), which"),
        (["network.generator=mine.py:WrongFeatures"], "feature_channels gives [5], and the feature maps have [2]"),
        (["network.generator=mine.py:NOT_CALLABLE"], "must be a class of torch.nn.Module, not int"),
        (["network.generator=mine.py:weight"], "weight(3, 3, 2) fails"),
        (["network.generator=mynet"], 'network.generator must be one of "resnet_9blocks"'),
        (
            ["network.discriminator=mine.py:Mute"],
            "forward of (2, 3, 256, 256) returns a NoneType instead of scores (2, ...)",
        ),
        (["network.discriminator=bad.py:Judge"], "network.discriminator=bad.py:Judge cannot be imported: ZeroDivision"),
    ],
)
def test_wrong_networks_are_refused(folder, here, capsys, settings, sentence):
    options = [s for s in SMALL if not s.startswith("network.generator")] if "generator" in settings[0] else SMALL
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(here / "run"), *options, "loss.nce_layers=0"]
    assert sentence in refused(capsys, *arguments, *settings)
    assert not (here / "run").exists()


def test_a_generator_without_features_works_with_methods_that_need_none(folder, here):
    options = [s for s in SMALL if not s.startswith("loss.")]
    arguments = ["train", "cyclegan", "--data", str(folder), "--out", str(here / "run"), *options]
    assert main([*arguments, "network.generator=mine.py:Net"]) == 0


def test_tiles_and_recomputation_of_a_generator(here):
    network = build_generator("mine.py:Blocks", width=4).double()
    picture = torch.rand(1, 3, 132, 140, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        whole, tiled = network(picture), translate_exact(network, picture, 64, torch.device("cpu"))
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-9)
    options = NetworkOptions(generator="mine.py:Blocks", width=4, discriminator_width=2)
    method = CycleGAN(CycleGANOptions(lambda_identity=0.0), options)
    assert recompute_blocks(method) == 2


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(3, 3, 3, groups=3),
        torch.nn.Conv2d(3, 3, 3, dilation=2),
        torch.nn.Conv2d(3, 3, (3, 1)),
        torch.nn.Conv2d(3, 3, 3, padding="same"),
        torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        torch.nn.ConvTranspose2d(3, 3, 5, 2, padding=2, output_padding=1),
        torch.nn.ConvTranspose2d(3, 3, 3, 2, padding=1),
        torch.nn.ConvTranspose2d(3, 3, 3, 1, padding=1),
        torch.nn.Upsample(scale_factor=2),
    ],
)
def test_layers_that_tiles_do_not_support_are_refused(here, layer):
    network = build_generator("mine.py:Blocks", width=4)
    network.tile_layers = lambda: [layer]
    with pytest.raises(ValueError, match="tiles (do not )?support"):
        translate_exact(network, torch.zeros(1, 3, 132, 140), 64, torch.device("cpu"))


def test_a_file_may_import_its_neighbours(here, capsys):
    (here / "neighbour.py").write_text("from fastnce.methods import CUT\n")
    (here / "paper.py").write_text(
        textwrap.dedent("""
        from neighbour import CUT

        class Mine(CUT):
            '''CUT again.'''
        """)
    )
    assert main(["train", "paper.py:Mine", "--dry-run"]) == 0
    assert "lambda_nce = 1.0" in capsys.readouterr().out


def test_files_of_the_same_name_in_two_folders(here, tmp_path):
    for i, folder in enumerate(("one", "two")):
        (here / folder).mkdir()
        (here / folder / "nets.py").write_text(f"{CODE}\n\nclass Width(FeatureNet):\n    number = {i}\n")
    from fastnce.common.imports import load_object

    assert [load_object(f"{folder}/nets.py:Width", "x").number for folder in ("one", "two")] == [0, 1]


def test_train_run_accepts_an_import_path(folder, here):
    options = [s for s in SMALL if not s.startswith("loss.")]
    config = resolve("mine.py:Keep", None, [*options, f"data.dir={folder}"])
    assert train_run(config, here / "run", quiet=True) == 2
