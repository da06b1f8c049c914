"""What the published training step's kernels compile to: registers, shared memory, loads, products, programs.

python -m benchmarks.build_table --arch sm_90 --out builds.csv

No device is needed. Kernels are compiled as in `aot.py`, at the sizes of one published picture, and their machine code
is counted. A row is one launch of one case. The same code and compiler give the same table.

`python -m benchmarks.aot` compiles all forms of all kernels; this table shows few of them closely.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastnce.kernels import blur, few_outputs, few_outputs_backward, instance_norm, instance_norm_backward, nce
from fastnce.kernels.specialise import specialised

from benchmarks import aot, aot_cases
from fastnce.common.writing import atomic_file

PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}
"""Multiprocessors of a large device of each architecture: A100, A40, L40S, H100, B200, RTX 5090."""

CHANNELS = (3, 128, 256, 256, 256)
"""Of the five maps that CUT takes patches from."""


class Case(NamedTuple):
    """One call, and the kernels that it must launch among others."""

    name: str
    call: Callable[[], object]
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """One launch of a case. Numbers of instructions are those of the program's code, not of its loops."""

    case: str
    kernel: str
    programs: int
    programs_per_processor: float
    blocks: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_128: int
    load_64: int
    load_32: int
    load_16: int
    load_8: int
    copy_128: int
    """Copies from global into shared memory that need no register (cp.async), of 128 bits."""
    copy_64: int
    copy_32: int
    tensor_copies: int
    """Copies of whole blocks by descriptor (TMA)."""
    matrix_instructions: int
    instructions: int
    loops: str
    """Instructions of each innermost loop, in order."""


def cases() -> Iterator[Case]:
    """The kernels of the published step: B = 1, 256 x 256 pixels, bfloat16, channels-last."""
    dense = _tensor(1, 16384, 256)
    yield Case("nce dense 16384x256", partial(_nce, [dense]), ("nce_kernel",))
    few = [_tensor(1, 256, 256) for _ in CHANNELS]
    yield Case("nce five layers 256x256", partial(_nce, few), ("nce_kernel",))
    projected = ("project_kernel", "project_backward_kernel", "weight_gradient_kernel")
    for images in (1, 8):
        yield Case(f"project B={images}", partial(_project, images), projected)
    for margin, residual in ((1, False), (0, True)):
        name = "residual" if residual else "ReLU, pad 1"
        yield Case(f"norm 256x64x64, {name}", partial(_norm, _map(256, 64), margin, residual), ())
    wide, narrow = _map(128, 256), _map(128, 128)
    yield Case("blur down 128x256x256", partial(blur.blur_down, wide, 128, 128), ("blur_kernel",))
    yield Case("blur down 128x256x256, backward", partial(blur.blur_down_backward, narrow, 256, 256), ("blur_kernel",))
    yield Case("blur up to 128x256x256", partial(blur.blur_up, narrow, 256, 256), ("blur_kernel",))
    yield Case("blur up to 128x256x256, backward", partial(blur.blur_up_backward, wide, 128, 128), ("blur_kernel",))
    last = ("few_outputs_kernel", "map_gradient_kernel", "few_outputs_sums_kernel")
    yield Case("few outputs 64 to 3, 7x7, 262x262", _last_convolution, last)


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _map(channels: int, side: int) -> torch.Tensor:
    return _tensor(1, channels, side, side).to(memory_format=torch.channels_last)


def _nce(rows: list[torch.Tensor]) -> None:
    nce.nce_forward(rows, rows, [], [], [], [0.07] * len(rows), unit=True)


def _project(images: int) -> None:
    """With copies of the weights in 16 bits, as a training step makes them."""
    aot_cases._sample(256, CHANNELS, images=images, weights=torch.bfloat16)


def _norm(x: torch.Tensor, margin: int, residual: bool) -> None:
    slope = 1.0 if residual else 0.0
    y, statistics = instance_norm.instance_norm(x, x if residual else None, 1e-5, slope, margin)
    instance_norm_backward.instance_norm_backward(y, None, x, statistics, slope, margin, 0, residual)


def _last_convolution() -> None:
    x, bias = _map(64, 262), _tensor(3, dtype=torch.float32)
    weight = _tensor(3, 64, 7, 7, dtype=torch.float32).to(memory_format=torch.channels_last)
    y = few_outputs.few_outputs(x, weight, bias, 0)
    few_outputs_backward.few_outputs_backward(y, x, weight, 0, True, True, True)


Launched = tuple[Any, int, tuple[Any, ...], dict[str, Any]]
"""A kernel, its number of programs, its arguments and its options."""


def launches(case: Case, arch: str) -> list[Launched]:
    """What a case launches on an architecture; RuntimeError if a kernel that it must launch is not among it."""
    found: list[Launched] = []

    def keep(kernel, blocks, like, *args, **options):
        found.append((kernel, blocks, args, options))

    with aot.launching(keep, arch):
        case.call()
    names = [kernel.fn.__name__ for kernel, *_ in found]
    missing = [name for name in case.kernels if name not in names]
    if missing or not found:
        raise RuntimeError(
            f"{case.name}: launches {', '.join(names) or 'no kernel'} on {arch}, without {' and '.join(missing)}; "
            "name its kernels in benchmarks/build_table.py"
        )
    return found


def builds(arch: str) -> Iterator[Build]:
    """Compile every case for an NVIDIA architecture, and count what its kernels consist of."""
    triton.runtime.driver.set_active(aot._NamedDriver(arch))
    for case in cases():
        for kernel, blocks, arguments, options in launches(case, arch):
            arguments = specialised(kernel, arguments, lambda tensor: tensor.data_ptr() % 16 == 0)
            compiled = kernel.warmup(*arguments, grid=(1,), **options)
            usage = aot._usage(arch, compiled)
            yield Build(
                case.name,
                usage.kernel,
                blocks,
                round(blocks / PROCESSORS[arch], 2),
                aot._blocks(options),
                options.get("num_warps", 4),
                options.get("num_stages", 1),
                usage.registers,
                usage.spill_bytes,
                usage.shared_bytes,
                **counted(disassembled(compiled.asm["cubin"])),
            )


def disassembled(cubin: bytes) -> str:
    """Return the machine code of a kernel as text."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


LINE = re.compile(r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
MATRIX = re.compile(r"(?:H|B|D|I|Q|O)MMA|[HIQ]GMMA|UTC\w*MMA")
WIDTH = re.compile(r"\.(128|64|[US]?16|[US]8)(?:\.|$)")
TARGET = re.compile(r"`\((\.L_\w+)\)")


def counted(code: str) -> dict[str, Any]:
    """Count the instructions of machine code by kind; `NOP`s do not count.

    Args:
        code: as `nvdisasm -c` prints it.

    Returns:
        the last fields of `Build` by name.
    """
    found: Counter[str] = Counter()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for label, instruction, operands in LINE.findall(code):
        if label:
            labels[label] = found["instructions"]
            continue
        kind = instruction.split(".")[0]
        if kind == "NOP":
            continue
        found["instructions"] += 1
        width = WIDTH.search(instruction)
        bits = width[1].lstrip("US") if width else "32"
        if kind == "LDG":
            found[f"load_{bits}"] += 1
        elif kind == "LDGSTS":
            found[f"copy_{bits}"] += 1
        elif kind in ("UTMALDG", "UBLKCP"):
            found["tensor_copies"] += 1
        elif MATRIX.fullmatch(kind):
            found["matrix_instructions"] += 1
        elif kind == "BRA" and (target := TARGET.search(operands)) and target[1] in labels:
            loops.append((labels[target[1]], found["instructions"]))
    inner = [loop for loop in loops if not any(_within(other, loop) for other in loops)]
    # a branch of one instruction to itself ends every program
    sizes = [str(end - start) for start, end in sorted(inner) if end - start > 1]
    names = [field.name for field in fields(Build)]
    return {**{name: found[name] for name in names[names.index("load_128") : -1]}, "loops": " ".join(sizes)}


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90", choices=[arch for arch in aot.ARCHITECTURES if arch in PROCESSORS])
    parser.add_argument("--out", type=Path, help="CSV file; without it the table is printed")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, so Triton compiles nothing: unset it")
    rows = list(builds(arguments.arch))
    if arguments.out is None:
        _write(sys.stdout, rows)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.out) as partial_file, open(partial_file, "w", newline="") as file:
        _write(file, rows)


def _write(file: Any, rows: list[Build]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Build)])
    writer.writerows(astuple(row) for row in rows)


if __name__ == "__main__":
    main()
