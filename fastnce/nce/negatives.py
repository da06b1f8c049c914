"""Learned negatives: Wang et al., Instance-wise Hard Negative Example Generation (NEGCUT, ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks
from .impl.rows import normalize_rows, similarity, widened


class _Ascend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def ascend(x: Tensor) -> Tensor:
    """Return x with its gradient reversed: parameters behind `x` are trained to raise the loss that others lower."""
    checks.tensor("x", x)
    return _Ascend.apply(x)


class LearnedNegatives(nn.Module):
    """NEGCUT's generator of negatives for one layer, to be passed as `extra_keys`.

    Wang et al., Instance-wise Hard Negative Example Generation for Contrastive Learning in Unpaired Image-to-Image
    Translation (ICCV 2021) and its code: a two-layer MLP maps the image's mean code and noise to a negative of unit
    length. It is trained to raise the contrastive loss (pass its output through `ascend`, or give it a phase of its
    own) and to make its negatives differ (`diversity`). NEGCUT uses no other negatives: pass
    `pair_log_weight=only_external(...)`.

    Args:
        dim: width of the codes, at least 1.
        noise: noise values per negative, at least 1.
    """

    def __init__(self, dim: int = 256, noise: int = 64):
        super().__init__()
        self.dim, self.noise = checks.count("dim", dim), checks.count("noise", noise)
        self.mlp = nn.Sequential(nn.Linear(dim + noise, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, mean_code: Tensor, count: int = 256, noise: Tensor | None = None) -> Tensor:
        """Map codes (images, dim) to negatives (images, count, dim); `noise` (images, count, noise) is drawn if None.

        Codes and noise may have any floating dtype; negatives are float32, or float64 if the weights are.
        """
        checks.tensor("mean_code", mean_code)
        if mean_code.dim() != 2 or mean_code.shape[1] != self.dim or mean_code.numel() == 0:
            raise ValueError(f"mean_code must be (images, {self.dim}), not {tuple(mean_code.shape)}")
        images = mean_code.shape[0]
        if noise is None:
            shape = (images, checks.count("count", count), self.noise)
            noise = torch.randn(shape, device=mean_code.device, dtype=mean_code.dtype)
        checks.tensor("noise", noise)
        if noise.dim() != 3 or noise.shape[0] != images or noise.shape[2] != self.noise or noise.numel() == 0:
            raise ValueError(f"noise must be ({images}, count, {self.noise}), not {tuple(noise.shape)}")
        codes = mean_code.detach()[:, None, :].expand(-1, noise.shape[1], -1)
        both = torch.cat([codes, noise], dim=2).to(next(self.mlp.parameters()).dtype)
        return normalize_rows(widened(self.mlp(both)))


def diversity(negatives: Tensor) -> Tensor:
    """Return NEGCUT's diversity of (images, count, dim) negatives, to be maximised: mean |first half - second half|.

    count must be at least 2; if it is odd, the last negative is left out.
    """
    checks.tensor("negatives", negatives)
    if negatives.dim() != 3 or negatives.shape[1] < 2 or negatives.numel() == 0:
        raise ValueError(f"negatives must be (images, 2 or more, dim), not {tuple(negatives.shape)}")
    half = negatives.shape[1] // 2
    return (negatives[:, :half] - negatives[:, half : 2 * half]).abs().mean()


def only_external(images: int, rows: int, device: torch.device | str | None = None) -> Tensor:
    """Return a `pair_log_weight` that leaves only `extra_keys` as negatives: (images, rows, rows) of -1e34.

    This is below the logits of unit rows at every temperature.
    """
    images, rows = checks.count("images", images), checks.count("rows", rows)
    return torch.full((images, rows, rows), -1e34, device=device, dtype=torch.float32)


class NegativeGenerator(nn.Module):
    """NEGCUT's network N as released: one MLP per layer, `mlp_0`, `mlp_1` and so on, that makes negatives.

    Unlike `LearnedNegatives`, it passes a gradient to the mean codes, as the released code does.

    Args:
        layers: number of layers.
        dim: width of the codes.
        noise: noise values per negative.
    """

    def __init__(self, layers: int, dim: int = 256, noise: int = 64):
        super().__init__()
        self.noise = checks.count("noise", noise)
        for layer in range(checks.count("layers", layers)):
            self.add_module(f"mlp_{layer}", LearnedNegatives(dim, noise).mlp)

    def draw(self, images: int, count: int, like: Tensor) -> Tensor:
        """Draw the noise of one layer, (images, count, noise), as `like`."""
        return torch.randn(images, count, self.noise, device=like.device, dtype=like.dtype)

    def forward(self, mean_codes: Sequence[Tensor], count: int) -> list[Tensor]:
        """Map mean codes, (images, dim) per layer, to negatives of unit length, (images, count, dim) per layer."""
        negatives = []
        for mlp, codes in zip(self.children(), mean_codes, strict=True):
            noise = self.draw(len(codes), count, codes)
            both = torch.cat([codes[:, None, :].expand(-1, count, -1), noise], dim=2)
            negatives.append(normalize_rows(widened(mlp(both))))
        return negatives


def contrast_with(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """Return PatchNCE with given negatives only (NEGCUT): logsumexp(positive, negatives) - positive, per row.

    Args:
        queries, keys: (rows, dim), group after group, any floating dtype. The key of a query's row is its positive.
        negatives: (groups, count, dim); each group of rows is contrasted with its own. They get a gradient.
        temperature: divides all similarities; a tensor () gets its gradient.

    Returns:
        (rows,) float32, or float64 for float64.
    """
    checks.same_shape("queries", queries, "keys", keys, dims=2)
    checks.groups_of("groups of negatives", len(negatives), len(queries))
    q = widened(queries).unflatten(0, (len(negatives), -1))
    positive = (q * widened(keys.detach()).view_as(q)).sum(2, keepdim=True) / temperature
    logits = torch.cat([positive, similarity(q, widened(negatives)) / temperature], dim=2)
    return -logits.log_softmax(2)[:, :, 0].flatten()
