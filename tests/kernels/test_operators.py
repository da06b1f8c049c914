"""The operations that the tests compute in NumPy give what Triton's interpreter gives, or leave it the operands.

Both are called within a launch, where the interpreter has replaced the language. Data, types and errors must be alike.
"""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastnce.kernels import common
from triton.language import core
from triton.runtime import interpreter

from tests import interpreter as faster
from tests import operators

pytestmark = pytest.mark.skipif(not common.INTERPRET.value, reason="Triton's interpreter is off")

PLAIN = {name: core.tensor.__dict__[name] for name in operators.METHODS}
PLAIN |= {name: getattr(core, name) for name in operators.FUNCTIONS}
WHOLE = [-(2**31), -1, 0, 3]
REAL = [-0.0, 2.5, float("inf"), float("nan")]
NUMBERS = [0, 3, -2, 2**31, 2**63, 2**64, -(2**63) - 1, -0.0, 0.5, 1e-40, 1e39, True, tl.constexpr(2), None]
KINDS = (*operators.DTYPES, tl.int8)
FEW = (tl.int1, tl.int32, tl.int64, tl.float32)
MEMORY = np.arange(8, 2056, dtype=np.float32)  # for addresses
BYTES = np.array([1, 0, 1, 1], np.uint8)
launch_calls: list = []


@triton.jit
def calling_kernel(out):
    launch_calls[-1]()


def in_a_launch(function) -> None:
    """Triton's own exception would hide that of an assertion."""
    failures = []

    def call():
        try:
            with np.errstate(all="ignore"):
                function()
        except AssertionError as error:
            failures.append(error)

    launch_calls.append(call)
    calling_kernel[(1,)](torch.zeros(1))
    launch_calls.pop()
    if failures:
        raise failures[0]


def tensor(kind, shape: tuple[int, ...]):
    """A tensor of a type with zeros, signs and what is not finite. Shape (): a scalar."""
    dtype = np.dtype(np.int8) if kind is tl.int8 else operators.DTYPES[kind]
    if kind is tl.bfloat16:
        data = (np.array(REAL, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = np.array(REAL if kind.is_floating() else WHOLE).astype(dtype)
    data = data[: max(1, np.prod(shape, dtype=int))].reshape(shape or (1,))
    return core.tensor(interpreter.TensorHandle(data, kind), core.block_type(kind, list(shape)) if shape else kind)


def pointer(offsets: np.ndarray, start: np.ndarray = MEMORY, element=tl.float32):
    kind = core.pointer_type(element)
    data = (start.ctypes.data + start.itemsize * offsets).astype(np.uint64)
    return core.tensor(interpreter.TensorHandle(data, kind), core.block_type(kind, list(data.shape)))


def plain(name: str):
    def call(*given, **options):
        return PLAIN[name](*given, **options, _semantic=interpreter.interpreter_semantic)

    return call


def result_of(function, given, options):
    try:
        made = function(*given, **options)
    except Exception as error:
        return type(error)
    if type(made) is not core.tensor:
        return made
    data = made.handle.data
    shape = [int(side) for side in made.shape]
    return str(made.type), str(made.dtype), shape, data.dtype, data.shape, np.ascontiguousarray(data).tobytes()


def compare(name: str, *given, **options) -> bool:
    """Whether the operands were known. Where they are not, the interpreter's own function is called once."""
    own, calls = plain(name), []

    def counted(*given, **options):
        calls.append(1)
        return own(*given, **options)

    faster = {**operators.METHODS, **operators.FUNCTIONS}[name](counted)
    wanted, found = result_of(own, given, options), result_of(faster, given, options)
    described = [str(getattr(each, "type", each)) for each in given]
    assert found == wanted, (name, described, options)
    return not calls


OPERATORS = [name for name in operators.METHODS if name not in ("__getitem__", "to")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    def every_pair():
        sizes = (((4,), (4,)), ((), (4,)), ((4,), ()), ((), ()), ((2,), (2, 1)), ((4,), (2,)))
        known = 0
        for a, b in itertools.product(KINDS, KINDS):
            known += compare(name, tensor(a, (2, 1)), tensor(b, (1, 2)))
        for (left, right), a, b in itertools.product(sizes, FEW, FEW):
            known += compare(name, tensor(a, left), tensor(b, right))
        for kind, shape, number in itertools.product(KINDS, ((), (4,)), NUMBERS):
            known += compare(name, tensor(kind, shape), number)
        assert known > 10

    in_a_launch(every_pair)


@pytest.mark.filterwarnings("ignore")
def test_addresses():
    def sums():
        places = pointer(np.arange(4).reshape(4, 1))
        for kind, shape in itertools.product(KINDS, ((4, 1), (1, 4), (), (2, 1))):
            assert compare("__add__", places, tensor(kind, shape)) == (kind in (tl.int32, tl.int64) and shape != (2, 1))
            compare("__add__", tensor(kind, shape), places)
        compare("__add__", places, 3)
        compare("__sub__", places, tensor(tl.int32, (4, 1)))
        compare("__add__", places, places)

    in_a_launch(sums)


@pytest.mark.filterwarnings("ignore")
def test_conversions():
    def all_of_them():
        tiny = np.array([1e-40, 2.0], np.float32)
        single = core.tensor(interpreter.TensorHandle(tiny, tl.float32), core.block_type(tl.float32, [2]))
        for source, target, shape in itertools.product(KINDS, KINDS, ((), (2, 2))):
            known = (source is target is not tl.int8) or {source, target} == {tl.float32, tl.bfloat16}
            known = known or (id(source), id(target)) in operators.CONVERTED
            assert compare("to", tensor(source, shape), target) == known
            compare("cast", tensor(source, shape), target)
        compare("to", single, tl.bfloat16)
        compare("to", tensor(tl.float32, (4,)), tl.float16, fp_downcast_rounding="rtz")
        compare("to", tensor(tl.float32, (4,)), tl.int32, bitcast=True)
        compare("to", tensor(tl.float32, (4,)) > 0, tl.float32)
        compare("cast", 3, tl.float32)

    in_a_launch(all_of_them)


@pytest.mark.filterwarnings("ignore")
def test_choices_and_axes():
    def all_of_them():
        for shape, left, right in itertools.product(((), (4,), (2, 1)), ((4,), (), (1, 2)), ((4,), ())):
            for a, b in itertools.product(FEW, repeat=2):
                compare("where", tensor(tl.int1, shape), tensor(a, left), tensor(b, right))
        for kind, number in itertools.product(KINDS, NUMBERS):
            compare("where", tensor(tl.int1, (2, 1)), tensor(kind, (1, 2)), number)
            compare("where", tensor(tl.int1, (4,)), number, tensor(kind, ()))
        compare("where", tensor(tl.int32, (4,)), tensor(tl.float32, (4,)), 0.0)
        compare("where", tensor(tl.int1, (4,)), 1.0, 0.0)
        every = slice(None)
        for shape, keys in itertools.product(
            ((), (4,), (2, 2)), (None, every, (every, None), (None, every), (every, None, every), 0, slice(0, 2))
        ):
            compare("__getitem__", tensor(tl.float32, shape), keys)
        for shape, number, kind in itertools.product(([4], [2, 4], (4,), [], [3]), NUMBERS, KINDS):
            compare("full", shape, number, kind)

    in_a_launch(all_of_them)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [4, 1024])
def test_loads(count):
    """Few values are loaded by Triton's loop, many by NumPy's."""

    def all_of_them():
        order = np.random.default_rng(0).permutation(count)
        places = pointer(order)
        chosen = core.tensor(interpreter.TensorHandle(order % 3 > 0, tl.int1), core.block_type(tl.int1, [count]))
        none = core.tensor(interpreter.TensorHandle(order < 0, tl.int1), core.block_type(tl.int1, [count]))
        other = core.tensor(
            interpreter.TensorHandle(order.astype(np.float32), tl.float32), core.block_type(tl.float32, [count])
        )
        assert compare("load", places)
        assert compare("load", places, eviction_policy="evict_last")
        for mask in (chosen, none):
            assert compare("load", places, mask)
            assert compare("load", places, mask, other)
            assert compare("load", places, mask=mask, other=0.5)
            compare("load", places, mask, tensor(tl.float32, ()))
            compare("load", places, mask, tensor(tl.int32, ()))
        compare("load", places, None, 1.0)
        compare("load", places, True)
        compare("load", places, cache_modifier="wrong")
        compare("load", pointer(order.reshape(2, -1)), tensor(tl.int1, (2, 1)), 0)
        compare("load", pointer(order, MEMORY.view(np.uint16), tl.bfloat16), chosen, 0.0)
        compare("load", pointer(order % 4, BYTES, tl.int1), chosen)
        compare("load", pointer(4 * order + 2, MEMORY.view(np.uint8)))  # not at a multiple of four bytes
        compare("load", pointer(2 * order + order % 2, MEMORY.view(np.uint16)))
        compare("load", tensor(tl.int64, (4,)))

    in_a_launch(all_of_them)


@triton.jit
def device_function():
    pass


def test_a_module_that_is_first_seen_within_another_launch_is_patched_whole(tmp_path, monkeypatch):
    """Its own launch patches also what the other launch had patched at that moment."""
    (tmp_path / "only_tl.py").write_text(
        "import triton\nimport triton.language as tl\nfrom tests.kernels import test_operators as here\n\n"
        "@triton.jit\ndef outer(out):\n    here.device_function()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kept = dict(faster.CHANGES)
    faster.CHANGES.clear()
    try:
        importlib.import_module("only_tl").outer[(1,)](torch.zeros(1))
        left = []
        in_a_launch(lambda: left.extend(n for n in operators.METHODS if core.tensor.__dict__[n] is PLAIN[n]))
        assert (True, True) in faster.CHANGES
        assert not left
    finally:
        faster.CHANGES.update(kept)
