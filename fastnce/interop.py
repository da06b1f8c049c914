"""Published weight files: `{latest|epoch}_net_{G,F,D,...}.pth` of CUT, DCLGAN, DCD-GAN and CycleGAN.

state = read_weights("latest_net_G.pth")
generator = network_from_weights(state)
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from .networks import PatchGAN, PixelGAN, ResnetGenerator, UnetGenerator

STALE = ("running_mean", "running_var", "num_batches_tracked")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A published weight file as a state dict on the CPU, its `module.` prefix (files trained on a CPU) taken off.

    Only tensors are read (`weights_only=True`); a file that needs more than that is refused with a ValueError.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: holds Python objects besides tensors, which are never loaded") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a PyTorch weight file ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a state dict (names with tensors), but a {type(state).__name__}")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def load_weights(network: nn.Module, state: dict[str, Tensor], name: str = "the file") -> None:
    """Load a published state dict; ValueError lists the keys and shapes that differ.

    InstanceNorm statistics, which old files carry and no network uses, are dropped.
    """
    projector_to_be_built = getattr(network, "mlp_init", True) is False
    if projector_to_be_built:
        network.load_state_dict(state)
        return
    wanted = network.state_dict()
    state = {k: t for k, t in state.items() if k in wanted or k.rsplit(".", 1)[-1] not in STALE}
    problems = [f"{key} is missing" for key in wanted if key not in state]
    problems += [f"{key} is not in this network" for key in state if key not in wanted]
    problems += [
        f"{key} is {tuple(state[key].shape)}, this network has {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{name} does not fit: {'; '.join(problems[:6])}{more}")
    network.load_state_dict(state)


def network_from_weights(state: dict[str, Tensor], name: str = "the file") -> nn.Module:
    """Build the published generator or discriminator that this state dict belongs to, and load it.

    What weights cannot tell is taken as published: instance norm where there is no batch norm, no dropout.
    """
    # Batch norm has weights of one dimension besides its statistics; instance norm has none.
    batch = any(k.endswith("running_mean") and k.replace("running_mean", "weight") in state for k in state)
    norm = "batch" if batch else "instance"
    network: nn.Module
    try:
        if any(".conv_block." in key for key in state):
            first, last = state["model.1.weight"], max(_indices(state))
            blocks = len({key.split(".")[1] for key in state if ".conv_block." in key})
            filters = [int(key.split(".")[1]) for key in state if key.endswith(".filt")]
            block = next(int(key.split(".")[1]) for key in state if ".conv_block." in key)
            dropout = any(key.endswith(".conv_block.6.weight") and t.dim() == 4 for key, t in state.items())
            network = ResnetGenerator(
                first.shape[1],
                state[f"model.{last}.weight"].shape[0],
                first.shape[0],
                blocks,
                norm,  # type: ignore[arg-type]
                dropout,
                antialias=any(index < block for index in filters),
                antialias_up=any(index > block for index in filters),
            )
        elif "model.model.0.weight" in state:
            first = state["model.model.0.weight"]
            depth = 0
            while f"model.model.1{'.model.3' * depth}.model.1.weight" in state:
                depth += 1
            downs = depth + 1
            network = UnetGenerator(first.shape[1], state["model.model.3.weight"].shape[1], downs, first.shape[0], norm)  # type: ignore[arg-type]
        elif "net.0.weight" in state:
            network = PixelGAN(state["net.0.weight"].shape[1], state["net.0.weight"].shape[0], norm)  # type: ignore[arg-type]
        elif "model.0.weight" in state and state["model.0.weight"].dim() == 4:
            first = state["model.0.weight"]
            convolutions = sum(tensor.dim() == 4 for key, tensor in state.items() if key.endswith(".weight"))
            antialias = any(key.endswith(".filt") for key in state)
            network = PatchGAN(first.shape[1], first.shape[0], convolutions - 2, norm, antialias)  # type: ignore[arg-type]
        else:
            raise KeyError("no known layout")
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"{name} is not a published ResNet, U-Net or PatchGAN: it begins with {sorted(state)[:3]}"
        ) from None
    load_weights(network, state, name)
    return network.eval()


def _indices(state: dict[str, Tensor]) -> list[int]:
    return [int(key.split(".")[1]) for key in state if key.startswith("model.") and key.split(".")[1].isdigit()]


def save_published(networks: dict[str, nn.Module], folder: str | Path, label: str = "latest") -> list[Path]:
    """Write `{label}_net_{name}.pth` for each network, as the published code reads them; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, network in networks.items():
        path = folder / f"{label}_net_{name}.pth"
        temporary = path.with_suffix(".pth.partial")
        torch.save({key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}, temporary)
        temporary.replace(path)
        paths.append(path)
    return paths


def load_published(networks: dict[str, nn.Module], folder: str | Path, label: str = "latest") -> list[str]:
    """Load every `{label}_net_{name}.pth` that lies in the folder; returns the names of the networks found."""
    found = []
    for name, network in networks.items():
        path = Path(folder) / f"{label}_net_{name}.pth"
        if path.exists():
            load_weights(network, read_weights(path), str(path))
            found.append(name)
    if not found:
        wanted = ", ".join(f"{label}_net_{name}.pth" for name in networks)
        raise ValueError(f"{folder}: none of {wanted} is here")
    return found
