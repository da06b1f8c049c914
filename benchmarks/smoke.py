"""Check the kernels and captured steps on this device, and count the kernels that had to be compiled.

python -m benchmarks.smoke FILE.json        # about 20 s on a GPU if Triton's cache has the kernels

Compares every kernel with float64 at a size of the published networks, then CUT's and DCD-GAN's captured step with the
same step launched eagerly. The file is rewritten after each check, so a device that hangs loses only later checks.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import build
from benchmarks.triton_cache import Compilations
from fastnce import PatchNCEHead, patch_nce, project_patches
from fastnce.commands import doctor
from fastnce.common.timing import default_device, synchronize
from fastnce.engine.cudagraph import WARM_UP
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.nce.impl import triton_maps as fused_maps
from fastnce.nce.multilayer import patch_nce_layers
from fastnce.networks import fused, fused_last

LAYER_GATES = {torch.float32: 5e-6, torch.bfloat16: 4e-3}
"""Gates of pads, blurs, norms and a convolution's map gradient: one rounding of the result."""
SUM_GATES = {torch.float32: 5e-6, torch.bfloat16: 3e-5}
"""Gates of a convolution's float32 results: factors of 17 bits, in sums that a matrix unit truncates. (TF32: 3e-4.)"""
CHAIN_GATE = 1e-2
"""Gate of the losses of the chain and of steps in bfloat16, whose rows are rounded before they are compared."""


@dataclass(frozen=True)
class Size:
    """The sizes of the checks."""

    patches: int = 256
    dim: int = 256
    channels: Sequence[int] = (3, 128, 256, 256, 256)
    sides: Sequence[int] = (262, 256, 128, 64, 64)
    map: tuple[int, int] = (256, 64)  # channels and side of a layer's map
    step_side: int = 128
    network: dict = field(default_factory=lambda: {"width": 16, "discriminator_width": 16})


Result = tuple[str, float, float]
"""Name of the check, error, and the largest allowed error."""


def relative(ours: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the truth; NaN if the truth is all zeros."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return ((ours - truth).norm() / truth.norm()).item()


def compared(
    name: str,
    ours: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    gates: tuple[float, float],
) -> Iterator[Result]:
    """Compare a function's value and gradients with those of another on the same numbers in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, exact = ours(*leaves), truth(*wide)
    upstream = torch.randn_like(exact)
    gradients = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
    # the same rounded upstream gradient for both
    expected = torch.autograd.grad(exact, wide, upstream.to(y.dtype).double())
    yield f"{name}: value", relative(y, exact), gates[0]
    worst = max(relative(a, b) for a, b in zip(gradients, expected, strict=True))
    yield f"{name}: gradients", worst, gates[1]


def check_rows(device: torch.device, size: Size) -> Iterator[Result]:
    """InfoNCE with gradients of queries, keys and extra keys; the layers of two directions in one call."""
    for dtype in (torch.bfloat16, torch.float32):
        rows = [F.normalize(torch.randn(size.patches, size.dim, device=device), dim=1).to(dtype) for _ in range(3)]

        def loss(q: Tensor, k: Tensor, extra: Tensor, **options) -> Tensor:
            return patch_nce(q, k, extra_keys=extra, detach_keys=False, reduction="none", **options)

        def ours(*rows: Tensor) -> Tensor:
            return loss(*rows, implementation="triton")

        gates = doctor.LOSS_GATES[dtype], doctor.GRADIENT_GATES[dtype]
        yield from compared(f"nce, {_short(dtype)}", ours, loss, rows, gates)

    four = [F.normalize(torch.randn(size.patches, size.dim, device=device), dim=1).bfloat16() for _ in range(4)]

    def layers(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, **options) -> Tensor:
        return patch_nce_layers([[q1], [q2]], [[k1], [k2]], extra_keys="other", cosine=True, **options)

    def our_layers(q1: Tensor, q2: Tensor) -> Tensor:
        return layers(q1, q2, *four[2:], implementation="triton")

    def truth(q1: Tensor, q2: Tensor) -> Tensor:
        return layers(q1, q2, *(k.double() for k in four[2:]))

    gates = CHAIN_GATE, 2 * doctor.GRADIENT_GATES[torch.bfloat16]  # normalising rounds the rows once more
    yield from compared("nce of two directions, cosine", our_layers, truth, four[:2], gates)


def check_chain(device: torch.device, size: Size) -> Iterator[Result]:
    """Sampling, projection and loss of five layers with gradients; drawn and repeated locations."""
    locations = [side * side for side in size.sides]
    drawn = fused_maps.draw_ids(locations, size.patches, 1, device)
    distinct = all(
        len(ids.unique()) == min(size.patches, n) and 0 <= int(ids.min()) <= int(ids.max()) < n
        for ids, n in zip(drawn, locations, strict=True)
    )
    yield "drawn locations are distinct and inside", float(not distinct), 0.0
    for dtype in (torch.bfloat16, torch.float32):
        head = PatchNCEHead(size.channels, dim=size.dim, init_gain=1.0, implementation="triton").to(device)
        with torch.no_grad():
            for weight in head.parameters():
                weight.copy_(weight.to(dtype))  # otherwise rounding of weights would count as an error
        queries, keys = (
            [
                torch.randn(1, c, s, s, device=device).to(dtype, memory_format=torch.channels_last)
                for c, s in zip(size.channels, size.sides, strict=True)
            ]
            for _ in range(2)
        )
        ids, layers = [i[0] for i in drawn], len(size.channels)
        names = [name for name, _ in head.named_parameters()]

        def ours(*leaves: Tensor, head=head, dtype=dtype, keys=keys, ids=ids, names=names) -> Tensor:
            weights = dict(zip(names, leaves[len(keys) :], strict=True))
            with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
                return torch.func.functional_call(head, weights, (leaves[: len(keys)], keys), {"patch_ids": ids})

        def truth(*leaves: Tensor, keys=keys, ids=ids) -> Tensor:
            maps, weights = leaves[: len(keys)], leaves[len(keys) :]
            mlps = [weights[i : i + 4] for i in range(0, len(weights), 4)]
            rows = [project_patches(side, ids, mlps) for side in (maps, [k.double() for k in keys])]
            return torch.stack([patch_nce(q, k) for q, k in zip(*rows, strict=True)]).mean()

        gates = CHAIN_GATE if dtype is torch.bfloat16 else 1e-5, doctor.SAMPLING_GATES[dtype]
        inputs = [*queries, *head.parameters()]
        yield from compared(f"chain of {layers} layers, {_short(dtype)}", ours, truth, inputs, gates)
    feature_map = torch.randn(1, size.channels[1], size.sides[-1], size.sides[-1], device=device)
    repeated = [torch.randint(0, size.sides[-1] ** 2 // 4, (size.patches,), device=device)]

    def sampled(x: Tensor, **options) -> Tensor:
        return project_patches([x], repeated, **options)[0]

    def our_sampled(x: Tensor) -> Tensor:
        return sampled(x, implementation="triton")

    gates = doctor.SAMPLING_GATES[torch.float32], doctor.SAMPLING_GATES[torch.float32]
    yield from compared("repeated locations", our_sampled, sampled, [feature_map], gates)


def check_layers(device: torch.device, size: Size) -> Iterator[Result]:
    """Instance norm with ReLU and pad, with a residual; reflection pad; both blurs."""
    channels, side = size.map
    for dtype in (torch.bfloat16, torch.float32):
        x, other = (
            torch.randn(1, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
            for _ in range(2)
        )
        # rounding may put values at the mean on either side of the ReLU's corner
        centre = x.double().mean((2, 3), keepdim=True)
        x = torch.where((x.double() - centre).abs() < 1e-4, x + 0.05, x)
        gates, name = (LAYER_GATES[dtype], LAYER_GATES[dtype]), _short(dtype)
        yield from compared(
            f"norm, ReLU, pad, {name}",
            lambda x: fused.instance_norm(x, 1e-5, 0.0, 1),
            lambda x: F.pad(F.relu(_normalised(x)), (1, 1, 1, 1), mode="reflect"),
            [x],
            gates,
        )
        yield from compared(
            f"norm, residual, {name}",
            lambda x, r: fused.instance_norm(x, 1e-5, 1.0, 0, r),
            lambda x, r: _normalised(x) + r,
            [x, other],
            gates,
        )
        yield from compared(
            f"pad, {name}",
            lambda x: fused.reflection_pad(x, 3),
            lambda x: F.pad(x, (3, 3, 3, 3), mode="reflect"),
            [x],
            gates,
        )
        yield from compared(f"blur-down, {name}", fused.blur_down, _blurred, [x], gates)
        yield from compared(
            f"blur-up, {name}",
            fused.blur_up,
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            [x],
            gates,
        )


def check_last_convolution(device: torch.device, size: Size) -> Iterator[Result]:
    """A generator's last convolution: float32 results from inputs of either precision."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, 64, size.sides[0], size.sides[0], device=device)
        x = F.relu(x).to(dtype, memory_format=torch.channels_last)
        weight, bias = 0.02 * torch.randn(3, 64, 7, 7, device=device), torch.randn(3, device=device)
        weight = weight.contiguous(memory_format=torch.channels_last)
        name, sums = f"last convolution, {_short(dtype)}", SUM_GATES[dtype]
        yield from compared(
            name, fused_last.few_outputs_convolution, lambda x, w, b: F.conv2d(x, w, b), [x, weight, bias],
            (sums, LAYER_GATES[dtype]),
        )  # fmt: skip
        yield from compared(
            f"{name}, weights alone",
            lambda w, b, x=x: fused_last.few_outputs_convolution(x, w, b),
            lambda w, b, x=x: F.conv2d(x.double(), w, b),
            [weight, bias],
            (sums, sums),
        )


def _normalised(x: Tensor) -> Tensor:
    centred = x - x.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def _blurred(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:])[:, :, ::2] / 4
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:])[..., ::2] / 4


def check_steps(device: torch.device, size: Size) -> Iterator[Result]:
    """Losses of captured steps against eagerly launched steps with the same weights and seeds."""
    for name in ("cut", "dcdgan"):
        plain, recorded = (
            build(name, size.network, device, "bf16", {"graph": graph}, {"patches": size.patches})
            for graph in (False, device.type == "cuda")
        )
        worst = 0.0
        for number in range(WARM_UP + 2):
            batch = Batch(*(torch.rand(2, 1, 3, size.step_side, size.step_side, device=device) * 2 - 1))
            with torch.no_grad():  # copy weights and moments before each step: Adam amplifies small differences
                state = plain.state()
                for key, tensor in recorded.state().items():
                    tensor.copy_(state[key])
            expected, found = (_losses(step, batch, number) for step in (plain, recorded))
            worst = max(worst, *(abs(found[key] - loss) / (1.0 + abs(loss)) for key, loss in expected.items()))
        trouble = "" if recorded.graphs is None else recorded.graphs.failed
        yield f"{name}: recorded step{f' failed: {trouble}' if trouble else ''}", worst, 0.0 if trouble else 2e-2
        for step in (plain, recorded):
            step.close()


def _losses(step: Step, batch: Batch, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    return {name: float(loss) for name, loss in step.run(batch, Draws()).items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


GROUPS = (check_rows, check_chain, check_layers, check_last_convolution, check_steps)


def results(device: torch.device, size: Size) -> Iterator[Result]:
    """Yield all checks. A group that raises counts as a failed check, and the next group runs."""
    for group in GROUPS:
        try:
            yield from group(device, size)
            synchronize(device)
        except Exception as error:
            traceback.print_exc()
            message = " ".join(str(error).split())[:120]
            yield f"{group.__name__} raised {type(error).__name__}: {message}", float("nan"), 0.0


def main(arguments: Sequence[str], size: Size | None = None) -> int:
    """Run and write the checks; return 0 if all pass, else 1."""
    file = Path(arguments[0])
    device = default_device()
    torch.manual_seed(0)
    for library in (torch.backends.cuda.matmul, torch.backends.cudnn):
        library.allow_tf32 = False  # the gates are those of true float32
    checks: list[dict] = []
    found: dict = {"checks": checks}
    failed = 0

    def write() -> None:
        found["compilations"] = asdict(compilations.counted)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(file)

    with Compilations() as compilations:
        for name, error, gate in results(device, size or Size()):
            ok = error <= gate  # False for NaN
            failed += not ok
            finite = math.isfinite(error)  # JSON has no NaN
            checks.append({"name": name, "error": error if finite else None, "gate": gate, "ok": ok})
            print(f"{'ok' if ok else 'FAIL':4}  {name:60}  {error:.1e}  (gate {gate:.0e})", flush=True)
            write()
    library = doctor.check_library_instance_norm(device)
    found["library"] = library.note
    write()
    print(library.line())
    print(f"{len(checks) - failed} of {len(checks)} checks passed; {compilations.counted.sentence()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
