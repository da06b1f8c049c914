"""The contrastive losses of other projects beside ours: values, query gradients, CPU time of one process.

python -m benchmarks.peers cut=CUT/models/patchnce.py joligen=joliGEN/models/modules/NCE/base_NCE.py:BaseNCELoss \\
    models=src/models/cut/cut_model.py metric-learning

A class is taken from its file alone, without what the file imports from its project. `metric-learning` is the installed
package pytorch-metric-learning (SupConLoss and NTXentLoss, which normalise rows themselves, so the gradients are
compared across the rows). Providers take turns; a figure is the median CPU time of forward and backward, on one thread.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce import PatchNCELoss

Loss = Callable[[Tensor, Tensor], Tensor]
T, DIM = 0.07, 256
SLOW = {"NTXentLoss": 256}
"""The most rows of losses that take seconds beyond them."""


def class_of(file: Path, name: str) -> type[nn.Module]:
    """Run one class of a file, with nothing but PyTorch and `packaging` around it."""
    found = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    if not found:
        raise ValueError(f"{file} has no class {name}")
    from packaging import version

    names: dict = {"torch": torch, "nn": nn, "version": version}
    exec(compile(ast.Module(found, []), str(file), "exec"), names)
    return names[name]


def published(file: Path, name: str, rows: int) -> Loss:
    """A loss of CUT's kind: its constructor takes the options, or their values."""
    every = "nce_includes_all_negatives_from_minibatch"
    values = {"nce_T": T, "batch_size": 1, every: False}
    options = argparse.Namespace(**values, **{f"alg_cut_{key}": value for key, value in values.items()})
    made = class_of(file, name)
    arguments = made.__init__.__code__.co_varnames
    loss = made(options) if "opt" in arguments else made(**values)
    return (lambda q, k: loss(q, k, 1)) if "current_batch" in loss.forward.__code__.co_varnames else loss


def metric_learning(name: str, rows: int) -> Loss:
    from pytorch_metric_learning import losses

    loss, labels = getattr(losses, name)(T), torch.arange(rows)
    others = labels.clone()  # of the keys: the same object would mean that queries and keys are one set
    return lambda q, k: loss(q, labels, ref_emb=k, ref_labels=others)


def providers(sources: list[str], rows: int) -> dict[str, Loss]:
    found: dict[str, Loss] = {"fastnce": PatchNCELoss(temperature=T)}
    for source in sources:
        if source == "metric-learning":
            names = [n for n in ("SupConLoss", "NTXentLoss") if rows <= SLOW.get(n, rows)]
            found.update({name: metric_learning(name, rows) for name in names})
        else:
            label, _, place = source.partition("=")
            file, _, name = place.partition(":")
            found[label] = published(Path(file), name or "PatchNCELoss", rows)
    return found


def compare(losses: dict[str, Loss], rows: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """Name, relative difference of the mean loss and of the query gradient, and CPU seconds of each loss."""
    generator = torch.Generator().manual_seed(0)
    queries = nn.functional.normalize(torch.randn(rows, DIM, generator=generator), dim=1)
    keys = nn.functional.normalize(queries + 0.05 * torch.randn(rows, DIM, generator=generator), dim=1)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            q = queries.clone().requires_grad_()
            began = time.process_time()
            value = loss(q, keys).mean()
            value.backward()
            seconds[name].append(time.process_time() - began)
            assert q.grad is not None
            across = q.grad - (q.grad * queries).sum(1, keepdim=True) * queries
            results[name] = value.detach(), across
    value, across = results["fastnce"]
    return [
        (
            name,
            float((results[name][0] - value).abs() / value),
            float((results[name][1] - across).norm() / across.norm()),
            statistics.median(seconds[name][1:]),
        )
        for name in losses
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="NAME=FILE[:CLASS]|metric-learning")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| rows | loss | value differs by | gradient differs by | CPU ms | ratio |\n|---:|---|---:|---:|---:|---:|")
    for rows in args.rows:
        lines = compare(providers(args.sources, rows), rows, max(args.rounds * 256 // rows, 4))
        for name, value, gradient, seconds in lines:
            figures = f"{value:.0e} | {gradient:.0e} | {seconds * 1e3:.2f} | {seconds / lines[0][3]:.2f}"
            print(f"| {rows:,} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
