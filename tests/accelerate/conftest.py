"""Modules of a checkout, imported for one test."""

import importlib
import sys
import types

import pytest

from tests.accelerate.checkouts import write_checkout


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import modules of a checkout written for one test, and remove them from `sys.modules` afterwards."""

    def load(flavour: str, *names: str) -> list[types.ModuleType]:
        monkeypatch.syspath_prepend(str(write_checkout(tmp_path / flavour, flavour)))
        return [importlib.import_module(f"models.{name}") for name in names]

    yield load
    for name in [n for n in sys.modules if n == "models" or n.startswith("models.")]:
        del sys.modules[name]
