"""The section `data` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.options import option
from ..data.folder import DIRECTIONS
from ..data.target import PREPROCESS, SINGLE, Target
from ..evaluate.pairs import RAIN_SIDES

MAX_PIXELS = "data.max_pixels={}"
"""How a configuration accepts larger images (see `fastnce.data.limit.accepting`)."""

MOST_SIDE = 16_384
"""Largest side of an image, in pixels: a square image of this side takes 3 GiB as float32."""


@dataclass
class DataOptions:
    """Where images come from, and how they are resized and cropped (see `fastnce.data.UnpairedData`)."""

    dir: str = option("", "folder with trainA and trainB (testA, testB for samples)", anything=True)
    direction: str = option(
        "AtoB",
        "BtoA exchanges the domains everywhere: A is then what trainB, testB and the truths of pairs hold",
        choices=DIRECTIONS,
    )
    phase: str = option(
        "train", "train reads DIR/trainA and DIR/trainB, and so on; empty: DIR/A and DIR/B", anything=True
    )
    max_images: int = option(0, "train with the first so many images of each domain; 0: all", low=0)
    load_size: int | list[int] = option(
        286, "size to resize to before cropping: one side, or [height, width]", low=1, high=MOST_SIDE
    )
    crop_size: int | list[int] = option(
        256, "side of the crops, or [height, width]; multiples of 4", low=1, high=MOST_SIDE
    )
    preprocess: str = option(
        "resize_and_crop",
        "how images are resized to load_size, and whether a window of crop_size is taken; none: whole images; "
        "zoom_and_patch: of SinCUT",
        choices=(*PREPROCESS, SINGLE),
    )
    random_scale_max: float = option(
        3.0, "zoom_and_patch shows the image at 1/random_scale_max of its sides or more", low=1, high=1000
    )
    flip: bool = option(True, "mirror half of the images")
    rain: float = option(0.0, "share of A's images that are B's with rendered rain; 1 needs no trainA", low=0, high=1)
    rain_like: str = option(
        "",
        "rain for data.rain, e.g. density=0.1:0.3,angle=-40:40, or several kinds with ; between them; empty: the "
        "defaults of fastnce rain",
        anything=True,
    )
    validate: str = option(
        "",
        "folder of held-out pairs for run.validate_every, or with testA and testB for FID; empty: test in the data "
        "folder if paired, else the data folder itself",
        anything=True,
    )
    rain_side: str = option("right", "the rainy half of held-out strips: right or left", choices=RAIN_SIDES)
    dataset: str = option(
        "", "your own data set instead of folders (mydata.py:MyData); empty: trainA and trainB", anything=True
    )
    batch: int = option(1, "images of each domain per step", low=1, high=65_536)
    shuffle: bool = option(True, "false: the images of both domains in their order, the same in every epoch")
    skip_bad: bool = option(False, "skip images that cannot be read; false: stop")
    max_pixels: int = option(
        0, "largest image to read, in pixels; 0: 178,956,970. Decoding takes about 15 bytes per pixel and thread", low=0
    )
    cache_dir: str = option("", "folder for decoded images; empty: .fastnce-cache in the data folder", anything=True)


def batch_sizes(options: DataOptions, decay: bool = True) -> list[tuple[int, int]]:
    """Return each (height, width) of a run's batches, at first and while the learning rate falls.

    Args:
        decay: whether the learning rate falls at all.

    Returns:
        one or two sizes; none if they depend on the images.
    """
    load, crop = sides(options.load_size), sides(options.crop_size)
    if options.preprocess == SINGLE:
        return [crop]
    target = Target.checked(options.preprocess, load, crop, channels=1)
    targets = (target, target.decaying()) if decay else (target,)
    return list(dict.fromkeys(target.fixed for target in targets if target.fixed))


def exchanges_pairs(options: DataOptions) -> bool:
    """Return whether the truths of held-out pairs are a run's A. With `data.rain` A is rainy in either direction."""
    return options.direction == "BtoA" and not options.rain


def sides(size: int | list[int]) -> tuple[int, int]:
    """Return (height, width) of an option that holds one side or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
