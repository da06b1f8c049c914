"""Compile every kernel that the tables give, for every architecture listed, without a device.

python -m benchmarks.aot --out benchmarks/results

The launchers run as they always do, on tensors without storage; the launch itself is replaced by Triton's compiler, so
signature, alignment hints and options are those of a real call. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
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
from fastnce.kernels import common, configs, nce, sample_project
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Build:
    """What the compiler made of one kernel for one architecture."""

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

    def fault(self) -> str | None:
        """Why this build must not ship, or None."""
        limit = configs.SHARED_MEMORY[self.arch]
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {limit}"
        if self.spill_bytes and not self.arch.startswith("gfx"):
            return f"spills {self.spill_bytes} bytes"
        if not (self.matrix_instructions or any(name in self.case for name in WITHOUT_PRODUCTS)):
            return "does not use the matrix unit"
        return None


WITHOUT_PRODUCTS = ("float32", "without MLP", "draw", "mean")


class _NamedDriver:
    """Stands where Triton's driver stands and only says which architecture is wanted."""

    def __init__(self, arch: str):
        self.index = configs.ARCHITECTURES.index(arch)
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    def get_current_device(self) -> int:
        return self.index  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def nce_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call): every width of the table, few and many rows, in the forms that differ most."""
    for width in (64, 128, 256, 512):
        few, many = _tensor(1, 256, width), _tensor(1, configs.MANY_ROWS, width)
        weight = _tensor(1, configs.MANY_ROWS, configs.MANY_ROWS)
        yield f"nce D={width} few rows", lambda x=few: _forward([x], unit=True)
        yield f"nce D={width} many rows", lambda x=many: _forward([x], unit=True)
        yield f"nce D={width} keys", lambda x=many, w=weight: _keys(x, w)
        yield (
            f"nce D={width} everything",
            lambda x=many, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w]),
        )
    layers = [_tensor(1, 256, dim) for dim in (3, 64, 128, 256, 256)]
    yield "nce five layers", lambda: _forward(layers, unit=True)
    wide = _tensor(1, 1024, 512, dtype=torch.float32)
    yield "nce D=512 float32", lambda: _forward([wide], extra=[wide])
    half = _tensor(1, 256, 256, dtype=torch.float16)
    yield "nce D=256 float16 loss only", lambda: _forward([half], gradient=False)


def _forward(x, extra=(), log_weight=(), pair_weight=(), **options):
    return nce.nce_forward(x, x, extra, log_weight, pair_weight, [0.07] * len(x), **options)


def _keys(x: torch.Tensor, weight: torch.Tensor):
    rows = _tensor(x.shape[0] * x.shape[1], dtype=torch.float32)
    return nce.nce_key_gradients([x], [x], [weight], [weight], [0.07], rows, rows, extra=False)


def sample_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The chain of the published networks, of wider ones, and of sampling without a projection."""
    for dim, channels, images in ((256, (3, 128, 256), 1), (256, (3, 128, 256), 64), (512, (64, 512), 1)):
        name = f"sample D={dim} images={images}"
        yield name, lambda d=dim, c=channels, i=images: _sample(d, c, i, distinct=True)
    yield "sample D=256 repeated ids", lambda: _sample(256, (3, 128, 256), 1, distinct=False)
    yield "sample without MLP", lambda: _sample(0, (3, 128, 256), 1, distinct=True)
    yield "draw", lambda: sample_project.draw_ids(_tensor(5, 2, dtype=torch.int64), [68644, 65536, 16384], 256)
    yield "mean", lambda: sample_project.mean_by_direction(_tensor(1280, dtype=torch.float32), [256] * 5, 1)


def _sample(dim: int, channels: tuple[int, ...], images: int, distinct: bool) -> None:
    maps = [_tensor(images, c, 32, 32).to(memory_format=torch.channels_last) for c in channels]
    maps[0] = _tensor(images, channels[0], 32, 32, dtype=torch.float32)  # a picture beside 16-bit features
    ids = [_tensor(1, 256, dtype=torch.int64) for _ in maps]
    shapes = [s for c in channels for s in ((dim, c), (dim,), (dim, dim), (dim,))] if dim else []
    mlp = [_tensor(*shape, dtype=torch.float32) for shape in shapes]
    units, *saved = sample_project.project(maps, ids, mlp, torch.bfloat16, len(maps))
    sample_project.project_backward(
        units, None, 1, [sample_project.map_layout(m) for m in maps], ids, mlp, units, *saved,
        distinct=distinct, wanted=[True] * len(maps), weights_wanted=True,
    )  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield from nce_cases()
    yield from sample_cases()


def compile_all(archs: tuple[str, ...] = configs.ARCHITECTURES, only: str = "") -> Iterator[Build]:
    """Every case for every architecture; each distinct kernel once."""
    kept = common.launch, common.architecture
    modules = [module for module in sys.modules.values() if getattr(module, "launch", None) is common.launch]
    for arch in archs:
        triton.runtime.driver.set_active(_NamedDriver(arch))
        seen: set[str] = set()
        for case, call in cases():
            if only not in case:
                continue
            builds: list[Build] = []

            def compile_only(kernel, blocks, like, *args, arch=arch, case=case, builds=builds, seen=seen, **options):
                start = time.perf_counter()
                compiled = kernel.run(*args, grid=None, warmup=True, **options)
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
        blocks="x".join(str(options[name]) for name in ("BM", "BN", "BK", "BD", "BC", "BH") if name in options),
        warps=options.get("num_warps", 4),
        stages=options.get("num_stages", 1),
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=products,
        seconds=round(seconds, 2),
    )


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

    registers = number("vgpr_count") + number("agpr_count")
    return registers, 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")), len(re.findall("v_mfma", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for aot.csv")
    parser.add_argument("--arch", nargs="*", default=configs.ARCHITECTURES)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    arguments = parser.parse_args()
    builds = []
    for build in compile_all(tuple(arguments.arch), arguments.case):
        builds.append(build)
        print(*asdict(build).values(), build.fault() or "ok", flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open(arguments.out / "aot.csv", "w", newline="") as file:
            writer = csv.writer(file)
            names = [field.name for field in fields(Build) if field.name != "seconds"]
            writer.writerow([*names, "torch", "triton"])
            for build in builds:
                writer.writerow([getattr(build, name) for name in names] + [torch.__version__, triton.__version__])
    faults = [build for build in builds if build.fault()]
    print(f"{len(builds)} kernels, {len(faults)} with a fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
