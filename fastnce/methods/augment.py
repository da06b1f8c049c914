"""DiffAugment: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training (NeurIPS 2020).

Every image that a discriminator judges, real or fake, is changed at random in a way that passes the gradient on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
AUGMENT_HELP = (
    "DiffAugment of all that the discriminators judge, for few images: color, translation, cutout or several of them, "
    "as color,translation,cutout; empty: none"
)
DRAWS = 7
"""Random numbers per image: brightness, saturation, contrast, row and column of the shift, and of the cutout."""
MOST_SHIFT = 0.125
"""Largest shift, as a share of each side."""
CUTOUT = 0.5
"""Side of the grey rectangle, as a share of the image's side."""


class Augment:
    """DiffAugment with the published formulas and strengths, in the order in which `kinds` names them.

    It runs on the device of the images, has fixed shapes and reads no values, so that a step can be captured.

    Args:
        kinds: color, translation and cutout, separated by commas; empty returns every image as it is and draws nothing.

    Raises:
        ValueError: another kind, or one kind twice.
    """

    def __init__(self, kinds: str = ""):
        self.kinds = tuple(kind.strip() for kind in kinds.split(",")) if kinds.strip() else ()
        if not set(self.kinds) <= set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(
                f"loss.augment={kinds} must name {', '.join(KINDS)} or several of them, each once, separated by "
                f"commas; empty: none"
            )
        self.rank, self.world = 0, 1

    def __call__(self, pictures: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return the changed images, of the same shape.

        Args:
            pictures: (images, channels, height, width) in [-1, 1], of a floating dtype. (Color can leave this range.)
            uniform: (images, 7) in [0, 1), see `DRAWS`; drawn on the device if None. Ranks draw for the images of all
                ranks, so that each image has its own numbers, and the same ones as in a single process.
        """
        if not self.kinds:
            return pictures
        if uniform is None:
            every = torch.rand(len(pictures) * self.world, DRAWS, device=pictures.device)
            uniform = every[self.rank :: self.world]
        layout = torch.contiguous_format
        if pictures.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        for kind in self.kinds:
            if kind == "color":
                pictures = colored(pictures, uniform[:, :3])
            elif kind == "translation":
                pictures = translated(pictures, uniform[:, 3:5])
            else:
                pictures = cut_out(pictures, uniform[:, 5:])
        return pictures.contiguous(memory_format=layout)

    def before(self, discriminator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the discriminator with this augmentation in front of it."""
        return (lambda pictures: discriminator(self(pictures))) if self.kinds else discriminator


def colored(pictures: Tensor, uniform: Tensor) -> Tensor:
    """Change brightness, then saturation, then contrast.

    Brightness adds a number from -0.5 to 0.5. Saturation multiplies the distance to the pixel's mean over channels by 0
    to 2. Contrast multiplies the distance to the image's mean by 0.5 to 1.5.

    Args:
        uniform: (images, 3) in [0, 1): brightness, saturation, contrast.
    """
    uniform = uniform.to(torch.promote_types(uniform.dtype, pictures.dtype))
    brightness, saturation, contrast = (column.view(-1, 1, 1, 1) for column in uniform.unbind(1))
    pictures = pictures + (brightness - 0.5)
    grey = pictures.mean(dim=1, keepdim=True)
    pictures = (pictures - grey) * (saturation * 2) + grey
    level = pictures.mean(dim=(1, 2, 3), keepdim=True)
    return (pictures - level) * (contrast + 0.5) + level


def translated(pictures: Tensor, uniform: Tensor) -> Tensor:
    """Shift by whole pixels, up to 1/8 of each side in each direction; what is uncovered is 0, which is grey.

    Args:
        uniform: (images, 2) in [0, 1): the shift of rows and of columns.
    """
    height, width = pictures.shape[2:]
    (row, row_inside), (column, column_inside) = (
        _shifted(side, share) for side, share in ((height, uniform[:, 0]), (width, uniform[:, 1]))
    )
    # Places outside wrap around. So every pixel is read once, and its gradient has a single summand.
    index = (row[:, :, None] * width + column[:, None, :]).flatten(1)[:, None]  # (images, 1, height * width)
    moved = pictures.flatten(2).gather(2, index.expand(-1, pictures.shape[1], -1)).unflatten(2, (height, width))
    inside = row_inside[:, None, :, None] & column_inside[:, None, None, :]
    return torch.where(inside, moved, 0.0)


def _shifted(side: int, share: Tensor) -> tuple[Tensor, Tensor]:
    """For each place along a side, the place that moves there, and whether it lies in the image: (images, side)."""
    most = int(side * MOST_SHIFT + 0.5)
    shift = _whole(share, 2 * most + 1) - most
    places = torch.arange(side, device=share.device) + shift[:, None]
    return places.remainder(side), (places >= 0) & (places < side)


def cut_out(pictures: Tensor, uniform: Tensor) -> Tensor:
    """Set a rectangle of half of each side, which may reach over the edges, to 0, which is grey.

    Args:
        uniform: (images, 2) in [0, 1): the place of the rectangle's middle, in rows and in columns.
    """
    height, width = pictures.shape[2:]
    rows, columns = (_covered(side, share) for side, share in ((height, uniform[:, 0]), (width, uniform[:, 1])))
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], 0.0, pictures)


def _covered(side: int, share: Tensor) -> Tensor:
    """Whether each place along a side is in the rectangle: (images, side)."""
    size = int(side * CUTOUT + 0.5)
    first = _whole(share, side + 1 - size % 2) - size // 2
    places = torch.arange(side, device=share.device)
    return (places >= first[:, None]) & (places < first[:, None] + size)


def _whole(share: Tensor, count: int) -> Tensor:
    """Whole numbers from 0 to `count` - 1 out of numbers in [0, 1)."""
    return (share * count).long().clamp_max(count - 1)  # a product may be rounded up to `count`
