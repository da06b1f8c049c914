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

def held():
    before = resident()
    block = torch.ones(64 << 18)  # 64 MiB
    del block
    return resident() - before

print(held())
assert keep_freed_memory()
print(held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_only_when_asked():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(float, result.stdout.split())
    assert before < 16
    assert after > 60
