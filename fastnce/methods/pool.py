"""A pool of past fakes for the discriminators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import Sizes

MOST_POOLED = 10**6
POOL_HELP = "past fakes kept per domain for the discriminators to judge; 0: they judge only the latest"


def check_pool_sizes(size: int, sizes: Sizes, remedy: str) -> None:
    """ValueError if a pool of so many images would take fakes of several sizes."""
    if size and len(sizes) > 1:
        first, second = list(sizes.values())[:2]
        raise ValueError(
            f"loss.pool_size={size} remembers fakes of one size, but {first} and {second} are of one domain: {remedy}, "
            f"or set loss.pool_size=0"
        )


class ImagePool(nn.Module):
    """A pool of past fakes, so that a discriminator judges a history of them (Shrivastava et al., CVPR 2017).

    Until the pool is full, every image is stored and returned. After that, with probability 1/2, an image replaces a
    random one of the pool, which is returned; otherwise it is returned itself. Everything runs on the device, with
    fixed shapes and without branches, so that a step can be captured.

    Args:
        size: the number of images kept; 0 returns every image.
    """

    pictures: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        if size < 0:
            raise ValueError(f"pool_size must be at least 0, not {size}")
        self.size = size
        # allocated by `prepare`, when the size of the images is known
        self.register_buffer("pictures", torch.empty(0))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def prepare(self, like: Tensor, channels: int) -> None:
        """Allocate the pool for images of this size and so many channels; ValueError if it has another size.

        The pool takes the memory format of `like`, also after loading a checkpoint, which does not store it. Images of
        two formats, judged in one batch, would be computed in the slower one.
        """
        shape = (channels, *like.shape[2:])
        if self.size == 0:
            return
        if not self.pictures.numel():
            self.pictures = like.new_zeros(self.size, *shape)
        elif self.pictures.shape[1:] != shape:
            raise ValueError(
                f"a pool of {tuple(self.pictures.shape[1:])} pictures cannot take {shape}: all crops of a run must be "
                f"of one size, or loss.pool_size=0"
            )
        channels_last = like.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.pictures = self.pictures.contiguous(memory_format=layout)

    @torch.no_grad()
    def forward(self, fakes: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return the images for the discriminator to judge, without gradient, of the shape of `fakes`.

        An image that is not finite is never stored.

        Args:
            fakes: (images, channels, height, width).
            uniform: (images, 2) in [0, 1), whether each image is exchanged (above 1/2) and for which one of the pool;
                drawn if None.
        """
        fakes = fakes.detach()
        if self.size == 0:
            return fakes
        if self.pictures.shape[1:] != fakes.shape[1:]:
            self.prepare(fakes, fakes.shape[1])
        if uniform is None:
            uniform = torch.rand(len(fakes), 2, device=fakes.device)
        judged = []
        for fake, (coin, place) in zip(fakes.split(1), uniform.unbind(), strict=True):
            filling = self.count < self.size
            slot = torch.where(filling, self.count, (place * self.size).long()).clamp_max(self.size - 1)
            old = self.pictures.index_select(0, slot)
            change = ~filling & (coin > 0.5)
            keep = (filling | change) & fake.isfinite().all()
            judged.append(torch.where(change, old, fake))
            self.pictures.index_copy_(0, slot, torch.where(keep, fake, old))
            self.count.add_((filling & keep).long())
        return torch.cat(judged)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(f"{prefix}pictures")
        if stored is not None and stored.numel() and (stored.dim() != 4 or len(stored) != self.size):
            args[-1].append(f"{prefix}pictures is {tuple(stored.shape)}, this pool has {self.size} pictures")  # errors
            return
        if stored is not None and stored.shape != self.pictures.shape:
            self.pictures = self.pictures.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
