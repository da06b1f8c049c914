"""The smoke checks pass, and fail for a wrong kernel."""

from __future__ import annotations

import json

import torch

from benchmarks import smoke

SMALL = smoke.Size(
    patches=32,
    dim=64,
    channels=(3, 16, 24),
    sides=(14, 12, 10),
    map=(20, 10),
    step_side=32,
    network={"generator": "resnet_4blocks", "width": 8, "discriminator_width": 8},
)


def test_the_kernels_pass_the_smoke_checks(few_blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(smoke, "WARM_UP", 1)  # steps before the capture of a graph, which a CPU has none of
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 0
    found = json.loads((tmp_path / "smoke.json").read_text())
    names = " ".join(check["name"] for check in found["checks"])
    for kernel in (
        "nce",
        "cosine",
        "chain of 3 layers",
        "repeated",
        "norm",
        "pad",
        "blur-down",
        "blur-up",
        "drawn",
        "cut",
    ):
        assert kernel in names
    assert all(check["ok"] for check in found["checks"])
    assert "checks passed" in capsys.readouterr().out


def test_a_wrong_kernel_fails_its_smoke_check(tmp_path, monkeypatch):
    right = smoke.fused.blur_up
    monkeypatch.setattr(smoke.fused, "blur_up", lambda x: right(x) * 1.01)
    monkeypatch.setattr(smoke, "GROUPS", (smoke.check_layers,))
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 1
    checks = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert {check["name"].split(",")[0] for check in checks if not check["ok"]} == {"blur-up"}


def test_a_check_that_raises_or_compares_zeros_fails(tmp_path, monkeypatch):
    def raises(device, size):
        raise RuntimeError("no such kernel")
        yield

    def zeros(device, size):
        yield from smoke.compared("zeros", lambda x: 0 * x, lambda x: 0 * x, [torch.ones(3)], (1.0, 1.0))

    monkeypatch.setattr(smoke, "GROUPS", (raises, zeros))
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 1
    checks = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert [check["ok"] for check in checks] == [False, False, False]
    assert "no such kernel" in checks[0]["name"]
