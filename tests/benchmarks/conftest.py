"""Fixtures of the tests of the benchmarks."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import cases


@pytest.fixture(scope="module", autouse=True)
def without_imported_objects():
    """Each measurement collects garbage first: as in `run.py`, objects of imported modules are exempt from it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def planned(monkeypatch):
    """Return the cases of a part on a GPU without running them."""

    def plan(part, module):
        found = []
        monkeypatch.setattr(module, "measure", lambda case, context: found.append(case) or iter(()))
        context = cases.Context(torch.device("cuda"))
        context.counts.get = lambda *_: (1.0, 2.0)
        assert not list(part(context))
        return found

    return plan
