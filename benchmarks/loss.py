"""The contrastive loss: the loss modules, and InfoNCE from 256 to tens of thousands of rows. See also `chain.py`.

python benchmarks/run.py --out DIR --only patchnce infonce

Goals P3 and P4: `infonce`, loss and query gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import Case, Context, Provider, Row
from benchmarks.measure import measure
from benchmarks.published import loss_options
from fastnce import PatchNCELoss, patch_nce

DIM = 256
TEMPERATURE = 0.07
OURS = "fastnce"
PLAIN = "F.normalize + F.cross_entropy"
OWN_WRITING = "written here, no checkout was given"


def patchnce(context: Context) -> Iterator[Row]:
    """PatchNCELoss, forward and backward, at the published size: 256 patches, 256 features, float32."""
    for case in patchnce_cases(context):
        yield from measure(case, context)


def infonce(context: Context) -> Iterator[Row]:
    """P3, P4: InfoNCE of S queries against S keys."""
    for case in infonce_cases(context):
        yield from measure(case, context)


def query_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple]:
    """Wrap a loss of (queries, keys): return its mean and the query gradient."""

    def call(queries: Tensor, keys: Tensor) -> tuple:
        value = loss(queries, keys).mean()
        return value, *torch.autograd.grad(value, queries)

    return call


def unit_rows(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries, keys = (F.normalize(torch.randn(rows, dim, device=device), dim=1).to(dtype) for _ in range(2))
    return queries.requires_grad_(), keys


def with_graph(providers: list[Provider], context: Context) -> list[Provider]:
    """On a CUDA device, add the eager providers in a CUDA graph, as in a captured step."""
    if context.device.type != "cuda":
        return providers
    return providers + [replace(p, mode="graph") for p in providers if p.mode == "eager"]


class CountsGraphs:
    """A compiled call that counts its graphs: more than one after a graph break."""

    def __init__(self, call: Callable[..., Any]):
        self.call, self.graphs = call, 0

    def __call__(self, *args: Any) -> Any:
        statistics = torch._dynamo.utils.counters["stats"]
        before = statistics["unique_graphs"]
        result = self.call(*args)
        self.graphs += statistics["unique_graphs"] - before
        return result

    def check(self) -> str:
        return f"compiled to {self.graphs} graph{'s' * (self.graphs != 1)}"


def compiled(name: str, call: Callable[..., Any], note: str = "") -> Provider:
    counted = CountsGraphs(call)
    return Provider(name, counted, "compile", note, check=counted.check)


def compiled_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor], note: str = "") -> Provider:
    return compiled(name, query_gradient(torch.compile(loss, dynamic=False)), note)


def against_ours(case: Case, compiled: Provider) -> Case:
    """Return a separate case of our code against compiled code, as compiling may take minutes."""
    torch._dynamo.reset()  # otherwise earlier compilations for other sizes count against Dynamo's limit
    ours = [replace(p, energy=False) for p in case.providers if p.name == OURS]
    return replace(case, benchmark=f"{case.benchmark}, compiled", providers=[*ours, compiled])


# --- the loss module ---------------------------------------------------------------------------------------------


def patchnce_cases(context: Context) -> Iterator[Case]:
    found = []
    for case in _patchnce_cases(context):
        found.append(case)
        yield case
    for checkout in context.published[:1] if context.large else ():
        theirs = checkout.losses()["PatchNCELoss"](loss_options(temperature=TEMPERATURE))
        yield against_ours(found[0], compiled_loss(f"{checkout.name} PatchNCELoss", theirs, "published"))


def _patchnce_cases(context: Context) -> Iterator[Case]:
    patches = 64 if context.quick else 256
    for images in (1,) if context.quick else (1, 4):
        rows = images * patches
        ours = query_gradient(PatchNCELoss(temperature=TEMPERATURE, negatives="image"))
        whole = query_gradient(PatchNCELoss(temperature=TEMPERATURE, negatives="batch"))
        if images > 1:
            ours = query_gradient(PatchNCELoss(loss_options(images, temperature=TEMPERATURE)))
        providers = [Provider(OURS, ours)]
        if images > 1:
            providers.append(Provider(f"{OURS}, whole batch", whole, note="negatives as DCLGAN's"))
        for checkout in context.published:
            for name, cls in checkout.losses().items():
                loss = cls(loss_options(images, temperature=TEMPERATURE))
                fits = fits_here(context, rows, cosine=name == "PatchNCELoss" and checkout.cosine)
                call = query_gradient(loss) if fits else refuse
                providers.append(Provider(f"{checkout.name} {name}", call, note="published"))
        if not context.published:
            cut = partial(baselines.cut_loss, images=images, temperature=TEMPERATURE)
            dclgan = partial(baselines.dclgan_loss, temperature=TEMPERATURE)
            providers += [Provider("CUT", query_gradient(cut), note=OWN_WRITING)]
            call = query_gradient(dclgan) if fits_here(context, rows, cosine=True) else refuse
            providers += [Provider("DCLGAN", call, note=OWN_WRITING)]
        yield Case(
            "patchnce",
            {"images": images, "patches": patches, "dim": DIM, "dtype": "float32"},
            partial(unit_rows, rows, DIM, context.device, torch.float32),
            with_graph(providers, context),
            flop=4.0 * rows * patches * DIM,
            bytes=3.0 * rows * DIM * 4,
            do_bench=True,
        )


# --- many rows ---------------------------------------------------------------------------------------------------


GOALS = (16384, 65536, 256)
"""Rows of the goals P3 and P4, and the published number of patches."""


def infonce_cases(context: Context, sizes: Sequence[int] = (*GOALS, 1024, 4096)) -> Iterator[Case]:
    """Yield the cases of these sizes on a GPU, and of fewer, smaller sizes elsewhere."""
    cuda = context.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes = (64, 128) if context.quick else sizes if cuda else (256, 1024, 4096)
    found = {}
    for rows in sizes:
        found[rows] = case = Case(
            "infonce",
            {"images": 1, "patches": rows, "dim": DIM, "dtype": str(dtype).removeprefix("torch.")},
            partial(unit_rows, rows, DIM, context.device, dtype),
            list(_infonce_providers(context, rows, dtype)),
            flop=4.0 * rows * rows * DIM,
            bytes=3.0 * rows * DIM * dtype.itemsize,
            do_bench=True,
        )
        yield case
    for rows in (1024, 16384) if context.large else ():
        if rows in found and fits_here(context, rows, width=dtype.itemsize):
            plain = partial(baselines.normalized_cross_entropy, temperature=TEMPERATURE)
            yield against_ours(found[rows], compiled_loss(PLAIN, plain))


def _infonce_providers(context: Context, rows: int, dtype: torch.dtype) -> Iterator[Provider]:
    ours = query_gradient(partial(patch_nce, temperature=TEMPERATURE))
    absent = [library.name for library, loss in _libraries() if loss is None]
    smallest = rows == (64 if context.quick else 256)  # to report missing libraries once
    note = f"not installed here: {', '.join(absent)}" if absent and smallest else ""
    energy = rows == 16384
    yield from with_graph([Provider(OURS, ours, note=note, energy=energy)], context)
    if context.device.type == "cuda":  # `unit_rows` affects only the kernels
        promised = query_gradient(partial(patch_nce, temperature=TEMPERATURE, unit_rows=True))
        yield from with_graph([Provider(f"{OURS}, unit rows", promised)], context)
    width = dtype.itemsize
    peers: list[tuple[str, Callable[[Tensor, Tensor], Tensor], str, bool]] = []
    for checkout in context.published:
        published = checkout.losses()["PatchNCELoss"](loss_options(temperature=TEMPERATURE))
        note = "published" if dtype == torch.float32 else "published class, given bfloat16 rows"
        peers.append((f"{checkout.name} PatchNCELoss", published, note, checkout.cosine))
    if not context.published:
        peers.append(("CUT", partial(baselines.cut_loss, temperature=TEMPERATURE), OWN_WRITING, False))
        peers.append(("DCLGAN", partial(baselines.dclgan_loss, temperature=TEMPERATURE), OWN_WRITING, True))
    plain = partial(baselines.normalized_cross_entropy, temperature=TEMPERATURE)
    peers.append((PLAIN, plain, "", False))
    for name, loss, note, cosine in peers:
        fits = fits_here(context, rows, cosine, width)
        yield Provider(name, query_gradient(loss) if fits else refuse, note=note, energy=energy and loss is plain)
    attention = partial(baselines.sdpa_query_gradient, temperature=TEMPERATURE)
    yield Provider("attention(q, k, k)", attention, note="query gradient only, no loss")
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13 and later
        chunked = query_gradient(partial(baselines.linear_cross_entropy, temperature=TEMPERATURE))
        yield Provider("F.linear_cross_entropy", chunked, note="chunked")
    for library, loss in _libraries():
        if loss is not None:
            fits = library.linear_memory or fits_here(context, rows, width=width)
            yield Provider(library.name, query_gradient(loss) if fits else refuse, note=library.note)


def _libraries() -> Iterator[tuple[baselines.Library, baselines.Loss | None]]:
    """Yield the losses of other libraries; None if a library is not installed."""
    for library in baselines.LIBRARIES:
        try:
            yield library, library.make(importlib.import_module(library.module), TEMPERATURE)
        except ImportError:
            yield library, None


def fits_here(context: Context, rows: int, cosine: bool = False, width: int = 4, layers: int = 1) -> bool:
    """Return whether an eager loss fits: per layer six logit matrices, or four broadcast (rows, rows, dim) products.

    The tensors of all layers are alive during the backward pass.
    """
    needed = 4.0 * rows * rows * DIM * width if cosine else 6.0 * rows * rows * width
    return layers * needed < context.free_bytes()


def refuse(*_):
    raise MemoryError("its intermediates exceed the memory for one provider")
