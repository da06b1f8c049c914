"""The method that a configuration names: planned without memory, or built."""

from __future__ import annotations

import torch

from ..common.imports import CodeError, is_import_path
from ..engine.memory import check_networks_fit
from ..methods import Method
from ..methods.contract import check_contract, check_planned
from ..methods.presets import find_preset
from ..networks.tracing import on_cpu
from .check import check
from .config import Config


def plan(config: Config) -> Method:
    """Check a configuration and build its method to check it, not to train it.

    It is on the meta device, which needs no memory. A user's own method or network is on the CPU, because its
    constructor may read the values of what it makes. PyTorch's random numbers do not advance.

    Raises:
        ValueError: what `check` refuses, or options that do not fit the networks.
    """
    check(config)
    with torch.device("meta"):
        if not is_import_path(config.method):
            return build_method(config)
        check_networks_fit(config.network)
        with on_cpu():
            built = build_method(config)
            check_planned(built, config.method)
            return built


def build_method(config: Config) -> Method:
    """Build the method of a configuration on the current default device.

    Raises:
        ValueError: options or networks that do not fit together, or a user's own method that fails.
    """
    method = find_preset(config.method).method
    if not is_import_path(config.method):
        return method(config.loss, config.network)
    try:
        built = method(config.loss, config.network)
        check_contract(built, config.method)
        return built
    except ValueError:
        raise
    except Exception as error:
        call = f"{config.method.rpartition(':')[2]}(options, network)"
        raise CodeError(f"method={config.method}: {call} fails: {type(error).__name__}: {error}") from error
