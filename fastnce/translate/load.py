"""Load a translator from a run, a checkpoint, an export or a published file, or by the name of a shipped model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.imports import CodeError, is_import_path
from ..common.messages import nearest
from ..config import Config
from ..config.build import build_method
from ..config.options import exchanges_pairs
from ..config.stored import from_dict
from ..engine.checkpoint import open_checkpoint
from ..engine.stored import follow, load_generators, using
from ..methods.base import Method
from ..methods.checks import channels_of
from ..methods.translation import translation_of
from ..networks.contracts import fitting_side
from ..networks.published import load_weights, network_from_weights, read_weights
from .exported import is_exported, network_options, read_folder
from .named import absent, locate
from .translator import Tiles, Translator


def load_translator(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    generator: str = "",
    *,
    tiles: Tiles = "auto",
    tile_size: int = 1024,
    say: Callable[[str], None] | None = None,
    trust_code: bool = False,
) -> Translator:
    """Load a translator from a run, a checkpoint's folder, an exported folder or a published `.pth` file.

    Args:
        source: the path, or the name of a model that comes with the package, such as "derain"; a path that exists
            comes first. The pointers RUN/checkpoints/best and latest are followed. An exported folder is one that
            `fastnce export --format safetensors` or `published` wrote; weights of 16 bits are computed in float32.
        generator: for a method with two generators, "G_A" (A to B, the default) or "G_B".
        device, tiles, tile_size, say: see `Translator`.
        trust_code: import the user's own classes that the checkpoint names. Importing runs their code. An exported
            folder or a published file never names any.

    Raises:
        ValueError: there is no such run or file, or it does not contain a usable generator.
    """
    loaded = load_generator(source, generator, trust_code=trust_code)
    translator = Translator(loaded.network, device, tiles=tiles, tile_size=tile_size, say=say)
    translator.sources = loaded.sources
    translator.direction, translator.paired_direction = loaded.direction, loaded.paired_direction
    return translator


@dataclass(frozen=True)
class Loaded:
    """A generator with what is known of it.

    network: on the CPU.
    name: "G", "G_A" or "G_B".
    sources: the files that were read.
    reverse: it translates from B to A.
    direction, paired_direction: as the attributes of `Translator`.
    options: the options of the network; None for a published file and for a user's own method.
    config, state: of a run: its configuration, and what state.json holds.
    details: of an exported folder: what config.json holds.
    """

    network: nn.Module
    name: str
    sources: tuple[Path, ...]
    reverse: bool = False
    direction: str = "AtoB"
    paired_direction: str = "AtoB"
    options: dict[str, Any] | None = None
    config: Config | None = None
    state: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def load_generator(source: str | os.PathLike[str], generator: str = "", *, trust_code: bool = False) -> Loaded:
    """Load a generator on the CPU; arguments and errors are those of `load_translator`."""
    source = follow(locate(source))
    if is_exported(source):
        found = read_folder(source, generator)
        d = found.details
        where = (d["direction"], d["paired_direction"])
        return Loaded(found.network, d["generator"], found.files, d["reverse"], *where, found.options, details=d)
    if source.is_dir():
        return _of_run(source, generator, trust_code)
    if not source.exists():
        raise ValueError(absent(source))
    if generator:
        raise ValueError(f"{source} holds one generator, so there is no {generator!r} to choose: name the file itself")
    network = network_from_weights(read_weights(source), str(source))
    if not hasattr(network, "factor"):
        raise ValueError(f"{source}: holds a discriminator; translation needs a generator (..._net_G.pth)")
    return Loaded(network, "G", (source,))


def _of_run(source: Path, generator: str, trust_code: bool) -> Loaded:
    folder, state = open_checkpoint(source, ("generator.safetensors",))
    with using(folder):
        weights = load_generators(folder, state)
        config = from_dict(state["config"], trust_code=trust_code, generators_only=True)
    first = next(iter(weights))
    name = generator or first
    if name not in weights:
        raise ValueError(f"{folder}: no generator {name!r}, it holds {', '.join(weights)}{nearest(name, weights)}")
    own = is_import_path(config.method)
    if own:
        network = _own_network(config, folder, weights, name)
    else:
        network = config.network.build_generator(reverse=name != first)
        with using(folder):
            load_weights(network, weights[name], str(folder))
    return Loaded(
        network,
        name,
        (folder / "state.json", folder / "generator.safetensors"),
        reverse=name != first,
        direction=config.data.direction,
        paired_direction="BtoA" if exchanges_pairs(config.data) else "AtoB",
        options=None if own else network_options(config.network),
        config=config,
        state=state,
    )


def _own_network(config: Config, folder: Path, weights: dict[str, dict[str, Tensor]], name: str) -> nn.Module:
    """A network of a user's own method: what `translate` computes for the first generator, else the generator."""
    method = build_method(config)
    generators = method.generators()
    if generators.keys() != weights.keys():
        found, stored = ", ".join(generators), ", ".join(weights)
        raise CodeError(f"{folder} holds {stored}, and method={config.method} now has {found}: has its code changed?")
    for key, network in generators.items():
        try:
            load_weights(network, weights[key], f"generator {key}")
        except ValueError as error:
            raise CodeError(f"{folder}: {error}: has the code of method={config.method} changed?") from None
    network = generators[name]
    return network if name != next(iter(generators)) or _is_plain(method, network) else translation_of(method)


def _is_plain(method: Method, generator: nn.Module) -> bool:
    """Whether `translate` is the generator and nothing else: then tiles and memory are those of the generator."""
    factor, smallest = (int(getattr(generator, member, 1)) for member in ("factor", "smallest"))
    side = fitting_side(64, factor, smallest)
    probe = torch.rand(1, channels_of(generator), side, side) * 2 - 1
    method.eval()
    with torch.no_grad():
        wanted, found = generator(probe), method.translate(probe)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.equal(found, wanted)
