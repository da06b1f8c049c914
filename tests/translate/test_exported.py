"""Exported folders are read again, and what is wrong with one is said in one sentence."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastnce
from fastnce.commands.main import main
from fastnce.export import Source, open_source, write_safetensors
from fastnce.methods import NetworkOptions
from fastnce.networks import PatchGAN
from fastnce.networks.published import save_published
from fastnce.translate.exported import LARGEST, NETWORK_KEYS, network_options, read_folder
from fastnce.translate.load import load_translator
from tests.ends import one_sentence
from tests.networks.test_roundtrip import described, shaken

pytestmark = pytest.mark.usefixtures("few_blocks")

CASES: list[tuple[str, dict]] = [
    ("resnet_4blocks", {"norm": "instance", "width": 3}),
    ("resnet_4blocks", {"norm": "instance", "antialias": False, "dropout": True, "in_channels": 1}),
    ("resnet_4blocks", {"norm": "instance", "antialias_up": False, "out_channels": 4}),
    ("resnet_4blocks", {"norm": "batch", "antialias": False, "antialias_up": False, "out_channels": 1}),
    ("resnet_4blocks", {"norm": "batch", "dropout": True}),
    ("resnet_4blocks", {"norm": "none"}),
    ("resnet_6blocks", {"norm": "none", "antialias": False, "antialias_up": False}),
    ("resnet_9blocks", {"norm": "batch"}),
    ("unet_128", {"norm": "instance", "dropout": True}),
    ("unet_128", {"norm": "batch", "in_channels": 1}),
    ("resnet_4blocks", {"norm": "instance", "norm_affine": True}),
    ("unet_128", {"norm": "instance", "norm_affine": True}),
    ("unet_256", {"norm": "none"}),
    ("stylegan2", {"resolution": 256, "width": 5, "in_channels": 2, "out_channels": 1}),
    ("stylegan2", {"resolution": 512, "width": 7, "stylegan2_downsampling": 0}),
    ("smallstylegan2", {"resolution": 512, "width": 7, "stylegan2_downsampling": 2}),
    ("resnet_cat", {"out_channels": 1}),
    ("restorer", {"width": 4, "in_channels": 1, "out_channels": 1}),
]


def source_of(options: NetworkOptions, *, reverse: bool = False, **facts) -> Source:
    network = shaken(options.build_generator(reverse))
    channels = (options.out_channels, options.in_channels) if reverse else (options.in_channels, options.out_channels)
    smallest = getattr(network, "smallest", network.factor)
    name = "G_B" if reverse else "G"
    return Source(network, name, network_options(options), reverse, facts, network.factor, smallest, *channels)


SMALL = NetworkOptions(generator="resnet_4blocks", width=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_safetensors(source_of(SMALL, method="cut"), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in whole.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=described)
def test_every_generator_bit_for_bit(case, tmp_path):
    name, values = case
    options = NetworkOptions(**{"generator": name, "width": 1, **values})
    source = source_of(options)
    write_safetensors(source, tmp_path)
    found = read_folder(tmp_path)
    own, stored = source.network.state_dict(), found.network.state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], stored[key]) for key in own)
    assert type(found.network) is type(source.network)
    assert not found.network.training
    assert found.options == network_options(options)
    side = max(12, source.smallest)
    x = torch.rand(1, options.in_channels, side, side) * 2 - 1
    assert torch.equal(found.network(x), source.network(x))


@torch.no_grad()
def test_a_generator_from_b_to_a(tmp_path):
    options = NetworkOptions(generator="resnet_4blocks", width=1, in_channels=1, out_channels=3)
    source = source_of(options, reverse=True, direction="BtoA", paired_direction="BtoA")
    write_safetensors(source, tmp_path)
    translator = load_translator(tmp_path, generator="G_B")
    assert (translator.channels, translator.out_channels) == (3, 1)
    assert (translator.direction, translator.paired_direction) == ("BtoA", "BtoA")
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(translator(x), source.network(x).clamp(-1, 1))
    with pytest.raises(ValueError, match="holds the generator G_B, and no 'G_A'"):
        load_translator(tmp_path, generator="G_A")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_computed_in_float32(dtype, tmp_path):
    source = source_of(SMALL)
    write_safetensors(source, tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    model = fastnce.load(tmp_path, device="cpu")
    assert model.dtype == torch.float32
    wanted = {k: t.to(getattr(torch, dtype)).float() for k, t in source.network.state_dict().items()}
    assert all(torch.equal(t, wanted[k]) for k, t in model.generator.state_dict().items())
    assert open_source(tmp_path).dtype == dtype


def test_commands_take_an_exported_folder(folder, tmp_path, capsys):
    Image.new("RGB", (20, 12), (90, 20, 200)).save(tmp_path / "a.png")
    assert main(["translate", str(folder), str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), "--device=cpu"]) == 0
    with Image.open(tmp_path / "o" / "a.png") as written:
        assert written.size == (20, 12)
    model = fastnce.load(folder, device="cpu")
    assert model.sources == (folder / "config.json", folder / "model.safetensors")
    assert repr(model) == f"Translator(ResnetGenerator, 3 to 3 channels, cpu, from {folder})"
    capsys.readouterr()
    assert main(["translate", str(folder), str(tmp_path / "a.png"), "--out", str(folder / "model.safetensors")]) == 2
    one_sentence(capsys)
    read_folder(folder)


def test_weights_without_options_are_known_by_their_names(tmp_path):
    (file,) = save_published({"G": shaken(SMALL.build_generator())}, tmp_path / "published")
    source = open_source(file)
    assert source.options is None
    write_safetensors(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["network"] is None
    found = read_folder(tmp_path / "out").network.state_dict()
    assert all(torch.equal(t, found[k]) for k, t in source.network.state_dict().items())
    save_file(PatchGAN(width=2).state_dict(), tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="holds a discriminator, and an export holds a generator"):
        read_folder(tmp_path / "out")


def test_a_published_file_beside_its_config(folder):
    """The format `published`: config.json names a file such as latest_net_G.pth."""
    network = SMALL.build_generator()
    save_published({"G": shaken(network)}, folder)
    (folder / "model.safetensors").unlink()
    changed(folder, format="published", file="latest_net_G.pth")
    model = load_translator(folder)
    assert model.sources[1] == folder / "latest_net_G.pth"
    assert all(torch.equal(t, model.generator.state_dict()[k]) for k, t in network.state_dict().items())


# ---- faults ----


def changed(folder: Path, **values) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def network(**values) -> dict:
    return {"network": {"generator": "resnet_4blocks", "width": 2, **values}}


CONFIGS = {
    "of another program": ({"fastnce": None}, None),
    "newer": ({"version": 2, "fastnce": "9.1", "network": [3]}, "is of a newer fastnce, '9.1': install that version"),
    "version true": ({"version": True}, "version must be a whole number, not True"),
    "version 0": ({"version": 0}, "version must be 1, not 0"),
    "another format": ({"format": "onnx"}, "an export of the format onnx, which fastnce does not read again"),
    "file of another folder": ({"file": "../model.safetensors"}, "file must be the name of a file beside it"),
    "absolute file": ({"file": "/etc/passwd"}, "file must be the name of a file beside it, not '/etc/passwd'"),
    "hidden file": ({"file": ".x"}, "file must be the name of a file beside it"),
    "no file name": ({"file": ""}, "file must be the name of a file beside it, not ''"),
    "file is a list": ({"file": []}, "file must be the name of a file such as model.safetensors, not []"),
    "missing file": ({"file": "x.safetensors"}, "x.safetensors is not there, and config.json names it"),
    "network is text": ({"network": "resnet"}, "network must be a table of network options, or null"),
    "unknown key": (network(widht=3), "network.widht is no option of a generator; did you mean 'width'?"),
    "discriminator": (network(discriminator="a.py:D"), "network.discriminator is no option of a generator"),
    "wrong type": (network(width="2"), "network.width must be a whole number from 1 to 65,536, not '2'"),
    "number for a switch": (network(antialias=1), "network.antialias must be true or false, not 1"),
    "unknown generator": (network(generator="resnet"), "network.generator must be one of"),
    "own code": (network(generator="evil.py:Net"), "is code of its own, 'evil.py:Net', which is never imported"),
    "contradiction": (network(generator="stylegan2", norm="batch"), "has neither batch norm nor dropout"),
    "huge width": (network(width=65_536), "model.1.weight is (2, 3, 7, 7), this network has (65536, 3, 7, 7)"),
    "huge unet": ({"network": {"generator": "unet_256", "width": 65_536}}, "does not fit: "),
    "huge stylegan2": ({"network": {"generator": "stylegan2", "width": 60_000, "resolution": 8}}, "does not fit: "),
    "another width": (
        network(width=3),
        "with the network of config.json, does not fit: model.1.weight is (2, 3, 7, 7)",
    ),
    "reverse is a number": ({"reverse": 0}, "reverse must be true or false, not 0"),
    "direction": ({"direction": "up"}, 'direction must be "AtoB" or "BtoA", not \'up\''),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_wrong(name, folder, monkeypatch):
    values, wanted = CONFIGS[name]
    if wanted is None:
        (folder / "config.json").write_text(json.dumps({"architectures": ["Bert"], "model_type": "bert"}))
        wanted = 'was not written by fastnce export: it has no "fastnce"'
    else:
        changed(folder, **values)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        load_translator(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "config.json is no JSON: Expecting value"),
        (b"{", "config.json is no JSON"),
        (b"\xff\xfe", "config.json is no JSON"),
        (b"[]", "was not written by fastnce export"),
        (b"[" * 100_000, "config.json is no JSON: nested too deeply"),
        (b" " * (LARGEST + 1), "config.json has more than 1,048,576 bytes"),
    ],
    ids=["empty", "cut", "no text", "a list", "deep", "long"],
)
def test_a_config_that_is_no_table(content, wanted, folder, capsys):
    (folder / "config.json").write_bytes(content)
    assert main(["translate", str(folder), str(folder), "--out", str(folder / "o")]) == 2
    assert wanted in one_sentence(capsys)


def weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def drop(tensors):
    del tensors["model.1.weight"]


def add(tensors):
    tensors["model.99.weight"] = torch.ones(2)


def spoil(tensors):
    tensors["model.1.bias"][0] = float("nan")


def whole_numbers(tensors):
    tensors["model.1.bias"] = torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (drop, "does not fit: model.1.weight is missing"),
        (add, "does not fit: model.99.weight is not in this network"),
        (spoil, "model.1.bias holds numbers that are not finite"),
        (whole_numbers, "model.1.bias holds torch.int32; weights must be floats"),
    ],
)
def test_weights_that_are_wrong(change, wanted, folder):
    weights(folder, change)
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        load_translator(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_that_are_cut(length, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="model.safetensors is no file of tensors: .*; it is damaged: export again"):
        load_translator(folder)


def test_a_header_that_claims_too_much(folder):
    header = json.dumps({"model.1.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="is no file of tensors"):
        load_translator(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_missing_or_pipes(name, folder):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is (missing|not there)"):
        load_translator(folder)
    os.mkfifo(folder / name)  # to open it would wait for ever
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
        load_translator(folder)


def test_a_folder_with_neither_a_run_nor_an_export(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint here .*; an exported one has config\.json"):
        load_translator(tmp_path)


def test_a_run_comes_before_an_export_in_its_folder(folder):
    (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint here"):
        load_translator(folder)


def test_the_keys_of_config_are_those_that_build_a_generator():
    """A new option of generators is written by itself, and one of discriminators is not."""
    assert {"generator", "width", "norm", "antialias_up", "in_channels"} <= set(NETWORK_KEYS)
    assert not [key for key in NETWORK_KEYS if "discriminator" in key or "init" in key]


def test_a_missing_network_and_a_long_name_are_one_sentence(tmp_path):
    write_safetensors(source_of(SMALL), tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    for changed, wanted in (({"file": "x" * 1000}, "file must be the name of a file"), ({}, "network must be a table")):
        content = whole | changed
        if not changed:
            del content["network"]
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=wanted):
            read_folder(tmp_path)
