"""The benchmark programs run, measure what they say, and write what they promise. No times are asserted."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, loss, measure, plot, published, run
from fastnce import patch_nce
from fastnce.nce import reference

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results"
    command = [sys.executable, "benchmarks/run.py", "--out", str(out), "--quick", "--device", "cpu", "--threads", "1"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=_environment())
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


def _environment():
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.mark.slow
def test_quick_run_writes_every_row_with_its_machine(quick_run):
    out, printed = quick_run
    results = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["rows"]) > 10
    assert {row["benchmark"] for row in rows} == {"patchnce", "chain", "infonce", "step cut", "step dcdgan-released"}
    for row in rows:
        assert not row["note"].startswith("did not run"), row
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["peak_bytes"]) > 0
        assert int(row["launches"]) > 0
        assert row["joules"] == ""  # not measured on a CPU: empty, not zero
        assert row["torch"] == torch.__version__
        assert float(row["floor_ms"]) > 0
    machine = results["machine"]
    assert machine["threads"] == 1
    assert machine["ceilings"]["copy_bytes_per_s"] > 0
    assert str(ROOT) not in json.dumps(results)
    assert "No accelerator: the eager implementation was measured" in printed
    assert "fastnce, drop-in classes" in printed


def test_list_names_every_part(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed for part in run.PARTS)


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--published", "no/such/folder"], ["--only", "nothing"]])
def test_a_wrong_command_is_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_loses_nobody_elses_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_parts.py").write_text(
        "import time\n"
        "from benchmarks.measure import Row\n"
        "def good(context):\n    yield Row('good', 'x', 'eager', p50_ms=1.0, p20_ms=1.0, p80_ms=1.0)\n"
        "def bad(context):\n    yield Row('bad', 'x', 'eager', note='first')\n    raise RuntimeError('went wrong')\n"
        "def slow(context):\n    yield Row('slow', 'x', 'eager', note='first')\n    time.sleep(600)\n"
    )
    limits = {"bad": 60, "slow": 8, "good": 60}
    monkeypatch.setattr(run, "PARTS", [run.Part(name, "broken_parts", name, limits[name]) for name in limits])
    # a started process has its own list of parts: give it this one
    starter = tmp_path / "starter.py"
    starter.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from benchmarks import run\n"
        "run.PARTS = [run.Part(n, 'broken_parts', n, 60) for n in ('bad', 'slow', 'good')]\n"
        "sys.exit(run.main())\n"
    )
    monkeypatch.setattr(run, "__file__", str(starter))
    monkeypatch.setattr(run.sys, "argv", ["run.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "--quick", "--device", "cpu"]) == 1
    results = json.loads((out / "results.json").read_text())
    assert [row["benchmark"] for row in results["rows"]] == ["bad", "slow", "good"]
    assert "went wrong" in results["parts"]["bad"]
    assert "limit of 8 s" in results["parts"]["slow"]
    assert results["parts"]["good"].startswith("ran in")
    complaint = capsys.readouterr().err
    assert "part bad failed" in complaint
    assert "part slow failed" in complaint


def test_peak_memory_on_the_cpu_is_that_of_the_tensors():
    def call():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        return torch.empty(500, 1000), b

    assert measure.peak_bytes(call, CPU) == 8_000_000


def test_operators_are_counted():
    x = torch.ones(3, requires_grad=True)
    one = measure.launches(lambda: x.detach() * 2, CPU, "eager")
    two = measure.launches(lambda: x.detach() * 2 * 2, CPU, "eager")
    assert two == one + 1
    backward = measure.launches(lambda: torch.autograd.grad((x * 2).sum(), x), CPU, "eager")
    assert backward > measure.launches(lambda: (x * 2).sum(), CPU, "eager")


def test_interleaved_times_have_a_round_each():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measure.time_interleaved(calls, CPU, 0.0, min_rounds=4, least_ms=0.0)
    assert [len(t) for t in times.values()] == [4, 4]
    assert order[-8:] == list("abbaabba")
    assert measure.percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_a_provider_that_raises_gets_a_row_without_figures():
    def broken(x):
        raise MemoryError("too large")

    providers = [measure.Provider("good", lambda x: x + 1), measure.Provider("bad", broken)]
    case = measure.Case("toy", {"patches": 3}, lambda: (torch.ones(3),), providers)
    good, bad = measure.measure(case, measure.Context(CPU, quick=True))
    assert good.p50_ms > 0
    assert bad.p50_ms is None
    assert bad.note == "did not run: MemoryError: too large"


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    machine = {"ceilings": {"matmul_float32_flop_per_s": 1e9, "copy_bytes_per_s": 1e6}}
    case = measure.Case("toy", {"dtype": "float32"}, tuple, [], flop=1e9, bytes=2e6)
    assert measure.floor_ms(case, machine) == 2000.0
    case.bytes = 1e3
    assert measure.floor_ms(case, machine) == 1000.0
    assert measure.floor_ms(case, {}) is None


@pytest.mark.parametrize("images", [1, 3])
def test_baselines_compute_the_definition(images):
    queries, keys = torch.nn.functional.normalize(torch.randn(2, images * 12, 16, dtype=torch.float64), dim=2)
    queries.requires_grad_()
    exact, _, _ = reference.nce_rows(
        queries.unflatten(0, (images, -1)), keys.unflatten(0, (images, -1)), temperature=0.07
    )
    torch.testing.assert_close(baselines.cut_loss(queries, keys, images), exact.flatten())
    whole = patch_nce(queries, keys, images=1, reduction="none")
    for function in (baselines.dclgan_loss, baselines.normalized_cross_entropy):
        torch.testing.assert_close(function(queries, keys), whole)
    (gradient,) = torch.autograd.grad(whole.sum(), queries)
    torch.testing.assert_close(baselines.sdpa_query_gradient(queries, keys), gradient)


def test_every_provider_of_the_chain_does_the_same_work():
    context = measure.Context(CPU, quick=True)
    torch.manual_seed(0)
    (case,) = loss.chain_cases(context)
    inputs = case.make_inputs()
    results = [provider.call(*inputs) for provider in case.providers]
    shapes = [[tuple(t.shape) for t in result] for result in results]
    assert shapes[0] == shapes[1] == shapes[2]


def test_checkouts_are_found_alone_and_in_a_folder(checkout):
    for folder in (checkout, checkout.parent):
        (found,) = published.find_checkouts([folder])
        assert (found.name, found.folder) == ("standin", checkout)
    with pytest.raises(ValueError, match=r"models/patchnce\.py is missing"):
        published.find_checkouts([checkout / "models"])


def test_a_checkout_leaves_the_names_of_others_alone(checkout, monkeypatch):
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


def test_growth_is_fitted_and_a_plot_without_matplotlib_is_a_sentence(tmp_path, monkeypatch):
    row = {"benchmark": "infonce", "provider": "x", "mode": "eager"}
    rows = [row | {"patches": s, "p50_ms": 1e-3 * s**2, "peak_bytes": 5 * s} for s in (64, 256, 1024)]
    assert list(plot.growth(rows)) == ["growth of x: time S^2.00, memory S^1.00"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw(tmp_path, rows) == "no plot: matplotlib is not installed"
    assert "fewer than two sizes" in plot.draw(tmp_path, rows[:1])


def test_pytest_benchmark_finds_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--collect-only"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for wanted in ("test_chain[chain-1x16-fastnce]", "test_patchnce[patchnce-1x64-CUT]", "test_infonce[infonce-1x128"):
        assert wanted in finished.stdout
