"""Read and write published weight files: `{latest|epoch}_net_{G,F,D,...}.pth` of CUT, DCLGAN, DCD-GAN and CycleGAN.

state = read_weights("latest_net_G.pth")
generator = network_from_weights(state)
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.locking import hold
from ..common.writing import sweep, write_whole
from . import (
    InstanceNorm,
    MUNITGenerator,
    Norm,
    PatchGAN,
    PixelGAN,
    ResnetGenerator,
    Restorer,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    UnetGenerator,
)
from .norms import AffineInstanceNorm
from .spectral import fitted, without_spectral_norm

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEARNED_TEMPERATURE = "learned_temperature.log_scale"
"""The end of the name of the one parameter that weights may lack."""
STALE = ("running_mean", "running_var", "num_batches_tracked")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a published weight file as a state dict on the CPU. The prefix `module.` of CPU-trained files is removed.

    Only tensors are read (`weights_only=True`), and never more bytes than the file has.

    Raises:
        ValueError: the file does not exist, holds anything but tensors, is damaged, or claims more data than it holds.
    """
    path = Path(path)
    if not path.is_file():  # opening a pipe would block
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged content raises almost any error
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # it names a class or a function
            raise ValueError(f"{path}: holds Python objects besides tensors, which are never loaded") from None
        reason = ""
        if isinstance(error, OSError | RuntimeError | zipfile.BadZipFile):  # the text of other errors does not help
            reason = f" ({getattr(error, 'strerror', None) or str(error).partition(chr(10))[0]})"
        raise ValueError(f"{path}: not a PyTorch weight file, or a damaged one{reason}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a state dict (names with tensors), but a {type(state).__name__}")
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: not a state dict: its key {key!r} must be text")
        problem = oddity(key, tensor)
        if problem:
            raise ValueError(f"{path}: {key} {problem}")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _check_archive(path: Path) -> None:
    """Raise BadZipFile if a checksum is wrong or an entry is compressed. PyTorch itself checks no checksums.

    Files of PyTorch's first versions are not archives and have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        held = path.stat().st_size
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > held:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, but PyTorch writes no compressed files")
            if entry.CRC == 0:  # written without a checksum, which PyTorch has an option for
                continue
            with archive.open(entry) as content:
                while content.read(2**20):
                    pass


def oddity(key: str, tensor: Tensor) -> str:
    """Return why a tensor cannot be a weight; empty if it can."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is sparse, quantised or without values; weights must be ordinary tensors"
    if tensor.dtype not in FLOATS and not key.endswith("num_batches_tracked"):
        return f"holds {tensor.dtype}; weights must be floats of 16 to 64 bits"
    if not tensor.numel():
        return f"holds no numbers: its shape is {tuple(tensor.shape)}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():,} numbers but holds fewer"
    return ""


def load_weights(network: nn.Module, state: dict[str, Tensor], name: str = "the file") -> None:
    """Load a published state dict into a network.

    InstanceNorm statistics are dropped: old files contain them, but no network uses them. A learned temperature, which
    no published projector has, keeps its value. A discriminator with spectral norm takes weights without it, and the
    reverse (`spectral.fitted`).

    Raises:
        ValueError: keys or shapes differ (the message lists them), or weights are not finite.
    """
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(f"{name}: {broken[0]}{more} holds numbers that are not finite (NaN or infinity)")
    projector_to_be_built = getattr(network, "mlp_init", True) is False
    if projector_to_be_built:
        try:
            network.load_state_dict(state)
        except (RuntimeError, KeyError, IndexError) as error:
            raise ValueError(f"{name} does not fit: {' '.join(str(error).split())}") from None
        return
    state = fitting(network, state, name)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # a layer's own check of its state
        raise ValueError(f"{name} does not fit: {' '.join(str(error).split())}") from None


def fitting(network: nn.Module, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors that a network takes, as `load_weights` describes. The network may be on the meta device.

    Raises:
        ValueError: keys or shapes differ; the message lists them.
    """
    wanted, state = network.state_dict(), fitted(published_names(state, network), network)
    state = {k: t for k, t in state.items() if k in wanted or k.rsplit(".", 1)[-1] not in STALE}
    problems = [f"{key} is missing" for key in wanted if key not in state and not key.endswith(LEARNED_TEMPERATURE)]
    problems += [f"{key} is not in this network" for key in state if key not in wanted]
    problems += [
        f"{key} is {tuple(state[key].shape)}, this network has {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{name} does not fit: {'; '.join(problems[:6])}{more}{other_norms(state, network)}")
    return state


def network_from_weights(state: dict[str, Tensor], name: str = "the file") -> nn.Module:
    """Build the generator or discriminator that this state dict belongs to, and load it.

    Names and shapes determine the network, also where a ResNet's blocks are named `block` (see `published_names`), and
    where instance norms have weights and biases. They do not show the dropout of a U-Net and the training resolution of
    a StyleGAN2 generator, but these do not change a trained network. The file of a "patch" discriminator is that of a
    PatchGAN of 2 layers, and is read as one.

    Raises:
        ValueError: the state dict is that of a projector or of an unknown network.
    """
    if any(key.startswith("mlp_") for key in state):
        raise ValueError(f"{name}: holds a projector (F), not a generator or discriminator")
    try:
        network = _build(_with_published_names(state))
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        raise ValueError(
            f"{name} is not a published ResNet, U-Net, StyleGAN2, MUNIT or PatchGAN, nor a restorer: it begins with "
            f"{sorted(state)[:3]}"
        ) from None
    load_weights(network, state, name)
    return network.eval()


_BLOCK = re.compile(r"(model\.\d+\.)block(\.\d+\.\w+)")


def published_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for a network with the published names, if the network is a ResNet generator.

    Some CycleGANs have the published layers in the published order, and call a residual block's layers `block` instead
    of `conv_block`. State dicts for other networks are returned as they are.
    """
    return _with_published_names(state) if isinstance(network, ResnetGenerator) else state


def _with_published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_BLOCK.sub(r"\1conv_block\2", key) if _BLOCK.fullmatch(key) else key: t for key, t in state.items()}


def other_norms(state: dict[str, Tensor], network: nn.Module) -> str:
    """Return a clause if only one of a state dict and a network has instance norms with weights; else empty."""
    here = any(isinstance(module, AffineInstanceNorm) for module in network.modules())
    there = _norm(state) == "instance" and _is_affine(state)
    if here == there or not any(isinstance(module, InstanceNorm) for module in network.modules()):
        return ""
    has = "have a weight and a bias" if there else "have no weight and bias"
    return f"; its instance norms {has}, which network.norm_affine={str(there).lower()} fits"


def _build(state: dict[str, Tensor]) -> nn.Module:
    """Build a network with these names and shapes; raise KeyError or a similar error if there is none."""
    norm = _norm(state)
    affine = norm == "instance" and _is_affine(state)
    numbers = sum(tensor.numel() for tensor in state.values())

    def width_of(first: Tensor) -> int:
        """Return a width. Refuse one whose square exceeds the number of weights: a false shape must not cost memory."""
        if not 0 < first.shape[0] ** 2 < numbers:
            raise KeyError("weights for such a width")
        return first.shape[0]

    if any(".conv_block." in key for key in state):
        first, last = state["model.1.weight"], state[f"model.{max(_indices(state, 'model.'))}.weight"]
        places = {int(key.split(".")[1]) for key in state if ".conv_block." in key}
        filters = [int(key.split(".")[1]) for key in state if key.endswith(".filt")]
        return ResnetGenerator(
            first.shape[1],
            last.shape[0],
            width_of(first),
            len(places),
            norm,
            dropout=any(key.endswith(".conv_block.6.weight") and t.dim() == 4 for key, t in state.items()),
            antialias=any(index < min(places) for index in filters),
            antialias_up=any(index > min(places) for index in filters),
            norm_affine=affine,
        )
    if "model.model.0.weight" in state:
        first = state["model.model.0.weight"]
        downs = 1
        while f"model.model.1{'.model.3' * (downs - 1)}.model.1.weight" in state:
            downs += 1
        last = state["model.model.3.weight"]
        return UnetGenerator(first.shape[1], last.shape[1], downs, width_of(first), norm, norm_affine=affine)
    if "decoder.convs.0.conv1.0.weight" in state:
        first = state["encoder.convs.1.0.weight"]
        last = state[f"decoder.convs.{max(_indices(state, 'decoder.convs.'))}.0.weight"]
        halving = [f"encoder.convs.{i}.conv2.1.weight" for i in sorted({*_indices(state, "encoder.convs.")})]
        widths = tuple(width_of(tensor) for tensor in (first, *(state[key] for key in halving if key in state)))
        blocks = 2 * (max(_indices(state, "encoder.convs.")) - len(widths))
        noise = blocks != 2  # as published; it shows in training only
        return StyleGAN2Generator(first.shape[1], last.shape[0], blocks=blocks, noise=noise, widths=widths)
    if "enc_content.model.0.conv.weight" in state:
        first, last = state["enc_content.model.0.conv.weight"], state["dec.model.5.conv.weight"]
        blocks = max(_indices(state, "enc_content.model.3.model.")) + 1
        return MUNITGenerator(first.shape[1], last.shape[0], width_of(first), blocks)
    if "encoder.1.weight" in state:
        first = state["encoder.1.weight"]
        return Restorer(first.shape[1], width_of(first), middle=max(_indices(state, "encoder.")) - 7)
    if "final_linear.0.weight" in state:
        first, level = state["convs.0.0.weight"], max(_indices(state, "convs.")) + 2
        # At 256 there are `width` channels; below, `width` times a power of two, at most 384.
        at_256 = state[f"convs.{level - 8}.conv2.1.weight"] if level > 8 else first
        width = -(-width_of(at_256) // 2 ** (8 - min(level, 8)))
        return StyleGAN2Discriminator(first.shape[1], width, 2**level)
    if "net.0.weight" in state:
        return PixelGAN(state["net.0.weight"].shape[1], width_of(state["net.0.weight"]), norm, affine)
    first = state["model.0.weight"]
    convolutions = sum(tensor.dim() == 4 for key, tensor in state.items() if key.endswith(".weight"))
    antialias = any(key.endswith(".filt") for key in state)
    return PatchGAN(first.shape[1], width_of(first), convolutions - 2, norm, antialias, affine)


def _norm(state: dict[str, Tensor]) -> Norm:
    """Infer the norm. Batch norm has weights and statistics; published convolutions have biases only before instance
    norm."""
    if any(key.endswith("running_mean") and key.replace("running_mean", "weight") in state for key in state):
        return "batch"
    convolutions = [key for key, tensor in state.items() if key.endswith(".weight") and tensor.dim() == 4]
    return "instance" if all(key.replace(".weight", ".bias") in state for key in convolutions) else "none"


def _is_affine(state: dict[str, Tensor]) -> bool:
    """Whether norms have weights. Of the networks with `Norm`, only norms have weights of one dimension."""
    return any(key.endswith(".weight") and tensor.dim() == 1 for key, tensor in state.items())


def _indices(state: dict[str, Tensor], prefix: str) -> list[int]:
    """Return the numbers that follow `prefix` in the names."""
    found = (key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix))
    return [int(index) for index in found if index.isdigit()]


def save_published(networks: dict[str, nn.Module], folder: str | Path, label: str = "latest") -> list[Path]:
    """Write `{label}_net_{name}.pth` for each network, in the format of the published code; return the paths.

    A learned temperature, which the published code would refuse, is left out.

    Raises:
        ValueError: `label` cannot be part of a file name, `folder` is a file, or another process exports there
            (`InUse`).
        OSError: names the file that could not be written. The files before it are complete.
    """
    folder = Path(folder)
    check_label(label)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file is in the way, a folder is needed")
    paths = []
    # A separate lock, because a run may be exported into its own folder while it trains.
    with hold(folder, "fastnce export", name=".fastnce-export-lock"):
        sweep(folder, held=True)
        for name, network in networks.items():
            path = folder / f"{label}_net_{name}.pth"
            write_whole(path, packed(published_state(network)))
            paths.append(path)
    return paths


def check_label(label: str) -> None:
    """Raise ValueError if `label` cannot be the first part of a file name."""
    if not label or Path(label).name != label:
        raise ValueError(f"label must be the first part of a file name, such as latest or 400, not {label!r}")


def published_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's weights on the CPU as the published code has them: without spectral norm and learned temperature."""
    state = network.state_dict()
    if getattr(network, "has_spectral_norm", False):
        state = without_spectral_norm(state)
    return {key: t.detach().cpu() for key, t in state.items() if not key.endswith(LEARNED_TEMPERATURE)}


def packed(state: dict[str, Tensor]) -> bytes:
    """The bytes of a `.pth` file. PyTorch's file writer would hide the errors of the disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_published(networks: dict[str, nn.Module], folder: str | Path, label: str = "latest") -> list[str]:
    """Load every `{label}_net_{name}.pth` that is in the folder; return the names of the networks found."""
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
