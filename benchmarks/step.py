"""Whole training steps: P5, P6 and P7 of the goals on a GPU, P11 and P12 on a CPU.

Each provider trains its own networks on the same pictures. The published repositories run their own
`optimize_parameters`; without one, our own step that shares nothing (keys encoded again) stands in, and the results say
so. A step is measured after its first ones, which compile, tune and fill Adam's moments.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Case, Context, Provider, Row, measure
from benchmarks.published import Checkout
from fastnce.engine.optim import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import PRESETS, Batch, NetworkOptions

PUBLISHED_MODEL = {"cut": "cut", "fastcut": "cut", "dclgan": "dcl", "dcdgan-released": "dcd"}
"""The name that their `--model` takes."""


def cut(context: Context) -> Iterator[Row]:
    """CUT's step beside the published repository's (P5, P6; P11 on a CPU)."""
    batches = (1, 8) if context.device.type != "cpu" and not context.quick else (1,)
    for images in batches:
        yield from measure(_case("cut", images, context), context)


def dual(context: Context) -> Iterator[Row]:
    """DCLGAN's and the released DCD-GAN's step beside the published repositories' (P7; P12 on a CPU)."""
    names = ("dcdgan-released",) if context.device.type == "cpu" else ("dclgan", "dcdgan-released", "dcdgan")
    for name in names:
        yield from measure(_case(name, 1, context), context)


def _case(name: str, images: int, context: Context) -> Case:
    side = 64 if context.quick else 256
    pictures = partial(_pictures, images, side, context.device)
    providers = list(_providers(name, images, context))
    with FlopCounterMode(display=False) as counter:  # of our step, which computes nothing twice
        providers[0].call(*pictures())
    return Case(
        f"step {name}",
        {"images": images, "dtype": "float32"},
        pictures,
        providers,
        flop=float(counter.get_total_flops()),
        energy=images > 1,
    )


def _pictures(images: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = (torch.rand(images, 3, side, side, device=device) * 2 - 1 for _ in range(2))
    return a, b


def _providers(name: str, images: int, context: Context) -> Iterator[Provider]:
    network = {"width": 8, "discriminator_width": 8} if context.quick else {}
    cpu = context.device.type == "cpu"
    yield Provider("fastnce", _ours(name, network, context, "fp32"), note=_tf32(context))
    yield Provider("fastnce bf16", _ours(name, network, context, "bf16"))
    if not cpu:
        yield Provider("fastnce bf16", _ours(name, network, context, "bf16", compiled=True), "compile")
    yield Provider(
        "fastnce, nothing shared",
        _ours(name, network, context, "fp32", reuse_key_features=False),
        note="no reuse of keys",
    )
    model = PUBLISHED_MODEL.get(name)
    for checkout in context.published:
        if model is not None and (checkout.folder / "models" / f"{model}_model.py").is_file():
            yield Provider(f"{checkout.name} published", _theirs(checkout, model, images, context), note="published")
            break  # later checkouts carry copies of the earlier papers' models


def _tf32(context: Context) -> str:
    if context.device.type != "cuda":
        return ""
    return f"matmul TF32 {torch.backends.cuda.matmul.allow_tf32}, cuDNN TF32 {torch.backends.cudnn.allow_tf32}"


def _ours(
    name: str, network: dict[str, int], context: Context, precision: str, compiled: bool = False, **changes: bool
) -> Callable[[Tensor, Tensor], None]:
    """Our step as `fastnce train` runs it; built at the first call."""
    state: dict[str, Step] = {}
    count = [0]

    def call(a: Tensor, b: Tensor) -> None:
        if not state:
            preset = PRESETS[name]
            options = preset.options()
            for key, value in changes.items():
                setattr(options, key, value)
            method = preset.method(options, NetworkOptions(**{**preset.sections.get("network", {}), **network}))
            method = method.to(context.device)
            optim = preset.sections.get("optim", {})
            state["step"] = Step(method, OptimOptions(**optim), precision, compiled)
        count[0] += 1
        step = state["step"]
        step.run(Batch(a, b), step.method.draw(random.Random(count[0])))

    return call


def _theirs(checkout: Checkout, model: str, images: int, context: Context) -> Callable[[Tensor, Tensor], None]:
    """Their step, as their train.py runs it; built at the first call."""
    state = {}

    def call(a: Tensor, b: Tensor) -> None:
        data = {"A": a, "B": b, "A_paths": "", "B_paths": ""}
        if not state:
            with tempfile.TemporaryDirectory() as folder:
                width = ["--ngf", "8", "--ndf", "8"] if context.quick else []
                place = ["--checkpoints_dir", folder, "--name", "benchmark", "--dataroot", folder]
                gpus = ["--gpu_ids", str(context.device.index or 0) if context.device.type == "cuda" else "-1"]
                built = checkout.model([*place, *gpus, "--model", model, "--batch_size", str(images), *width])
                built.data_dependent_initialize(data)
                built.setup(built.opt)
                built.parallelize()
            state["model"] = built
        state["model"].set_input(data)
        state["model"].optimize_parameters()

    return call
