"""What an export writes: of runs, of published files and of exports; and that a failure leaves the earlier one."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastnce
from fastnce.commands.main import main
from fastnce.common.locking import InUse
from fastnce.export import Source, open_source, save_weights, write_folder, write_safetensors
from fastnce.export import folder as folder_module
from fastnce.export.folder import check_target
from fastnce.methods import NetworkOptions
from fastnce.translate.exported import network_options, read_folder
from tests.ends import NO_ROOM, largest_file, tiny
from tests.forked import Forked
from tests.networks.test_roundtrip import shaken

NAMES = ["README.md", "config.json", "model.safetensors"]


def made(width: int = 2, **facts) -> Source:
    options = NetworkOptions(generator="resnet_4blocks", width=width)
    return Source(shaken(options.build_generator()), "G", network_options(options), False, facts, 4, 8, 3, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("x") / "horses"
    for name, count in (("trainA", 2), ("trainB", 3), ("testA", 1)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (22, 25, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("x") / "run"
    assert main([*tiny(data, folder), "--quiet", "run.steps=2", "optim.ema=0.5", "optim.lr=0.01"]) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- sources ----


def test_a_run_and_its_export_translate_alike(run, data, tmp_path):
    source = open_source(run)
    assert sorted(path.name for path in write_safetensors(source, tmp_path / "out")) == NAMES
    picture = torch.rand(1, 3, 16, 20) * 2 - 1
    wanted = fastnce.load(run, device="cpu")(picture)  # with averaged weights
    assert torch.equal(fastnce.load(tmp_path / "out", device="cpu")(picture), wanted)
    assert main(["export", str(run), "--out", str(tmp_path / "published")]) == 0
    again = open_source(tmp_path / "published" / "latest_net_G.pth")
    write_safetensors(again, tmp_path / "again")
    assert torch.equal(fastnce.load(tmp_path / "again", device="cpu")(picture), wanted)


def test_a_generator_of_sincut_loads_again(data, tmp_path):
    """Trained, and exported in both formats that are read again."""
    small = ["network.width=1", "network.discriminator_width=1", "network.resolution=8", "data.crop_size=8"]
    words = ["train", "sincut", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet", *small]
    words += ["data.load_size=20", "data.batch=2", "data.max_images=1", "loss.projection=8", "run.device=cpu"]
    assert main([*words, "run.steps=1", "run.sample_every=0", "run.report=false"]) == 0
    wanted = open_source(tmp_path / "run")
    assert type(wanted.network).__name__ == "StyleGAN2Generator"
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "published")]) == 0
    write_safetensors(wanted, tmp_path / "safetensors")
    picture = torch.rand(1, 3, 12, 18) * 2 - 1
    for place in ("published/latest_net_G.pth", "safetensors"):
        found = open_source(tmp_path / place)
        assert (found.factor, found.smallest) == (wanted.factor, wanted.smallest)
        with torch.no_grad():
            assert torch.equal(found.network(picture), wanted.network(picture))


def test_what_is_known_of_a_run(run, data, tmp_path):
    source = open_source(run / "checkpoints" / "latest")
    facts = source.facts
    assert (facts["method"], facts["step"], facts["seen"]) == ("fastcut", 2, 2)
    assert facts["data"] == {"name": "horses", "A": 2, "B": 3}
    assert "\ncrop_size = 16\n" in facts["config"]
    assert (source.name, source.reverse, source.own, source.dtype) == ("G", False, "", "float32")
    assert (source.factor, source.smallest, source.in_channels, source.out_channels) == (4, 8, 3, 3)
    assert source.options is not None
    assert (source.options["generator"], source.options["width"]) == ("resnet_4blocks", 2)
    assert not source.network.training
    assert not any(parameter.requires_grad for parameter in source.network.parameters())


def test_nothing_tells_of_the_machine(run, data, tmp_path):
    """Folders, which may hold a user's name, are in none of the files."""
    write_safetensors(open_source(run), tmp_path / "out")
    for text in content(tmp_path / "out").values():
        assert os.fsencode(data.parent) not in text
        assert os.fsencode(run.parent) not in text


def test_an_export_is_exported_again(run, tmp_path):
    write_safetensors(open_source(run), tmp_path / "one", "bfloat16")
    source = open_source(tmp_path / "one")
    assert source.dtype == "bfloat16"
    write_safetensors(source, tmp_path / "two", source.dtype)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_data_folder_that_is_gone(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("fastnce.export.source.domain_folders", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
    assert open_source(run).facts["data"] == {"name": "horses"}


def test_a_generator_of_the_users_own(data, tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, in_channels, out_channels, width):\n"
        "        super().__init__()\n        self.layer = torch.nn.Conv2d(in_channels, out_channels, 1)\n\n"
        "    def forward(self, x, layers=(), encode_only=False):\n        y = self.layer(x)\n"
        "        features = [x for _ in layers]\n"
        "        return features if encode_only else (y, features) if layers else y\n\n"
        "    def feature_channels(self, layers):\n        return [3 for _ in layers]\n"
    )
    own = f"network.generator={tmp_path / 'nets.py'}:Net"
    assert main([*tiny(data, tmp_path / "run"), "--quiet", "run.steps=1", own]) == 0
    with pytest.raises(ValueError, match="if you trust it, add --trust-code"):
        open_source(tmp_path / "run")
    source = open_source(tmp_path / "run", trust_code=True)
    assert source.own.endswith("nets.py:Net")
    with pytest.raises(ValueError, match=r"G is code of its own, .*nets\.py:Net, which config\.json cannot describe"):
        write_safetensors(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


OWN_METHODS = {
    "Plain": "",  # it translates with the generator that network.* describes
    "Darker": "\n    def translate(self, a):\n        return self.generator(a) * 0.5\n",
    "Changed": "\n    def __init__(self, options, network):\n        super().__init__(options, network)\n"
    "        for layer in self.generator.modules():\n            if hasattr(layer, 'eps'):\n"
    "                layer.eps = 0.5\n",
}


@pytest.mark.parametrize("name", OWN_METHODS)
def test_a_method_of_the_users_own(name, data, tmp_path):
    head = f"from fastnce.methods import CUT, CUTOptions\n\n\nclass {name}(CUT):\n    Options = CUTOptions\n"
    (tmp_path / "mine.py").write_text(head + OWN_METHODS[name])
    arguments = tiny(data, tmp_path / "run", "--quiet", "run.steps=1")
    arguments[1] = f"{tmp_path / 'mine.py'}:{name}"
    assert main(arguments) == 0
    source = open_source(tmp_path / "run", trust_code=True)
    if name != "Plain":
        with pytest.raises(ValueError, match=rf"G is code of its own, .*mine\.py:{name}, which config\.json cannot "):
            write_safetensors(source, tmp_path / "out")
        return
    write_safetensors(source, tmp_path / "out")
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(open_source(tmp_path / "out").network(picture), source.network(picture))
    assert open_source(tmp_path / "out").facts["method"] == "mine.py:Plain"


def test_weights_that_16_bits_cannot_hold():
    source = made()
    with torch.no_grad():
        next(source.network.parameters())[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.1\.weight of G is too large for float16: take another --dtype"):
        save_weights(source, "float16")
    save_weights(source, "bfloat16")
    with torch.no_grad():
        next(source.network.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.1\.weight of G holds numbers that are not finite"):
        save_weights(source)


# ---- folders ----


def test_a_second_export_replaces_the_first_and_leaves_other_files(tmp_path):
    write_safetensors(made(2), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_safetensors(made(3), tmp_path)
    assert sorted(content(tmp_path)) == [*NAMES, "notes.txt"]
    assert read_folder(tmp_path).options["width"] == 3


def test_an_export_of_another_format_is_not_replaced(tmp_path):
    write_folder(tmp_path / "onnx", {"config.json": json.dumps(ONNX).encode()})
    before = content(tmp_path)
    with pytest.raises(ValueError, match="holds an export of the format onnx: take another folder for --out"):
        write_safetensors(made(), tmp_path / "onnx")
    check_target(tmp_path / "onnx", "onnx", ["model.onnx"])
    (tmp_path / "onnx" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by fastnce export.*; take another folder for --out"):
        write_safetensors(made(), tmp_path / "onnx")
    (tmp_path / "onnx" / "config.json").write_bytes(before["onnx/config.json"])
    assert content(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file is in the way"):
        write_safetensors(made(), tmp_path / "file")
    with pytest.raises(ValueError, match="is the name of a file, and a folder is needed"):
        write_safetensors(made(), tmp_path / "model.safetensors")


ONNX = {"fastnce": "1", "version": 1, "format": "onnx", "file": "model.onnx", "generator": "G", "network": None}
ONNX["reverse"] = False


def test_a_readme_that_is_edited_or_of_another_is_not_replaced(tmp_path):
    write_safetensors(made(2), tmp_path / "one")
    card = tmp_path / "one" / "README.md"
    text = card.read_text()
    card.write_bytes(text.replace("\n", "\r\n").encode())
    check_target(tmp_path / "one", "safetensors", ["model.safetensors"])  # only the ends of lines have changed
    card.write_text(text.replace("license: unknown", "license: mit"))
    before = content(tmp_path / "one")
    with pytest.raises(ValueError, match=r"README\.md was edited or is of no export, and would be replaced: move it"):
        write_safetensors(made(3), tmp_path / "one")
    assert content(tmp_path / "one") == before
    write_safetensors(made(3), tmp_path / "one", own_card=card.read_text())  # the same text
    assert content(tmp_path / "one")["README.md"] == before["README.md"]
    for name, make in {"text": lambda p: p.write_text("My project"), "link": lambda p: p.symlink_to("x")}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "README.md")
        with pytest.raises(ValueError, match=r"README\.md was edited or is of no export"):
            write_safetensors(made(), tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["README.md"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_while_files_are_moved_puts_the_earlier_ones_back(at, tmp_path, monkeypatch):
    write_safetensors(made(2), tmp_path)
    before, replace, calls = content(tmp_path), os.replace, iter(range(1000))

    def failing(source, target):
        if next(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))
        return replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_safetensors(made(3), tmp_path)
    assert Path(caught.value.filename).parent == tmp_path
    assert not Path(caught.value.filename).name.startswith(".")
    assert content(tmp_path) == before


def test_an_error_in_an_empty_folder_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_keep", None)  # nothing is replaced
    replace, calls = os.replace, iter(range(1000))

    def failing(source, target):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(made(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_earlier_export(tmp_path, capsys):
    write_safetensors(made(2), tmp_path)
    before = content(tmp_path)
    with largest_file(20_000), pytest.raises(OSError, match=r"model\.safetensors") as caught:
        write_safetensors(made(3), tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "model.safetensors")
    assert content(tmp_path) == before


def test_a_check_that_fails_leaves_the_earlier_export(tmp_path, monkeypatch):
    write_safetensors(made(2), tmp_path)
    before, source = content(tmp_path), made(2)
    monkeypatch.setattr("fastnce.export.safetensors_format.save", lambda *_, **__: before["model.safetensors"])
    write_safetensors(source, tmp_path / "same")
    with torch.no_grad():
        next(source.network.parameters())[0] += 1
    with pytest.raises(RuntimeError, match=r"model\.1\.weight of G is read again with other values"):
        write_safetensors(source, tmp_path)
    assert {name: content(tmp_path)[name] for name in before} == before


def test_a_killed_export_leaves_the_earlier_one(tmp_path):
    write_safetensors(made(2), tmp_path / "out")
    before = content(tmp_path / "out")

    def wait(path: Path) -> None:
        path.write_bytes(b"half")
        print("half is written", flush=True)
        signal.pause()

    def work() -> int:
        write_folder(tmp_path / "out", {"README.md": b"new", "model.safetensors": wait, "config.json": b"new"})
        return 0

    child = Forked(work)
    try:
        child.wait_for_line("half is written")
        with pytest.raises(InUse, match="fastnce export"):
            write_safetensors(made(3), tmp_path / "out")
    finally:
        child.send(signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
    assert read_folder(tmp_path / "out").options["width"] == 2
    after = content(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    write_safetensors(made(3), tmp_path / "out")  # sweeps what was left
    assert sorted(content(tmp_path / "out")) == NAMES


def test_the_error_of_a_full_disk_has_the_name_of_the_file(tmp_path):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, NO_ROOM)

    with pytest.raises(OSError, match=r"No space left on device: .*model\.onnx") as caught:
        write_folder(tmp_path / "out", {"model.onnx": full, "config.json": b""})
    assert caught.value.filename == str(tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()
