"""Spectral norm of discriminators (Miyato et al., Spectral Normalization for GANs, ICLR 2018).

Each convolution computes with its weight divided by the weight's largest singular value, as
`torch.nn.utils.parametrizations.spectral_norm` estimates it. That module iterates in every forward pass. A step judges
images several times, and may judge them in parts or once more for a check, so there it iterates once per step instead,
as Algorithm 1 of the paper says: see `once_per_step`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

ORIGINAL = ".parametrizations.weight.original"
VECTORS = (".parametrizations.weight.0._u", ".parametrizations.weight.0._v")


def add_spectral_norm(network: nn.Module) -> nn.Module:
    """Put spectral norm on every convolution of a network that is initialised; returns the network itself."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            spectral_norm(module)
    network.has_spectral_norm = True  # type: ignore[assignment]
    return network


class PowerIteration:
    """The power iteration of every layer that `add_spectral_norm` has given one."""

    def __init__(self, networks: Iterable[nn.Module]):
        layers = [m for net in networks if getattr(net, "has_spectral_norm", False) for m in net.modules()]
        self.layers: list[Any] = [layer for layer in layers if parametrize.is_parametrized(layer, "weight")]
        for layer in self.layers:
            layer.parametrizations.weight[0].n_power_iterations = 0

    @torch.no_grad()
    def run(self) -> None:
        """Iterate once: the vectors u and v follow the weights, in place and in float32."""
        for layer in self.layers:
            norm = layer.parametrizations.weight[0]
            norm.n_power_iterations = 1
            try:
                norm(layer.parametrizations.weight.original)
            finally:
                norm.n_power_iterations = 0


def once_per_step(networks: Iterable[nn.Module]) -> PowerIteration:
    """Stop the iterations in forward passes, so that only `PowerIteration.run` changes u and v."""
    return PowerIteration(networks)


def without_spectral_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the weights that the convolutions compute with, in place of u, v and the weights below.

    A network without spectral norm then gives the same scores. Other state dicts are returned as they are.
    """
    found = dict(state)
    for key, tensor in state.items():
        layer = key.removesuffix(ORIGINAL)
        u, v = (state.get(layer + vector) for vector in VECTORS)
        if layer != key and u is not None and v is not None and len(u) * len(v) == tensor.numel():
            found[f"{layer}.weight"] = tensor / torch.vdot(u, torch.mv(tensor.flatten(1), v))
            for name in (ORIGINAL, *VECTORS):
                del found[layer + name]
    return found


def fitted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for a network that has spectral norm where the stored one has none, or the reverse.

    The vectors u and v of a weight that had none are its singular vectors.
    """
    own = network.state_dict().keys()
    if not getattr(network, "has_spectral_norm", False):
        return state if any(key.endswith(ORIGINAL) for key in own) else without_spectral_norm(state)
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if layer + ORIGINAL in own and tensor.dim() == 4:
            left, _, right = torch.linalg.svd(tensor.float().flatten(1), full_matrices=False)
            found |= {layer + ORIGINAL: tensor, layer + VECTORS[0]: left[:, 0], layer + VECTORS[1]: right[0]}
        else:
            found[key] = tensor
    return found
