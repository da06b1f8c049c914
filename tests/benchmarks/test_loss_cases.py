"""Cases of the contrastive loss, and the baselines that they compare."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines, cases, chain, loss
from fastnce import patch_nce
from fastnce.nce.impl import reference
from tests.conftest import plain_environment
from tests.programs import run_program

CPU = torch.device("cpu")


def test_a_compiled_provider_has_its_own_case(monkeypatch):
    context = cases.Context(CPU)
    monkeypatch.setattr(cases.Context, "large", True)
    found = list(loss.infonce_cases(context))
    assert [case.benchmark for case in found] == ["infonce"] * 3 + ["infonce, compiled"]
    assert [provider.mode for provider in found[-1].providers] == ["eager", "compile"]
    assert found[-1].size == found[1].size
    assert not any(provider.mode == "compile" for case in found[:3] for provider in case.providers)


def test_every_case_of_a_loss_has_the_figures_of_triton():
    context = cases.Context(CPU, quick=True)
    found = [*loss.patchnce_cases(context), *loss.infonce_cases(context), *chain.chain_cases(context)]
    assert {case.benchmark for case in found} >= {"patchnce", "infonce", "chain"}
    assert all(case.do_bench for case in found)


def test_graphs_of_a_compiled_function_are_counted():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    for function, graphs in ((broken, "2 graphs"), (lambda x: x * 2, "1 graph")):
        counted = loss.CountsGraphs(torch.compile(function, backend="eager"))
        for _ in range(2):
            counted(torch.ones(3))
        assert counted.check() == f"compiled to {graphs}"


def test_the_memory_of_all_layers_counts():
    context = cases.Context(CPU)
    rows = 256
    one = 4 * rows * rows * loss.DIM * 4
    layers = context.free_bytes() // one
    assert loss.fits_here(context, rows, cosine=True, layers=layers - 1)
    assert not loss.fits_here(context, rows, cosine=True, layers=layers + 1)


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
    context = cases.Context(CPU, quick=True)
    torch.manual_seed(0)
    (case,) = chain.chain_cases(context)
    inputs = case.make_inputs()
    results = [provider.call(*inputs) for provider in case.providers]
    shapes = [[tuple(t.shape) for t in result] for result in results]
    assert shapes[0] == shapes[1] == shapes[2]


def test_pytest_benchmark_finds_the_same_cases():
    command = ["-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--collect-only", "-p", "no:cacheprovider"]
    finished = run_program(command, environment=plain_environment())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for wanted in ("test_chain[chain-1x16-fastnce]", "test_patchnce[patchnce-1x64-CUT]", "test_infonce[infonce-1x128"):
        assert wanted in finished.stdout
