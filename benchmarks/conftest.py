"""`pytest benchmarks/ --benchmark-only`: the cases of run.py as pytest-benchmark tests.

pytest benchmarks/ --benchmark-only --published ../published     # add --full for the sizes of run.py without --quick
"""

from pathlib import Path

import pytest

from benchmarks.cases import Context
from benchmarks.published import find_checkouts
from fastnce.common.timing import default_device


def pytest_addoption(parser):
    parser.addoption("--published", nargs="+", default=[], help="unpacked checkouts of CUT or DCLGAN")
    parser.addoption("--full", action="store_true", help="the full sizes")


def pytest_generate_tests(metafunc):
    if "work" not in metafunc.fixturenames:
        return
    try:
        checkouts = find_checkouts([Path(folder) for folder in metafunc.config.getoption("published")])
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    context = Context(default_device(None), not metafunc.config.getoption("full"), checkouts)
    found, names = [], []
    for case in metafunc.function.cases(context):
        for provider in case.providers:
            if provider.mode != "graph":  # one replay holds many calls: run.py divides, pytest-benchmark cannot
                found.append((case, provider, context.device))
                names.append(f"{case.benchmark}-{case.size['images']}x{case.size['patches']}-{provider.name}")
    metafunc.parametrize("work", found, ids=names)
