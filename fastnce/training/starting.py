"""Begin a run with weights that are there already: `run.start_from`.

The source is a published file such as latest_net_G.pth, a folder of such files, a run, one of its checkpoints, what
`fastnce export` wrote, or the name of a model that comes with fastnce. A tensor is taken if it has the name and the
shape of one here; all others keep their initial values. Of a run that keeps averaged generators, those are taken. The
optimisers and the schedule start at their beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.messages import nearest
from ..common.toml import format_value
from ..config.config import Config
from ..engine.checkpoint import open_checkpoint
from ..engine.stored import all_finite, check_numbers, follow, load_generators, read_tensors, step_of, using
from ..methods import Method
from ..networks.published import (
    LEARNED_TEMPERATURE,
    STALE,
    load_weights,
    other_norms,
    published_names,
    read_weights,
)
from ..networks.spectral import fitted
from ..translate.exported import NETWORK_KEYS, is_exported, read_folder
from ..translate.named import absent, locate

MOST_PROBLEMS = 3
"""So many tensors of a network are named in the report; the others are counted."""


@dataclass
class Source:
    """Networks whose weights can be read, by name.

    path: for messages.
    read: returns the state dict of each network.
    averaged: the networks of which the averaged weights are taken.
    options: of the table `network` that the generators were built with, where the source says so.
    """

    path: Path
    read: dict[str, Callable[[], dict[str, Tensor]]]
    averaged: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Start:
    """Weights that a run begins with.

    path: `run.start_from`; if a name was taken, the folder of its model.
    source: where they are from, for the history.
    weights: the tensors that fit, by network.
    lines: the report, one sentence per network.
    """

    path: str
    source: str
    weights: dict[str, dict[str, Tensor]]
    lines: list[str]

    def load(self, method: Method) -> None:
        """Copy the weights into the networks of a method."""
        networks = method.networks()
        for name, weights in self.weights.items():
            _load(networks[name], weights, f"{self.source}: {name}")


def plan_start(config: Config, planned: Method) -> Start | None:
    """Read the weights that a new run begins with, and compare them with its networks.

    Args:
        planned: as `fastnce.config.build.plan` returns; its networks may be on the meta device.

    Returns:
        the weights and the report; None without `run.start_from`.

    Raises:
        ValueError: there are no such weights, a named network is not among them or not in the method, they are damaged
            or not finite, nothing fits, or less than half of a generator fits that `run.start_networks` does not name.
    """
    path, names = config.run.start_from, [name.strip() for name in config.run.start_networks.split(",") if name.strip()]
    if not path:
        if names:
            raise ValueError(f"run.start_networks={config.run.start_networks} has no effect without run.start_from")
        return None
    networks = planned.networks()
    for name in names:
        if name not in networks:
            here = ", ".join(networks)
            raise ValueError(
                f"run.start_networks={config.run.start_networks}: {config.method} has no network {name}"
                f"{nearest(name, networks)}; it has {here}"
            )
    if is_exported(located := locate(path)) and not _labels(located):  # published files may be of all networks
        source = _exported(located, list(planned.generators()), names)
    else:
        source = _find(Path(path), config.method, networks, names)
    there = ", ".join(source.read) or "no networks"
    for name in names:
        if name not in source.read:
            raise ValueError(f"run.start_networks names {name}, and {source.path} holds {there}")
    chosen = [name for name in networks if name in source.read and (not names or name in names)]
    weights, lines, other = {}, [], []
    for name in chosen:
        state = source.read[name]()
        weights[name], line, mostly_other = _compare(name, networks[name], state, f"{source.path}: {name}")
        lines.append(line)
        other += [line] if mostly_other and name in planned.generators() else []
        if not weights[name] and names:
            raise ValueError(f"run.start_from={path}: nothing fits: {line}")
    if not any(weights.values()):
        reason = "; ".join(lines) or f"it holds {there}, and {config.method} has {', '.join(networks)}"
        raise ValueError(f"run.start_from={path}: nothing fits: {reason}")
    if other and not names:
        fitting = ",".join(name for name in chosen if weights[name])
        raise ValueError(
            f"run.start_from={path}: the generator there is another one: {'; '.join(other)}"
            f"{_built_with(source.options, config)}. To take what fits, add run.start_networks={fitting}"
        )
    if averaged := [name for name in source.averaged if weights.get(name)]:
        lines.append(f"the averaged weights of {', '.join(averaged)} are taken, as translation does")
    for group, verb in (
        ([name for name in source.read if name not in networks], "is not part of this method, and is left"),
        ([name for name in networks if name not in weights], "begins with its own initial weights"),
    ):
        lines += [f"{name} {verb}" for name in group]
    taken = path if located == Path(path) else str(located)
    return Start(taken, str(source.path), {name: state for name, state in weights.items() if state}, lines)


def _built_with(options: dict[str, Any], config: Config) -> str:
    """A sentence with the options of a source's generators that differ from a run's; "" if none are known."""
    own = asdict(config.network)
    differ = [key for key, value in options.items() if key in own and own[key] != value]
    other = [f"network.{key}={format_value(options[key]).strip(chr(34))}" for key in differ]
    return f". It was built with {' '.join(other)}" if other else ""


def _find(path: Path, method: str, networks: Iterable[str], names: list[str]) -> Source:
    path = follow(path)
    if path.name == "checkpoints" and any(step_of(entry) is not None for entry in path.glob("step-*")):
        path = path.parent
    if path.is_file():
        return _file(path, method, list(networks), names)
    if path.is_dir():
        if (path / "state.json").exists() or step_of(path) is not None or (path / "checkpoints").is_dir():
            return _checkpoint(path)
        if labels := _labels(path):
            if "latest" not in labels and len(labels) > 1:
                raise ValueError(
                    f"run.start_from={path} holds files of {', '.join(sorted(labels))} and none of latest: name one, "
                    f"such as run.start_from={path / sorted(labels)[-1]}"
                )
            return _published(path, "latest" if "latest" in labels else labels.pop())
        raise ValueError(
            f"run.start_from={path} holds neither a run (checkpoints/step-*) nor published files (latest_net_G.pth)"
        )
    if path.parent.is_dir() and path.name in _labels(path.parent):
        return _published(path.parent, path.name)
    if path.exists():
        raise ValueError(f"run.start_from={path}: not a regular file")
    raise ValueError(f"run.start_from: {absent(path)}")


def _exported(folder: Path, generators: list[str], names: list[str]) -> Source:
    """An exported generator is the one of its name here, or else the first of those that `names` chooses."""
    found = read_folder(folder)
    generators = [name for name in generators if not names or name in names] or generators
    name = found.details["generator"] if found.details["generator"] in generators else generators[0]
    return Source(folder, {name: found.network.state_dict}, options=found.options or {})


def _labels(folder: Path) -> set[str]:
    """The labels of the published files in a folder, such as "latest" or "400"."""
    return {
        match[1] for file in folder.glob("*_net_*.pth") if (match := re.fullmatch(r"(.+?)_net_(.+)\.pth", file.name))
    }


def _published(folder: Path, label: str) -> Source:
    files = sorted(folder.glob(f"{label}_net_*.pth"))
    found = {file.name.removeprefix(f"{label}_net_").removesuffix(".pth"): file for file in files}
    path = folder / f"{label}_net_*.pth"
    return Source(path, {name: lambda file=file: read_weights(file) for name, file in found.items()})  # type: ignore[misc]


def _file(path: Path, method: str, networks: list[str], names: list[str]) -> Source:
    """One published file: its name says which network it is, unless one is chosen."""
    match = re.fullmatch(r".+?_net_(.+?)\.\w+", path.name)
    if len(names) > 1:
        raise ValueError(f"run.start_networks={','.join(names)} names several, and {path} holds one network")
    name = names[0] if names else match[1] if match else ""
    if name not in networks:
        what = f"is a network {name}" if name else "does not say in its name which network it is"
        raise ValueError(
            f"run.start_from={path} {what}, and {method} has {', '.join(networks)}: say which one takes it, such as "
            f"run.start_networks={networks[0]}"
        )
    return Source(path, {name: lambda: read_weights(path)})


def _checkpoint(path: Path) -> Source:
    """The networks of a checkpoint; of the generators, the averaged weights if it has any."""
    folder, state = open_checkpoint(path)
    with using(folder):
        tensors = read_tensors(folder / "training.safetensors")
        check_numbers(state, tensors)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            name, _, parameter = rest.partition("/")
            if kind == "network":
                found.setdefault(name, {})[parameter] = tensor
        found |= load_generators(folder, state)
    averaged = sorted({key.split("/")[1] for key in tensors if key.startswith("average/")})
    options = {key: value for key, value in state.get("config", {}).get("network", {}).items() if key in NETWORK_KEYS}
    read = {name: lambda weights=weights: weights for name, weights in found.items()}
    return Source(folder, read, averaged, options)  # type: ignore[arg-type]


def _compare(
    name: str, network: nn.Module, state: dict[str, Tensor], where: str
) -> tuple[dict[str, Tensor], str, bool]:
    """The tensors that fit a network, a sentence about them, and whether they are less than half of either network.

    Raises:
        ValueError: tensors are not finite, or no projector can be built from them.
    """
    if not all_finite(state):
        raise ValueError(f"{where} holds numbers that are not finite (NaN or infinity)")
    if _to_be_built(network):
        load_weights(network, state, where)
    own, state = network.state_dict(), fitted(published_names(state, network), network)
    state = {key: tensor for key, tensor in state.items() if key in own or key.rpartition(".")[2] not in STALE}
    fit = {key: tensor for key, tensor in state.items() if key in own and tensor.shape == own[key].shape}
    problems = [
        f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
        for key in own
        if key in state and key not in fit
    ]
    lacking = [key for key in own if key not in state]
    problems += [
        "its learned temperature begins with loss.temperature, because none is there"
        if key.endswith(LEARNED_TEMPERATURE)
        else f"{key} is not there"
        for key in lacking
    ]
    problems += [f"{key} is not here" for key in state if key not in own]
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    most = ", so most of it begins with its own initial weights" if 2 * len(fit) < len(own) else ""
    mostly_other = 2 * len(fit) < max(len(own), len(state))
    count = f"{len(fit)} of {len(own)} tensors{most}"
    norms = other_norms(state, network)
    return fit, f"{name}: {'; '.join([count, *problems[:MOST_PROBLEMS], *more])}{norms}", mostly_other


def _load(network: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    if _to_be_built(network):
        load_weights(network, weights, where)
        return
    with torch.no_grad():
        network.load_state_dict({**network.state_dict(), **weights})


def _to_be_built(network: nn.Module) -> bool:
    """Whether this is a projector that is built for the first features, or the first weights, that it gets."""
    return getattr(network, "mlp_init", True) is False
