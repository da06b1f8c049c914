"""Compile every kernel with every tile of the table, for every architecture in `SHARED_MEMORY`, without a device.

python -m benchmarks.aot --recorded benchmarks/results/aot.csv --out benchmarks/results

With `--recorded`, only builds that are not on record are compiled: after a change of a kernel, its own. `--again 64`
compiles one recorded build of 64 all the same, and compares. `--quick` compiles only what is used in everyday training,
and takes the rest from the record.

The launchers run unchanged on tensors without storage. Triton's compiler replaces the launch, so signatures, alignment
hints and options are those of a real call. TRITON_INTERPRET must not be set.

To check a new architecture, add its shared memory to `SHARED_MEMORY` in `kernels/configs.py`. Its own tiles and those
that it shares are compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from fastnce.kernels import common, configs
from fastnce.kernels.specialise import specialised
from triton.backends.compiler import GPUTarget

from benchmarks import aot_record
from benchmarks.aot_cases import QUICK, cases
from benchmarks.aot_record import Known, Lookup, Usage
from fastnce.common.writing import atomic_file

ARCHITECTURES = tuple(configs.SHARED_MEMORY)


@dataclass(frozen=True)
class Build:
    """One kernel, compiled for one architecture. `key` stands for all that it was compiled from."""

    key: str
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
    recorded: Usage | None = None

    def usage(self) -> Usage:
        return Usage(self.kernel, self.registers, self.spill_bytes, self.shared_bytes, self.matrix_instructions)

    def fault(self) -> str | None:
        """Why this tile must not be used, or None."""
        if self.crash:
            return f"the compiler fails: {self.crash}"
        if self.recorded and self.recorded != self.usage():
            return f"is recorded as {self.recorded}, but compiles to {self.usage()}"
        limit = configs.SHARED_MEMORY[self.arch]
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {limit}"
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        none = any(name in self.case for name in WITHOUT_PRODUCTS) or self.kernel in KERNELS_WITHOUT_PRODUCTS
        if not (self.matrix_instructions or none):
            return "does not use the matrix unit"
        return None


SHOWN = tuple(field.name for field in fields(Build) if field.name not in ("key", "crash", "recorded"))
"""What is printed of a build."""
WRITTEN = ("key", *(name for name in SHOWN if name != "seconds"))
"""What is written of a build. The same builds give the same file."""

WITHOUT_PRODUCTS = ("float32", "without MLP", "draw", "mean", "rows:", "layer:", "loss:")
"""Cases without products on the matrix unit."""
KERNELS_WITHOUT_PRODUCTS = (
    "pack_weight_kernel",
    "pack_gradient_kernel",
    "few_outputs_join_kernel",
    "weight_join_kernel",
    "add_rows_kernel",
)
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


def compile_all(
    archs: tuple[str, ...] = ARCHITECTURES,
    only: str = "",
    quick: bool = False,
    lookup: Lookup | None = None,
) -> Iterator[Build]:
    """Compile every case for every architecture; each distinct kernel once.

    Args:
        archs: of `ARCHITECTURES`.
        only: compile the cases whose name contains this.
        quick: compile the QUICK cases alone.
        lookup: has the builds that need not be compiled. One that is compiled all the same, with another result, is a
            fault.
    """
    aot_record.prepare_kernels()
    with lookup or Lookup() as builds:
        yield from _compile_all(archs, only, quick, builds)


def _compile_all(archs: tuple[str, ...], only: str, quick: bool, lookup: Lookup) -> Iterator[Build]:
    for arch in archs:
        triton.runtime.driver.set_active(_NamedDriver(arch))
        seen: set[str] = set()
        for case, call in cases():
            if only not in case:
                continue
            lookup.compiles = not quick or QUICK.fullmatch(case) is not None
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
                if compiled.hash not in seen | lookup.left_out:
                    seen.add(compiled.hash)
                    seconds = round(time.perf_counter() - start, 2)
                    builds.append(_inspect(arch, case, compiled, options, seconds, lookup.known.get(compiled.hash)))

            with launching(compile_only, arch):
                call()
            yield from builds


@contextlib.contextmanager
def launching(launch: Callable[..., None], arch: str) -> Iterator[None]:
    """Within, the launchers of all kernels call `launch` as if every device were of this architecture."""
    kept = common.launch, common.architecture
    modules = [module for module in sys.modules.values() if getattr(module, "launch", None) is common.launch]
    for module in modules:
        module.launch, module.architecture = launch, lambda device: arch  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.launch, module.architecture = kept  # type: ignore[attr-defined]


def _inspect(arch: str, case: str, compiled, options: dict, seconds: float, recorded: Usage | None) -> Build:
    usage = compiled.usage if isinstance(compiled, Known) else _usage(arch, compiled)
    return Build(
        key=compiled.hash,
        arch=arch,
        case=case,
        blocks=_blocks(options),
        warps=options.get("num_warps", 4),
        stages=options.get("num_stages", 1),
        seconds=seconds,
        recorded=recorded,
        **asdict(usage),
    )


def _usage(arch: str, compiled) -> Usage:
    registers, spilled, products = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)
    return Usage(compiled.metadata.name, registers, spilled, compiled.metadata.shared, products)


def _blocks(options: dict) -> str:
    return "x".join(str(options[name]) for name in ("BM", "BN", "BK", "BD", "BC", "BH") if name in options)


def _crashed(arch: str, case: str, kernel: str, options: dict, seconds: float, error: Exception) -> Build:
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 1)
    crash = " ".join(str(error).split())[:200] or type(error).__name__
    return Build("", arch, case, kernel, _blocks(options), warps, stages, 0, 0, 0, 0, seconds, crash)


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
    parser.add_argument("--quick", action="store_true", help="compile only the cases of everyday training")
    parser.add_argument("--recorded", type=Path, help="an aot.csv: compile only what it lacks")
    parser.add_argument("--again", type=int, default=0, help="compile one recorded build of so many, and compare")
    arguments = parser.parse_args()
    try:
        known = aot_record.read(arguments.recorded) if arguments.recorded else {}
    except ValueError as error:
        parser.error(f"--recorded {error}")
    table = arguments.out and arguments.out / "aot.csv"
    partial = arguments.case or arguments.quick or set(arguments.arch) != set(ARCHITECTURES)
    if table and table.exists() and partial:
        parser.error(
            f"{table} would lose its other builds: leave out --case, --quick and --arch, or name another --out"
        )
    lookup = Lookup(known, arguments.again)
    builds = []
    for build in compile_all(tuple(arguments.arch), arguments.case, arguments.quick, lookup):
        builds.append(build)
        print(*(getattr(build, name) for name in SHOWN), build.fault() or "ok", flush=True)
    if table:
        table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(table) as partial_file, open(partial_file, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*WRITTEN, "torch", "triton", "compiler"])
            versions = [torch.__version__, triton.__version__, aot_record.compiler_key()]
            for build in builds:
                writer.writerow([getattr(build, name) for name in WRITTEN] + versions)
    faults = [build for build in builds if build.fault()]
    new = sum(build.recorded is None for build in builds)
    print(f"{len(builds)} kernels, {new} not on record, {len(lookup.left_out)} left out, {len(faults)} with a fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
