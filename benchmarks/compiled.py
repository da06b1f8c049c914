"""Our steps through the compiler, whole and in parts, beside the same step recorded without it.

python benchmarks/run.py --out DIR --only compiled

A part of its own, and the last: compiling takes a minute or more a step, and no other figure may wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch._dynamo

from benchmarks.cases import Context, Row
from benchmarks.measure import measure
from benchmarks.step import FASTCUT_STEPS, our_provider, step_case


def compiled(context: Context) -> Iterator[Row]:
    """Our captured step without a compiler, compiled whole, compiled in parts; nothing on a CPU or in the dry run."""
    if context.device.type != "cuda" or context.quick:
        return
    for name, images, steps in (("cut", 1, None), ("fastcut", 1, FASTCUT_STEPS), ("cut", 8, None)):
        yield from forms_of(name, images, (False, "whole", True), context, steps)


def forms_of(
    name: str, images: int, forms: Sequence[bool | str], context: Context, steps: int | None = None
) -> Iterator[Row]:
    """Our captured step in these forms of `Step(compile=...)`, side by side."""
    context.patience, context.share = float("inf"), 0.95  # the last thing measured: it may take all that is left
    torch._dynamo.reset()  # or the same functions, compiled for other sizes, would count against a limit
    providers = [our_provider(name, context, "bf16", label="fastnce bf16", graph=True, compile=form) for form in forms]
    yield from measure(step_case(name, images, context, providers, "compiled step", steps), context)
