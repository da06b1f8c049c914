"""Plans: the host work of a launch is done once per layout of the tensors, and replayed afterwards.

Triton's own launch binds, specialises and packs its arguments at every call. With tuples of tensors that costs more
CPU time than everything else in an uncaptured loss. A function with the decorator `planned` runs once on tensors
without memory for each layout (shapes, strides, dtypes, alignment). `record.py` keeps what that run allocates,
launches and returns. Every later call allocates the same tensors and starts the compiled kernels directly, with only
the addresses replaced.

A planned function may allocate tensors, view them and launch kernels; anything else is noticed, and the function then
runs without a plan. Plans are for CUDA with a version of Triton in `plan.TRITON_VERSIONS`, and for Triton's
interpreter, in which every test of a kernel also tests its plan. Elsewhere the function simply runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from .common import fp32_precision
from .plan import INTERPRETED, USABLE, Plan
from .record import make_plan

F = TypeVar("F", bound=Callable)

MOST_PLANS = 1024
"""The most plans of one function. Beyond them all are discarded: a plan is made in milliseconds."""


def planned(function: F | None = None, *, products: str = "") -> Any:
    """Decorator: replay the host work of a function that only allocates, views and launches.

    Its positional arguments are tensors, lists of tensors, and hashable values. Its keyword arguments are hashable and
    have the same order at every call. All tensors are on one device.

    `products`: "matmul" or "conv" if the function also depends on how PyTorch multiplies float32 there.
    """
    if function is None:
        return functools.partial(planned, products=products)
    return _planned(function, products) if USABLE else function


class PlanCache(dict):
    """A dictionary of plans, of limited size, that `forget_plans` clears."""

    def __init__(self) -> None:
        super().__init__()
        _caches.append(self)

    def __setitem__(self, key: Any, plan: Any) -> None:
        if len(self) >= MOST_PLANS:
            self.clear()
        super().__setitem__(key, plan)


_caches: list[PlanCache] = []


def forget_plans() -> None:
    """Discard all plans. Call it after a change of what their keys do not contain, such as the table of tiles."""
    for cache in _caches:
        cache.clear()


def plan_of(function: Callable, *arguments: Any, **options: Any) -> Plan | None:
    """Return the plan of a planned function for these arguments; None if it runs without one."""
    return function.find(arguments, options)[0] if hasattr(function, "find") else None


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a plan depends on of a tensor, beside its device."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15 == 0


def _planned(function: Callable, products: str) -> Callable:
    cache = PlanCache()

    def find(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Plan | None, list[Tensor]]:
        tensors: list[Tensor] = []
        key: list[Any] = [*options.values()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
                key += (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() & 15 == 0)
            elif argument is None:
                key.append(None)
            elif isinstance(argument, (list, tuple)):
                key.append(len(argument))
                for item in argument:
                    if isinstance(item, Tensor):
                        tensors.append(item)
                        key += (item.shape, item.stride(), item.dtype, item.data_ptr() & 15 == 0)
                    else:
                        key.append(item)
            else:
                key.append(argument)
        device = tensors[0].device
        if not (device.type == "cuda" or (INTERPRETED and device.type == "cpu")):
            return None, tensors
        key.append(device)
        if products:
            key.append(fp32_precision("cuda", products))
        whole = tuple(key)
        try:
            plan = cache[whole]
        except KeyError:
            plan = cache[whole] = make_plan(function, arguments, options, device)
        return plan, tensors

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        plan, tensors = find(arguments, options)
        return function(*arguments, **options) if plan is None else plan.replay(tensors)

    call.find = find  # type: ignore[attr-defined]
    return call
