"""Weight initialisation of networks and projectors."""

from __future__ import annotations

from torch import nn

INIT_TYPES = ("normal", "xavier", "kaiming", "orthogonal")


def init_weights(network: nn.Module, init_type: str = "xavier", gain: float = 0.02) -> nn.Module:
    """Initialise convolutions and linear layers by `init_type`, batch norms with N(1, gain) and all biases with 0.

    This is the published initialisation. Returns the network itself. What is on the meta device has no values to set.
    """
    if init_type not in INIT_TYPES:
        raise ValueError(f"init_type must be normal, xavier, kaiming or orthogonal, not {init_type!r}")
    for module in network.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if init_type == "normal":
                nn.init.normal_(module.weight, 0.0, gain)
            elif init_type == "xavier":
                nn.init.xavier_normal_(module.weight, gain=gain)
            elif init_type == "kaiming":
                nn.init.kaiming_normal_(module.weight, a=0, mode="fan_in")
            else:
                nn.init.orthogonal_(module.weight, gain=gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, gain)
            nn.init.zeros_(module.bias)
    return network
