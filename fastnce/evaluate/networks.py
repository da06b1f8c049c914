"""The networks of the measures that compare two sets of images: each image goes once through each network."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..common.imports import first_line
from .distribution import Inception, check_counts
from .features import FRECHET, KERNEL, Lite0

INCEPTION, LITE0 = ("fid", "kid"), (FRECHET, KERNEL)
"""The measures of each network."""
SETS = (*INCEPTION, *LITE0)


class Network(Protocol):
    """A network whose features are compared, such as `Inception` and `Lite0`."""

    width: int
    """Features of one image."""

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor, Tensor], float]]:
        """(features, features of the reference) -> number, by name. They raise ValueError for fewer than two images."""

    def compute(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        """All measures at once, and the spread of those that have one."""

    def features(self, picture: Tensor) -> Tensor:
        """(width,) float64 on the CPU of one image (1, channels, height, width) in [-1, 1]; NaN if it is not finite."""


class Networks:
    """Several networks, whose features stand one after another in a row.

    A network whose measures are not wanted, or failed, is not run: its features are zeros.
    """

    def __init__(self, networks: Iterable[Network] = ()):
        self.networks = tuple(networks)
        self.widths = [network.width for network in self.networks]
        self.width = sum(self.widths)

    def features(self, picture: Tensor, wanted: Collection[str], failures: dict[str, str]) -> Tensor:
        """Compute the features of one image.

        Args:
            picture: (1, 1 or 3, height, width) in [-1, 1].
            wanted: the measures that will be computed.
            failures: the reasons of measures that failed, by name; those of a network that fails are added.

        Returns:
            (width,) float64.
        """
        rows = []
        for network in self.networks:
            names = [name for name in network.measures if name in wanted]
            row = torch.zeros(network.width, dtype=torch.float64)
            if names and not failures.keys() & {*names}:
                try:
                    row = network.features(picture)
                except Exception as error:
                    failures |= {name: f"{name} fails: {first_line(error)}" for name in names}
            rows.append(row)
        return torch.cat(rows)

    def distances(
        self, features: Tensor, reference: Tensor, wanted: Collection[str], failures: dict[str, str]
    ) -> dict[str, float]:
        """Compute the wanted measures that have not failed, in the order of the networks.

        Args:
            features, reference: (images, width) of rows as `features` returns.
            wanted, failures: as there.
        """
        found = {}
        parts = zip(features.split(self.widths, dim=1), reference.split(self.widths, dim=1), strict=True)
        for network, both in zip(self.networks, parts, strict=True):
            for name, measure in network.measures.items():
                if name in wanted and name not in failures:
                    try:
                        found[name] = float(measure(*both))
                    except Exception as error:
                        failures[name] = f"{name} fails: {first_line(error)}"
        return found

    def check_counts(self, outputs: int, reference: int) -> None:
        """Raise ValueError if the sets are too small for the measures of these networks."""
        if self.networks:
            check_counts(outputs, reference, " and ".join(name for each in self.networks for name in each.measures))


class Comparison:
    """Compares the images of one or several models with the same reference.

    Args:
        networks: those of the measures.
    """

    def __init__(self, networks: Networks):
        self.networks = networks
        self.reference: list[Tensor] = []
        """The features of each image of the reference; to be filled once."""

    def features(self, picture: Tensor) -> Tensor:
        """Compute the features of one image (1, 1 or 3, height, width) in [-1, 1]: (width,) float64."""
        return torch.cat([network.features(picture) for network in self.networks.networks])

    def measure(self, made: list[Tensor]) -> dict[str, float]:
        """Return all measures of the features of a model's images.

        Raises:
            ValueError: a set has fewer than two images, or an image of the model is not finite.
        """
        self.networks.check_counts(len(made), len(self.reference))
        if not all(row.isfinite().all() for row in made):
            raise ValueError("the generator's output is not finite, so it has no distance from the reference")
        both = (torch.stack(rows).split(self.networks.widths, dim=1) for rows in (made, self.reference))
        found: dict[str, float] = {}
        for network, features, reference in zip(self.networks.networks, *both, strict=True):
            found |= network.compute(features, reference)
        return found


def load_networks(
    names: Collection[str], device: torch.device | str = "cpu", weights: str | os.PathLike[str] = ""
) -> Networks:
    """Load the networks that measures need.

    Args:
        names: of measures; those that are not in `SETS` need no network.
        device: where the networks compute.
        weights: of `Inception`.

    Raises:
        ValueError: as `Inception` and `Lite0` do.
    """
    found: list[Network] = []
    if {*INCEPTION} & {*names}:
        found.append(Inception(device, weights))
    if {*LITE0} & {*names}:
        found.append(Lite0(device))
    return Networks(found)
