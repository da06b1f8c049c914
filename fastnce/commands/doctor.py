"""Report which implementation runs on this machine, and check its numbers.

fastnce doctor

Prints the devices and versions, and what earlier checks of the kernels have found. Then compares the loss, its
gradient, the sampling of patches and the layers of the networks on every device with float64 definitions: one line per
check, with the measured error and its limit (gate). Kernels are measured wherever they can run, even if they are known
to be wrong. The exit code is 1 if a check fails. A fault of PyTorch itself is reported, but does not fail.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import __version__, patch_nce, project_patches
from ..common import first_use, verdicts
from ..common.agreement import (
    GRADIENT_GATES,
    LOSS_GATES,
    MLP_GRADIENT_GATES,
    SAMPLING_GATES,
    TEMPERATURE,
    UPSTREAM,
    Check,
    confident_queries,
    logit_rounding,
    relative,
    relative_per_row,
    unit_rows,
)
from ..common.dispatch import obstacle
from ..engine.choices import tf32_allowed
from ..nce import Choice, which
from ..nce.impl import reference
from ..nce.impl.rows import gather_patches
from ..networks.layers import BlurDown, BlurUp, FusedLayer, InstanceNorm, LastConvolution, ReflectionPad
from ..networks.uses import away_from_the_bias, away_from_the_corner, formula
from .parsing import command_parser

LAYERS = {
    "instance_norm": ((1e-5, 0.0, 1, 0, False), (1e-5, 0.2, 0, 0, False), (1e-5, 0.2, 0, 1, False)),
    "activate": ((0.2, 1),),
    "reflection_pad": ((3,),),
    "blur_down": ((),),
    "blur_up": ((),),
    "few_outputs_convolution": ((0,),),
}
"""The options with which each layer is measured, see `fastnce.networks.uses.formula`."""
FAMILIES = ("patch_nce", "patch_nce_layers", "draw_ids", "project_patches", "PatchNCEHead", "loss_terms", *LAYERS)
"""The kernels that are checked at their first use."""


def check_nce(device: torch.device, dtype: torch.dtype, implementation=None) -> Iterator[Check]:
    """Check loss and query gradient on random and on confident rows, for both groupings and with extra keys."""
    images, patches, dim = 2, 64, 128
    keys = unit_rows((images * patches, dim), device, seed=0)
    extra = unit_rows((images, 40, dim), device, seed=1).to(dtype)
    data = {"random": unit_rows((images * patches, dim), device, seed=3)}
    data |= {f"p {p}": confident_queries(keys, p) for p in (0.5, 0.9999)}
    keys = keys.to(dtype)
    for kind, exact_queries in data.items():
        for case in ("image", "batch", "extra keys"):
            groups = 1 if case == "batch" else images
            extra_keys = extra if case == "extra keys" else None
            queries = exact_queries.to(dtype).requires_grad_()
            loss = patch_nce(
                queries,
                keys,
                images=images,
                negatives="batch" if case == "batch" else "image",
                temperature=TEMPERATURE,
                extra_keys=extra_keys,
                reduction="none",
                implementation=implementation,
            )
            (gradient,) = torch.autograd.grad(loss.sum() * UPSTREAM, queries)

            q64 = queries.detach().double().requires_grad_()
            grouped = (q64.unflatten(0, (groups, -1)), keys.double().unflatten(0, (groups, -1)))
            exact, _, _ = reference.nce_rows(
                *grouped, None if extra_keys is None else extra_keys.double(), temperature=TEMPERATURE
            )
            (exact_gradient,) = torch.autograd.grad(exact.sum() * UPSTREAM, q64)
            exact = exact.detach().flatten()
            name, rounding = f"{_short(dtype)} {kind}, {case}", logit_rounding() if "0.9999" in kind else 0.0
            yield Check(f"{name}: loss", relative_per_row(loss, exact), LOSS_GATES[dtype] + rounding)
            yield Check(f"{name}: query gradient", relative(gradient, exact_gradient), GRADIENT_GATES[dtype])


def check_sampling(device: torch.device, dtype: torch.dtype, implementation=None) -> Iterator[Check]:
    """Check rows, map gradients and weight gradients of sampling, projection and normalisation."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    ids = [torch.randperm(20 * 18, generator=generator)[:100].to(device) for _ in range(2)]
    weights = [(draw(64, c) / c**0.5, draw(64) * 0.1, draw(64, 64) / 8, draw(64) * 0.1) for c in (3, 32)]
    maps = [draw(2, 3, 20, 18).to(dtype), draw(2, 32, 20, 18).to(dtype, memory_format=torch.channels_last)]
    upstream = [draw(200, 64) for _ in ids]
    for with_mlps in (False, True):
        results = []
        for precision in (dtype, torch.float64):
            feats = [m.detach().to(precision, copy=True).requires_grad_() for m in maps]
            mlps = [tuple(w.to(dtype).to(precision).requires_grad_() for w in mlp) for mlp in weights]
            used: Any = mlps if with_mlps else [None] * len(mlps)
            if precision == torch.float64:
                sampled = [gather_patches(m, i).flatten(0, 1) for m, i in zip(feats, ids, strict=True)]
                rows = [reference.project(sample, mlp) for sample, mlp in zip(sampled, used, strict=True)]
            else:
                rows = project_patches(feats, ids, used if with_mlps else None, implementation=implementation)
            parts = [(r * u[:, : r.shape[1]].to(r.dtype)).sum() for r, u in zip(rows, upstream, strict=True)]
            total = torch.stack(parts).sum()
            learned = [w for mlp in mlps for w in mlp] if with_mlps else []
            gradients = torch.autograd.grad(total, [*feats, *learned])
            results.append((rows, gradients[: len(feats)], gradients[len(feats) :]))
        kinds = ("rows", "map gradients", "weight gradients") if with_mlps else ("rows", "map gradients")
        for kind, measured, exact in zip(kinds, *(r[: len(kinds)] for r in results), strict=True):
            error = max(relative(a, b.detach()) for a, b in zip(measured, exact, strict=True))
            name = f"{_short(dtype)} sampling {'with' if with_mlps else 'without'} projection: {kind}"
            yield Check(name, error, (MLP_GRADIENT_GATES if with_mlps and kind != "rows" else SAMPLING_GATES)[dtype])


def check_layers(device: torch.device, dtype: torch.dtype, implementation=None) -> Iterator[Check]:
    """Check the output and the gradients of norms, pads, blurs and last convolutions."""
    generator = torch.Generator().manual_seed(8)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(device, to)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x

    layers: dict[str, Callable[..., FusedLayer]] = {
        "instance_norm": lambda eps, *options: InstanceNorm(32, eps),
        "activate": lambda slope, blur: _Activated(32, slope),
        "reflection_pad": ReflectionPad,
        "blur_down": lambda: BlurDown(32),
        "blur_up": lambda: BlurUp(32),
        "few_outputs_convolution": lambda padding: LastConvolution(32, 3, 7, padding),
    }
    for name, cases in LAYERS.items():
        for options in cases:
            x = draw(2, 32, 24, 20)
            if name == "instance_norm":
                x = away_from_the_corner(x)
            layer: Any = layers[name](*options).to(device)
            layer.implementation = implementation
            learned = list(layer.parameters())
            with torch.no_grad():
                for parameter in learned:
                    parameter.copy_(draw(*parameter.shape, to=torch.float32) / 16)
            if name == "activate":
                x = away_from_the_bias(x, layer.bias.detach())
            leaf = x.requires_grad_()
            if name == "instance_norm":
                _, slope, margin, blur, _ = options
                y = layer(leaf, slope, margin, None, blur)
            else:
                y = layer(leaf)
            upstream = draw(*y.shape, to=y.dtype)
            measured = [y, *torch.autograd.grad(y, [leaf, *learned], upstream)]
            exact_leaves = [t.detach().double().requires_grad_() for t in (leaf, *learned)]
            exact_y = formula(name, exact_leaves, options)[0]
            exact = [exact_y, *torch.autograd.grad(exact_y, exact_leaves, upstream.double())]
            kinds = ("output", "map gradient", *(f"{key} gradient" for key, _ in layer.named_parameters()))
            tf32 = dtype == torch.float32 and device.type == "cuda" and name.startswith("few") and tf32_allowed()[1]
            gate = GRADIENT_GATES[torch.float16 if tf32 else dtype]  # TF32 keeps as many digits of a factor
            for kind, ours, truth in zip(kinds, measured, exact, strict=False):
                yield Check(f"{_short(dtype)} {name} {options or ''}: {kind}", relative(ours, truth), gate)


class _Activated(FusedLayer):
    """A bias, a leaky ReLU and a blur."""

    def __init__(self, channels: int, slope: float):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.blur = BlurDown(channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        self.blur.implementation = self.implementation
        return self.blur.after(x, self.bias, self.slope)


def check_library_instance_norm(device: torch.device) -> Check:
    """Compare `F.instance_norm` at batch 1, with a channels-last incoming gradient, with its formula in float64."""
    generator = torch.Generator().manual_seed(5)
    x, upstream = torch.randn(2, 1, 8, 12, 10, generator=generator).to(device)
    upstream = upstream.contiguous(memory_format=torch.channels_last)
    library, formula = x.clone().requires_grad_(), x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.instance_norm(library), library, upstream)
    centred = formula - formula.mean((2, 3), keepdim=True)
    normalised = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    (exact,) = torch.autograd.grad(normalised, formula, upstream.double())
    error = relative(gradient, exact)
    right = "PyTorch is right here"
    wrong = "a fault of PyTorch: published CUT at batch 1 trains on wrong gradients here; fastnce uses its own norm"
    return Check("F.instance_norm, batch 1, channels-last gradient", error, None, right if error < 1e-4 else wrong)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def devices() -> list[torch.device]:
    """Return the CPU, and the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])


def chosen_implementation(device: torch.device, dtype: torch.dtype) -> Choice:
    """Return what `patch_nce` runs for such rows (see `fastnce.nce.which`); kernels are tried once."""
    choice = which(device, dtype, dim=32, rows=16)
    if not choice.triton:
        return choice
    rows = torch.eye(16, 32, device=device, dtype=dtype)
    try:
        patch_nce(rows, rows)
    except Exception as error:  # anything that a compiler or a driver raises
        return Choice("triton", f"but it fails: {' '.join(str(error).split())[:200]}")
    return Choice("triton", f"{choice.reason}; compiled and ran")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[0].strip() if lines else "unknown"


def facts() -> Iterator[str]:
    """Yield lines about the machine, the versions and the implementations."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    yield f"fastnce {__version__}, torch {torch.__version__}, triton {triton_version}"
    yield f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    for device in devices():
        if device.type == "cpu":
            # Every CPU can compute bfloat16, but only these instructions make it fast.
            flags = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
            fast = [name for flag, name in flags.items() if flag in _cpu_flags()]
            yield f"cpu: bfloat16 {'with ' + ', '.join(fast) if fast else 'without special instructions'}"
        elif device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                gpu = torch.cuda.get_device_properties(index)
                runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
                bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no"
                yield (
                    f"cuda:{index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability "
                    f"{gpu.major}.{gpu.minor}, driver {_driver()}, {runtime}, bfloat16 {bfloat16}"
                )
        else:
            yield f"{device.type}: {torch.accelerator.device_count()} devices"
        for dtype in (torch.bfloat16, torch.float32):
            implementation, why = chosen_implementation(device, dtype)
            yield f"{device.type}: patch_nce runs {implementation} for {_short(dtype)} ({why})"


def verdict_lines(device: torch.device) -> Iterator[str]:
    """Yield lines about the kernels of a device that were checked at their first use."""
    yield f"kernels checked at their first use on {device}, remembered in {verdicts.path() or 'no file'}:"
    yield from (f"  {line}" for line in first_use.report(device, FAMILIES))


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return {flag for line in cpuinfo if line.startswith("flags") for flag in line.split()}
    except OSError:
        return set()


def checks(device: torch.device) -> Iterator[Check]:
    """Run every check for one device. An exception becomes a failed check."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else tuple(LOSS_GATES)
    tasks: list[tuple[str, Callable[[], Iterator[Check]]]] = []
    for dtype in dtypes:
        forced = "triton" if device.type != "cpu" and obstacle(device, dtype) is None else None
        for name, check in (("loss", check_nce), ("sampling", check_sampling), ("layers", check_layers)):
            tasks.append((f"{_short(dtype)} {name}", functools.partial(check, device, dtype, forced)))
    for name, task in tasks:
        try:
            yield from task()
        except Exception as error:
            yield Check(name, math.nan, 0.0, f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    yield check_library_instance_norm(device)


def main(arguments: list[str]) -> int:
    """Report which implementation runs on this machine, and check its numbers against the definition."""
    command_parser("doctor", main).parse_args(arguments)
    for fact in facts():
        print(fact)
    failed = 0
    for device in devices():
        if device.type != "cpu":
            print("", *verdict_lines(device), sep="\n")
        print(f"\nchecks on {device} against float64 definitions:")
        for check in checks(device):
            failed += not check.ok
            print(check.line())
    print(f"\n{failed} checks failed: please report the lines above" if failed else "\nall checks passed")
    return 1 if failed else 0
