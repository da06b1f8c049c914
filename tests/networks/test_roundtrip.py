"""Exported networks can be read back bit for bit: every generator, norm and number of channels."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastnce.commands.main import main
from fastnce.nce import PatchNCEHead, PatchSampleF
from fastnce.networks import PatchGAN
from fastnce.networks.build import build_discriminator, build_generator
from fastnce.networks.published import load_published, load_weights, network_from_weights, read_weights, save_published
from fastnce.translate.load import load_translator

CHANNELS = [(3, 3), (1, 1), (1, 3), (4, 4), (3, 1)]


def shaken(network: nn.Module) -> nn.Module:
    """Fill every tensor except fixed filters with random values, so that a missing one is detected."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not key.endswith((".filt", ".kernel")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 + (0.3 if "running_var" in key else -0.2))
    return network.eval()


def cases() -> list[tuple[str, dict]]:
    made: list[tuple[str, dict]] = []
    norms = ("instance", "batch", "none")
    for i, (norm, dropout, down, up) in enumerate(product(norms, *[(False, True)] * 3)):
        inside, outside = CHANNELS[i % len(CHANNELS)]
        options = {"norm": norm, "dropout": dropout, "antialias": down, "antialias_up": up}
        made.append(("resnet_4blocks", {**options, "in_channels": inside, "out_channels": outside, "width": 1 + i % 5}))
    for i, (name, norm) in enumerate(product(("resnet_6blocks", "resnet_9blocks", "unet_128", "unet_256"), norms)):
        inside, outside = CHANNELS[i % len(CHANNELS)]
        options = {"norm": norm, "dropout": bool(i % 2)}
        made.append((name, {**options, "in_channels": inside, "out_channels": outside, "width": 1 + i % 3}))
    for resolution, width in ((8, 1), (32, 2), (64, 3), (256, 5), (512, 7), (1024, 11)):
        made.append(("stylegan2", {"in_channels": 2, "out_channels": 1, "width": width, "resolution": resolution}))
    for i, (inside, outside) in enumerate(CHANNELS):
        sizes = {"in_channels": inside, "out_channels": outside, "width": 1 + i % 2}
        small = {"resolution": (16, 64)[i % 2], "stylegan2_downsampling": i % 3}
        made += [("resnet_cat", sizes), (("smallstylegan2", "stylegan2")[i % 2], {**sizes, **small})]
    made += [("restorer", {"in_channels": c, "out_channels": c, "width": w}) for c, w in ((3, 3), (1, 2), (4, 1))]
    return made


def described(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


@torch.no_grad()
@pytest.mark.parametrize("case", cases(), ids=described)
def test_a_generator_through_a_file(case, tmp_path):
    name, options = case
    network = shaken(build_generator(name, **options, init_type="normal"))
    (path,) = save_published({"G": network}, tmp_path)
    translator = load_translator(path)
    assert (translator.channels, translator.out_channels) == (options["in_channels"], options["out_channels"])
    x = torch.rand(1, options["in_channels"], *[max(12, getattr(network, "smallest", 8))] * 2) * 2 - 1
    assert torch.equal(translator(x), network(x).clamp(-1, 1))
    stored, own = torch.load(path, weights_only=True), network.state_dict()
    assert stored.keys() == own.keys()
    assert all(torch.equal(stored[key], own[key]) for key in own)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_discriminators_and_projectors_through_files(norm, tmp_path):
    networks = {
        "D": build_discriminator("basic", 3, 3, norm=norm, init_type="normal"),
        "D1": build_discriminator("n_layers", 1, 2, layers=1, norm=norm, antialias=False, init_type="normal"),
        "D2": build_discriminator("n_layers", 4, 1, layers=5, norm=norm, init_type="normal"),
        "D3": build_discriminator("pixel", 3, 5, norm=norm, init_type="normal"),
        "F": PatchSampleF(nc=4, in_channels=[3, 8]),
        "F1": PatchSampleF(use_mlp=False),  # published netF=sample: a file without a tensor
    }
    paths = save_published({name: shaken(network) for name, network in networks.items()}, tmp_path)
    for path, (name, network) in zip(paths, networks.items(), strict=True):
        if name.startswith("D"):
            x = torch.rand(1, first_channels(network), 112, 112)
            assert torch.equal(network_from_weights(read_weights(path))(x), network(x)), name
    others = {"F": PatchSampleF(), "F1": PatchSampleF(use_mlp=False)}
    assert load_published(others, tmp_path) == ["F", "F1"]
    maps = [torch.rand(1, 3, 4, 4), torch.rand(1, 8, 2, 2)]
    ids = [torch.tensor([0, 3]), torch.tensor([1, 2])]
    for one, other in zip(others["F"](maps, 2, ids)[0], networks["F"](maps, 2, ids)[0], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"latest_net_F\.pth: holds a projector"):
        load_translator(tmp_path / "latest_net_F.pth")
    with pytest.raises(ValueError, match="holds a discriminator"):
        load_translator(tmp_path / "latest_net_D.pth")


def first_channels(network: nn.Module) -> int:
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d)).in_channels


@torch.no_grad()
@pytest.mark.parametrize(("resolution", "width"), [(8, 1), (16, 30), (32, 2), (64, 1), (512, 3)])
def test_the_discriminator_of_sincut(resolution, width):
    """At 16 the channels are limited to 384. At 512 the finest level has fewer channels than `width`."""
    network = build_discriminator("stylegan2", 3, width, resolution=resolution).eval()
    rebuilt = network_from_weights(network.state_dict())
    x = torch.rand(1, 3, resolution, resolution) if resolution < 512 else None
    assert {key: t.shape for key, t in rebuilt.state_dict().items()} == {
        key: t.shape for key, t in network.state_dict().items()
    }
    if x is not None:
        assert torch.equal(rebuilt(x), network(x))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_biases_are_where_the_published_networks_have_them(norm):
    """Published: `use_bias` is true only before instance norm; layers without `use_bias` have a bias (the default)."""
    of_norms = {"batch": [2, 5, 8], "none": []}[norm]

    def biases(network: nn.Module) -> set[str]:
        return {key for key in network.state_dict() if key.endswith(".bias")}

    unet = build_generator("unet_128", width=1, norm=norm, init_type="normal")
    convolutions = {f"{name}.bias" for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    assert biases(unet) & convolutions == {"model.model.3.bias"}
    patchgan = build_discriminator("basic", 3, 2, norm=norm, antialias=False)
    assert biases(patchgan) == {"model.0.bias", "model.11.bias"} | {f"model.{i + 1}.bias" for i in of_norms}
    pixelgan = build_discriminator("pixel", 3, 2, norm=norm)
    assert biases(pixelgan) == {"net.0.bias"} | ({"net.3.bias"} if norm == "batch" else set())


def test_wide_stylegan2_generators_have_the_published_channels(monkeypatch):
    """256 * width / 32 at 64, where the published table has no limit; at most 512 below."""
    monkeypatch.setattr(torch, "randn", torch.empty)  # saves drawing 130 MB of unused numbers
    state = build_generator("stylegan2", 3, 3, 100, resolution=64).state_dict()
    assert state["encoder.convs.1.0.weight"].shape == (800, 3, 1, 1)
    assert state["encoder.convs.2.conv2.1.weight"].shape == (512, 800, 3, 3)
    with pytest.raises(ValueError, match=r"network\.width=1 leaves no channels at network.resolution=1024"):
        build_generator("stylegan2", 3, 3, 1, resolution=1024)
    with pytest.raises(ValueError, match=r"network\.discriminator_width=1 leaves no channels"):
        build_discriminator("stylegan2", 3, 1, resolution=512)


def test_a_run_and_its_export_translate_alike(folder, tmp_path, capsys):
    """With averaged weights: `fastnce translate RUN` and the exported generator both use the average."""
    run, out = tmp_path / "run", tmp_path / "published"
    small = [
        "network.generator=resnet_4blocks",
        "network.width=3",
        "network.discriminator_width=3",
        "network.norm=none",
    ]
    small += ["network.antialias_up=false", "data.load_size=36", "data.crop_size=32", "loss.patches=8"]
    small += ["loss.projection=8", "loss.nce_layers=0,4", "run.device=cpu", "run.steps=3", "run.sample_every=0"]
    train = ["train", "fastcut", "--data", str(folder), "--out", str(run), "--quiet", "optim.ema=0.5", "optim.lr=0.01"]
    assert main([*train, *small]) == 0
    picture = next((folder / "testA").iterdir())
    checkpoint = run / "checkpoints" / "latest"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "same"), "--label", "3"]) == 0
    found = {}
    models = {"run": run, "file": out / "latest_net_G.pth", "same": tmp_path / "same" / "3_net_G.pth", "folder": out}
    for name, model in models.items():
        assert main(["translate", str(model), str(picture), "--out", str(tmp_path / name), "--device", "cpu"]) == 0
        with Image.open(tmp_path / name / picture.with_suffix(".png").name) as opened:
            found[name] = np.asarray(opened)
    assert (found["run"] == found["file"]).all()
    assert (found["run"] == found["same"]).all()
    assert (found["run"] == found["folder"]).all()
    network = PatchGAN(width=3, norm="none")
    assert load_published({"D": network}, out) == ["D"]
    capsys.readouterr()
    for arguments, wanted in (
        (
            ["export", str(out / "latest_net_G.pth"), "--out", str(tmp_path / "x"), "--format", "published"],
            "needs a run",
        ),
        (["export", str(run), "--out", str(out / "latest_net_G.pth")], "a file is in the way"),
        (["export", str(run), "--out", str(tmp_path / "x"), "--label", "a/b"], "label must be"),
        (["translate", str(out / "latest_net_G.pth"), str(picture), "--out", str(run), "--generator", "G_B"], "'G_B'"),
        (["translate", str(tmp_path / "file"), str(picture), "--out", str(tmp_path / "x")], "no checkpoint here"),
        (["translate", str(run), str(picture), "--out", str(picture)], "is read by this command and would be replaced"),
    ):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert wanted in message
        assert message.count("\n") == 1
    (checkpoint.parent / checkpoint.read_text() / "state.json").write_text("{")
    assert main(["export", str(run), "--out", str(tmp_path / "x")]) == 2
    assert "every checkpoint is damaged (the newest, step-00000003: state.json is no JSON" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


ODD = {
    "integers": ({"w": torch.ones(2, dtype=torch.int32)}, "w holds torch.int32; weights must be floats"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "w holds torch.complex64"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "w is sparse"),
    "without values": ({"w": torch.ones(2, device="meta")}, "w is sparse, quantised or without values"),
    "claims": ({"w": torch.zeros(1).expand(2**40)}, "w claims 1,099,511,627,776 numbers but holds fewer"),
    "numbers as names": ({5: torch.zeros(1)}, "its key 5 must be text"),
    "nothing": ({}, "begins with []"),
    "one dimension": (
        {"model.1.weight": torch.zeros(3), "model.9.conv_block.1.weight": torch.zeros(1)},
        "is not a published ResNet",
    ),
    "a huge network": (
        {"model.1.weight": torch.zeros(10**5, 3, 1, 1), "model.9.conv_block.1.weight": torch.zeros(1),
         "model.20.weight": torch.zeros(3, 1, 1, 1)},
        "is not a published ResNet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_in_one_sentence(name, tmp_path, capsys):
    state, wanted = ODD[name]
    torch.save(state, tmp_path / "odd.pth")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "odd.pth"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["translate", *arguments]) == 2
    message = capsys.readouterr().err
    assert "odd.pth" in message
    assert wanted in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path: Path):
    network = build_generator("resnet_4blocks", width=2, init_type="normal")
    with torch.no_grad():
        network.model[1].weight[0, 0, 0, 0] = value
    (path,) = save_published({"G": network}, tmp_path)
    with pytest.raises(ValueError, match=r"latest_net_G\.pth: model\.1\.weight holds numbers that are not finite"):
        load_translator(path)


def test_a_learned_temperature_is_left_out(tmp_path: Path):
    """The published F has the same weights without it, and loads them strictly."""
    network = PatchNCEHead([3, 4], temperature=0.1, learn_temperature=True)
    (path,) = save_published({"F": network}, tmp_path)
    published = PatchNCEHead([3, 4], temperature=0.1)
    published.load_state_dict(torch.load(path))
    assert torch.equal(published.mlp_1[2].weight, network.mlp_1[2].weight)
    load_weights(network, read_weights(path))


def test_a_projector_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(PatchSampleF(), {"mlp_0.0.weight": torch.zeros(2, 3)})
