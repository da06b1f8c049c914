"""The whole contrastive loss: five query and five key maps in, loss and gradients of maps and projector out.

python benchmarks/run.py --out DIR --only chain

Goals P1 and P2, in float32 and, as in a training step, under autocast in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import Case, Context, Provider, Row
from benchmarks.loss import DIM, OURS, OWN_WRITING, TEMPERATURE, against_ours, compiled, fits_here, refuse, with_graph
from benchmarks.measure import measure
from benchmarks.published import Checkout, loss_options
from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF
from fastnce.nce import api


def chain(context: Context) -> Iterator[Row]:
    """P1, P2: five query and five key maps in, loss and gradients of maps and projector out."""
    for case in chain_cases(context):
        yield from measure(case, context)


def layer_shapes(image: int) -> list[tuple[int, int]]:
    """Return (channels, side) of the published layers 0, 4, 8, 12, 16 for a square image."""
    return [(3, image + 6), (128, image), (256, image // 2), (256, image // 4), (256, image // 4)]


HALF = ", bf16"
"""Suffix of a benchmark under autocast in bfloat16, as in a training step."""


def chain_cases(context: Context) -> Iterator[Case]:
    cuda = context.device.type == "cuda"
    image, patches = (32, 16) if context.quick else (256, 256)
    shapes = layer_shapes(image)
    found = []
    for images in (1,) if context.quick else (1, 16) if cuda else (1, 4):
        for half in (True, False) if cuda else (False,):
            case = chain_case(context, shapes, images, patches, half)
            if not half:
                found.append(case)
            yield case
    for case in found if context.large else ():
        for checkout in context.published[:1]:
            images = case.size["images"]
            if fits_here(context, images * patches, checkout.cosine, layers=len(shapes)):
                sampler, loss = (torch.compile(c, dynamic=False) for c in _classes(checkout, context, shapes, images))
                call = _as_published(sampler, loss, patches)
                yield against_ours(case, compiled(f"{checkout.name} classes", call, "published"))


def chain_case(context: Context, shapes: list[tuple[int, int]], images: int, patches: int, half: bool) -> Case:
    """Return the chain of `images` images, in float32 or, with `half`, under autocast with bfloat16 maps."""
    sampled = [images * patches * channels for channels, _ in shapes]
    whole = [images * channels * side**2 for channels, side in shapes]
    # the first map is the image, which stays float32 in training too
    widths = [2.0 if half and layer else 4.0 for layer in range(len(shapes))]
    dtype = "bfloat16" if half else "float32"
    return Case(
        f"chain{HALF}" if half else "chain",
        {"images": images, "patches": patches, "dim": DIM, "layers": len(shapes), "dtype": dtype},
        partial(_maps, shapes, images, context.device, half),
        list(_chain_providers(context, shapes, images, patches, half)),
        # MLPs: queries and keys forward, queries backward (twice a forward); then the loss with its query gradient
        flop=sum(2.0 * images * patches * (c * DIM + DIM * DIM) * 4 for c, _ in shapes)
        + 4.0 * len(shapes) * images * patches**2 * DIM,
        # reads the sampled rows of queries and keys, writes dense gradients of the query maps
        bytes=sum(w * (2 * s + m) for w, s, m in zip(widths, sampled, whole, strict=True)),
        do_bench=True,
    )


def _maps(
    shapes: list[tuple[int, int]], images: int, device: torch.device, half: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return query maps and key maps. In bfloat16 they are channels-last, as in the training step."""

    def draw() -> list[Tensor]:
        maps = [torch.randn(images, channels, side, side, device=device) for channels, side in shapes]
        if half:
            maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
            maps[1:] = [m.bfloat16() for m in maps[1:]]
        return maps

    return [m.requires_grad_() for m in draw()], draw()


def _chain_providers(context: Context, shapes, images: int, patches: int, half: bool) -> Iterator[Provider]:
    channels = [c for c, _ in shapes]
    head = PatchNCEHead(channels, dim=DIM, patches=patches, temperature=TEMPERATURE).to(context.device)
    weights = list(head.parameters())
    autocast = partial(torch.autocast, context.device.type, torch.bfloat16, enabled=half)

    def ours(query_maps, key_maps):
        with autocast():
            loss = head(query_maps, key_maps)
        return loss, *torch.autograd.grad(loss, [*query_maps, *weights])

    energy, cuda = images == 1, context.device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    note = f"products {api.products(dtype, context.device)}" if cuda else ""
    yield from with_graph([Provider(OURS, ours, note=note, energy=energy)], context)
    if cuda and not half:
        yield from with_graph(
            [Provider(f"{OURS}, TF32", _with_tf32(ours), note="products tf32", dtype="tf32")], context
        )
    drop_in = PatchSampleF(use_mlp=True, nc=DIM, in_channels=channels).to(context.device)
    criterion = PatchNCELoss(loss_options(images, temperature=TEMPERATURE))
    call = _as_published(drop_in, criterion, patches, autocast)
    yield from with_graph([Provider(f"{OURS}, drop-in classes", call)], context)
    for checkout in context.published:
        name = f"{checkout.name} classes"
        if not fits_here(context, images * patches, checkout.cosine, layers=len(shapes)):
            yield Provider(name, refuse, note="published")
            continue
        call = _as_published(*_classes(checkout, context, shapes, images), patches, autocast)
        note = "published classes, under our autocast" if half else "published"
        yield Provider(name, call, note=note, energy=energy)
    if not context.published:
        mlps = head.mlps(len(channels))

        def plain(query_maps, key_maps):
            with autocast():
                loss = baselines.chain(query_maps, key_maps, mlps, patches=patches, temperature=TEMPERATURE)
            return loss, *torch.autograd.grad(loss, [*query_maps, *weights])

        yield Provider("CUT", plain, note=OWN_WRITING, energy=energy)


def _with_tf32(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call: inside, float32 products of cuBLAS, and with them those of the kernels, use TF32."""

    def with_tf32(*inputs: Any) -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call(*inputs)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return with_tf32


def _classes(checkout: Checkout, context: Context, shapes, images: int) -> tuple[Any, Any]:
    """Return the sampler and the loss of a checkout."""
    gpus = [context.device.index or 0] if context.device.type == "cuda" else []
    sampler = checkout.sampler(use_mlp=True, init_type="xavier", nc=DIM, gpu_ids=gpus)
    sampler.create_mlp([torch.empty(1, channels, 1, 1) for channels, _ in shapes])
    return sampler, checkout.losses()["PatchNCELoss"](loss_options(images, temperature=TEMPERATURE))


def _as_published(sampler, criterion, patches: int, autocast: Callable[[], AbstractContextManager] = nullcontext):
    """Call the two classes as the published step does: keys first, then queries at the same ids, then gradients."""

    def call(query_maps, key_maps):
        with autocast():
            keys, ids = sampler(key_maps, patches, None)
            queries, _ = sampler(query_maps, patches, ids)
            losses = [criterion(q, k).mean() for q, k in zip(queries, keys, strict=True)]
            loss = sum(losses[1:], losses[0]) / len(losses)
        return loss, *torch.autograd.grad(loss, [*query_maps, *sampler.parameters()])

    return call
