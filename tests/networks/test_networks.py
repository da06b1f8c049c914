"""Networks: features, sizes, parameter counts; reading and writing published files."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastnce.networks import PatchGAN, PixelGAN, ResnetGenerator, UnetGenerator
from fastnce.networks.published import load_published, load_weights, network_from_weights, read_weights, save_published


def test_parameter_counts_are_the_published_ones():
    assert sum(p.numel() for p in ResnetGenerator().parameters()) == 11_378_179
    assert sum(p.numel() for p in PatchGAN().parameters()) == 2_764_737


@pytest.mark.parametrize("antialias", [True, False])
def test_features_are_the_outputs_of_the_layers(antialias):
    network = ResnetGenerator(width=4, blocks=4, antialias=antialias).double()
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    layers = [0, 1, 4, 5, 11]
    y, features = network(x, layers)
    expected, current = [], x
    for index, module in enumerate(network.model):
        current = module(current.clone())
        if index in layers:
            expected.append(current.clone())
    torch.testing.assert_close(y, current)
    assert network.feature_channels(layers) == [feature.shape[1] for feature in features]
    for index, (tapped, plain) in enumerate(zip(features, expected, strict=True)):
        follows_relu = isinstance(network.model[layers[index] + 1], torch.nn.ReLU)
        torch.testing.assert_close(tapped, plain.relu() if follows_relu else plain)
    for alone, tapped in zip(network(x, layers, encode_only=True), features, strict=True):
        torch.testing.assert_close(alone, tapped)
    torch.testing.assert_close(network(x), y)


def test_the_feature_of_a_norm_is_taken_after_its_relu_unless_it_is_the_last():
    """The published ReLU works in place. An encoder that stops at the norm does not run it."""
    network = ResnetGenerator(width=4, blocks=4, antialias=False)
    x = torch.randn(1, 3, 16, 16)
    on_the_way = network(x, [8, 10], encode_only=True)[0]
    at_the_end = network(x, [4, 8], encode_only=True)[1]
    assert float(on_the_way.detach().min()) == 0.0
    assert float(at_the_end.detach().min()) < 0.0
    torch.testing.assert_close(on_the_way, at_the_end.relu())


def test_unet_taps_and_sizes():
    network = UnetGenerator(downs=5, width=4)
    x = torch.randn(1, 3, 64, 96)
    y, features = network(x, [0, 1, 3])
    assert y.shape == x.shape
    assert [tuple(f.shape[1:]) for f in features] == [(3, 64, 96), (4, 32, 48), (16, 8, 12)]
    assert network.feature_channels([0, 1, 3]) == [3, 4, 16]
    for alone, tapped in zip(network(x, [0, 1, 3], encode_only=True), features, strict=True):
        torch.testing.assert_close(alone, tapped)
    torch.testing.assert_close(network(x), y)


@pytest.mark.parametrize("layers", [[], [4, 0], [0, 0], [-1, 4], [0, 400]])
def test_invalid_layers(layers):
    with pytest.raises(ValueError, match="its layers are ascending positions from 0 to"):
        ResnetGenerator(width=4, blocks=4).feature_channels(layers)


NETWORKS = {
    "resnet": lambda: ResnetGenerator(3, 1, 4, 6),
    "resnet, strided": lambda: ResnetGenerator(width=4, blocks=4, antialias=False),
    "resnet, antialias down only": lambda: ResnetGenerator(width=4, blocks=4, antialias=True, antialias_up=False),
    "resnet, dropout": lambda: ResnetGenerator(width=4, blocks=4, dropout=True),
    "resnet, batch norm": lambda: ResnetGenerator(width=4, blocks=4, norm="batch"),
    "unet": lambda: UnetGenerator(2, 3, 6, 4),
    "patchgan": lambda: PatchGAN(1, 4, layers=4),
    "patchgan, strided": lambda: PatchGAN(width=4, antialias=False),
    "pixelgan": lambda: PixelGAN(width=4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_rebuilt_from_its_weights(name):
    network = NETWORKS[name]().eval()
    rebuilt = network_from_weights(network.state_dict())
    channels = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d)).in_channels
    x = torch.randn(1, channels, 64, 64)
    torch.testing.assert_close(rebuilt(x), network(x), rtol=0, atol=0)


def test_published_files_survive_a_round_trip(tmp_path):
    networks = {"G": ResnetGenerator(width=4, blocks=4), "D": PatchGAN(width=4)}
    paths = save_published(networks, tmp_path, "20")
    assert [path.name for path in paths] == ["20_net_G.pth", "20_net_D.pth"]
    others = {"G": ResnetGenerator(width=4, blocks=4), "D": PatchGAN(width=4), "F": PixelGAN()}
    assert load_published(others, tmp_path, "20") == ["G", "D"]
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(others[name].state_dict()[key], tensor)
    with pytest.raises(ValueError, match="none of latest_net_G.pth, latest_net_D.pth"):
        load_published(networks, tmp_path)


def test_prefix_and_stale_statistics_of_old_files(tmp_path):
    network = ResnetGenerator(width=4, blocks=4)
    state = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        state[f"module.model.2.{name}"] = torch.zeros(4)
    torch.save(state, tmp_path / "old_net_G.pth")
    other = ResnetGenerator(width=4, blocks=4)
    load_weights(other, read_weights(tmp_path / "old_net_G.pth"))
    assert torch.equal(other.model[1].weight, network.model[1].weight)


def test_the_error_of_a_file_that_does_not_fit_lists_the_differences(tmp_path):
    network = ResnetGenerator(width=4, blocks=4)
    state = dict(network.state_dict())
    state["model.1.weight"] = state["model.1.weight"][:2]
    state["extra"] = state.pop("model.1.bias")
    with pytest.raises(ValueError, match="one.pth does not fit") as caught:
        load_weights(network, state, "one.pth")
    for part in (
        "model.1.bias is missing",
        "extra is not in this network",
        "model.1.weight is (2, 3, 7, 7), this network has (4, 3, 7, 7)",
    ):
        assert part in str(caught.value)


class Trap:
    def __reduce__(self):
        return (pickle.loads, (b"",))


def test_files_that_are_not_weights(tmp_path):
    torch.save({"G": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="Python objects besides tensors, which are never loaded"):
        read_weights(tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pth"):
        read_weights(tmp_path / "text.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="not a published ResNet"):
        network_from_weights({"fc.weight": torch.zeros(2, 2)})
