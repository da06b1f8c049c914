"""Translate pictures with a trained generator: one picture, a folder of them, or one that is larger than memory.

translator = load_translator("runs/horse2zebra")       # a run, a checkpoint folder or a published .pth
picture = translator(load_image("horse.jpg")[None])    # any size
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.memory import available_memory, out_of_memory
from ..evaluate.quality import FLOATS, check_range
from ..networks import channels_last
from .tiles import translate_exact, translate_fast
from .windows import steps_of

Tiles = Literal["auto", "exact", "fast"]
SMALLEST_TILE = 128


class Translator:
    """A generator that takes pictures of any size: padded by reflection to what it needs, cropped back after.

    Args:
        generator: its `factor` says what sides must be multiples of.
        device: where it computes.
        tiles: "auto" translates whole pictures, and those that do not fit into memory by exact tiles; "exact" cuts
            every picture larger than a tile and gives the same as the whole to rounding; "fast" takes the statistics of
            instance norms from a downscaled picture, and `say` is told how far that is from exact on a crop.
        tile_size: side of a tile in pixels; halved as long as it does not fit into memory.
        say: called with a sentence where something is done otherwise than expected.

    Raises:
        ValueError: settings that make no sense, or tiles asked for with a generator that they are not for.
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
            steps_of(generator, {})
        self.device = torch.device(device)
        self.generator = generator.to(self.device).eval()
        self.layout = torch.contiguous_format
        if self.device.type != "cpu":  # where it is no faster
            self.layout = torch.channels_last
            channels_last(self.generator)
        self.sources: tuple[Path, ...] = ()
        """The files that the weights came from, where that is known."""
        self.tiles, self.tile_size, self.say = tiles, tile_size, say or (lambda sentence: None)
        self.factor: int = getattr(generator, "factor", 1)
        self.smallest: int = getattr(generator, "smallest", self.factor)
        # the convolution that sees the picture, whatever its class
        first = next(p for p in generator.parameters() if p.dim() == 4)
        self.channels, self.dtype = first.shape[1], first.dtype
        self.out_channels: int = getattr(generator, "out_channels", self.channels)
        self._bytes_per_pixel = 0.0

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Floats (images, channels, height, width) in [-1, 1] to the same size, float32 in [-1, 1] on the CPU.

        What a generator puts outside of [-1, 1] is clipped, as it is in a file.

        Raises:
            ValueError: another shape, dtype or range, or a picture that does not fit into memory even in tiles.
        """
        self._check(pictures)
        return self._translate(pictures.to(self.dtype)).clamp(-1, 1)

    def _check(self, pictures: Tensor) -> None:
        wanted = f"pictures must be (images, {self.channels}, height, width)"
        if not isinstance(pictures, Tensor) or pictures.dtype not in FLOATS:
            kind = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
            raise ValueError(f"{wanted}, floats in [-1, 1], not {kind}: fastnce.data.load_image(path)[None] is")
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
            if len(padded) > 1:
                return torch.cat([self._translate(picture) for picture in pictures.split(1)])
        return torch.cat([self._tiled(picture)[:, :, :height, :width] for picture in padded.split(1)])

    def _whole(self, padded: Tensor) -> Tensor | None:
        """None where memory is too small for it."""
        if self.device.type == "cpu":  # where memory runs out only when it is written to, and the process is killed
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

    def _tiled(self, padded: Tensor) -> Tensor:
        size = f"{padded.shape[3]}x{padded.shape[2]}"
        tile = self.tile_size
        if self.tiles == "auto":
            try:
                steps_of(self.generator, {})
            except ValueError as error:
                raise ValueError(f"a picture of {size} does not fit into memory as a whole, and {error}") from None
            while tile > SMALLEST_TILE and tile >= max(padded.shape[2:]):
                tile //= 2
            self.say(f"a picture of {size} does not fit into memory as a whole: exact tiles of {tile}")
        while True:
            try:
                if self.tiles == "fast":
                    output, apart = translate_fast(self.generator, padded, tile, self.device)
                    self.say(str(apart))
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
            self.say(f"tiles of {2 * tile} do not fit into memory: tiles of {tile}")

    def _release(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _needed(self, padded: Tensor) -> float:
        """An estimate of the bytes that a pass over the whole picture takes, from the widest layer's maps."""
        if not self._bytes_per_pixel:
            widest = 0

            def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                nonlocal widest
                widest = max(widest, inputs[0].numel() + 2 * output.numel())

            leaves = [m for m in self.generator.modules() if not list(m.children())]
            hooks = [module.register_forward_hook(record) for module in leaves]
            side = max(64, self.smallest)
            try:
                self.generator(padded.new_zeros(1, self.channels, side, side))
            finally:
                for hook in hooks:
                    hook.remove()
            self._bytes_per_pixel = 2 * 4 * widest / side**2  # twice: skips, and what convolutions need for themselves
        return self._bytes_per_pixel * padded.shape[0] * padded.shape[2] * padded.shape[3]


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
