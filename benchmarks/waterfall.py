"""The contribution of each optimisation: a training step with one more optimisation per stage.

python benchmarks/run.py --out DIR --only waterfall cudnn

Every stage is a separate step, built with the library's switches and measured interleaved with the others. A stage that
this machine or version does not support gets a row that says so. An optimisation without gain should be removed. On a
GPU every stage is captured, because Python's time would hide the device's. Only the last is not, to show that time.
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
from fastnce.common.beside import CudaStreams
from fastnce.engine.step import Step
from fastnce.nce import PatchNCEHead
from fastnce.networks import ResnetGenerator, fuse_neighbours, leave_out_biases, set_implementation
from fastnce.networks.layers import LastConvolution


@dataclass(frozen=True)
class Stage:
    """The switches of a step. Each stage keeps those of the stage before."""

    name: str
    tf32: bool = False
    precision: str = "fp32"
    layout: torch.memory_format = torch.contiguous_format
    layers: Literal["eager", "triton"] = "eager"
    last: Literal["eager", "triton"] = "eager"
    """The generator's last convolution, which `layers` does not cover."""
    loss: Literal["eager", "triton"] = "eager"
    weights_at_once: bool = False
    no_cancelled_biases: bool = False
    """Convolutions omit a bias that the following norm cancels."""
    neighbours: bool = False
    """Norms compute the pads, blurs and residuals around them, see `fuse_neighbours`."""
    taps: bool = False
    """Sampled maps get the gradients of their rows alone (`hands_out_taps`)."""
    streams: bool = False
    """Independent work runs at the same time (`run.streams`)."""
    graph: bool = True
    cudnn_benchmark: bool = False
    """cuDNN benchmarks its kernels for each shape, as in the published repositories."""


def stages(cuda: bool, loss: bool = True) -> list[Stage]:
    """Return the stages in order. A CPU has no TF32, kernels or graphs. For compilers see `compiled.py`.

    loss: whether the method's loss can run without its kernels. DCLGAN's loss cannot: all its stages use them.
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
    without_biases: dict[str, Any] = at_once | {"no_cancelled_biases": True}
    neighbours: dict[str, Any] = without_biases | {"neighbours": True}
    all_on: dict[str, Any] = neighbours | {"taps": True}
    found = [
        Stage("fp32"),
        Stage("+ TF32", tf32=True),
        Stage("+ bf16", **half),
        Stage("+ channels-last", **last),
        Stage("+ fused norm, pad, blur", **layers),
        Stage("+ last convolution", **ending),
        Stage("+ fused NCE", **fused),
        Stage("+ weights converted at once", **at_once),
        Stage("+ no biases that norms cancel", **without_biases),
        Stage("+ norms joined with pads, blurs and residuals", **neighbours),
        Stage("+ gradients of sampled rows alone", **all_on),
        Stage("+ streams", **all_on, streams=True),
        Stage("all, uncaptured", **all_on, streams=True, graph=False),
    ]
    return found if loss else [replace(stage, loss="triton") for stage in found if stage.name != "+ fused NCE"]


def waterfall(context: Context) -> Iterator[Row]:
    """The contribution of each optimisation to CUT's and DCD-GAN's step."""
    for name, images in [("cut", 1), ("dcdgan", 1), ("cut", 8)] if context.large else [("cut", 1)]:
        yield from measure_stages(name, images, context)


def measure_stages(name: str, images: int, context: Context) -> Iterator[Row]:
    """Measure the stages of one step, each with its gain.

    With several images the maps of all stages do not fit into memory together, so the stages are measured in turn.
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
            context.timed.clear()  # frees its memory; launches are not counted


def cudnn(context: Context) -> Iterator[Row]:
    """CUT's captured step with all optimisations and cuDNN's benchmark mode; skipped on a CPU."""
    # needs its own process: PyTorch keeps the first kernel chosen for a shape, whatever is set later
    if context.device.type != "cuda":
        return
    stage = replace(stages(cuda=True)[-1], name="+ cuDNN benchmark", cudnn_benchmark=True, streams=False, graph=True)
    for images in (1, 8) if context.large else (1,):
        provider = _provider("cut", stage, context)
        provider.note = "in its own process"
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
    """Apply the switches of a stage to a built step."""
    step.weights_at_once = stage.weights_at_once
    device = step.bad_steps.device
    step.streams = CudaStreams(device) if stage.streams and device.type == "cuda" else None
    leave_out_biases(step.method, stage.no_cancelled_biases)
    fuse_neighbours(step.method, stage.neighbours)
    set_implementation(step.method, stage.layers)
    for module in step.method.modules():
        if isinstance(module, LastConvolution):
            module.implementation = stage.last
        if isinstance(module, ResnetGenerator):
            module.hands_out_taps = stage.taps
        if isinstance(module, PatchNCEHead):
            module.implementation = stage.loss
