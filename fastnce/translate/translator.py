"""Translate images of any size with a trained generator, also images that do not fit into memory.

translator = load_translator("runs/horse2zebra")       # a run, a checkpoint folder or a published .pth
picture = translator(load_image("horse.jpg")[None])    # any size
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.imports import CodeError
from ..engine.memory import available_memory, out_of_memory
from ..evaluate.quality import FLOATS, check_range
from ..methods.checks import channels_of
from ..networks import channels_last
from ..networks.contracts import fitting_side
from .kinds import translate_picture
from .tiles import translate_exact, translate_fast
from .windows import operations_of

Tiles = Literal["auto", "exact", "fast"]
SMALLEST_TILE = 128


class Translator:
    """A generator for images of any size. It pads them by reflection to a valid size and crops the result.

    Args:
        generator: the sides of its input must be multiples of its attribute `factor`.
        device: where it runs.
        tiles: "auto" translates whole images, and uses exact tiles if an image does not fit into memory. "exact" cuts
            every image larger than a tile; the result equals that of the whole image up to rounding. "fast" takes the
            statistics of instance norms from a downscaled image, and reports the error on a crop through `say`.
        tile_size: side of a tile in pixels. It is halved until a tile fits into memory.
        say: called with a sentence about each fallback to tiles or smaller tiles, and about the error of fast tiles.

    Raises:
        ValueError: a setting is invalid, or the generator does not support tiles.
    """

    def __init__(
        self,
        generator: nn.Module,
        device: torch.device | str = "cpu",
        *,
        tiles: Tiles = "auto",
        tile_size: int = 1024,
        say: Callable[[str], None] | None = None,
    ):
        if tiles not in ("auto", "exact", "fast"):
            raise ValueError(f"tiles must be auto, exact or fast, not {tiles!r}")
        if tile_size < SMALLEST_TILE:
            raise ValueError(f"tile_size must be at least {SMALLEST_TILE}, not {tile_size}")
        if tiles != "auto":
            operations_of(generator, {})
        self.device = torch.device(device)
        self.generator = generator.to(self.device).eval()
        self.layout = torch.contiguous_format
        if self.device.type != "cpu":  # channels-last is not faster on a CPU
            self.layout = torch.channels_last
            channels_last(self.generator)
        self.sources: tuple[Path, ...] = ()
        self.direction = self.paired_direction = "AtoB"  # of the run: which held-out images are inputs
        """The files that the weights came from, if known."""
        self.tiles, self.tile_size, self.say = tiles, tile_size, say or (lambda sentence: None)
        self.factor: int = getattr(generator, "factor", 1)
        self.smallest: int = getattr(generator, "smallest", self.factor)
        self.channels = channels_of(generator)
        self.dtype = next(generator.parameters()).dtype
        self.out_channels: int = getattr(generator, "out_channels", self.channels)
        self._bytes_per_pixel = 0.0
        self._tiles_checked = False

    def train_mode(self) -> None:
        """Compute as in training: dropout is on, and batch norm takes the statistics of the image.

        The published test.py does so unless --eval is given. Instance norm computes the same in both modes.
        """
        self.generator.train()

    def __repr__(self) -> str:
        place = self.sources[0] if self.sources else None
        if place is not None and place.name in ("state.json", "config.json"):  # in the folder of a model
            place = place.parent
        known = f", from {place}" if place else ""
        name = type(self.generator).__name__
        return f"Translator({name}, {self.channels} to {self.out_channels} channels, {self.device}{known})"

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Translate floats (images, channels, height, width) in [-1, 1].

        Returns:
            the same size, float32 on the CPU. Values outside [-1, 1] are clipped, as in a file.

        Raises:
            ValueError: the shape, dtype or range is wrong, or an image does not fit into memory even in tiles.
        """
        self._check(pictures)
        return self._translate(pictures.to(self.dtype)).clamp(-1, 1)

    def translate(self, picture: Any) -> Any:
        """Translate a picture of any size, and return the same kind.

        Args:
            picture: one of these.
                A PIL image: EXIF orientation is applied; alpha and a fitting colour profile are kept.
                A NumPy array (height, width, channels), with (height, width) for grey, or (images, height, width,
                channels): uint8, uint16, or floats in [-1, 1].
                A tensor (channels, height, width) or (images, channels, height, width): uint8, uint16, or floats in
                [-1, 1]. The result is on the tensor's device.

        Returns:
            the same kind, dtype and number of dimensions; the channels are those of the model's output.

        Raises:
            ValueError: the kind, dtype, shape or range does not fit, or the picture does not fit into memory.
        """
        return translate_picture(self, picture, self.channels, self.out_channels)

    def _check(self, pictures: Tensor) -> None:
        wanted = f"pictures must be (images, {self.channels}, height, width)"
        if not isinstance(pictures, Tensor) or pictures.dtype not in FLOATS:
            kind = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
            raise ValueError(f"{wanted}, floats in [-1, 1], not {kind}: use fastnce.data.load_image(path)[None]")
        if pictures.dim() != 4 or pictures.shape[1] != self.channels or 0 in pictures.shape:
            raise ValueError(f"{wanted}, not {tuple(pictures.shape)}")
        check_range(pictures)

    def _translate(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        padded = pad_to_multiple(pictures, self.factor, self.smallest)
        if self.tiles == "auto" or max(padded.shape[2:]) <= self.tile_size:
            result = self._whole(padded)
            if result is not None:
                return result[:, :, :height, :width]
            if self.generator.training:
                size = f"{padded.shape[3]}x{padded.shape[2]}"
                raise ValueError(f"a picture of {size} does not fit into memory as a whole, as --train-mode needs it")
            if len(padded) > 1:
                return torch.cat([self._translate(picture) for picture in pictures.split(1)])
        return torch.cat([self._tiled(picture)[:, :, :height, :width] for picture in padded.split(1)])

    def _whole(self, padded: Tensor) -> Tensor | None:
        """Translate without tiles; None if memory does not suffice."""
        if self.device.type == "cpu":  # check first: a process that uses too much memory is killed without an exception
            room = available_memory()
            if room is not None and self._needed(padded) > room:
                return None
        try:
            x = padded.to(self.device).contiguous(memory_format=self.layout)
            return self.generator(x).float().cpu()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        self._release()
        return None

    def _check_own_tiles(self) -> None:
        """Compare the tiles of a user's own generator with the whole image, once and on a small image."""
        if self._tiles_checked or not hasattr(self.generator, "tile_layers"):
            return
        side = fitting_side(96, self.factor, self.smallest)
        probe = torch.rand(1, self.channels, side, side, dtype=self.dtype) * 2 - 1
        whole = self.generator(probe.to(self.device)).float().cpu()
        tiled = translate_exact(self.generator, probe, side // 2, self.device).float().cpu()
        if tiled.shape != whole.shape or not torch.allclose(tiled, whole, rtol=1e-2, atol=1e-2):
            name = type(self.generator).__name__
            raise CodeError(f"tile_layers() of {name} does not compute what its forward computes")
        self._tiles_checked = True

    def _tiled(self, padded: Tensor) -> Tensor:
        self._check_own_tiles()
        size = f"{padded.shape[3]}x{padded.shape[2]}"
        tile = self.tile_size
        if self.tiles == "auto":
            try:
                operations_of(self.generator, {})
            except ValueError as error:
                raise ValueError(f"a picture of {size} does not fit into memory as a whole, and {error}") from None
            while tile > SMALLEST_TILE and tile >= max(padded.shape[2:]):
                tile //= 2
            self.say(f"a picture of {size} does not fit into memory as a whole: using exact tiles of {tile}")
        while True:
            try:
                if self.tiles == "fast":
                    output, difference = translate_fast(self.generator, padded, tile, self.device)
                    self.say(str(difference))
                else:
                    output = translate_exact(self.generator, padded, tile, self.device)
                return output.float().cpu()
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
            self._release()
            if tile // 2 < SMALLEST_TILE:
                raise ValueError(f"a picture of {size} does not fit into memory, not even in tiles of {tile}")
            tile //= 2
            self.say(f"tiles of {2 * tile} do not fit into memory: using tiles of {tile}")

    def _release(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _needed(self, padded: Tensor) -> float:
        """Estimate the bytes of a pass over the whole image, from the maps of the widest layer."""
        if not self._bytes_per_pixel:
            widest = 0

            def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                nonlocal widest
                widest = max(widest, inputs[0].numel() + 2 * output.numel())

            leaves = [m for m in self.generator.modules() if not list(m.children())]
            hooks = [module.register_forward_hook(record) for module in leaves]
            side = fitting_side(64, self.factor, self.smallest)
            try:
                self.generator(padded.new_zeros(1, self.channels, side, side))
            finally:
                for hook in hooks:
                    hook.remove()
            self._bytes_per_pixel = 2 * 4 * widest / side**2  # twice: skip connections and workspaces of convolutions
        return self._bytes_per_pixel * padded.shape[0] * padded.shape[2] * padded.shape[3]


def pad_to_multiple(pictures: Tensor, factor: int, smallest: int = 1) -> Tensor:
    """Pad on the right and at the bottom to multiples of `factor`, at least `smallest`.

    Padding is by reflection, or by replication if the image is too small for reflection.
    """
    height, width = pictures.shape[2:]
    bottom, right = (fitting_side(side, factor, smallest) - side for side in (height, width))
    if bottom == right == 0:
        return pictures
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(pictures, (0, right, 0, bottom), mode=mode)
