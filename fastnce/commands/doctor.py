"""Report which implementation runs on this machine, and check its numbers.

fastnce doctor

Prints the devices and versions. Then compares the loss, its gradient and the sampling of patches on every device with
float64 definitions: one line per check, with the measured error and its limit (gate). The exit code is 1 if a check
fails. A fault of PyTorch itself is reported, but does not fail.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__, patch_nce, project_patches
from ..nce import Choice, which
from ..nce.impl import reference
from ..nce.impl.rows import gather_patches
from .parsing import command_parser

LOSS_GATES = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
GRADIENT_GATES = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SAMPLING_GATES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative norms of errors against float64 on the same rounded inputs. The gates of sampling in 16 bits are four times
those of gradients: rows, activations and weights are rounded at each layer, in PyTorch as in this library."""

TEMPERATURE = 0.07
LOGIT_ROUNDING = 3 * 2.0**-24 / TEMPERATURE
"""A logit of 1/T = 14.3 in float32 has an error of at most 2^-24 / T = 8.5e-7. The loss of a confident row is nearly
exp(negatives - positive), so its relative error is the absolute error of the two logits and their sum."""

UPSTREAM = 1024.0
"""Factor of the loss when gradients are computed, as a loss scaler applies it: otherwise the gradients of confident
rows underflow float16."""


@dataclass(frozen=True)
class Check:
    """One measured error. With gate None it is only reported and cannot fail."""

    name: str
    error: float
    gate: float | None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.gate is None or self.error <= self.gate  # False for NaN

    def line(self) -> str:
        word = "report" if self.gate is None else "ok" if self.ok else "FAIL"
        gate = "" if self.gate is None else f"  (gate {self.gate:.0e})"
        return f"{word:6}  {self.name:58}  error {self.error:.1e}{gate}" + (f"  {self.note}" if self.note else "")


def _relative(measured: Tensor, exact: Tensor) -> float:
    return ((measured.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def _rows(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(device)


def _confident_queries(keys: Tensor, probability: float) -> Tensor:
    """Unit rows whose positive has about this probability among the keys, or the highest that unit rows allow."""
    away = _rows(tuple(keys.shape), keys.device, seed=2)
    away = F.normalize(away - (away * keys).sum(1, keepdim=True) * keys, dim=1)
    negatives = torch.logsumexp(away @ keys.T / TEMPERATURE, dim=1, keepdim=True)
    cosine = (TEMPERATURE * (negatives + math.log(probability / (1 - probability)))).clamp(max=1.0)
    return cosine * keys + (1 - cosine**2).sqrt() * away


def check_nce(device: torch.device, dtype: torch.dtype, implementation=None) -> Iterator[Check]:
    """Check loss and query gradient on random and on confident rows, for both groupings and with extra keys."""
    images, patches, dim = 2, 64, 128
    keys = _rows((images * patches, dim), device, seed=0)
    extra = _rows((images, 40, dim), device, seed=1).to(dtype)
    data = {"random": _rows((images * patches, dim), device, seed=3)}
    data |= {f"p {p}": _confident_queries(keys, p) for p in (0.5, 0.9999)}
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
            # Relative error per row: a norm over all rows would hide confident rows, whose loss is near 0.
            error = (loss.detach().double() / exact - 1).square().mean().sqrt()
            name = f"{_short(dtype)} {kind}, {case}"
            yield Check(
                f"{name}: loss", error.item(), LOSS_GATES[dtype] + (LOGIT_ROUNDING if "0.9999" in kind else 0.0)
            )
            yield Check(f"{name}: query gradient", _relative(gradient, exact_gradient), GRADIENT_GATES[dtype])


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
            error = max(_relative(a, b.detach()) for a, b in zip(measured, exact, strict=True))
            name = f"{_short(dtype)} sampling {'with' if with_mlps else 'without'} projection: {kind}"
            yield Check(name, error, SAMPLING_GATES[dtype])


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
    error = _relative(gradient, exact)
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
        tasks.append((f"{_short(dtype)} loss", lambda dtype=dtype: check_nce(device, dtype)))  # type: ignore[misc]
        tasks.append((f"{_short(dtype)} sampling", lambda dtype=dtype: check_sampling(device, dtype)))  # type: ignore[misc]
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
        print(f"\nchecks on {device} against float64 definitions:")
        for check in checks(device):
            failed += not check.ok
            print(check.line())
    print(f"\n{failed} checks failed: please report the lines above" if failed else "\nall checks passed")
    return 1 if failed else 0
