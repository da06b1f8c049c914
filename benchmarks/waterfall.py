"""What each part of the speed brings: one training step, one thing more switched on at a time.

python benchmarks/run.py --out DIR --only waterfall cudnn

Every stage is a step of its own, built with the library's switches and measured interleaved with the others; a stage
that this machine or version does not have gets a row that says so. A stage that brings nothing is to be taken out. On a
GPU every stage is captured, or Python's time would hide the device's; the last is launched one by one, to show that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.cases import Context, Provider, Row
from benchmarks.measure import measure
from benchmarks.step import our_provider, step_case
from fastnce.engine.step import Step
from fastnce.nce import PatchNCEHead
from fastnce.networks import leave_out_biases, set_implementation
from fastnce.networks.layers import LastConvolution


@dataclass(frozen=True)
class Stage:
    """The switches of a step; each stage keeps those of the one before."""

    name: str
    tf32: bool = False
    precision: str = "fp32"
    layout: torch.memory_format = torch.contiguous_format
    layers: Literal["eager", "triton"] = "eager"
    last: Literal["eager", "triton"] = "eager"
    """The generator's last convolution, which `layers` leaves out."""
    loss: Literal["eager", "triton"] = "eager"
    weights_at_once: bool = False
    no_cancelled_biases: bool = False
    """Convolutions leave out a bias that the norm after them takes away."""
    graph: bool = True
    cudnn_benchmark: bool = False
    """cuDNN tries its kernels for each shape, as the published repositories have it."""


def stages(cuda: bool, loss: bool = True) -> list[Stage]:
    """In the order in which they add up. A CPU has neither TF32 nor kernels nor graphs. Compilers: `compiled.py`.

    `loss`: the method's loss can be told not to use its kernels. DCLGAN's cannot, and has them from the first stage on.
    """
    half: dict[str, Any] = {"tf32": True, "precision": "bf16"}
    last: dict[str, Any] = half | {"layout": torch.channels_last}
    if not cuda:
        cpu: dict[str, Any] = {"precision": "bf16"}
        at_once = cpu | {"weights_at_once": True}
        without = at_once | {"no_cancelled_biases": True}
        return [
            Stage("fp32"),
            Stage("+ bf16", **cpu),
            Stage("+ weights converted at once", **at_once),
            Stage("+ no biases that norms cancel", **without),
            Stage("+ channels-last", **without, layout=torch.channels_last),
        ]
    layers: dict[str, Any] = last | {"layers": "triton"}
    ending: dict[str, Any] = layers | {"last": "triton"}
    fused: dict[str, Any] = ending | {"loss": "triton"}
    at_once: dict[str, Any] = fused | {"weights_at_once": True}
    all_on: dict[str, Any] = at_once | {"no_cancelled_biases": True}
    found = [
        Stage("fp32"),
        Stage("+ TF32", tf32=True),
        Stage("+ bf16", **half),
        Stage("+ channels-last", **last),
        Stage("+ fused norm, pad, blur", **layers),
        Stage("+ last convolution", **ending),
        Stage("+ fused NCE", **fused),
        Stage("+ weights converted at once", **at_once),
        Stage("+ no biases that norms cancel", **all_on),
        Stage("all, uncaptured", **all_on, graph=False),
    ]
    return found if loss else [replace(stage, loss="triton") for stage in found if stage.name != "+ fused NCE"]


def waterfall(context: Context) -> Iterator[Row]:
    """What each part of the speed brings, for CUT's and DCD-GAN's step."""
    for name, images in [("cut", 1), ("dcdgan", 1), ("cut", 8)] if context.large else [("cut", 1)]:
        yield from fall(name, images, context)


def fall(name: str, images: int, context: Context) -> Iterator[Row]:
    """The stages of one step, each with what it brings.

    Many images' maps of all stages do not fit side by side: they are then measured one after another.
    """
    every = stages(context.device.type == "cuda", loss=name == "cut")
    first, before = None, None
    for together in [every] if images == 1 else [[stage] for stage in every]:
        providers = [_provider(name, stage, context) for stage in together]
        for row in measure(step_case(name, images, context, providers, "waterfall"), context):
            if row.p50_ms is not None:
                first = first or row.p50_ms
                gain = f"{first / row.p50_ms:.2f}x the first"
                gain += f", {before / row.p50_ms:.2f}x the one before" if before else ""
                row.note = f"{gain}; {row.note}".removesuffix("; ")
                before = row.p50_ms
            yield row
        if images > 1:
            context.timed.clear()  # or its memory would be kept to count launches later


def cudnn(context: Context) -> Iterator[Row]:
    """CUT's captured step, with every stage, where cuDNN tries its kernels for each shape; nothing on a CPU."""
    # a process of its own: PyTorch keeps the first kernel that it took for a shape, tried or not, whatever is set later
    if context.device.type != "cuda":
        return
    stage = replace(stages(cuda=True)[-1], name="+ cuDNN benchmark", cudnn_benchmark=True, graph=True)
    for images in (1, 8) if context.large else (1,):
        provider = _provider("cut", stage, context)
        provider.note = "in a process of its own"
        yield from measure(step_case("cut", images, context, [provider], "waterfall"), context)


def _provider(name: str, stage: Stage, context: Context) -> Provider:
    cuda = context.device.type == "cuda"
    return our_provider(
        name,
        context,
        stage.precision,
        label=stage.name,
        layout=stage.layout,
        graph=stage.graph,
        dtype={"bf16": "bfloat16", "fp32": "tf32" if stage.tf32 else "float32"}[stage.precision],
        prepare=partial(switch, stage=stage),
        flags={"tf32": stage.tf32, "benchmark": stage.cudnn_benchmark} if cuda else None,
    )


def switch(step: Step, stage: Stage) -> None:
    """Put a built step into the state of a stage."""
    step.weights_at_once = stage.weights_at_once
    leave_out_biases(step.method, stage.no_cancelled_biases)
    set_implementation(step.method, stage.layers)
    for module in step.method.modules():
        if isinstance(module, LastConvolution):
            module.implementation = stage.last
        if isinstance(module, PatchNCEHead):
            module.implementation = stage.loss
