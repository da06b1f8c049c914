"""Readings of an NVIDIA board: driver, clocks, power, temperature, energy. They need nvidia-ml-py (extra `bench`)."""

from __future__ import annotations

import functools
from typing import Any

import torch

try:
    import pynvml
except ImportError:
    pynvml = None

INSTALL = "no clocks, power or energy: install nvidia-ml-py"


class Board:
    """One board.

    Raises:
        pynvml.NVMLError: there is no driver or no such board.
    """

    def __init__(self, uuid: str):
        pynvml.nvmlInit()
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def joules(self) -> float:
        """Return the energy used since the driver was loaded."""
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def facts(self) -> dict[str, Any]:
        """Return driver, clocks in MHz, power limit in W and temperature in degrees Celsius, as far as available."""
        readings = {
            "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(self.handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(self.handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(self.handle) / 1e3,
            "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(self.handle, pynvml.NVML_TEMPERATURE_GPU),
        }
        found: dict[str, Any] = {}
        for name, read in readings.items():
            try:
                found[name] = read()
            except pynvml.NVMLError:  # this board or driver does not report it
                continue
        return found


@functools.cache
def board(device: torch.device) -> Board | None:
    """Return the board of a CUDA device, or None without readings: another device, no library, no driver."""
    if device.type != "cuda" or pynvml is None:
        return None
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)  # type: ignore[attr-defined]
        return Board(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError, RuntimeError):
        return None


def facts(device: torch.device) -> dict[str, Any]:
    """Return `Board.facts` of a CUDA device; where the library is missing, only "nvml" with a line that says so."""
    if device.type == "cuda" and pynvml is None:
        return {"nvml": INSTALL}
    found = board(device)
    return {} if found is None else found.facts()
