"""Published repositories run unmodified and leave this process unchanged."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, loss, measure, published, step
from fastnce import patch_nce

CPU = torch.device("cpu")


STAND_IN_LOSS = """
import torch
from torch import nn
import visdom
import torchvision.transforms as transforms

class PatchNCELoss(nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.opt = opt

    def forward(self, feat_q, feat_k):
        logits = feat_q @ feat_k.detach().T / self.opt.nce_T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkouts" / "standin"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "patchnce.py").write_text(STAND_IN_LOSS)
    return folder


class FakeCheckout:
    """A checkout with the parts that a step needs. Like theirs, its model enables cuDNN's benchmark mode."""

    name = "fake"

    def __init__(self):
        self.seen = []

    def model(self, arguments):
        torch.backends.cudnn.benchmark = True
        self.opt = None
        return self

    def data_dependent_initialize(self, data): ...

    def setup(self, opt): ...

    def parallelize(self): ...

    def set_input(self, data): ...

    def optimize_parameters(self):
        self.seen.append(torch.backends.cudnn.benchmark)
        if len(self.seen) == 3:
            raise RuntimeError("out of memory")


def test_flags_that_their_code_sets_do_not_reach_ours():
    checkout = FakeCheckout()
    call = step._theirs(checkout, "cut", 1, cases.Context(CPU, quick=True))
    with step.library_flags(benchmark=False):
        for _ in range(2):
            call(None, None)
            assert not torch.backends.cudnn.benchmark
        with pytest.raises(RuntimeError):
            call(None, None)
        assert not torch.backends.cudnn.benchmark
    assert checkout.seen == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut", "dclgan", "dcdgan-released"])
def test_the_published_step_of_the_quick_run(name):
    folder = os.environ.get("FASTNCE_PUBLISHED")
    if folder is None:
        pytest.skip("no published checkouts: set FASTNCE_PUBLISHED to a folder that contains them")
    context = cases.Context(CPU, quick=True, published=published.find_checkouts(sorted(Path(folder).iterdir())))
    provider = next(p for p in step.step_providers(name, 1, context) if "published" in p.name)
    (row,) = measure.measure(step.step_case(name, 1, context, [provider]), context)
    assert row.p50_ms is not None, row.note
    assert not torch.backends.cudnn.benchmark


def test_checkouts_are_found_alone_and_in_a_folder(checkout):
    for folder in (checkout, checkout.parent):
        (found,) = published.find_checkouts([folder])
        assert (found.name, found.folder) == ("standin", checkout)
    with pytest.raises(ValueError, match=r"no models/patchnce\.py"):
        published.find_checkouts([checkout / "models"])


def test_a_missing_checkout_is_skipped(checkout, capsys):
    (found,) = published.find_checkouts([checkout.parent / "nowhere", checkout])
    assert found.name == "standin"
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_parser_that_exits_raises_an_error(checkout):
    (checkout / "options").mkdir()
    (checkout / "options" / "__init__.py").write_text("")
    (checkout / "options" / "train_options.py").write_text("raise SystemExit(2)")
    with pytest.raises(RuntimeError, match="standin exited with code 2"):
        published.Checkout(checkout).model(["--netG", "unknown"])


def test_a_checkout_leaves_other_modules_unchanged(checkout, monkeypatch):
    before = dict(sys.modules)
    mine = type(sys)("models")
    monkeypatch.setitem(sys.modules, "models", mine)
    opened = published.Checkout(checkout)
    cls = opened.losses()["PatchNCELoss"]
    assert sys.modules["models"] is mine
    assert not {"models.patchnce"} & set(sys.modules)
    assert str(checkout) not in sys.path
    assert "visdom" in before or "visdom" not in sys.modules
    queries, keys = loss.unit_rows(8, 4, CPU, torch.float32)
    rows = cls(published.loss_options())(queries, keys)
    torch.testing.assert_close(rows, patch_nce(queries, keys, reduction="none"))
    assert not opened.cosine
