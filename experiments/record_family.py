"""Record what the released code of four methods computes, for tests/methods/test_family_replay.py.

    python experiments/record_family.py CHECKOUT --case negcut --out tests/methods/recordings

CHECKOUT is a copy of the method's repository: hDCE with SRC (its folder Single-modal), NEGCUT, QS-Attn or F-LSeSim.
The script imports its model, builds tiny networks with seeded weights, and runs two steps in float64 on the CPU. It
writes to CASE.npz, without pickles: the weights, `init/netNAME/KEY`; images, `step0/A`; drawn locations, `step0/ids/N`,
and noise times 16, `step0/noise16/N`, by their order; changes of the weights in 2^-19 of the learning rate,
`final_change/netNAME/KEY`; and `meta`, JSON with the command line, the losses of each step and the optimisers.
Packages that only show or load images are replaced by stubs, and so is instance norm, by its plain formula.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

SIDE, STEPS = 24, 2
SMALL = ["--ngf", "2", "--ndf", "2", "--n_epochs", "2", "--n_epochs_decay", "2", "--name", "recorded"]
CONTRAST = [*SMALL, "--netG", "resnet_6blocks", "--netF_nc", "8", "--num_patches", "12"]
SPATIAL = ["--patch_nums", "12", "--patch_size", "5", "--ngf", "1", "--ndf", "1"]
CASES: dict[str, list[str]] = {
    "hneg_src": [
        *("--model", "cut", *CONTRAST, "--dce_idt", "--lambda_HDCE", "0.1", "--lambda_SRC", "0.05"),
        *("--use_curriculum", "--HDCE_gamma", "50", "--HDCE_gamma_min", "10"),
    ],
    "hneg_src_default": ["--model", "cut", *CONTRAST],
    "negcut": ["--model", "negcut", *CONTRAST, "--num_patches", "4", "--ngf", "1", "--ndf", "1"],
    "qsattn_global": ["--model", "qs", *CONTRAST, "--QS_mode", "global"],
    "qsattn_local": ["--model", "qs", *CONTRAST, "--QS_mode", "local"],
    "qsattn_local_global": ["--model", "qs", *CONTRAST, "--QS_mode", "local_global"],
    "fsesim": ["--model", "sc", *SMALL, *SPATIAL],
    "lsesim": ["--model", "sc", *SMALL, *SPATIAL, "--learned_attn", "--augment"],
}
STUBS = (
    *("visdom", "dominate", "dominate.tags", "matplotlib", "matplotlib.pyplot", "GPUtil", "h5py", "cv2"),
    *("torchvision", "torchvision.transforms", "torchvision.models"),
)
RESOLUTION = 2.0**-19
"""Unit of the recorded changes of weights, as a part of the learning rate: whole numbers take less space."""
WIDTHS = (3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 6)
"""Channels of the stand-in for VGG16, which has the layers of the real one."""


def plain_instance_norm(x: Tensor, *args, eps: float = 1e-5, **kwargs) -> Tensor:
    """Instance norm by its formula: PyTorch's own may return wrong gradients for one image on the CPU."""
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


class Features(nn.Module):
    """A VGG16 as torchvision returns it, with few channels."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for i, width in enumerate(WIDTHS):
            if i in (2, 4, 7, 10):
                layers.append(nn.MaxPool2d(2, 2))
            layers += [
                nn.Conv2d(before, width, 3, padding=1),
                nn.ReLU(inplace=True),
            ]  # in place: it completes what the released code names relu4_1
            before = width
        self.features = nn.Sequential(*layers, nn.MaxPool2d(2, 2))


class Stub(ModuleType):
    """A module that has every name."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def stub(folder: Path) -> None:
    """Let the checkout import what it does not need."""
    for name in STUBS:
        sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    sys.modules["torchvision.models"].vgg16 = Features  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign]  # some files call it on a CPU too
    torch.nn.functional.instance_norm = plain_instance_norm  # type: ignore[assignment]
    # QS-Attn's local mode views a tensor that old versions of PyTorch laid out as it needs; reshape gives the same
    torch.Tensor.view = torch.Tensor.reshape  # type: ignore[method-assign,assignment]


def options_of(arguments: list[str]):
    """Parse a published command line with the checkout's own options."""
    from options.train_options import TrainOptions  # type: ignore[import-not-found]

    sys.argv = ["train.py", "--dataroot", "none", "--gpu_ids", "-1", *arguments]
    reader = TrainOptions()
    options = reader.gather_options()
    options.isTrain, options.gpu_ids = True, []
    return options


def rounded(numbers: np.ndarray) -> Tensor:
    """Numbers with 8 bits of mantissa: they take less space, and no precision is lost on the way to a file."""
    return torch.from_numpy(numbers).bfloat16().double()


def fill(network: nn.Module, rng: np.random.RandomState) -> None:
    """Give a network weights that leave no activation near zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            inputs = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(rounded(rng.standard_normal(parameter.shape) / inputs**0.5))


class Drawn:
    """Notes the locations and the noise that the code draws, in order."""

    def __init__(self, most: int):
        self.most, self.ids, self.noise = most, [], []  # type: ignore[var-annotated]
        self.permute, self.normal = torch.randperm, torch.randn

    def __enter__(self):
        def permute(count, **options):
            found = self.permute(count)
            self.ids.append(found[: self.most].clone())
            return found

        def normal(*shape, **options):
            found = (self.normal(*shape) * 16).round().clamp(-127, 127) / 16  # fits a byte
            self.noise.append(found)
            return found

        torch.randperm, torch.randn = permute, normal  # type: ignore[assignment]
        return self

    def __exit__(self, *error):
        torch.randperm, torch.randn = self.permute, self.normal


def networks_of(model) -> dict[str, nn.Module]:
    """The networks by their published names, and the fixed VGG16 of F-LSeSim."""
    found = {name: getattr(model, f"net{name}") for name in model.model_names}
    return found | ({"Pre": model.netPre} if hasattr(model, "netPre") else {})


def record(case: str) -> tuple[dict[str, np.ndarray], dict]:
    """Run the steps of a case; returns arrays and meta."""
    from models import create_model  # type: ignore[import-not-found]

    torch.manual_seed(0)
    options = options_of(CASES[case])
    model = create_model(options)
    rng = np.random.RandomState(1)
    inputs = [
        {key: rounded(rng.randint(0, 16, (1, 3, SIDE, SIDE)) / 7.5 - 1) for key in ("A", "B", "A_aug", "B_aug")}
        | {"A_paths": "", "B_paths": ""}
        for _ in range(STEPS)
    ]
    if options.model == "qs":  # it initialises from what is set, and counts GPUs
        model.set_input(inputs[0])
        model.opt.gpu_ids = [0]
        model.data_dependent_initialize()
    else:
        if hasattr(model, "set_epoch"):
            model.set_epoch(1)
        model.data_dependent_initialize(inputs[0])
    for network in networks_of(model).values():
        fill(network, rng)
    names = networks_of(model)
    arrays = {
        f"init/net{name}/{key}": tensor.detach().numpy().astype(np.float32)
        for name, network in names.items()
        for key, tensor in network.named_parameters()
    }
    start = {key: torch.from_numpy(value).double() for key, value in arrays.items()}
    most = int(getattr(options, "num_patches", getattr(options, "patch_nums", 0)))
    losses = []
    for i, given in enumerate(inputs):
        if hasattr(model, "set_epoch"):
            model.set_epoch(i + 1)
        with Drawn(most) as drawn:
            model.set_input({key: x.clone() if isinstance(x, Tensor) else x for key, x in given.items()})
            model.optimize_parameters()
        kept = ("A", "B", "A_aug", "B_aug") if getattr(options, "augment", False) else ("A", "B")
        arrays |= {f"step{i}/{key}": given[key].numpy().astype(np.float32) for key in kept}
        arrays |= {f"step{i}/ids/{n}": ids.numpy().astype(np.int16) for n, ids in enumerate(drawn.ids)}
        arrays |= {f"step{i}/noise16/{n}": (noise * 16).numpy().astype(np.int8) for n, noise in enumerate(drawn.noise)}
        shown = {name: getattr(model, f"loss_{name}", None) for name in model.loss_names}  # numbers are terms left out
        losses.append({name: float(loss.detach()) for name, loss in shown.items() if isinstance(loss, Tensor)})
    for name, network in names.items():
        for key, tensor in network.named_parameters():
            change = (tensor.detach() - start[f"init/net{name}/{key}"]) / options.lr / RESOLUTION
            arrays[f"final_change/net{name}/{key}"] = change.round().numpy().astype(np.int32)
    optimizers = [
        {"lr": group["lr"], "betas": group["betas"], "parameters": sum(p.numel() for p in group["params"])}
        for optimizer in model.optimizers
        for group in optimizer.param_groups
    ]
    return arrays, {"argv": CASES[case], "losses": losses, "lr": options.lr, "optimizers": optimizers}


def main(arguments: list[str] | None = None) -> int:
    """Write one recording; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="the repository")
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--out", required=True, type=Path, help="folder for the recording")
    args = parser.parse_args(arguments)
    if not (args.checkout / "models").is_dir():
        print(f"{args.checkout}: no folder models here", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    stub(args.checkout.resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out.resolve() / f"{args.case}.npz"
    with tempfile.TemporaryDirectory() as folder:  # the published options write into the working directory
        os.chdir(folder)
        arrays, meta = record(args.case)
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    print(f"{path}: {path.stat().st_size:,} bytes, losses {meta['losses']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
