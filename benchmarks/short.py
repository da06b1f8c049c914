"""The parts of `check.py`: the measurements behind the goals, in one or two minutes each.

python benchmarks/check.py --out DIR --only loss steps waterfall compiled
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.cases import Context, Row
from benchmarks.chain import chain_case, layer_shapes
from benchmarks.compiled import forms_of
from benchmarks.loss import GOALS, infonce_cases
from benchmarks.measure import measure
from benchmarks.step import FASTCUT_STEPS, step_case, step_providers
from benchmarks.step import growth as step_growth
from benchmarks.waterfall import measure_stages

STEPS = (("cut", 1), ("cut", 8), ("fastcut", 1), ("dclgan", 1), ("dcdgan-released", 1))
"""Goals P5, P6, P8, P7, P7."""


def loss(context: Context) -> Iterator[Row]:
    """P1 to P4: the chain of one image, InfoNCE of 16,384 and 65,536 rows, the chain of 16 images, 256 rows."""
    side, patches = (32, 16) if context.quick else (256, 256)
    shapes = layer_shapes(side)
    context.cases = 16  # many providers per case, whose first calls take time
    halves = (True, False) if context.device.type == "cuda" else (False,)
    for half in halves:
        yield from measure(chain_case(context, shapes, 1, patches, half), context)
    for case in infonce_cases(context, GOALS[:2]):
        if not case.benchmark.endswith("compiled"):
            yield from measure(case, context)
    for half in halves if context.large else ():
        yield from measure(chain_case(context, shapes, 16, patches, half), context)
    for case in infonce_cases(context, GOALS[2:]) if context.large else ():
        yield from measure(case, context)


def steps(context: Context) -> Iterator[Row]:
    """P5 to P8: our captured step against the published step or its stand-in."""
    for name, images in STEPS if context.large else STEPS[:1]:
        providers = list(itertools.islice(step_providers(name, images, context), 2))
        count = FASTCUT_STEPS if name == "fastcut" else None
        yield from measure(step_case(name, images, context, providers, steps=count), context)


def waterfall(context: Context) -> Iterator[Row]:
    """The contribution of each optimisation to CUT's step, with 1 and with 8 images."""
    context.cases = 32  # building sixteen steps takes most of the time
    for images in (1, 8) if context.large else (1,):
        yield from measure_stages("cut", images, context)


def growth(context: Context) -> Iterator[Row]:
    """The cost of our CUT step over batch size, resolution and patches per layer."""
    context.cases = 24
    yield from step_growth(context)


def compiled(context: Context) -> Iterator[Row]:
    """CUT's captured step compiled in parts, against the same step uncompiled; skipped on a CPU."""
    if context.device.type == "cuda" and not context.quick:
        yield from forms_of("cut", 1, (False, True), context)
