"""`patch`: which names it reaches, and how a patched class behaves."""

import types

import numpy as np
import torch

from fastnce import accelerate
from tests.accelerate.checkouts import run_forked, write_checkout


def test_patch_reaches_names_that_were_imported_before(imported):
    patchnce, networks, toy_model = imported("cut", "patchnce", "networks", "toy_model")
    published, before = patchnce.PatchNCELoss, patchnce.PatchNCELoss.forward
    names = accelerate.patch(patchnce)
    assert sorted(names) == ["models.patchnce.PatchNCELoss", "models.toy_model.Criterion"]
    assert toy_model.Criterion is patchnce.PatchNCELoss is published
    assert published.forward is not before
    assert published.forward.__name__ == "forward"
    assert accelerate.patch(patchnce) == []
    assert accelerate.patch(networks) == ["models.networks.PatchSampleF"]
    assert accelerate.patch(types.ModuleType("empty")) == []


def test_another_loss_of_the_same_name_is_kept(imported):
    (patchnce,) = imported("changed", "patchnce")
    before = patchnce.PatchNCELoss.forward
    assert accelerate.patch(patchnce) == []
    assert patchnce.PatchNCELoss.forward is before


def test_a_changed_loss_is_named(tmp_path):
    finished = run_forked(write_checkout(tmp_path / "checkout", "changed"), "train.py", "fast.pth")
    assert finished.returncode == 0
    assert finished.stderr.count("models.patchnce.PatchNCELoss is left as it is") == 1
    assert "replaced models.networks.PatchSampleF" in finished.stderr


def test_patching_draws_no_random_numbers(imported):
    patchnce, networks = imported("cut", "patchnce", "networks")
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    accelerate.patch(patchnce)
    accelerate.patch(networks)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_the_replaced_sampler_takes_the_published_calls(imported):
    (networks,) = imported("cut", "networks")
    accelerate.patch(networks)
    maps = [torch.randn(2, 3, 6, 5), torch.randn(2, 4, 3, 3)]
    # an init_type that only the checkout's init_net may accept
    sampler = networks.PatchSampleF(use_mlp=True, init_type="their own", init_gain=0.02, nc=8, gpu_ids=[])
    assert sampler.init_type == "their own"
    assert not list(sampler.parameters())
    sampler(maps)  # makes the MLPs
    rows, ids = sampler(maps)
    assert [tuple(r.shape) for r in rows] == [(60, 8), (18, 8)]  # 64 patches by default, or all if there are fewer
    again, _ = sampler(maps, 64, ids)
    numpy_ids, _ = sampler(maps, 64, [i.numpy() for i in ids])
    for a, b, c in zip(rows, again, numpy_ids, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    whole, none = sampler(maps, 0)
    assert [tuple(w.shape) for w in whole] == [(2, 8, 6, 5), (2, 8, 3, 3)]
    assert none == [[], []]
