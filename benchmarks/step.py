"""Whole training steps: goals P5 to P8 on a GPU, P11 and P12 on a CPU, and the growth of their cost.

Each provider trains its own networks on the same images. Published repositories run their own `optimize_parameters`.
Without a checkout, our step without reuse (it encodes keys again) and with every bias stands in, and the results say
so. The first steps compile, capture, tune and fill Adam's moments; they are not timed. FLOP and least traffic are
counted (`step_costs.py`). For compiled steps see `compiled.py`.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CAPTURED, Case, Context, Provider, Row
from benchmarks.measure import measure
from benchmarks.published import Checkout
from fastnce.engine.cudagraph import WARM_UP
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, NetworkOptions
from fastnce.methods.presets import PRESETS
from fastnce.networks import leave_out_biases

COUNTED = [("cut", 1), ("cut", 8), ("dclgan", 1), ("dcdgan-released", 1), ("dclgan", 4), ("dcdgan", 1), ("fastcut", 1)]
"""Steps of the parts on a GPU, counted in advance in a parallel process."""

PUBLISHED_MODEL = {"cut": "cut", "fastcut": "cut", "dclgan": "dcl", "dcdgan-released": "dcd"}
"""The value of their option `--model`."""

FASTCUT_STEPS = 213_400
"""FastCUT on horse2zebra: 200 epochs of 1,067 images."""


def cut(context: Context) -> Iterator[Row]:
    """CUT's step against the published one (P5, P6; P11 on a CPU)."""
    yield from _steps([("cut", 1), ("cut", 8)] if context.large else [("cut", 1)], context)


def dual(context: Context) -> Iterator[Row]:
    """DCLGAN's and DCD-GAN's steps against the published ones (P7; P12 on a CPU)."""
    large = [("dclgan", 1), ("dcdgan-released", 1), ("dclgan", 4), ("dcdgan", 1)]
    yield from _steps(large if context.large else [("dcdgan-released", 1)], context)


def fastcut(context: Context) -> Iterator[Row]:
    """FastCUT's step, and the projected time of a training on horse2zebra (P8)."""
    yield from _steps([("fastcut", 1)], context, steps=FASTCUT_STEPS)


def growth(context: Context) -> Iterator[Row]:
    """The cost of our CUT step over batch size, resolution and patches per layer."""
    large = context.large
    batches, sides, patches = ((1, 2, 4, 8), (128, 256, 512), (64, 256, 1024)) if large else ((1, 2), (32, 64), ())
    usual = few(context.quick).get("patches", 256)
    points = [(b, None, usual) for b in batches] + [(1, s, usual) for s in sides] + [(1, None, p) for p in patches]
    precision = "fp32" if context.device.type == "cpu" else "bf16"  # the default precision of our step
    for images, side, count in dict.fromkeys((b, s or (256 if large else 32), p) for b, s, p in points):
        size = {"images": images, "side": side, "patches": count}
        provider = our_provider("cut", context, precision, graph=True, network=small(not large), patches=count)
        yield from measure(
            Case("growth cut", size, partial(pictures, images, side, context.device), [provider]), context
        )


def _steps(cases: list[tuple[str, int]], context: Context, steps: int | None = None) -> Iterator[Row]:
    """Measure steps (name, images) against the published ones."""
    for name, images in cases:
        providers = list(step_providers(name, images, context))
        yield from measure(step_case(name, images, context, providers, steps=steps), context)


def step_case(
    name: str,
    images: int,
    context: Context,
    providers: list[Provider],
    title: str = "step",
    steps: int | None = None,
) -> Case:
    """Return a case of whole steps; its FLOP are those of our step, which computes nothing twice."""
    side = step_side(context)
    network = small(context.quick)
    flop = None
    for provider in providers:
        precision = "bf16" if provider.dtype == "bfloat16" else "fp32"
        flop, provider.bytes = context.counts.get(name, images, side, precision, network, few(context.quick))
    size = {"images": images, "side": side}
    inputs = partial(pictures, images, side, context.device)
    return Case(f"{title} {name}", size, inputs, providers, flop=flop, steps=steps)


def step_side(context: Context) -> int:
    return context.side or (32 if context.quick else 256)


def small(quick: bool) -> dict[str, Any]:
    """Return the network options of the quick run."""
    return {"generator": "resnet_4blocks", "width": 8, "discriminator_width": 8} if quick else {}


def few(quick: bool) -> dict[str, Any]:
    """Return the changes to the method's options of the quick run."""
    return {"patches": 16} if quick else {}


def pictures(images: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = (torch.rand(images, 3, side, side, device=device) * 2 - 1 for _ in range(2))
    return a, b


def _products(precision: str, context: Context) -> str:
    """Return the precision that selects a step's ceiling: cuDNN's, as nearly all FLOP are convolutions."""
    if precision == "bf16":
        return "bfloat16"
    return "tf32" if context.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"


def step_providers(name: str, images: int, context: Context) -> Iterator[Provider]:
    """Yield the providers, those of the goals first: on a GPU our captured step, then the published one or stand-in."""
    if context.device.type == "cuda":
        yield our_provider(name, context, "bf16", label="fastnce bf16", graph=True, energy=True)
    full, model = _products("fp32", context), PUBLISHED_MODEL.get(name)
    for checkout in context.published:
        if model is not None and (checkout.folder / "models" / f"{model}_model.py").is_file():
            call = _theirs(checkout, name, images, context)
            yield Provider(f"{checkout.name} published", call, note="published", dtype=full, energy=True)
            break  # later checkouts contain copies of the earlier papers' models
    else:
        yield our_provider(
            name,
            context,
            "fp32",
            label="fastnce, nothing shared",
            note="stands in for the published step",
            energy=True,
            prepare=with_all_biases,
            reuse_key_features=False,
        )
    yield our_provider(name, context, "bf16", label="fastnce bf16")
    yield our_provider(name, context, "fp32", note=_tf32(context))


def with_all_biases(step: Step) -> None:
    """Add every bias, as the published networks do, even if a norm cancels it."""
    leave_out_biases(step.method, False)


def _tf32(context: Context) -> str:
    if context.device.type != "cuda":
        return ""
    return f"matmul TF32 {torch.backends.cuda.matmul.allow_tf32}, cuDNN TF32 {torch.backends.cudnn.allow_tf32}"


@contextlib.contextmanager
def library_flags(tf32: bool | None = None, benchmark: bool | None = None) -> Iterator[None]:
    """Context manager that sets TF32 and cuDNN's benchmark mode (None: unchanged) and restores both at the end."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
    try:
        if tf32 is not None:
            products.allow_tf32 = convolutions.allow_tf32 = tf32
        if benchmark is not None:
            convolutions.benchmark = benchmark
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = before


def our_provider(
    name: str,
    context: Context,
    precision: str,
    *,
    label: str = "fastnce",
    note: str = "",
    energy: bool = False,
    graph: bool = False,
    compile: bool | str = False,
    layout: torch.memory_format | None = None,
    dtype: str | None = None,
    **more: Any,
) -> Provider:
    """Return a provider of our step, captured if the device has graphs; `more` are arguments of `OurStep`."""
    captured = graph and context.device.type == "cuda"
    call = OurStep(name, context, precision, {"compile": compile, "graph": captured, "layout": layout}, **more)
    modes = ["compile whole" if compile == "whole" else "compile"] * bool(compile) + [CAPTURED] * captured
    dtype = dtype or _products(precision, context)
    return Provider(label, call, ", ".join(modes) or "eager", note, dtype, energy=energy, check=call.check)


class OurStep:
    """A call that runs one step. The first call builds the step and warms it up.

    Args:
        form: further arguments of `Step`.
        network: changes to the preset's network options; default `small(context.quick)`.
        prepare: called with the built step.
        flags: arguments of `library_flags` for every call.
        changes: to the method's options; `few(context.quick)` comes before them.
    """

    def __init__(
        self,
        name: str,
        context: Context,
        precision: str,
        form: dict[str, Any],
        *,
        network: dict[str, Any] | None = None,
        prepare: Callable[[Step], None] = lambda _: None,
        flags: dict[str, bool] | None = None,
        **changes: Any,
    ):
        network = small(context.quick) if network is None else network
        self._build = partial(build, name, network, context.device, precision, form, few(context.quick) | changes)
        self._prepare, self._flags = prepare, flags or {}
        self.step: Step | None = None
        self._count = 0
        self._recorded: list[Any] = []

    def __call__(self, a: Tensor, b: Tensor) -> None:
        with library_flags(**self._flags):
            if self.step is None:
                step = self._build()
                self._prepare(step)
                warm(step, Batch(a, b))
                self.step, self._recorded = step, _graphs(step)
            self._count += 1
            self.step.run(Batch(a, b), self.step.method.draw(random.Random(self._count)))

    def check(self) -> str:
        """Return a note for the row: the compile time, or that the step left its form while it was timed."""
        if self.step is None:
            return ""
        if trouble := obstacle(self.step):
            return trouble
        if _graphs(self.step) != self._recorded:
            return "captured again while it was timed"
        return f"compiled in {self.step.compile_seconds:.0f} s" if self.step.compile_seconds else ""


def build(
    name: str,
    network: dict[str, Any],
    device: torch.device,
    precision: str,
    form: dict[str, Any],
    changes: dict[str, Any],
    optim: dict[str, Any] | None = None,
) -> Step:
    """Return our step as `fastnce train` runs it.

    Args:
        network, changes, optim: changes to the options of the networks, of the method and of the updates.
        form: further arguments of `Step`.
    """
    preset = PRESETS[name]
    options = preset.options()
    for key, value in changes.items():
        setattr(options, key, value)
    method = preset.method(options, NetworkOptions(**{**preset.sections.get("network", {}), **network})).to(device)
    optim = {**preset.sections.get("optim", {}), **(optim or {})}
    return Step(method, OptimOptions(**optim), precision, **form)


def warm(step: Step, batch: Batch) -> None:
    """Run steps until graphs are captured and functions compiled.

    Raises:
        RuntimeError: the step fell back to a slower form than requested.
    """
    flips = (False, True) if getattr(step.method.options, "flip_equivariance", False) else (False,)
    for _ in range(1 if step.graphs is None else WARM_UP + 1):
        for flip in flips:
            step.run(batch, Draws(flip=flip))
    if trouble := obstacle(step):
        raise RuntimeError(trouble)


def obstacle(step: Step) -> str:
    """Return why a warm step does not run in the requested form; empty if it does."""
    if step.graphs is not None:
        if step.graphs.failed:
            return f"capture failed: {step.graphs.failed}"
        if not step.graphs.kinds or None in _graphs(step):
            return "not captured"
    if any(getattr(part, "compiled", part) is None for part in (step.generate, *(p.loss for p in step.phases))):
        return "the compiler refused a part of the step"
    if step.whole is not None and not step.whole.usable:
        return "the compiler refused the whole step"
    return ""


def _graphs(step: Step) -> list[Any]:
    return [] if step.graphs is None else [kind.graph for kind in step.graphs.kinds.values()]


def _theirs(checkout: Checkout, name: str, images: int, context: Context) -> Callable[[Tensor, Tensor], None]:
    """Return their step as their train.py runs it. The first call builds it.

    Their code enables cuDNN's benchmark mode for the whole process; here it is enabled only during their calls.
    """
    state: dict[str, Any] = {"benchmark": None}

    def call(a: Tensor, b: Tensor) -> None:
        data = {"A": a, "B": b, "A_paths": "", "B_paths": ""}
        with library_flags(benchmark=state["benchmark"]):
            if "model" not in state:
                state["model"] = _their_model(checkout, name, images, context, data)
                state["benchmark"] = torch.backends.cudnn.benchmark
            state["model"].set_input(data)
            state["model"].optimize_parameters()

    return call


def _their_model(checkout: Checkout, name: str, images: int, context: Context, data: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        width = ["--netG", "resnet_4blocks", "--ngf", "8", "--ndf", "8", "--num_patches", "16"] if context.quick else []
        mode = ["--CUT_mode", "FastCUT"] if name == "fastcut" else []
        folders = ["--checkpoints_dir", folder, "--name", "benchmark", "--dataroot", folder]
        gpus = ["--gpu_ids", str(context.device.index or 0) if context.device.type == "cuda" else "-1"]
        size = ["--batch_size", str(images), *width, *mode]
        built = checkout.model([*folders, *gpus, "--model", PUBLISHED_MODEL[name], *size])
        built.data_dependent_initialize(data)
        built.setup(built.opt)
        built.parallelize()
        return built
