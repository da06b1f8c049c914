"""`fastnce doctor` passes with right numbers and fails with a wrong gradient, loss or row."""

import pytest
import torch

from fastnce import patch_nce, project_patches
from fastnce.commands import doctor


@pytest.fixture(autouse=True)
def _only_the_cpu(monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])


def failures(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("FAIL")]


def test_all_checks_pass(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert failures(printed) == []
    assert torch.__version__ in printed
    assert "patch_nce runs eager for float32" in printed
    assert "F.instance_norm, batch 1, channels-last gradient" in printed
    assert "all checks passed" in printed
    for kind in ("random", "p 0.5", "p 0.9999"):
        for case in ("image", "batch", "extra keys"):
            for what in ("loss", "query gradient"):
                assert f"float32 {kind}, {case}: {what}" in printed


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("factor", [1.0 + 1e-4, float("nan")])
def test_a_wrong_gradient_fails(monkeypatch, capsys, factor):
    monkeypatch.setattr(doctor, "patch_nce", lambda q, k, **options: patch_nce(Scaled.apply(q, factor), k, **options))
    assert doctor.main([]) == 1
    failed = failures(capsys.readouterr().out)
    assert any("float32 random, image: query gradient" in line for line in failed)
    assert all("gradient" in line for line in failed)


def test_a_positive_kept_in_the_16_bit_product_fails_on_confident_rows_only(monkeypatch, capsys):
    def careless(q, k, *, images, negatives, temperature, extra_keys, reduction, implementation):
        """Rounds probabilities, the positive's included, to bfloat16. On random data this passes unnoticed."""
        groups = 1 if negatives == "batch" else images
        keys = k.unflatten(0, (groups, -1)).float()
        if extra_keys is not None:
            keys = torch.cat([keys, extra_keys.float()], dim=1)
        queries = q.unflatten(0, (groups, -1)).float()
        logits = queries @ keys.transpose(1, 2) / temperature
        loss = torch.logsumexp(logits, 2) - logits.diagonal(dim1=1, dim2=2)
        rounded = (logits.softmax(2).bfloat16().float() @ keys - keys[:, : queries.shape[1]]) / temperature
        surrogate = (queries * rounded.detach()).sum(2)
        return (loss.detach() + surrogate - surrogate.detach()).flatten()

    monkeypatch.setattr(doctor, "patch_nce", careless)
    failed = [c.name for c in doctor.check_nce(torch.device("cpu"), torch.bfloat16) if not c.ok]
    assert [name for name in failed if "p 0.9999" in name and "gradient" in name]
    assert not [name for name in failed if "random" in name]


def test_a_loss_that_cancels_fails_on_confident_rows_only(monkeypatch, capsys):
    def cancelling(q, k, *, images, negatives, temperature, extra_keys, reduction, implementation):
        """logsumexp over all logits minus the positive, in float32. Unless the loss is small, this goes unnoticed."""
        groups = 1 if negatives == "batch" else images
        keys = k.unflatten(0, (groups, -1))
        if extra_keys is not None:
            keys = torch.cat([keys, extra_keys], dim=1)
        logits = q.unflatten(0, (groups, -1)) @ keys.transpose(1, 2) / temperature
        return (torch.logsumexp(logits, 2) - logits.diagonal(dim1=1, dim2=2)).flatten()

    monkeypatch.setattr(doctor, "patch_nce", cancelling)
    failed = [c.name for c in doctor.check_nce(torch.device("cpu"), torch.float32) if not c.ok]
    assert {"float32 p 0.9999, image: loss", "float32 p 0.9999, extra keys: loss"} <= set(failed)
    assert not [name for name in failed if "random" in name]


def test_a_wrong_row_fails(monkeypatch, capsys):
    def shifted(maps, ids, mlps=None, **options):
        return project_patches(maps, [(i + 1) % (20 * 18) for i in ids], mlps, **options)

    monkeypatch.setattr(doctor, "project_patches", shifted)
    assert doctor.main([]) == 1
    assert any("sampling with projection: rows" in line for line in failures(capsys.readouterr().out))


def test_an_exception_is_a_failed_check(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(doctor, "patch_nce", broken)
    assert doctor.main([]) == 1
    assert any("out of registers" in line for line in failures(capsys.readouterr().out))


def test_pytorchs_norm_is_reported_but_cannot_fail():
    check = doctor.check_library_instance_norm(torch.device("cpu"))
    assert check.ok
    assert check.gate is None
    assert ("right" in check.note) == (check.error < 1e-4)
