"""A process keeps the memory that it has freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from fastnce.engine.memory import keep_freed_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024

if {keep}:
    assert keep_freed_memory()
before = resident()
block = torch.ones(64 << 18)  # 64 MiB
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_only_when_asked():
    held = {}
    for keep in (False, True):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
        )
        held[keep] = float(result.stdout)
    assert held[False] < 16
    assert held[True] > 60
