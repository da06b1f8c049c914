"""Translate pictures with a trained generator: one picture, or a folder of them.

translator = load_translator("runs/horse2zebra")       # a run, a checkpoint folder or a published .pth
picture = translator(load_image("horse.jpg")[None])    # any size
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import from_dict
from .data import DataError, find_images, load_image, save_image
from .engine.checkpoint import load_generators, newest, read_state
from .interop import load_weights, network_from_weights, read_weights
from .networks import channels_last


class Translator:
    """A generator that takes pictures of any size: padded by reflection to what it needs, cropped back after.

    Args:
        generator: its `factor` says what sides must be multiples of.
        device: where it computes.
    """

    def __init__(self, generator: nn.Module, device: torch.device | str = "cpu"):
        self.generator = generator.to(device).eval()
        channels_last(self.generator)
        self.device = torch.device(device)
        self.factor: int = getattr(generator, "factor", 1)
        self.smallest: int = getattr(generator, "smallest", self.factor)
        first = next(m for m in generator.modules() if isinstance(m, nn.Conv2d))
        self.channels = first.in_channels

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(images, channels, height, width) in [-1, 1] to the same size, float32 on the CPU."""
        if pictures.dim() != 4 or pictures.shape[1] != self.channels:
            raise ValueError(f"pictures must be (images, {self.channels}, height, width), not {tuple(pictures.shape)}")
        height, width = pictures.shape[2:]
        padded = pad_to_multiple(pictures.to(self.device), self.factor, self.smallest)
        result = self.generator(padded.contiguous(memory_format=torch.channels_last))
        return result[:, :, :height, :width].float().cpu()


def pad_to_multiple(pictures: Tensor, factor: int, smallest: int = 1) -> Tensor:
    """Pad the right and lower border to multiples of `factor`, at least `smallest`.

    By reflection, by replication where the picture is too small for that.
    """
    height, width = pictures.shape[2:]
    bottom, right = (max(side + -side % factor, smallest) - side for side in (height, width))
    if bottom == right == 0:
        return pictures
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(pictures, (0, right, 0, bottom), mode=mode)


def load_translator(source: str | Path, device: torch.device | str = "cpu", generator: str = "") -> Translator:
    """A translator from a run's folder, a checkpoint's folder or a published `.pth` file.

    Args:
        source: the path.
        generator: which one of a method with two: "G_A" (A to B, the default) or "G_B".

    Raises:
        ValueError: nothing there, or not what it should be.
    """
    source = Path(source)
    if source.is_dir():
        folder = source if (source / "state.json").exists() else newest(source)
        state = read_state(folder)
        weights = load_generators(folder)
        name = generator or next(iter(weights))
        if name not in weights:
            raise ValueError(f"{folder}: no generator {name!r}, it holds {', '.join(weights)}")
        network = from_dict(state["config"]).network.build_generator(reverse=name == "G_B")
        load_weights(network, weights[name], str(folder))
        return Translator(network, device)
    if not source.exists():
        raise ValueError(f"{source}: no such run or file")
    network = network_from_weights(read_weights(source), str(source))
    if not hasattr(network, "factor"):
        raise ValueError(f"{source}: holds a discriminator; translation needs a generator (..._net_G.pth)")
    return Translator(network, device)


def translate_files(translator: Translator, source: Path, out: Path, suffix: str = ".png") -> list[Path]:
    """Translate one picture or every picture of a folder (keeping its subfolders); returns the files written.

    Raises:
        ValueError: no picture there. Pictures that cannot be read are all named, after the others were written.
    """
    pictures = find_images(source) if source.is_dir() else [source]
    if not pictures:
        raise ValueError(f"{source}: no pictures here")
    root = source if source.is_dir() else source.parent
    written: list[Path] = []
    bad: list[str] = []
    for path in pictures:
        try:
            picture = load_image(path, channels=translator.channels)
        except DataError as error:
            bad.append(str(error))
            continue
        target = (out / path.relative_to(root)).with_suffix(suffix)
        if target in written:  # a.jpg beside a.png
            target = target.with_name(f"{path.name}{suffix}")
        save_image(translator(picture[None])[0], target)
        written.append(target)
    if bad:
        raise DataError("\n".join(bad))
    return written
