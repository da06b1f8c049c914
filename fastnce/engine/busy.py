"""Notice that steps wait: for a core of a busy machine, for the quota of a container, or for images.

The threads of an operation wait for each other. If other processes take the cores, an operation is as slow as its
slowest thread, and the others spin meanwhile. Measured on two cores with convolutions and their gradients: at a load of
5, one thread made 5.0 steps/s and two threads 0.9; at a load of 8, 2.1 and 0.3. The CPU time of a step was 60 ms with
one thread and 430 ms with two.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 5.0  # the shortest time that is judged
LITTLE = 0.5  # share of the threads' time that is spent computing, below which they wait
CPU_GROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"))
"""Where control groups of version 2 and 1 are, seen from inside a container."""


@dataclass(frozen=True)
class Usage:
    """What a process used during some time.

    Args:
        wall: seconds.
        cpu: seconds of CPU time, of all threads together.
        data: share of `wall` in which steps waited for their images, 0 to 1.
        threads: that PyTorch computes with.
        cores: that this process may use.
        quota: cores by the quota of its control group; None without one.
        throttled: seconds in which the quota stopped threads of the group.
        load: processes that compute or wait for a core, on the whole machine; None if unknown.
    """

    wall: float
    cpu: float
    data: float
    threads: int
    cores: int
    quota: float | None = None
    throttled: float = 0.0
    load: float | None = None


def advice(usage: Usage, *, on_cpu: bool = True) -> str:
    """Say in one sentence why steps wait and what helps; empty if they do not, or if the reason is unknown.

    Args:
        on_cpu: the networks are computed on the CPU. Otherwise only the images matter.
    """
    if usage.data > 0.5:
        return (
            f"{usage.data:.0%} of the time goes into waiting for images: a cache on a faster disk helps "
            f"(data.cache_dir=DIR), or smaller images (data.load_size)"
        )
    if not on_cpu:
        return ""
    threads, quota = usage.threads, usage.quota
    if quota is not None and threads > quota + 0.5 and usage.throttled > 0.1 * usage.wall:
        return (
            f"this container may use {quota:g} cores, and {threads} threads exceed that, so the system stops them: "
            f"run.threads={max(1, int(quota))} is faster (the same command with it continues the run)"
        )
    share = usage.cpu / max(usage.wall * (1 - usage.data), 1e-9) / threads
    if usage.load is None or share > LITTLE or usage.load < threads + 0.5 * usage.cores:
        return ""
    busy = f"the machine is busy (load {usage.load:.1f} on {usage.cores} cores)"
    free = max(1, int(usage.cores + threads - usage.load))
    if threads == 1 or free >= threads:  # nothing to do about it
        return ""
    return (
        f"{busy}, and the {threads} threads of this run wait for each other (they compute {share:.0%} of the time): "
        f"run.threads={free} is often several times faster (the same command with it continues the run)"
    )


class BusyWatch:
    """Measures a run between two looks, and advises once.

    Args:
        on_cpu: see `advice`.
    """

    def __init__(self, on_cpu: bool):
        self.on_cpu = on_cpu
        self._said = False
        self._wall = self._cpu = self._throttled = 0.0
        self._looked = self._data = 0.0
        self._start()

    def look(self, data_share: float) -> str:
        """Return the advice, or an empty text. After an advice, every text is empty.

        Args:
            data_share: of the time since the last look, 0 to 1.
        """
        if self._said:
            return ""
        wall = time.perf_counter() - self._wall
        self._data += data_share * (wall - self._looked)
        self._looked = wall
        if wall < SECONDS:
            return ""
        sentence = advice(self.usage(), on_cpu=self.on_cpu)
        self._said = bool(sentence)
        self._start()
        return sentence

    def usage(self) -> Usage:
        """Return what this process has used since the last advice was considered."""
        wall = max(time.perf_counter() - self._wall, 1e-9)
        load = None
        with suppress(OSError, AttributeError):  # not on every system
            load = os.getloadavg()[0]
        return Usage(
            wall=wall,
            cpu=time.process_time() - self._cpu,
            data=min(1.0, self._data / wall),
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            quota=cpu_quota(),
            throttled=throttled_seconds() - self._throttled,
            load=load,
        )

    def _start(self) -> None:
        self._wall, self._cpu, self._throttled = time.perf_counter(), time.process_time(), throttled_seconds()
        self._looked = self._data = 0.0


def cpu_quota(groups: tuple[Path, ...] = CPU_GROUPS) -> float | None:
    """Return the cores that the control group's quota allows; None without a quota."""
    for group in groups:
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            return int(quota) / int(period)  # "max" is no number: no quota
        with suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            return int(quota) / int(period) if int(quota) > 0 else None
    return None


def throttled_seconds(groups: tuple[Path, ...] = CPU_GROUPS) -> float:
    """Return the seconds in which the quota has stopped threads of the control group; 0 if unknown."""
    for group in groups:
        with suppress(OSError, ValueError):
            facts = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
            for name, unit in (("throttled_usec", 1e-6), ("throttled_time", 1e-9)):
                if name in facts:
                    return int(facts[name]) * unit
    return 0.0
