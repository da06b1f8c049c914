"""The cases of loss.py for pytest-benchmark; see conftest.py."""

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from benchmarks import chain, loss
from fastnce.common.timing import synchronize


def run_one(benchmark, work):
    case, provider, device = work
    inputs = case.make_inputs()

    def call():
        provider.call(*inputs)
        synchronize(device)

    try:
        call()
    except Exception as error:  # skip other implementations that do not run here
        if provider.name.startswith(loss.OURS):
            raise
        pytest.skip(f"{provider.name} does not run here: {type(error).__name__}: {error}")
    benchmark.group = f"{case.benchmark} {case.size['images']} x {case.size['patches']}"
    benchmark(call)


def test_patchnce(benchmark, work):
    run_one(benchmark, work)


def test_chain(benchmark, work):
    run_one(benchmark, work)


def test_infonce(benchmark, work):
    run_one(benchmark, work)


test_patchnce.cases = loss.patchnce_cases
test_chain.cases = chain.chain_cases
test_infonce.cases = loss.infonce_cases
