"""The format published: a file for each network, such as latest_net_G.pth, as the published code writes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks.published import check_label, packed, published_state, read_weights
from ..translate.exported import CARD, CONFIG
from .card import as_json, card, details
from .folder import Content, check_target, write_folder
from .source import Source

FORMAT = "published"


def write_published(networks: Mapping[str, nn.Module], source: Source, out: Path, label: str = "latest") -> list[Path]:
    """Write `{label}_net_{name}.pth` for each network, config.json and README.md: all or none, and each read again.

    Args:
        networks: of the run, by name. Generators have the averaged weights, if the run has them.
        source: the generator that the card describes; it is one of them.

    Returns:
        the paths of all files, the networks' first.

    Raises:
        ValueError: what `check_label` and `check_target` refuse, or another process exports there (`InUse`).
        OSError: names the file that could not be written; an earlier export is untouched.
    """
    check_label(label)
    named = {f"{label}_net_{name}.pth": published_state(network) for name, network in networks.items()}
    check_target(out, FORMAT, named)
    files = sorted(named, key=lambda name: name != f"{label}_net_{source.name}.pth")  # the generator first
    checked = "Read again after writing: every file holds the weights of its network, bit for bit."
    contents: dict[str, Content] = {
        **{name: packed(state) for name, state in named.items()},
        CONFIG: as_json(details(source, FORMAT, files, "float32")),
        CARD: card(source, FORMAT, files, "float32", checked).encode(),
    }
    return write_folder(out, contents, partial(_check, named))


def _check(named: Mapping[str, dict[str, Tensor]], folder: Path) -> None:
    """Raise RuntimeError if a file holds something else than it was written with."""
    for name, state in named.items():
        found = read_weights(folder / name)
        if found.keys() != state.keys() or not all(torch.equal(found[key], t) for key, t in state.items()):
            raise RuntimeError(f"{name} is read again with other weights than it was written with")
