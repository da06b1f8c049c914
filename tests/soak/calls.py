"""Correct and wrong calls of public functions: the result equals the formula, or one clear error is raised."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnce
from fastnce import NegativeBank, PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce
from fastnce.nce import Weights

from .common import Campaign, Outcome, survey

LAYOUTS = ("plain", "strided", "transposed", "flipped", "offset", "expanded")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """Return the same rows with other strides; "expanded" repeats the first row."""
    if layout == "strided":
        return rows.repeat_interleave(2, 1)[:, ::2]
    if layout == "transposed":
        return rows.T.contiguous().T
    if layout == "flipped":
        return rows.flip(0).contiguous().flip(0)
    if layout == "offset":
        return torch.cat([rows[:1], rows])[1:]
    return rows[:1].expand(rows.shape) if layout == "expanded" else rows


def formula(queries: Tensor, keys: Tensor, images: int, temperature: float) -> np.ndarray:
    """Return InfoNCE of each row against the keys of its image in float64 (Park et al., ECCV 2020, equation 3)."""
    q, k = (part.detach().double().numpy().reshape(images, -1, part.shape[1]) for part in (queries, keys))
    logits = q @ k.transpose(0, 2, 1) / temperature
    top = logits.max(2, keepdims=True)
    whole = np.log(np.exp(logits - top).sum(2)) + top[..., 0]
    return (whole - np.einsum("nii->ni", logits)).ravel()


def broken(rng: Random, queries: Tensor, keys: Tensor, options: dict) -> tuple[str, Tensor, Tensor, dict]:
    """Return a call with one fault: its name and the arguments."""
    wrong = {
        "fewer keys": (queries, keys[:-1], {}),
        "narrower keys": (queries, keys[:, :-1], {}),
        "one dimension": (queries[0], keys[0], {}),
        "three dimensions": (queries[None], keys[None], {}),
        "whole numbers": (queries.int(), keys.int(), {}),
        "complex numbers": (queries.to(torch.complex64), keys.to(torch.complex64), {}),
        "two dtypes": (queries.double(), keys.float(), {}),
        "no rows": (queries[:0], keys[:0], {}),
        "no width": (queries[:, :0], keys[:, :0], {}),
        "arrays": (queries.detach().numpy(), keys.detach().numpy(), {}),
        "nothing": (None, None, {}),
        "keys on meta": (queries, keys.to("meta"), {}),
        "images that do not divide": (queries, keys, {"images": len(queries) + 1}),
        "no images": (queries, keys, {"images": 0}),
        "images in text": (queries, keys, {"images": "2"}),
        "a temperature of 0": (queries, keys, {"temperature": 0.0}),
        "a temperature of NaN": (queries, keys, {"temperature": float("nan")}),
        "an unknown reduction": (queries, keys, {"reduction": "most"}),
        "an unknown kind of negatives": (queries, keys, {"negatives": "all"}),
        "an unknown implementation": (queries, keys, {"implementation": "fast"}),
        "extra keys of another width": (queries, keys, {"extra_keys": torch.ones(3, queries.shape[1] + 1)}),
        "weights of another shape": (queries, keys, {"weights": Weights(query_weight=torch.ones(len(queries) + 1))}),
    }
    name = rng.choice(sorted(wrong))
    queries, keys, more = wrong[name]
    return name, queries, keys, options | more


def losses(rng: Random) -> tuple[str, list[str]]:
    images, rows, width = rng.choice((1, 2, 3)), rng.randint(2, 17), rng.randint(1, 40)
    dtype, layout = rng.choice(list(TOLERANCE)), rng.choice(LAYOUTS)
    torch.manual_seed(rng.getrandbits(40))
    base = [F.normalize(torch.randn(images * rows, width, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
    leaves = [part.clone().requires_grad_() for part in base]
    queries, keys = (laid_out(leaf, layout) for leaf in leaves)
    temperature = rng.choice((0.07, 0.5, 1.0))
    options = {"images": images, "temperature": temperature, "reduction": "none", "detach_keys": False}
    done = f"patch_nce of {images} x {rows} x {width}, {dtype}, {layout}"
    if rng.random() < 0.4:
        what, queries, keys, options = broken(rng, queries, keys, options)
        try:
            patch_nce(queries, keys, **options)
        except (ValueError, TypeError) as error:
            return f"{done}, {what}", [] if str(error) else ["the error has no message"]
        return f"{done}, {what}", ["no error"]
    found = patch_nce(queries, keys, **options)
    wrong = []
    apart = np.abs(found.detach().double().numpy() - formula(queries, keys, images, temperature)).max()
    if not apart < TOLERANCE[dtype]:
        wrong.append(f"losses are {apart:.1e} from the formula")
    twice = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k = (laid_out(leaf, layout).reshape(images, rows, width) for leaf in twice)
    right = F.cross_entropy((q @ k.mT / temperature).flatten(0, 1), torch.arange(rows).repeat(images), reduction="sum")
    wanted = torch.autograd.grad(right, twice)
    if changed := rng.random() < 0.2:
        with torch.no_grad():
            leaves[0].mul_(0.5)  # after the forward pass
    try:
        gradients = torch.autograd.grad(found.sum(), leaves)
    except RuntimeError as error:
        return done, wrong + ([] if changed and "modified by an inplace" in str(error) else [f"{error}"])
    if not changed or layout in ("strided", "transposed", "flipped", "offset"):
        apart = max(float((a.double() - b).abs().max()) for a, b in zip(gradients, wanted, strict=True))
        if not apart < 30 * TOLERANCE[dtype]:
            wrong.append(f"gradients are {apart:.1e} from the formula's{' after a change in place' if changed else ''}")
    return done, wrong


def not_finite(rng: Random) -> tuple[str, list[str]]:
    queries, keys = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    queries[rng.randrange(6), rng.randrange(8)] = rng.choice((float("nan"), float("inf")))
    found = patch_nce(queries, keys, reduction="none")
    return "a query that is not finite", ["its loss is finite"] if bool(found.isfinite().all()) else []


def _work(state: bytes) -> list[float]:
    """Return the loss of pickled arguments; runs in another process."""
    loss, queries, keys = pickle.loads(state)
    return loss(queries, keys).tolist()


def modules(rng: Random) -> tuple[str, list[str]]:
    """Modules give the same numbers when copied, pickled, in eight threads, forked and spawned."""
    torch.manual_seed(rng.getrandbits(40))
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    ids = [torch.randperm(64)[:6], torch.randperm(16)[:6]]
    sampler = PatchSampleF(use_mlp=True, nc=8, in_channels=[3, 5])
    head = PatchNCEHead(in_channels=[3, 5], dim=8, patches=6)
    bank = NegativeBank(10, [8])
    loss = PatchNCELoss(temperature=0.07)
    rows = [F.normalize(torch.randn(12, 8), dim=1) for _ in range(2)]

    def outputs(sampler, head, bank, loss) -> list[Tensor]:
        with torch.no_grad():
            return [*sampler(maps, 6, ids)[0], head(maps, maps, patch_ids=ids), *bank.keys(), loss(*rows)]

    mine = [sampler, head, bank, loss]
    wanted = outputs(*mine)
    here = ("deepcopy", "pickle", "save", "threads")
    how = rng.choice(("fork", "spawn") if rng.random() < 0.03 else here)
    if how == "deepcopy":
        found = [outputs(*copy.deepcopy(mine))]
    elif how == "pickle":
        found = [outputs(*pickle.loads(pickle.dumps(mine)))]
    elif how == "save":
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        found = [outputs(*torch.load(buffer, weights_only=False))]
    elif how == "threads":
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: outputs(*mine), range(16)))
    else:
        with get_context(how).Pool(1) as pool:
            got = pool.apply(_work, (pickle.dumps((loss, *rows)),))
        return f"modules: {how}", [] if torch.equal(torch.tensor(got), wanted[-1]) else ["another loss"]
    same = all(torch.equal(a, b) for values in found for a, b in zip(values, wanted, strict=True))
    return f"modules: {how}", [] if same else ["other numbers"]


def pictures(rng: Random, place: Path) -> tuple[str, list[str]]:
    """A saved picture is loaded with the same values up to rounding. Wrong tensors are refused without a file."""
    channels = rng.choice((1, 3))
    picture = torch.rand(channels, rng.randint(1, 30), rng.randint(1, 30)) * 2.4 - 1.2
    suffix = rng.choice((".png", ".bmp", ".tiff", ".webp", ".npy"))
    path = place / f"x{suffix}"
    if rng.random() < 0.3:
        odd = rng.choice((picture[0], picture[None], picture[:, :0], torch.ones(2, 4, 4)))
        if suffix == ".npy" and odd.dim() == 3 and odd.numel():
            return "an array of any channels", []
        try:
            fastnce.data.save_image(odd, path)
        except ValueError:
            return f"a tensor of {tuple(odd.shape)} as {suffix}", [f"{path} is left"] * path.exists()
        return f"a tensor of {tuple(odd.shape)} as {suffix}", ["no error"]
    fastnce.data.save_image(picture, path)
    found = fastnce.data.load_image(path, channels)
    apart = float((found - picture.clamp(-1, 1)).abs().max())
    return f"{channels} channels as {suffix}", [] if apart <= 1 / 255 + 1e-6 else [f"{apart:.4f} away"]


def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
    kind = rng.choice((losses, losses, losses, not_finite, modules, pictures))
    return pictures(rng, place) if kind is pictures else kind(rng)


def run(count: int, seed: int, folder: Path) -> Outcome:
    return survey(count, seed, folder, attempt)


CAMPAIGN = Campaign(
    "calls",
    "Public functions with unusual strides, shapes, dtypes and values, in threads, forks, copies and pickles, return "
    "the numbers of the formula or raise one clear error.",
    2000,
    run,
)
