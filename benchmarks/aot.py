"""Compile every kernel with every tile of the table, for every architecture in `SHARED_MEMORY`, without a device.

python -m benchmarks.aot --out benchmarks/results

The launchers run unchanged on tensors without storage. Triton's compiler replaces the launch, so signatures, alignment
hints and options are those of a real call. TRITON_INTERPRET must not be set.

To check a new architecture, add its shared memory to `SHARED_MEMORY` in `kernels/configs.py`. Its own tiles and those
that it shares are compiled.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from fastnce.kernels import common, configs
from fastnce.kernels.specialise import specialised
from triton.backends.compiler import GPUTarget

from benchmarks.aot_cases import QUICK, cases

ARCHITECTURES = tuple(configs.SHARED_MEMORY)


@dataclass(frozen=True)
class Build:
    """One kernel, compiled for one architecture."""

    arch: str
    case: str
    kernel: str
    blocks: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    seconds: float
    crash: str = ""

    def fault(self) -> str | None:
        """Why this tile must not be used, or None."""
        if self.crash:
            return f"the compiler fails: {self.crash}"
        limit = configs.SHARED_MEMORY[self.arch]
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {limit}"
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        none = any(name in self.case for name in WITHOUT_PRODUCTS) or self.kernel in KERNELS_WITHOUT_PRODUCTS
        if not (self.matrix_instructions or none):
            return "does not use the matrix unit"
        return None


WITHOUT_PRODUCTS = ("float32", "without MLP", "draw", "mean", "rows:", "layer:")
"""Cases without products on the matrix unit."""
KERNELS_WITHOUT_PRODUCTS = ("pack_weight_kernel", "pack_gradient_kernel", "few_outputs_join_kernel")
"""Kernels of other cases without products on the matrix unit."""


class _NamedDriver:
    """Replaces Triton's driver; it only names the architecture to compile for."""

    def __init__(self, arch: str):
        self.index = ARCHITECTURES.index(arch)
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_device(self) -> int:
        return self.index  # Triton caches compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_all(archs: tuple[str, ...] = ARCHITECTURES, only: str = "", quick: bool = False) -> Iterator[Build]:
    """Compile every case (or every QUICK case) for every architecture; each distinct kernel once."""
    kept = common.launch, common.architecture
    modules = [module for module in sys.modules.values() if getattr(module, "launch", None) is common.launch]
    for arch in archs:
        triton.runtime.driver.set_active(_NamedDriver(arch))
        seen: set[str] = set()
        for case, call in cases():
            if only not in case or (quick and not QUICK.fullmatch(case)):
                continue
            builds: list[Build] = []

            def compile_only(kernel, blocks, like, *args, arch=arch, case=case, builds=builds, seen=seen, **options):
                start = time.perf_counter()
                try:
                    if not arch.startswith("gfx"):  # plans are for CUDA: elsewhere Triton specialises by itself
                        args = specialised(kernel, args, lambda tensor: tensor.data_ptr() % 16 == 0)
                    compiled = kernel.warmup(*args, grid=(1,), **options)
                except Exception as error:  # a pass of the compiler may raise anything; continue with the other cases
                    seconds = round(time.perf_counter() - start, 2)
                    builds.append(_crashed(arch, case, kernel.fn.__name__, options, seconds, error))
                    return
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    builds.append(_inspect(arch, case, compiled, options, time.perf_counter() - start))

            for module in modules:
                module.launch = compile_only  # type: ignore[attr-defined]
                module.architecture = lambda device, arch=arch: arch  # type: ignore[attr-defined]
            try:
                call()
            finally:
                for module in modules:
                    module.launch, module.architecture = kept  # type: ignore[attr-defined]
            yield from builds


def _inspect(arch: str, case: str, compiled, options: dict, seconds: float) -> Build:
    registers, spilled, products = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)
    return Build(
        arch=arch,
        case=case,
        kernel=compiled.metadata.name,
        blocks=_blocks(options),
        warps=options.get("num_warps", 4),
        stages=options.get("num_stages", 1),
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=products,
        seconds=round(seconds, 2),
    )


def _blocks(options: dict) -> str:
    return "x".join(str(options[name]) for name in ("BM", "BN", "BK", "BD", "BC", "BH") if name in options)


def _crashed(arch: str, case: str, kernel: str, options: dict, seconds: float, error: Exception) -> Build:
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 1)
    crash = " ".join(str(error).split())[:200] or type(error).__name__
    return Build(arch, case, kernel, _blocks(options), warps, stages, 0, 0, 0, 0, seconds, crash)


def _nvidia(compiled) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    products = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])
    return registers, stack, len(products)


def _amd(compiled) -> tuple[int, int, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    # scalar registers spill into lanes of vector registers: only private memory counts
    registers = number("vgpr_count") + number("agpr_count")
    return registers, number("private_segment_fixed_size"), len(re.findall("v_mfma", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for aot.csv")
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only the cases of everyday training")
    arguments = parser.parse_args()
    builds = []
    for build in compile_all(tuple(arguments.arch), arguments.case, arguments.quick):
        builds.append(build)
        print(*list(asdict(build).values())[:-1], build.fault() or "ok", flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open(arguments.out / "aot.csv", "w", newline="") as file:
            writer = csv.writer(file)
            names = [field.name for field in fields(Build) if field.name not in ("seconds", "crash")]
            writer.writerow([*names, "torch", "triton"])
            for build in builds:
                writer.writerow([getattr(build, name) for name in names] + [torch.__version__, triton.__version__])
    faults = [build for build in builds if build.fault()]
    print(f"{len(builds)} kernels, {len(faults)} with a fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
