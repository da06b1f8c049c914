"""Plans: recorded once per layout, replayed with other tensors, refused where PyTorch computes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fastnce.kernels import common, planned, record
from fastnce.kernels.common import launch
from fastnce.kernels.plan import State

from tests.oracle import DEVICE


@triton.jit
def add_kernel(pairs, out, count, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(pairs[0] + o_n, mask=o_n < count, other=0.0)
    b = tl.load(pairs[1] + o_n, mask=o_n < count, other=0.0)
    tl.store(out + o_n, a + b, mask=o_n < count)


def add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    launch(add_kernel, triton.cdiv(a.numel(), 32), a, (a, b), out, a.numel(), BLOCK=32)


@planned.planned
def sums(tensors, *, times: int):
    """Sums of two tensors: as a whole, as rows of one allocation, and in a state, with scratch memory before them."""
    a, b = tensors
    scratch, whole, state = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
    flat = a.new_empty(2 * a.numel())
    add(a, b, scratch)
    for _ in range(times):
        add(scratch, b, whole)
    add(a, a, flat[: a.numel()])
    add(b, b, flat[a.numel() :])
    add(scratch, scratch, state)
    return whole, flat.view(2, -1), State((state.view(2, -1),))


def check(a, b, times=1):
    whole, (first, second), state = sums([a, b], times=times)
    assert torch.equal(whole, a + b + b)
    assert torch.equal(first, a + a)
    assert torch.equal(second, b + b)
    plan = planned.plan_of(sums, [a, b], times=times)
    assert torch.equal(plan.state[0].of(state).flatten(), 2 * (a + b))


def whole_numbers(count: int) -> torch.Tensor:
    return torch.randint(-99, 99, (count,), device=DEVICE).float()


def test_a_plan_is_replayed_with_other_tensors(monkeypatch):
    made = []
    make = planned.make_plan
    monkeypatch.setattr(planned, "make_plan", lambda *a: made.append(a) or make(*a))
    for _ in range(3):
        check(whole_numbers(100), whole_numbers(100))
    assert len(made) == 1
    check(whole_numbers(102), whole_numbers(102))  # another shape
    assert len(made) == 2
    check(whole_numbers(100), whole_numbers(100), times=2)  # other settings
    assert len(made) == 3
    shared = whole_numbers(100)
    check(shared, shared)  # one tensor twice: nothing new
    assert len(made) == 3
    planned.forget_plans()
    check(whole_numbers(100), whole_numbers(100))
    assert len(made) == 4


def test_views_and_misaligned_tensors():
    long = whole_numbers(205)
    check(long[:100], long[100:200])
    check(long[1:101], long[102:202])  # addresses that are no multiples of 16 bytes
    check(long[:100], whole_numbers(100))


def doubled(x):
    out = torch.empty_like(x)
    add(x * 2, x, out)
    return out


def cleared(x):
    out = torch.empty_like(x)
    add(x, x, out)
    more = torch.empty_like(x).copy_(x)
    add(out, more, out)
    return out


@pytest.mark.parametrize("function", [doubled, cleared])
def test_what_pytorch_computes_is_not_planned(function):
    run = planned.planned(function)
    for _ in range(2):
        x = whole_numbers(64)
        assert torch.equal(run(x), 3 * x)
    assert planned.plan_of(run, x) is None


def test_a_part_of_an_allocation_is_not_planned():
    @planned.planned
    def tail(x):
        out = x.new_empty(2 * x.numel())
        add(x, x, out[x.numel() :])
        return out[x.numel() :]

    x = whole_numbers(16)
    assert torch.equal(tail(x), x + x)
    assert planned.plan_of(tail, x) is None


def test_an_error_comes_at_every_call():
    @planned.planned
    def refused(x):
        raise ValueError("too large")

    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            refused(whole_numbers(4))


def test_products_are_a_setting(monkeypatch):
    asked = []
    monkeypatch.setattr(planned, "fp32_precision", lambda *names: asked.append(names) or len(asked))

    @planned.planned(products="conv")
    def run(x):
        out = torch.empty_like(x)
        add(x, x, out)
        return out

    x = whole_numbers(8)
    assert torch.equal(run(x), x + x)
    first = planned.plan_of(run, x)
    assert planned.plan_of(run, x) is not first  # the setting differs
    assert set(asked) == {("cuda", "conv")}


def test_many_layouts_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(planned, "MOST_PLANS", 4)

    @planned.planned
    def run(x):
        out = torch.empty_like(x)
        add(x, x, out)
        return out

    for count in range(1, 20):
        x = whole_numbers(count)
        assert torch.equal(run(x), x + x)
    assert max(map(len, planned._caches)) <= 4


def test_a_tensor_keeps_its_place_in_a_state():
    """Tensors of a state begin at multiples of 256 bytes and do not overlap."""
    plan = planned.plan_of(sums, [whole_numbers(100), whole_numbers(100)], times=1)
    assert all(field.offset % record.ALIGNMENT == 0 for field in plan.state)
    assert common.RECORDING.launches is None  # nothing is recorded outside of `make_plan`
