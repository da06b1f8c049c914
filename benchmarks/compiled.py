"""Our captured steps compiled whole and in parts, against the same steps without the compiler.

python benchmarks/run.py --out DIR --only compiled

This part runs last, because compiling takes a minute or more per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch._dynamo

from benchmarks.cases import Context, Row
from benchmarks.measure import measure
from benchmarks.step import FASTCUT_STEPS, our_provider, step_case


def compiled(context: Context) -> Iterator[Row]:
    """Our captured step uncompiled, compiled whole and compiled in parts; skipped on a CPU and with --quick."""
    if context.device.type != "cuda" or context.quick:
        return
    for name, images, steps in (("cut", 1, None), ("fastcut", 1, FASTCUT_STEPS), ("cut", 8, None)):
        yield from forms_of(name, images, (False, "whole", True), context, steps)


def forms_of(
    name: str, images: int, forms: Sequence[bool | str], context: Context, steps: int | None = None
) -> Iterator[Row]:
    """Measure our captured step with each of these values of `Step(compile=...)`, side by side."""
    context.patience, context.share = float("inf"), 0.95  # the last measurement may use all the remaining time
    torch._dynamo.reset()  # otherwise earlier compilations for other sizes count against Dynamo's limit
    providers = [our_provider(name, context, "bf16", label="fastnce bf16", graph=True, compile=form) for form in forms]
    yield from measure(step_case(name, images, context, providers, "compiled step", steps), context)
