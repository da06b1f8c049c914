"""The operator for tritonbench, over a stand-in with the members of tritonbench that it uses.

tritonbench is on no registry, so the tests do not install it. The stand-in here has its interface as of 2025-08: names
by module path, registered benchmarks and metrics, modes. `benchmarks/tritonbench/operator.py` says how to run it there.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import cases, loss

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "tritonbench"
NAME = "tritonbench.operators.patch_nce"


class Mode(enum.Enum):
    FWD = "fwd"
    BWD = "bwd"
    FWD_BWD = "fwd_bwd"
    FWD_NO_GRAD = "fwd_no_grad"


def stand_in():
    """A module with what the operator imports; `registered` has (kind, name, options) of its functions."""
    module = ModuleType("tritonbench.utils.triton_op")
    module.registered, module.Mode = [], Mode

    def registers(kind):
        def register(**options):
            def decorator(function):
                assert function.__module__.startswith(f"{NAME}.")  # how tritonbench finds the operator's name
                module.registered.append((kind, function.__name__, options))
                return lambda self, *args, **more: function(self, *args, **more)

            return decorator

        return register

    for kind in ("benchmark", "metric", "x_val"):
        setattr(module, f"register_{kind}", registers(kind))

    class BenchmarkOperator:
        def __init__(self, mode, dtype):
            self.mode, self.device, self.dtype = Mode(mode), "cpu", dtype
            self.requires_grad = self.mode != Mode.FWD_NO_GRAD

        def function(self, name, inputs):
            forward = getattr(self, name)(*inputs)
            if self.mode == Mode.FWD:
                return forward
            if self.mode == Mode.FWD_NO_GRAD:
                return lambda: forward() and None
            backward = self.get_bwd_fn(forward)
            return backward if self.mode == Mode.BWD else lambda: (forward(), backward())

    module.BenchmarkOperator = BenchmarkOperator
    return module


@pytest.fixture
def operator(monkeypatch):
    monkeypatch.setattr(loss, "infonce_cases", small := Small(loss.infonce_cases))
    module = stand_in()
    for name in ("tritonbench", "tritonbench.utils", "tritonbench.operators"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, package)
    monkeypatch.setitem(sys.modules, f"{NAME}.operator", None)
    del sys.modules[f"{NAME}.operator"]  # it is removed again after the test
    spec.loader.exec_module(package)
    return SimpleNamespace(cls=package.Operator, registered=module.registered, cases=small)


class Small:
    """The cases of `loss.py` in their quick sizes, the largest first."""

    def __init__(self, function):
        self.function = function

    def __call__(self, context):
        assert (context.device, context.quick) == (torch.device("cpu"), False)
        return reversed(list(self.function(cases.Context(context.device, quick=True))))


def test_what_is_registered(operator):
    by_kind = {kind: [name for k, name, _ in operator.registered if k == kind] for kind, *_ in operator.registered}
    benchmarks = ["cross_entropy", "fastnce", "fastnce_unit_rows", "cut", "linear_cross_entropy"]
    assert by_kind == {"benchmark": benchmarks, "metric": ["flops", "error"], "x_val": ["get_x_val"]}
    assert [name for *_, name, options in operator.registered if options.get("baseline")] == ["cross_entropy"]


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd_bwd", "fwd_no_grad"])
def test_every_benchmark_computes_the_loss_and_its_gradient(operator, mode):
    one = operator.cls(mode, None)
    sizes = []
    for inputs in one.get_input_iter():
        sizes.append(one.get_x_val(inputs))
        assert one.get_grad_to_none(inputs) == [inputs[0]]
        assert inputs[0].requires_grad == (mode != "fwd_no_grad")
        assert not inputs[1].requires_grad
        rows, _ = sizes[-1]
        case = next(c for c in operator.cases(cases.Context(torch.device("cpu"))) if c.size["patches"] == rows)
        assert one.flops("fastnce", inputs, None) == case.flop / (1 if mode == "fwd_bwd" else 2)
        for kind, name, options in operator.registered:
            if kind != "benchmark" or (options.get("fwd_only") and "bwd" in mode):
                continue
            if name == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                with pytest.raises(NotImplementedError):
                    one.function(name, inputs)
                continue
            error = one.error(one.function(name, inputs), inputs, None)
            assert error is None if mode == "fwd_no_grad" else error < 1e-4, name
    assert sizes == [(64, loss.DIM), (128, loss.DIM)]  # the smallest first


def test_the_precision_of_the_command_line(operator):
    queries, keys = next(operator.cls("fwd", torch.bfloat16).get_input_iter())
    assert queries.dtype == keys.dtype == torch.bfloat16
    assert queries.is_leaf
    assert queries.requires_grad


def test_errors_of_many_rows_are_not_measured(operator, monkeypatch):
    one = operator.cls("fwd", None)
    monkeypatch.setattr(sys.modules[f"{NAME}.operator"], "MOST_EXACT_ROWS", 63)
    assert one.error(lambda: 1 / 0, next(one.get_input_iter()), None) is None


def test_a_wrong_loss_has_an_error(operator):
    one = operator.cls("fwd", None)
    inputs = next(one.get_input_iter())
    right = one.function("fastnce", inputs)
    assert one.error(lambda: right() * 1.01, inputs, None) == pytest.approx(0.01, rel=1e-3)
