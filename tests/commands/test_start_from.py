"""Runs that begin with weights that are there already: files, folders, runs, and what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fastnce import models
from fastnce.commands.main import main
from fastnce.common.messages import counted
from fastnce.config import resolve
from fastnce.config.build import build_method, plan
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.history import read_history
from fastnce.engine.stored import load_generators
from fastnce.methods import CUT
from fastnce.nce import PatchSampleF
from fastnce.networks.published import save_published
from fastnce.training import train_run
from fastnce.training.starting import plan_start
from fastnce.translate.exported import read_details
from tests.engine.test_engine import SMALL, small_config, small_method, training_tensors
from tests.logs import log_lines

pytestmark = pytest.mark.usefixtures("few_blocks")


def weights(method) -> dict[str, torch.Tensor]:
    return {f"{n}/{k}": t.clone() for n, net in method.networks().items() for k, t in net.state_dict().items()}


@pytest.fixture
def other() -> CUT:
    """A method whose weights no run of seed 0 has."""
    torch.manual_seed(1234)
    return small_method()


@pytest.fixture
def published(other, tmp_path) -> Path:
    save_published(other.networks(), tmp_path / "published")
    return tmp_path / "published"


def started(folder, *overrides, **changes):
    """What plan_start makes of a configuration, and the method with those weights."""
    config = small_config(folder, *overrides, **changes)
    start = plan_start(config, plan(config))
    torch.manual_seed(0)
    method = build_method(config)
    before = weights(method)
    if start is not None:
        start.load(method)
    return start, before, weights(method)


def test_a_folder_of_published_files(folder, published, other):
    start, before, after = started(folder, f"run.start_from={published}")
    assert [line.split(";")[0] for line in start.lines] == [
        f"{name}: {len(net.state_dict())} of {len(net.state_dict())} tensors" for name, net in other.networks().items()
    ]
    wanted = weights(other)
    assert wanted.keys() == after.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(after[key], before[key]) for key in wanted)


def test_named_networks_alone(folder, published, other):
    start, before, after = started(folder, f"run.start_from={published}", "run.start_networks=D")
    wanted = weights(other)
    for key in wanted:
        assert torch.equal(after[key], (wanted if key.startswith("D/") else before)[key]), key
    assert start.lines[1:] == ["G begins with its own initial weights", "F begins with its own initial weights"]


def test_one_file_says_its_network_in_its_name_or_is_told(folder, published, other):
    wanted = weights(other)
    _, before, after = started(folder, f"run.start_from={published / 'latest_net_G.pth'}")
    assert all(torch.equal(after[k], (wanted if k.startswith("G/") else before)[k]) for k in wanted)
    renamed = published / "mine.pth"
    shutil.copy(published / "latest_net_G.pth", renamed)
    with pytest.raises(ValueError, match=r"does not say in its name .* has G, F, D: .* run.start_networks=G$"):
        started(folder, f"run.start_from={renamed}")
    _, _, told = started(folder, f"run.start_from={renamed}", "run.start_networks=G")
    assert all(torch.equal(told[key], after[key]) for key in after)
    shutil.copy(renamed, published / "latest_net_G_A.pth")
    with pytest.raises(ValueError, match=r"latest_net_G_A.pth is a network G_A, and fastcut has G, F, D"):
        started(folder, f"run.start_from={published / 'latest_net_G_A.pth'}")
    with pytest.raises(ValueError, match="names several"):
        started(folder, f"run.start_from={renamed}", "run.start_networks=G,D")


def test_labels(folder, published, other):
    for file in list(published.glob("latest_*")):
        shutil.copy(file, published / file.name.replace("latest", "200"))
        file.rename(published / file.name.replace("latest", "400"))
    with pytest.raises(ValueError, match=rf"files of 200, 400 and none of latest: .*run.start_from={published}/400$"):
        started(folder, f"run.start_from={published}")
    _, _, after = started(folder, f"run.start_from={published / '200'}")
    assert torch.equal(after["G/model.1.weight"], weights(other)["G/model.1.weight"])
    save_published(small_method().networks(), published)  # latest is preferred
    _, _, after = started(folder, f"run.start_from={published}")
    assert not torch.equal(after["G/model.1.weight"], weights(other)["G/model.1.weight"])


def test_tensors_of_another_shape_stay(folder, published, other):
    start, before, after = started(
        folder, f"run.start_from={published}", "network.in_channels=4", "network.out_channels=4", "loss.nce_layers=4,8"
    )
    names = {line.partition(":")[0]: line for line in start.lines}
    inner = "G/model.12.conv_block.1.weight"
    assert torch.equal(after[inner], weights(other)[inner])
    assert torch.equal(after["G/model.1.weight"], before["G/model.1.weight"])
    assert "model.1.weight is (4, 3, 7, 7) there and (4, 4, 7, 7) here" in names["G"]
    total = len(other.networks()["G"].state_dict())
    assert names["G"].startswith(f"G: {total - 3} of {total} tensors; ")  # the first weight, the last weight and bias
    assert names["F"].startswith("F: 6 of 8 tensors; mlp_0.0.weight is (8, 3) there and (8, 8) here; ")
    assert names["F"].endswith("; and 7 more")  # of 2 weights that differ and 8 of layers that are not here


def test_a_run_is_taken_and_recorded(folder, tmp_path, capsys):
    train_run(small_config(folder, "run.steps=2", "run.seed=7", "optim.ema=0.5"), tmp_path / "first", quiet=True)
    config = small_config(folder, "run.steps=1", f"run.start_from={tmp_path / 'first'}", "optim.ema=0.5")
    start, _, after = started(folder, f"run.start_from={tmp_path / 'first'}")
    checkpoint = tmp_path / "first" / "checkpoints" / "step-00000002"
    averaged = load_generators(checkpoint)["G"]
    tensors = training_tensors(tmp_path / "first")
    assert all(torch.equal(after[f"G/{key}"], tensor) for key, tensor in averaged.items())
    assert not torch.equal(after["G/model.1.weight"], tensors["network/G/model.1.weight"])
    assert torch.equal(after["D/model.0.weight"], tensors["network/D/model.0.weight"])
    assert "the averaged weights of G are taken, as translation does" in start.lines
    train_run(config, tmp_path / "second")
    (event,) = [event for event in read_history(tmp_path / "second") if event["event"] == "from"]
    assert event["source"] == str(checkpoint)
    assert event["lines"] == start.lines
    lines = log_lines(tmp_path / "second")
    assert f"begins with the weights of {checkpoint}" in lines
    assert set(start.lines) <= set(lines)
    assert start.lines[0] in capsys.readouterr().out
    ours = training_tensors(tmp_path / "second")
    for key in ("model.1.weight", "model.12.conv_block.1.weight"):  # one step from the average, which starts with it
        first, average, now = averaged[key], ours[f"average/G/{key}"], ours[f"network/G/{key}"]
        torch.testing.assert_close(average, (first + now) / 2)
        assert (now - first).abs().max() <= 2.1 * config.optim.lr
    shutil.rmtree(tmp_path / "first")  # a run that continues does not read it again
    config.run.steps = 2
    assert train_run(config, tmp_path / "second", quiet=True) == 2
    assert len([event for event in read_history(tmp_path / "second") if event["event"] == "from"]) == 1


def test_a_run_that_is_there_does_not_begin_anew(folder, published, tmp_path, monkeypatch):
    """The same source in other words is the same command; another one would have no effect."""
    monkeypatch.chdir(tmp_path)
    one = small_config(folder, "run.steps=1", "run.start_from=published")
    train_run(one, "run", quiet=True)
    for step, source in enumerate(("", published, "./published"), 2):
        train_run(small_config(folder, f"run.steps={step}", f"run.start_from={source}"), "run", quiet=True)
    train_run(small_config(folder, "run.steps=1"), "plain", quiet=True)
    for out, steps, source in (("run", 4, "published/latest_net_G.pth"), ("plain", 1, "published")):
        refused = f"begins a new run, and {out} holds one of {counted(steps, 'step')}: leave it out to continue"
        with pytest.raises(ValueError, match=refused):
            train_run(small_config(folder, "run.steps=9", f"run.start_from={source}"), out, quiet=True)


def test_a_checkpoint_and_a_pointer(folder, tmp_path):
    config = small_config(folder, "run.steps=2", "run.save_every=1", "run.seed=7")
    train_run(config, tmp_path / "first", quiet=True)
    checkpoints = tmp_path / "first" / "checkpoints"
    _, _, one = started(folder, f"run.start_from={checkpoints / 'step-00000001'}")
    _, _, two = started(folder, f"run.start_from={checkpoints / 'latest'}")
    assert torch.equal(two["D/model.0.weight"], training_tensors(tmp_path / "first")["network/D/model.0.weight"])
    assert not torch.equal(one["D/model.0.weight"], two["D/model.0.weight"])


class Lazy(CUT):
    """CUT whose projector is built for the first features, as the published one is."""

    def __init__(self, method: CUT):
        super(CUT, self).__init__()
        self.method, self.lazy = method, PatchSampleF(nc=8)

    def networks(self):
        return {**self.method.generators(), "F": self.lazy}


def test_a_projector_that_is_not_built_yet(folder, published, other):
    config = small_config(folder, f"run.start_from={published}", "run.start_networks=F")
    start = plan_start(config, Lazy(small_method()))
    count = len(other.networks()["F"].state_dict())
    assert start.lines[0] == f"F: {count} of {count} tensors"
    method = Lazy(small_method())
    start.load(method)
    assert method.lazy.mlp_init
    wanted = other.networks()["F"].state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in method.lazy.state_dict().items())


class Tricked:
    def __reduce__(self):
        return os.system, ("touch tricked",)


def test_what_cannot_be_taken_is_refused_before_anything_is_written(folder, published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.1.weight": torch.full((4, 3, 7, 7), float("nan"))}, tmp_path / "nan_net_G.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "odd_net_G.pth")
    (tmp_path / "cut_net_G.pth").write_bytes((published / "latest_net_G.pth").read_bytes()[:-500])
    (tmp_path / "evil_net_G.pth").write_bytes(pickle.dumps(Tricked(), protocol=2))
    (tmp_path / "empty").mkdir()
    g = published / "latest_net_G.pth"
    for words, sentence in (
        (["run.start_from=nowhere.pth"], "nowhere.pth: no such run or file"),
        (["run.start_from=nowhere"], "nowhere: no such run or file, and the models that come with fastnce are: derain"),
        (["run.start_from=empty"], "holds neither a run"),
        (["run.start_from=nan_net_G.pth"], "not finite"),
        (["run.start_from=odd_net_G.pth"], "nothing fits: G: 0 of"),
        (["run.start_from=cut_net_G.pth"], "cut_net_G.pth: not a PyTorch weight file, or a damaged one"),
        (["run.start_from=evil_net_G.pth"], "evil_net_G.pth"),
        ([f"run.start_from={g}", "run.start_networks=D"], "nothing fits: D: 0 of"),
        ([f"run.start_from={g}", "run.start_networks=H"], "fastcut has no network H"),
        (["run.start_networks=G"], "run.start_networks=G has no effect without run.start_from"),
    ):
        assert main(["train", "fastcut", "--data", str(folder), "--out", "run", *SMALL, *words]) == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
        assert not (tmp_path / "run").exists()
    assert not (tmp_path / "tricked").exists()
    (published / "latest_net_D.pth").unlink()
    with pytest.raises(ValueError, match=r"run.start_networks names D, and .*latest_net_\*\.pth holds F, G$"):
        started(folder, f"run.start_from={published}", "run.start_networks=G,D")


def test_networks_of_another_method(folder, published):
    small = ("network.generator=resnet_4blocks", "network.width=4", "network.discriminator_width=4")
    config = resolve("cyclegan", None, [*small, f"run.start_from={published}"])
    with pytest.raises(ValueError, match=r"nothing fits: it holds D, F, G, and cyclegan has G_A, G_B, D_A, D_B$"):
        plan_start(config, plan(config))


def test_a_dry_run_shows_the_report(folder, published, tmp_path, capsys):
    words = ["train", "fastcut", "--data", str(folder), *SMALL, f"run.start_from={published / 'latest_net_G.pth'}"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "\n# F begins with its own initial weights\n" in out
    (tmp_path / "again.toml").write_text(out)
    assert main(["train", "--config", str(tmp_path / "again.toml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == out


def test_a_damaged_checkpoint_of_the_source_is_named(folder, tmp_path):
    train_run(small_config(folder, "run.steps=1"), tmp_path / "first", quiet=True)
    (path,) = Checkpoints(tmp_path / "first" / "checkpoints").steps()
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 1
    (path / "training.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        started(folder, f"run.start_from={tmp_path / 'first'}")
    with pytest.raises(ValueError, match="is damaged"):
        started(folder, f"run.start_from={path}")


def test_a_model_that_comes_with_fastnce(tmp_path, monkeypatch):
    """Its generator is the method's first one, whatever the method calls it."""
    monkeypatch.chdir(tmp_path)
    width = read_details(models.folder("derain"))["network"]["width"]
    config = resolve("dcdgan-plus", None, ["run.start_from=derain", f"network.width={width}"])
    start = plan_start(config, plan(config))
    assert start is not None
    assert list(start.weights) == ["G_A"]
    total = len(start.weights["G_A"])
    assert start.lines[0] == f"G_A: {total} of {total} tensors"
    assert start.path == str(models.folder("derain"))  # stored in a run, for other folders
    Path("derain").mkdir()
    with pytest.warns(UserWarning, match="holds no model"):
        assert plan_start(config, plan(config)).path == start.path
    Path("derain").rmdir()
    config.run.start_networks = "G_B"
    assert list(plan_start(config, plan(config)).weights) == ["G_B"]
    config.run.start_networks = "D_A"
    with pytest.raises(ValueError, match="run.start_networks names D_A, and .*derain holds G_A$"):
        plan_start(config, plan(config))


def test_a_generator_of_another_width_is_refused(folder, published, tmp_path):
    """Else a run that is meant to continue from a model would begin anew, with a line of its log to say so."""
    wide = ["network.width=8"]
    config = resolve("dcdgan-plus", None, ["run.start_from=derain", "network.width=32"])
    planned = plan(config)
    with pytest.raises(
        ValueError,
        match=r"run.start_from=derain: the generator there is another one: G_A: \d+ of \d+ tensors, .*"
        r"\. It was built with network.width=24( .*)?\. To take what fits, add run.start_networks=G_A$",
    ):
        plan_start(config, planned)
    with pytest.raises(
        ValueError, match=r"G: \d+ of \d+ tensors, .*; and \d+ more\. To take what fits, add run.start_networks=G,F,D$"
    ):
        started(folder, f"run.start_from={published}", *wide)  # published files do not tell their options
    train_run(small_config(folder, "run.steps=1"), tmp_path / "first", quiet=True)
    with pytest.raises(ValueError, match=r"\. It was built with network.width=4\. To take"):
        started(folder, f"run.start_from={tmp_path / 'first'}", *wide)
    start, before, after = started(folder, f"run.start_from={tmp_path / 'first'}", "run.start_networks=G", *wide)
    taken = {key for key in after if not torch.equal(before[key], after[key])}
    assert set() < taken <= {f"G/{key}" for key in start.weights["G"]}
    other = ["network.generator=restorer", "loss.nce_layers=4,8"]  # of which no tensor fits, while those of D do
    with pytest.raises(ValueError, match=r"G: 0 of .*\. It was built with network.generator=resnet_4blocks\. To take"):
        started(folder, f"run.start_from={tmp_path / 'first'}", *other)
    train_run(small_config(folder, "run.steps=1", "network.generator=resnet_9blocks"), tmp_path / "deep", quiet=True)
    with pytest.raises(ValueError, match=r"It was built with network.generator=resnet_9blocks\."):  # most is not taken
        started(folder, f"run.start_from={tmp_path / 'deep'}")


def test_an_export_is_taken_by_its_name(folder, published, other, tmp_path):
    exported = tmp_path / "exported"
    assert main(["export", str(published / "latest_net_G.pth"), "--out", str(exported)]) == 0
    start, before, after = started(folder, f"run.start_from={exported}")
    wanted = weights(other)
    for key in wanted:
        assert torch.equal(after[key], (wanted if key.startswith("G/") else before)[key]), key
    assert sorted(start.lines[1:]) == [f"{name} begins with its own initial weights" for name in "DF"]


@pytest.mark.filterwarnings("ignore:the folder exported holds no model")
def test_a_run_stores_the_folder_of_a_model_by_name(folder, published, tmp_path, monkeypatch):
    """A folder of this name, such as the outputs of the model, does not change what the run's own file says."""
    exported = tmp_path / "models" / "exported"
    assert main(["export", str(published / "latest_net_G.pth"), "--out", str(exported)]) == 0
    monkeypatch.setattr(models.shipped, "_HERE", exported.parent)
    (tmp_path / "here" / "exported").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for steps in (1, 2):  # the same command continues the run
        train_run(small_config(folder, f"run.steps={steps}", "run.start_from=exported"), "run", quiet=True)
        assert f'start_from = "{exported}"' in Path("run/config.toml").read_text(encoding="utf-8")
