"""The published checkouts train alike with and without `fastnce.accelerate`."""

import os
import textwrap
from pathlib import Path

import pytest

from tests.accelerate.checkouts import ROOT, printed, run


def published_checkout(name: str) -> Path:
    given = os.environ.get("FASTNCE_PUBLISHED")
    folder = Path(given) if given else ROOT.parent / "published"
    if not (folder / name / "models" / "patchnce.py").is_file():
        pytest.skip(f"no published checkout {name!r}: set FASTNCE_PUBLISHED to a folder that holds it")
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "norm"), [("2", "library"), ("1", "formula")])
@pytest.mark.parametrize("name", ["cut", "dclgan"])
def test_published_models_train_alike(name, batch, norm, tmp_path):
    """Training with and without the replacement gives the same losses.

    At batch 1 on the CPU, PyTorch's instance norm is wrong for channels-last gradients. Only the published sampler
    sends it such gradients. Both runs therefore use the plain formula.
    """
    folder = published_checkout(name)
    script = tmp_path / "steps.py"
    script.write_text(textwrap.dedent(PUBLISHED_STEPS))
    command = [str(script), str(folder), str(tmp_path), "float64", batch, norm]
    plain = printed(run(ROOT, *command, accelerated=False))
    finished = run(ROOT, *command)
    fast = printed(finished)
    assert finished.stderr.count("fastnce: replaced") == {"cut": 2, "dclgan": 3}[name]
    assert plain["keys"] == fast["keys"]
    for ours, theirs in zip(fast["losses"], plain["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


PUBLISHED_STEPS = """
    import json, sys
    import numpy as np
    import torch
    from benchmarks.published import Checkout

    folder, out, dtype, batch, norm = sys.argv[1:]
    torch.set_num_threads(1)
    # Adam's first step is the sign of the gradient, which amplifies float32 rounding differences
    torch.set_default_dtype(getattr(torch, dtype))

    def instance_norm(x, *_, eps=1e-5, **__):
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()

    if norm == "formula":
        torch.nn.functional.instance_norm = instance_norm
    checkout = Checkout(folder)
    arguments = "--ngf 8 --ndf 8 --num_patches 32 --netF_nc 32 --netG resnet_6blocks --nce_layers 4,8,12"
    torch.manual_seed(0)
    np.random.seed(0)
    model = checkout.model([*arguments.split(), "--batch_size", batch, "--checkpoints_dir", out])
    ids = np.random.RandomState(1)

    def same_ids(net, inputs):
        # the published code draws ids from NumPy or torch, fastnce on the device: give both the same
        feats, patches, chosen = inputs
        if chosen is None:
            chosen = [ids.permutation(f.shape[2] * f.shape[3])[:patches] for f in feats]
        return feats, patches, chosen

    projectors = [getattr(model, net) for net in ("netF", "netF1", "netF2") if hasattr(model, net)]
    for projector in projectors:
        projector.register_forward_pre_hook(same_ids)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(4):
        a, b = torch.rand(2, int(batch), 3, 64, 64, generator=generator) * 2 - 1
        data = {"A": a, "B": b, "A_paths": "", "B_paths": ""}
        if step == 0:
            torch.manual_seed(3)
            model.data_dependent_initialize(data)
            model.setup(model.opt)
        model.set_input(data)
        model.optimize_parameters()
        losses.append(list(model.get_current_losses().values()))
    keys = [list(projector.state_dict()) for projector in projectors]
    print(json.dumps(dict(losses=losses, keys=keys)))
"""
