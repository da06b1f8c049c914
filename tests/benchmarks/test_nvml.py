"""Readings through nvidia-ml-py, with a stand-in for its module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, nvml, observe

CUDA = torch.device("cuda")
UUID = "0123"


class NVMLError(Exception):
    """As pynvml's: not an OSError."""


class Library:
    """pynvml's functions for one board that does not report its temperature."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, driver: bool = True):
        self.driver = driver
        self.millijoules = 5_000

    def nvmlInit(self):
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlSystemGetDriverVersion(self):
        return "550.1"

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {("handle", 1): 1980, ("handle", 2): 2619}[handle, clock]

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return {("handle", 1): 2000}[handle, clock]

    def nvmlDeviceGetPowerManagementLimit(self, handle):
        return 700_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        raise NVMLError("Not Supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules += 3_000
        return self.millijoules


@pytest.fixture
def use(monkeypatch):
    """Put a library in place of pynvml, with a CUDA device of this UUID."""

    def install(library, uuid=UUID):
        nvml.board.cache_clear()
        monkeypatch.setattr(nvml, "pynvml", library)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))

    yield install
    nvml.board.cache_clear()


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_readings_of_a_board(use, uuid):
    use(Library(), uuid)
    assert nvml.facts(CUDA) == {
        "driver": "550.1",
        "sm_clock_mhz": 1980,
        "sm_clock_max_mhz": 2000,
        "memory_clock_mhz": 2619,
        "power_limit_w": 700.0,
    }
    assert nvml.board(CUDA).joules() == 8.0
    assert nvml.board(CUDA) is nvml.board(CUDA)


def test_energy_per_call(use, monkeypatch):
    use(Library())
    monkeypatch.setattr(observe, "synchronize", lambda _: None)
    calls = []
    clock = iter([0.0, 0.0, 1.0, 9.0])  # start, two rounds, end
    monkeypatch.setattr(observe.time, "perf_counter", lambda: next(clock))
    assert observe.joules(lambda: calls.append(1), CUDA, seconds=2.0) == pytest.approx(3.0 / 20)
    assert len(calls) == 20


@pytest.mark.parametrize(
    ("library", "uuid"), [(Library(driver=False), UUID), (Library(), "other")], ids=["no driver", "no such board"]
)
def test_a_board_without_readings_is_none(use, library, uuid):
    use(library, uuid)
    assert nvml.board(CUDA) is None
    assert nvml.facts(CUDA) == {}
    assert observe.joules(lambda: None, CUDA) is None


def test_a_missing_library_is_one_line(use):
    use(None)
    assert nvml.board(CUDA) is None
    assert nvml.facts(CUDA) == {"nvml": nvml.INSTALL}
    assert "install nvidia-ml-py" in nvml.INSTALL
    assert "\n" not in nvml.INSTALL


def test_warm_clocks_are_read_after_the_ceilings(use, monkeypatch):
    use(Library())
    monkeypatch.setattr(machine, "facts", lambda device: nvml.facts(device))
    monkeypatch.setattr(machine, "ceilings", lambda *_: {"copy_bytes_per_s": 1.0})
    found = machine.describe(CUDA, quick=True)
    assert found["sm_clock_mhz_warm"] == 1980
    assert {key for key in found if key.endswith("_warm")} == {"sm_clock_mhz_warm", "memory_clock_mhz_warm"}


def test_no_readings_on_a_cpu(use):
    use(None)
    assert nvml.facts(torch.device("cpu")) == {}
