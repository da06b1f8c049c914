"""Read what `fastnce export` wrote: a folder with config.json and a file of weights.

    FOLDER/{config.json, model.safetensors, README.md}
    FOLDER/{config.json, latest_net_G.pth, ..., README.md}

Nothing of such a folder is run: config.json names options of our own networks, and the other file holds tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.imports import is_import_path
from ..common.messages import brief, nearest
from ..common.options import check as check_options
from ..engine.stored import read_tensors
from ..methods import NetworkOptions
from ..networks.published import fitting, load_weights, network_from_weights, oddity, read_weights

VERSION = 1
"""Of the format of config.json."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
ABOUT = ("what", "trained_on", "license")
"""What "about" in config.json may say, each in one line: what the model does, its training pictures, its licence."""
LARGEST = 2**20
"""Bytes. A larger config.json is not read."""
READABLE = ("safetensors", "published")
"""The formats that are read again; the others are for other programs."""
NETWORK_KEYS = tuple(
    f.name for f in fields(NetworkOptions) if not f.name.startswith(("discriminator", "spectral", "init_"))
)
"""The keys of `NetworkOptions` that determine a generator. The others are of discriminators and of initial weights."""


@dataclass(frozen=True)
class Exported:
    """A generator out of an exported folder.

    network: in eval mode on the CPU, in float32. Weights of 16 bits are converted.
    details: the content of config.json.
    options: the values of `NETWORK_KEYS`; None if names and shapes of the weights determined the network.
    files: that were read.
    """

    network: nn.Module
    details: dict[str, Any]
    options: dict[str, Any] | None
    files: tuple[Path, ...]


def is_exported(folder: Path) -> bool:
    """Whether a folder is to be read as an export: it holds config.json or model.safetensors, and is no run."""
    if not folder.is_dir() or (folder / "state.json").exists() or (folder / "checkpoints").is_dir():
        return False
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists()


def read_folder(folder: Path, generator: str = "") -> Exported:
    """Read an exported generator.

    Args:
        folder: with config.json and the file that it names.
        generator: the name that the caller expects, such as "G_A"; empty: any.

    Raises:
        ValueError: a file is missing, damaged, of a newer version or of another program; the weights do not fit the
            network that config.json describes; or it is another generator. Memory for the network is allocated after
            all this is checked.
    """
    details = read_details(folder)
    if details["format"] not in READABLE:
        raise ValueError(
            f"{folder} is an export of the format {details['format']}, which fastnce does not read again: export "
            f"with --format safetensors, or name the run"
        )
    if generator and generator != details["generator"]:
        hint = ": name its .pth file itself" if details["format"] == "published" else ""
        raise ValueError(f"{folder} holds the generator {details['generator']}, and no {generator!r}{hint}")
    file = folder / details["file"]
    if not file.is_file():
        what = "no regular file" if file.exists() else f"not there, and {CONFIG} names it"
        raise ValueError(f"{file} is {what}: export again")
    tensors = _tensors(file)
    values = details["network"]
    options = None if values is None else network_options(NetworkOptions(**values))
    if options is None:
        network = network_from_weights(tensors, str(file))
        if not hasattr(network, "factor"):
            raise ValueError(f"{file} holds a discriminator, and an export holds a generator")
    else:
        network = _build(options, details["reverse"], tensors, file)
        load_weights(network, tensors, str(file))
    return Exported(network.eval(), details, options, (folder / CONFIG, file))


def read_details(folder: Path) -> dict[str, Any]:
    """Read and check config.json of an export.

    Raises:
        ValueError: it is missing, damaged, of a newer version or of another program.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "no regular file" if path.exists() else "missing: an export has it beside its weights"
        raise ValueError(f"{path} is {what}")
    with path.open("rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST:,} bytes, far more than fastnce export writes")
    try:
        details = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"{path} is no JSON: {reason}") from None
    if not isinstance(details, dict) or "fastnce" not in details:
        raise ValueError(f'{path} was not written by fastnce export: it has no "fastnce", the version that wrote it')
    version = details.get("version")
    if type(version) is int and version > VERSION:
        raise ValueError(f"{path} is of a newer fastnce, {brief(details['fastnce'])}: install that version")
    for key, (kinds, wanted) in _KINDS.items():
        if (
            key not in details
            or not isinstance(details[key], kinds)
            or (kinds is int and isinstance(details[key], bool))
        ):
            raise ValueError(f"{path}: {key} must be {wanted}, not {brief(details.get(key))}")
    if version != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, not {brief(version)}")
    name = details["file"]
    if not name or len(name) > 255 or name.startswith(".") or Path(name).name != name or "\0" in name or "\\" in name:
        raise ValueError(f"{path}: file must be the name of a file beside it, not {brief(name)}")
    for key in ("direction", "paired_direction"):
        if details.setdefault(key, "AtoB") not in ("AtoB", "BtoA"):
            raise ValueError(f'{path}: {key} must be "AtoB" or "BtoA", not {brief(details[key])}')
    if details["network"] is not None:
        _check_network(details["network"], path)
    return details


_KINDS: dict[str, tuple[Any, str]] = {
    "version": (int, "a whole number"),
    "format": (str, "a text such as safetensors"),
    "file": (str, f"the name of a file such as {WEIGHTS}"),
    "generator": (str, "the name of a generator such as G"),
    "network": (dict | None, "a table of network options, or null"),
    "reverse": (bool, "true or false"),
}


def about(details: dict[str, Any]) -> dict[str, str]:
    """What config.json says of a model in words: those of `ABOUT` that are there, each as one line."""
    said = details.get("about")
    said = said if isinstance(said, dict) else {}
    lines = {key: " ".join(said[key].split()) for key in ABOUT if isinstance(said.get(key), str)}
    return {key: line for key, line in lines.items() if line}


def _check_network(values: dict[str, Any], path: Path) -> None:
    for key in values:
        if key not in NETWORK_KEYS:
            raise ValueError(f"{path}: network.{key} is no option of a generator{nearest(key, NETWORK_KEYS)}")
    if is_import_path(values.get("generator")):
        raise ValueError(
            f"{path}: network.generator is code of its own, {brief(values['generator'])}, which is never imported from "
            f"an export: name the run, with --trust-code"
        )
    try:
        check_options(NetworkOptions(**values), "network")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read the weights; never more than the file holds."""
    if file.suffix == ".pth":
        return read_weights(file)
    try:
        tensors = read_tensors(file)
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}; it is damaged: export again") from None
    for key, tensor in tensors.items():
        if problem := oddity(key, tensor):
            raise ValueError(f"{file}: {key} {problem}")
    return tensors


def _build(values: dict[str, Any], reverse: bool, tensors: dict[str, Tensor], file: Path) -> nn.Module:
    """Build the network, after its shapes are compared with those of the weights."""
    options = NetworkOptions(**values)
    try:
        with torch.device("meta"):
            empty = options.build_generator(reverse)
    except (ValueError, RuntimeError, OverflowError) as error:  # options that contradict each other, or overflow
        raise ValueError(f"{file.parent / CONFIG}: {' '.join(str(error).split())}") from None
    fitting(empty, tensors, f"{file}, with the network of {CONFIG},")
    return options.build_generator(reverse)


def network_options(options: NetworkOptions) -> dict[str, Any]:
    """Return the values of `NETWORK_KEYS`, for config.json."""
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name in NETWORK_KEYS}
