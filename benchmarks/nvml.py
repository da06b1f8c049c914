"""What NVIDIA's management library says of a board: driver, clocks, power, energy. Read through ctypes, no package."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

CLOCK_SM, CLOCK_MEMORY = 1, 2
TEMPERATURE_GPU = 0


class Board:
    """One board.

    Raises:
        OSError: there is no library, no such board, or the board does not answer.
    """

    def __init__(self, uuid: str):
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self.handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.handle))

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self.library, name)(*arguments)
        except AttributeError:
            raise OSError(f"the library has no {name}") from None
        if code:
            raise OSError(f"{name} answered {code}")

    def _number(self, name: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int:
        value = kind()
        self._call(name, self.handle, *arguments, ctypes.byref(value))
        return value.value

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        return self._number("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong) / 1e3

    def facts(self) -> dict[str, Any]:
        """Driver, clocks in MHz, power limit in W, temperature in degrees; what does not answer is left out."""
        text = ctypes.create_string_buffer(96)
        found: dict[str, Any] = {}
        wanted = {
            "sm_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_SM),
            "sm_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", CLOCK_SM),
            "memory_clock_mhz": ("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
            "power_limit_w": ("nvmlDeviceGetPowerManagementLimit",),
            "temperature_c": ("nvmlDeviceGetTemperature", TEMPERATURE_GPU),
        }
        try:
            self._call("nvmlSystemGetDriverVersion", text, 96)
            found["driver"] = text.value.decode()
        except OSError:
            pass
        for name, (function, *arguments) in wanted.items():
            try:
                found[name] = self._number(function, *arguments) / (1e3 if name == "power_limit_w" else 1)
            except OSError:
                continue
        return found


@functools.cache
def board(device: torch.device) -> Board | None:
    """The board of a CUDA device, or None where it cannot be asked."""
    if device.type != "cuda":
        return None
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)  # type: ignore[attr-defined]
        return Board(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except (OSError, AttributeError, RuntimeError):
        return None
