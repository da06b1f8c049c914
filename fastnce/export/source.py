"""The generator that is exported, with what its model card says of it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.imports import is_import_path
from ..common.options import describe
from ..common.toml import format_value
from ..config import Config
from ..config.options import DataOptions
from ..data import DataError
from ..data.folder import domain_folders
from ..methods import NetworkOptions
from ..methods.checks import channels_of
from ..networks.contracts import fitting_side
from ..translate.exported import about, network_options
from ..translate.load import Loaded, load_generator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What the weights of an export may be."""


@dataclass(frozen=True)
class Source:
    """A generator to export.

    network: in eval mode on the CPU, in float32. Of a run with averaged weights, it has the average.
    name: "G", "G_A" or "G_B".
    options: the options that build it (`fastnce.translate.exported.NETWORK_KEYS`); None for a published file, and for a
        user's own method unless it translates with the generator of these options alone.
    reverse: it translates from B to A.
    facts: for the model card; each may be missing: "method", "step", "epoch", "seen" (images of each domain), "data" (a
        table of "name", and of "A" and "B", the numbers of training images), "config" (TOML, without folders),
        "figures" (measured values by name), "direction", "paired_direction", "about" (of an exported folder, as
        `fastnce.translate.exported.about` returns).
    factor: both sides of an image must be multiples of it.
    smallest: the smallest side of an image.
    in_channels, out_channels: of the images.
    own: the import path of the user's code that computes it; empty for our networks.
    dtype: of the weights in the exported folder that they came from; "float32" for other sources.
    """

    network: nn.Module
    name: str
    options: dict[str, Any] | None
    reverse: bool
    facts: dict[str, Any]
    factor: int
    smallest: int
    in_channels: int
    out_channels: int
    own: str = ""
    dtype: str = "float32"


def open_source(path: str | os.PathLike[str], generator: str = "", trust_code: bool = False) -> Source:
    """Load the generator of a run, a checkpoint's folder, an exported folder, a published file or a shipped model.

    Args:
        path, generator, trust_code: as `fastnce.translate.load_translator` takes them.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    loaded = load_generator(path, generator, trust_code=trust_code)
    network = loaded.network.eval().requires_grad_(False)
    factor = int(getattr(network, "factor", 1))
    channels = channels_of(network)
    options, own = loaded.options, _own(loaded.config)
    if options is None and loaded.config is not None and _builds(loaded.config.network, network, loaded.reverse):
        options, own = network_options(loaded.config.network), ""  # the user's own method trained our network
    return Source(
        network,
        loaded.name,
        options,
        loaded.reverse,
        _facts(loaded),
        factor,
        int(getattr(network, "smallest", factor)),
        channels,
        int(getattr(network, "out_channels", channels)),
        own,
        _stored_dtype(loaded.details),
    )


def _builds(options: NetworkOptions, network: nn.Module, reverse: bool) -> bool:
    """Whether options build a network: its class, its weights' names and shapes, and what it computes on an image."""
    if is_import_path(options.generator):
        return False
    twin = options.build_generator(reverse).eval()
    weights, shapes = network.state_dict(), {key: tensor.shape for key, tensor in twin.state_dict().items()}
    if type(twin) is not type(network) or {key: tensor.shape for key, tensor in weights.items()} != shapes:
        return False
    twin.load_state_dict(weights)
    side = fitting_side(64, int(getattr(network, "factor", 1)), int(getattr(network, "smallest", 1)))
    probe = torch.rand(1, channels_of(network), side, side) * 2 - 1
    with torch.no_grad():
        return torch.equal(twin(probe), network(probe))


def weights_of(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The generator's state dict on the CPU, with its floats in `dtype`."""
    return {
        key: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().contiguous().clone()
        for key, t in source.network.state_dict().items()
    }


def _stored_dtype(details: dict[str, Any]) -> str:
    weights = details.get("weights")
    dtype = weights.get("dtype") if isinstance(weights, dict) else None
    return dtype if isinstance(dtype, str) and dtype in DTYPES else "float32"


def _own(config: Config | None) -> str:
    """The import path of a user's own method or generator; empty for ours."""
    named = () if config is None else (config.method, config.network.generator)
    return next((name for name in named if is_import_path(name)), "")


def _facts(loaded: Loaded) -> dict[str, Any]:
    facts: dict[str, Any] = {"direction": loaded.direction, "paired_direction": loaded.paired_direction}
    if loaded.details:  # exported once more
        facts["method"] = str(loaded.details.get("method", ""))
        if said := about(loaded.details):
            facts["about"] = said
        return facts | _checked(loaded.details.get("training"))
    if loaded.config is None:
        return facts
    state = loaded.state
    progress = state.get("progress", {})
    figures = {key: value for key, value in state.get("validation", {}).items() if _is_number(value)}
    return facts | {
        "method": without_folders(loaded.config.method),
        "step": state["step"],
        **({"epoch": progress["epoch"], "seen": progress["seen"]} if progress else {}),
        "data": _data(loaded.config.data),
        "config": config_text(loaded.config),
        "figures": figures,
    }


def _checked(training: Any) -> dict[str, Any]:
    """What config.json tells of the training; values that nothing here writes are left out."""
    training = training if isinstance(training, dict) else {}
    found = {key: training[key] for key in ("step", "epoch", "seen") if type(training.get(key)) is int}
    if isinstance(training.get("config"), str):
        found["config"] = training["config"]
    if isinstance(data := training.get("data"), dict) and isinstance(data.get("name", ""), str):
        found["data"] = {
            key: data[key] for key in ("name", "A", "B") if type(data.get(key)) is (str if key == "name" else int)
        }
    if isinstance(figures := training.get("figures"), dict):
        found["figures"] = {key: value for key, value in figures.items() if _is_number(value)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _data(data: DataOptions) -> dict[str, Any]:
    """The name of the data folder, and the numbers of training images if the folder is still there."""
    if not isinstance(data.dir, str) or not data.dir:
        return {}
    found: dict[str, Any] = {"name": Path(data.dir).name}
    try:
        a, b = domain_folders(data.dir, "train")
    except (DataError, OSError, ValueError):
        return found
    return found | {"A": len(a), "B": len(b)}


def config_text(config: Config) -> str:
    """The configuration as TOML without comments. Folders are left out: they tell of the machine, not of the model."""
    lines = [f"method = {format_value(without_folders(config.method))}"]
    for section in config.SECTIONS:
        lines += ["", f"[{section}]"]
        for key, (value, _) in describe(getattr(config, section)).items():
            if isinstance(value, bool | int | float | str | list):
                lines.append(f"{key} = {format_value(without_folders(value))}")
    return "\n".join(lines) + "\n"


def without_folders(value: Any) -> Any:
    """A path without its folders, such as mynets.py:Net of /home/me/mynets.py:Net; any other value unchanged."""
    if isinstance(value, str) and ("/" in value or os.sep in value):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value
