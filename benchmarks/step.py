"""Whole training steps: P5, P6, P7 and P8 of the goals on a GPU, P11 and P12 on a CPU; and how their cost grows.

Each provider trains its own networks on the same pictures. The published repositories run their own
`optimize_parameters`; without one, our own step that shares nothing (keys encoded again) stands in, and the results say
so. A step is measured after its first ones, which compile, record, tune and fill Adam's moments. FLOP and the least
traffic of a step are counted (`benchmarks/count.py`), not measured.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case, Context, Provider, Row, measure
from benchmarks.published import Checkout
from fastnce.engine.cudagraph import WARM_UP
from fastnce.engine.optim import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import PRESETS, Batch, Draws, NetworkOptions

COUNTED = [("cut", 1), ("dclgan", 1), ("dcdgan-released", 1), ("dcdgan", 1), ("fastcut", 1), ("cut", 8), ("dclgan", 4)]
"""Steps at which the parts on a GPU look, to be counted while they do something else."""

PUBLISHED_MODEL = {"cut": "cut", "fastcut": "cut", "dclgan": "dcl", "dcdgan-released": "dcd"}
"""The name that their `--model` takes."""

FASTCUT_STEPS = 213_400
"""FastCUT on horse2zebra: 200 epochs of 1,067 pictures."""


def cut(context: Context) -> Iterator[Row]:
    """CUT's step beside the published repository's (P5, P6; P11 on a CPU)."""
    yield from _steps([("cut", 1), ("cut", 8)] if _large(context) else [("cut", 1)], context)


def dual(context: Context) -> Iterator[Row]:
    """DCLGAN's and DCD-GAN's steps beside the published repositories' (P7; P12 on a CPU)."""
    large = [("dclgan", 1), ("dcdgan-released", 1), ("dcdgan", 1), ("dclgan", 4)]
    yield from _steps(large if _large(context) else [("dcdgan-released", 1)], context)


def fastcut(context: Context) -> Iterator[Row]:
    """FastCUT's step, and what all steps on horse2zebra would take (P8)."""
    yield from _steps([("fastcut", 1)], context, steps=FASTCUT_STEPS)


def growth(context: Context) -> Iterator[Row]:
    """Our CUT step against batch size, resolution and patches a layer: how does its cost grow?"""
    large = _large(context)
    batches, sides, patches = ((1, 2, 4, 8), (128, 256, 512), (64, 256, 1024)) if large else ((1, 2), (32, 64), ())
    points = [(b, None, 256) for b in batches] + [(1, s, 256) for s in sides] + [(1, None, p) for p in patches]
    form = {"graph": True} if context.device.type == "cuda" else {}
    for images, side, count in dict.fromkeys((b, s or (256 if large else 32), p) for b, s, p in points):
        call = ours("cut", small(not large), context, _sixteen(context), form=form, patches=count)
        mode = "captured" if form else "eager"
        yield from measure(
            Case(
                "growth cut",
                {"images": images, "side": side, "patches": count},
                partial(pictures, images, side, context.device),
                [Provider("fastnce", call, mode, dtype=_products(_sixteen(context), context))],
            ),
            context,
        )


def _large(context: Context) -> bool:
    return context.device.type != "cpu" and not context.quick


def _sixteen(context: Context) -> str:
    """The precision that our step would choose here."""
    return "fp32" if context.device.type == "cpu" else "bf16"


def _steps(cases: list[tuple[str, int]], context: Context, steps: int | None = None) -> Iterator[Row]:
    """Steps (name, images) beside the published ones; then, as a compiler may be slow, their compiled forms."""
    for name, images in cases:
        providers = list(_providers(name, images, context))
        yield from measure(step_case(name, images, context, providers, steps=steps), context)
    if context.device.type == "cuda" and not context.quick:
        for name, images in cases:
            providers = list(_compiled(name, context))
            yield from measure(step_case(name, images, context, providers, "compiled", steps), context)


def step_case(
    name: str,
    images: int,
    context: Context,
    providers: list[Provider],
    kind: str = "",
    steps: int | None = None,
) -> Case:
    """A case of whole steps: its FLOP are those of our step, which computes nothing twice."""
    side = step_side(context)
    network = small(context.quick)
    for provider in providers:
        precision = "bf16" if provider.dtype == "bfloat16" else "fp32"
        flop, provider.bytes = context.counts.get(name, images, side, precision, network)
    return Case(
        " ".join(filter(None, ("step", name, kind))),
        {"images": images, "side": side},
        partial(pictures, images, side, context.device),
        providers,
        flop=flop,
        energy=_large(context),
        steps=steps,
    )


def step_side(context: Context) -> int:
    return context.side or (32 if context.quick else 256)


def small(quick: bool) -> dict[str, Any]:
    """Network options of the dry run."""
    return {"generator": "resnet_4blocks", "width": 8, "discriminator_width": 8} if quick else {}


def pictures(images: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = (torch.rand(images, 3, side, side, device=device) * 2 - 1 for _ in range(2))
    return a, b


def _products(precision: str, context: Context) -> str:
    """Whose ceiling a step is held against. Nearly all FLOP are convolutions, so cuDNN's setting decides."""
    if precision == "bf16":
        return "bfloat16"
    return "tf32" if context.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"


def _providers(name: str, images: int, context: Context) -> Iterator[Provider]:
    network, full, half = small(context.quick), _products("fp32", context), _products("bf16", context)
    yield Provider("fastnce", ours(name, network, context, "fp32"), note=_tf32(context), dtype=full)
    yield Provider("fastnce bf16", ours(name, network, context, "bf16"), dtype=half)
    if context.device.type == "cuda":
        call = ours(name, network, context, "bf16", form={"graph": True})
        yield Provider("fastnce bf16", call, "captured", dtype=half)
    model = PUBLISHED_MODEL.get(name)
    for checkout in context.published:
        if model is not None and (checkout.folder / "models" / f"{model}_model.py").is_file():
            call = _theirs(checkout, name, images, context)
            yield Provider(f"{checkout.name} published", call, note="published", dtype=full)
            break  # later checkouts carry copies of the earlier papers' models
    else:
        call = ours(name, network, context, "fp32", reuse_key_features=False)
        yield Provider("fastnce, nothing shared", call, note="stands in for the published step", dtype=full)


def _compiled(name: str, context: Context) -> Iterator[Provider]:
    network, half = small(context.quick), _products("bf16", context)
    yield Provider("fastnce bf16", ours(name, network, context, "bf16", form={"graph": True}), "captured", dtype=half)
    for mode, compile in (("compile", True), ("compile whole", "whole")):
        call = ours(name, network, context, "bf16", form={"compile": compile, "graph": True})
        yield Provider("fastnce bf16", call, f"{mode}, captured", dtype=half)


def _tf32(context: Context) -> str:
    if context.device.type != "cuda":
        return ""
    return f"matmul TF32 {torch.backends.cuda.matmul.allow_tf32}, cuDNN TF32 {torch.backends.cudnn.allow_tf32}"


def build(
    name: str, network: dict[str, Any], device: torch.device, precision: str, form: dict[str, Any], changes: dict
) -> Step:
    """Our step as `fastnce train` runs it; `form` are further arguments of `Step`."""
    preset = PRESETS[name]
    options = preset.options()
    for key, value in changes.items():
        setattr(options, key, value)
    method = preset.method(options, NetworkOptions(**{**preset.sections.get("network", {}), **network})).to(device)
    optim = preset.sections.get("optim", {})
    return Step(method, OptimOptions(**optim), precision, **form)


def ours(
    name: str,
    network: dict[str, Any],
    context: Context,
    precision: str,
    form: dict[str, Any] | None = None,
    prepare: Callable[[Step], None] = lambda _: None,
    before: Callable[[], None] = lambda: None,
    **changes: Any,
) -> Callable[[Tensor, Tensor], None]:
    """A call that makes one step; the first call builds it and takes it to where it goes on without warming up.

    Args:
        prepare: given the built step.
        before: called ahead of every step.
    """
    state: dict[str, Step] = {}
    count = [0]

    def call(a: Tensor, b: Tensor) -> None:
        before()
        if not state:
            step = build(name, network, context.device, precision, form or {}, changes)
            prepare(step)
            warm(step, Batch(a, b))
            state["step"] = step
        count[0] += 1
        step = state["step"]
        step.run(Batch(a, b), step.method.draw(random.Random(count[0])))

    return call


def warm(step: Step, batch: Batch) -> None:
    """Until graphs are recorded and functions compiled.

    Raises:
        RuntimeError: the step fell back to a slower form than it was asked for.
    """
    flips = (False, True) if getattr(step.method.options, "flip_equivariance", False) else (False,)
    for _ in range(1 if step.graphs is None else WARM_UP + 1):
        for flip in flips:
            step.run(batch, Draws(flip=flip))
    parts = [step.generate, *(phase.loss for phase in step.phases)]
    if step.graphs is not None and step.graphs.failed:
        raise RuntimeError(f"recording failed: {step.graphs.failed}")
    if any(getattr(part, "compiled", part) is None for part in parts):
        raise RuntimeError("the compiler refused a part of the step")
    if step.whole is not None and not step.whole.usable:
        raise RuntimeError("the compiler refused the whole step")


def _theirs(checkout: Checkout, name: str, images: int, context: Context) -> Callable[[Tensor, Tensor], None]:
    """Their step, as their train.py runs it; built at the first call."""
    state = {}

    def call(a: Tensor, b: Tensor) -> None:
        data = {"A": a, "B": b, "A_paths": "", "B_paths": ""}
        if not state:
            with tempfile.TemporaryDirectory() as folder:
                width = ["--netG", "resnet_4blocks", "--ngf", "8", "--ndf", "8"] if context.quick else []
                mode = ["--CUT_mode", "FastCUT"] if name == "fastcut" else []
                place = ["--checkpoints_dir", folder, "--name", "benchmark", "--dataroot", folder]
                gpus = ["--gpu_ids", str(context.device.index or 0) if context.device.type == "cuda" else "-1"]
                size = ["--batch_size", str(images), *width, *mode]
                built = checkout.model([*place, *gpus, "--model", PUBLISHED_MODEL[name], *size])
                built.data_dependent_initialize(data)
                built.setup(built.opt)
                built.parallelize()
            state["model"] = built
        state["model"].set_input(data)
        state["model"].optimize_parameters()

    return call
