"""`loss.projector`, the published --netF, against a plain writing of its classes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fastnce import PatchNCEHead, patch_nce
from fastnce.commands.main import main
from fastnce.methods import CUT, CUTOptions
from fastnce.methods.base import Batch, Draws, NetworkOptions
from fastnce.methods.dclgan import DCLGAN, DCLGANOptions
from fastnce.methods.simdcl import SimDCL, SimDCLOptions
from tests.ends import one_sentence, tiny, write

NETWORK = NetworkOptions("resnet_4blocks", width=4, discriminator_width=4)
SETS = {"negatives": ("image", "batch"), "projector": ("sample", "reshape")}
CASES = [(p, n) for p in SETS["projector"] for n in SETS["negatives"]]


def published_rows(projector, maps, ids):
    """Return the rows of PatchSampleF without MLPs, or of ReshapeF applied to each map, in float64."""
    rows = []
    for m, chosen in zip(maps, ids, strict=True):
        x = m.double()
        if projector == "reshape":
            h, w = x.shape[2] // 4, x.shape[3] // 4  # sides are multiples of 4 here
            x = x.unflatten(3, (4, w)).unflatten(2, (4, h)).mean(dim=(3, 5))
            chosen = torch.arange(16)
        x = x.flatten(2).permute(0, 2, 1)[:, chosen].flatten(0, 1)
        rows.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7))
    return rows


def published_loss(queries, keys, images, t=0.07):
    """Return the cross entropy of each layer's rows with their own location, averaged over layers."""
    losses = []
    for q, k in zip(queries, keys, strict=True):
        q, k = (x.unflatten(0, (images, -1)) for x in (q, k))
        logits = q @ k.transpose(1, 2) / t
        own = torch.arange(q.shape[1]).repeat(images)
        losses.append(F.cross_entropy(logits.flatten(0, 1), own))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("projector", "negatives"), CASES)
def test_cut(projector, negatives):
    torch.manual_seed(0)
    options = CUTOptions(nce_layers=[0, 4], patches=20, projector=projector, negatives=negatives, nce_idt=False)
    method = CUT(options, NETWORK)
    assert list(method.groups()) == ["G", "D"]
    assert method.phases()[1].groups == ("G",)
    assert not method.head.state_dict()
    a = torch.rand(2, 3, 16, 16) * 2 - 1
    fake = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = [torch.randperm(n)[:20] for n in (22 * 22, 16 * 16)]
    outputs = {"fake": fake, "real": a, "keys": None}
    with torch.no_grad():
        maps = [method.generator(x, [0, 4], encode_only=True) for x in (fake, a)]
        ids = [torch.randperm(m.shape[2] * m.shape[3])[:20] for m in maps[0]]
        ours = method._contrast(outputs, Draws(patch_ids=None if projector == "reshape" else [ids]))
        if projector == "reshape":
            maps = [[F.adaptive_avg_pool2d(m.double(), 4) for m in side] for side in maps]
    exact = published_loss(*(published_rows(projector, m, ids) for m in maps), 1 if negatives == "batch" else 2)
    torch.testing.assert_close(ours[0].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("external", ["none", "branch", "bank"])
@pytest.mark.parametrize("projector", ["sample", "reshape"])
def test_dclgan(projector, external, learn):
    torch.manual_seed(0)
    more = {"external": external, "bank_size": 5, "learn_temperature": learn, "reuse_key_features": False}
    options = DCLGANOptions(nce_layers=[4, 8], patches=20, projector=projector, cosine=False, **more)
    method = DCLGAN(options, NETWORK)
    assert list(method.groups()) == (["G", "D", "F"] if learn else ["G", "D"])
    assert method.phases()[1].groups == (("G", "F") if learn else ("G",))
    maps = [[torch.randn(1, c, 8, 8) for c in (8, 16)] for _ in range(4)]
    method.features = lambda *_: maps
    ids = [[torch.randperm(64)[:20] for _ in range(2)] for _ in range(2)]
    picture = torch.zeros(1, 3, 32, 32)
    losses = method.contrast(Batch(picture, picture), {}, Draws(patch_ids=ids))
    if external == "none":
        a, b, q_b, q_a = maps
        for loss, q, k, chosen in ((losses[0], q_b, a, ids[0]), (losses[1], q_a, b, ids[1])):
            exact = published_loss(*(published_rows(projector, m, chosen) for m in (q, k)), 1)
            torch.testing.assert_close(loss.double().detach(), exact, rtol=1e-5, atol=1e-6)
    assert losses.isfinite().all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="SimDCL stacks .* it needs loss.projector=mlp_sample"):
        SimDCL(SimDCLOptions(projector="sample"), NETWORK).check_options(1)
    with pytest.raises(ValueError, match="it needs loss.selection=uniform"):
        CUT(CUTOptions(projector="reshape", selection="attention"), NETWORK).check_options(1)
    unequal = NetworkOptions("resnet_4blocks", width=4, discriminator_width=4, out_channels=1)
    with pytest.raises(ValueError, match=r"must have the same channels, not \[3\] and \[1\]"):
        DCLGAN(DCLGANOptions(nce_layers=[0], projector="sample", lambda_idt=0.0), unequal)
    # the grid has 16 locations, whatever is drawn elsewhere
    CUT(CUTOptions(projector="reshape", patches=1), NETWORK).check_options(1)


@pytest.mark.parametrize("preset", ["fastcut", "dclgan"])
def test_a_run(preset, tmp_path, capsys):
    """Two steps, then two more from the checkpoint; another projector is refused on resuming.

    The learned temperature is on the progress line, in metrics.jsonl and in the report.
    """
    data = write(tmp_path / "set", "trainA/1.png", "trainA/2.png", "trainB/1.png", "trainB/2.png")
    more = ["loss.projector=sample", "loss.learn_temperature=true", "--quiet"]
    line = [x if x != "fastcut" else preset for x in tiny(data, tmp_path / "run", "run.steps=2", *more)]
    assert main(line) == 0
    assert main([x.replace("run.steps=2", "run.steps=4") for x in line]) == 0
    logged = [line["temperature"] for line in map(json.loads, (tmp_path / "run/metrics.jsonl").open())]
    assert len(set(logged)) == len(logged) > 1
    assert all(0.01 <= t <= 1.0 for t in logged)
    assert f" temperature {logged[-1]:.3f}" in (tmp_path / "run/log.txt").read_text()
    assert "Learned temperature" in (tmp_path / "run/report.html").read_text()
    capsys.readouterr()
    changed = [x.replace("=sample", "=mlp_sample").replace("run.steps=2", "run.steps=6") for x in line]
    assert main(changed) == 2
    assert "loss.projector" in one_sentence(capsys)


def test_keys_of_other_ranks_may_differ_in_width():
    """Without MLPs the layers have the widths of their maps. The keys of another rank are negatives."""
    head = PatchNCEHead([3, 8], patches=6, use_mlp=False, negatives="batch", implementation="eager")
    maps = [torch.randn(2, c, n, n, dtype=torch.float64) for c, n in ((3, 6), (8, 4))]
    others = [torch.randn_like(m) for m in maps]
    ids = [torch.randperm(m[0, 0].numel())[:6] for m in maps]
    sent: list[torch.Tensor] = []
    head.others = lambda flat: sent.append(flat) or flat[None]
    head(maps, others, patch_ids=ids)
    head.others = lambda flat: sent[0][None]
    loss = head(maps, maps, patch_ids=ids)
    wanted = [
        patch_nce(q, k, negatives="batch", images=2, extra_keys=e)
        for q, k, e in zip(*(published_rows("sample", x, ids) for x in (maps, maps, others)), strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-9, atol=1e-12)
