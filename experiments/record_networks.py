"""Record what the networks of a published checkout compute, for tests/networks/test_recordings.py.

    python experiments/record_networks.py CHECKOUT --out tests/networks/recordings

CHECKOUT is a clone of CUT (github.com/taesungp/contrastive-unpaired-translation). Everything is computed in float64, on
small seeded images and weights that follow from the names of the tensors (`filled`), so a file holds results only:
output, gradient of the image, and a part of each feature map.

Three kinds of networks need help. `resnet_cat` gets the option `nz=0`, which no parser defines. `patch` is built from
its class, which `define_D` never does. The StyleGAN2 generators move a constant to a GPU in every pass; here
`Tensor.cuda` returns the tensor itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IMAGE = (2, 3, 8, 16)
"""Two images, because PyTorch's instance norm has wrong gradients for one on the CPU."""
MOST_VALUES = 200
"""Values of a feature map that are kept."""

CASES: dict[str, dict[str, Any]] = {
    "smallstylegan2": {"network": "smallstylegan2", "width": 1, "layers": [0, 1, 2, 3]},
    "smallstylegan2_down2": {"network": "smallstylegan2", "width": 1, "stylegan2_downsampling": 2, "layers": [1, 3, 4]},
    "stylegan2_down0": {"network": "stylegan2", "width": 1, "stylegan2_downsampling": 0, "layers": [0, 2, 4]},
    "stylegan2_down3": {"network": "stylegan2", "width": 1, "stylegan2_downsampling": 3, "layers": [2, 4, 7]},
    "resnet_cat": {"network": "resnet_cat", "width": 3, "layers": [0, 1, 2, 3]},
    "resnet_cat_1_to_3": {"network": "resnet_cat", "width": 2, "in_channels": 1, "out_channels": 3, "layers": [3]},
    "patch_instance": {"network": "patch", "width": 4, "image": (2, 3, 16, 32)},
    "patch_none": {"network": "patch", "width": 4, "norm": "none", "image": (1, 3, 32, 16)},
    "patch_batch_strided": {
        "network": "patch",
        "width": 4,
        "norm": "batch",
        "antialias": False,
        "in_channels": 1,
        "image": (2, 1, 32, 32),
    },
    "tilestylegan2": {"network": "tilestylegan2", "width": 1, "resolution": 16, "image": (2, 3, 16, 16)},
    "basic_none": {"network": "basic", "width": 3, "norm": "none", "in_channels": 1, "image": (2, 1, 32, 40)},
    "basic_batch": {"network": "basic", "width": 3, "norm": "batch", "in_channels": 1, "image": (2, 1, 32, 40)},
    "n_layers_batch_strided": {
        "network": "n_layers",
        "layers": 2,
        "width": 3,
        "norm": "batch",
        "antialias": False,
        "image": (2, 3, 16, 24),
    },
    "pixel_batch": {"network": "pixel", "width": 3, "norm": "batch"},
    "pixel_none": {"network": "pixel", "width": 3, "norm": "none"},
}
"""By the name of the file: the network of our option, what is not the default, the image, and the feature layers (for
n_layers, the number of layers)."""

GENERATORS = ("smallstylegan2", "stylegan2", "resnet_cat")


def drawn(name: str, *shape: int) -> Tensor:
    """Return normal numbers in float64 that follow from a name. NumPy keeps this generator's numbers for good."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def filled(network: nn.Module, equalised: bool) -> nn.Module:
    """Give a network weights that follow from their names, and return it in float64.

    Blur filters stay, and so do the weights of noise, which are 0.

    Args:
        equalised: the network scales its weights at each use, as StyleGAN2 does.
    """
    network.double()
    for key, tensor in network.state_dict().items():
        if key.endswith((".filt", ".kernel", ".noise.weight", "num_batches_tracked")):
            continue
        values = drawn(key, *tensor.shape)
        if tensor.dim() > 1 and not key.endswith("bias"):
            tensor.copy_(values if equalised else values / math.sqrt(tensor[0].numel()))
        else:
            tensor.copy_(0.1 * values + (0.0 if key.endswith(("bias", "beta", "running_mean")) else 1.0))
    return network


def image_of(case: dict[str, Any]) -> Tensor:
    """Return the images of a case."""
    images, _, height, width = case.get("image", IMAGE)
    return 0.5 * drawn("image", images, case.get("in_channels", 3), height, width)


def part_of(feature: Tensor) -> Tensor:
    """Return evenly spaced values of a feature map."""
    flat = feature.detach().flatten()
    return flat[:: math.ceil(flat.numel() / MOST_VALUES)]


def published(networks: Any, case: dict[str, Any]) -> nn.Module:
    """Build the published network of a case, from the checkout's module `models.networks`."""
    name, width, norm = case["network"], case["width"], case.get("norm", "instance")
    resolution, antialias = case.get("resolution", 64), case.get("antialias", True)
    opt = Namespace(netG=name, netD=name, load_size=resolution, crop_size=resolution, nz=0)
    opt.stylegan2_G_num_downsampling = case.get("stylegan2_downsampling", 1)
    channels = case.get("in_channels", 3), case.get("out_channels", 3)
    if name in GENERATORS:
        return networks.define_G(*channels, width, name, norm, opt=opt)
    if name == "patch":
        layer = networks.get_norm_layer(norm)
        return networks.PatchDiscriminator(channels[0], width, norm_layer=layer, no_antialias=not antialias)
    return networks.define_D(channels[0], width, name, case.get("layers", 3), norm, no_antialias=not antialias, opt=opt)


def record(networks: Any, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return what the published network of a case computes, by the names in its file."""
    network = filled(published(networks, case), "stylegan2" in case["network"])
    x = image_of(case).requires_grad_()
    found: dict[str, np.ndarray] = {}
    if case["network"] in GENERATORS:
        argument = "nce_layers" if case["network"] == "resnet_cat" else "layers"
        y, features = network(x, **{argument: list(case["layers"])})
        found |= {f"feat{i}": part_of(f).numpy() for i, f in zip(case["layers"], features, strict=True)}
    else:
        y = network(x)
    (y * drawn("cotangent", *y.shape)).sum().backward()
    assert x.grad is not None
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    meta = np.frombuffer(json.dumps(shapes).encode(), dtype=np.uint8)
    return {"y": y.detach().numpy(), "dx": x.grad.numpy(), **found, "shapes": meta}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the published code")
    parser.add_argument("--out", type=Path, required=True, help="folder of the recordings")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(args.checkout))
    try:
        from models import networks  # type: ignore[import-not-found]  # of the checkout
    except ImportError as error:
        parser.error(f"{args.checkout}: no published checkout ({error})")
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign,assignment]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        path = args.out / f"{name}.npz"
        np.savez_compressed(path, **record(networks, case))
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
