"""Render rain on clean pictures, to train and test deraining without a data set.

fastnce rain PHOTOS --out DIR               # DIR/rain/NAME.png and DIR/norain/NAME.png
fastnce rain PHOTOS --out DIR --unpaired    # DIR/trainA (rainy) and DIR/trainB (clean), of different pictures

`render_rain` works on tensors on any device, so it can also serve as an augmentation.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.gathered import gathering
from ..common.locking import hold
from ..common.messages import counted
from ..common.writing import check_folder, check_free, distinct_names, move_together, partial_name, sweep
from .encoding import save_image
from .folder import DataError, find_images, load_image

Range = tuple[float, float]


@dataclass(frozen=True)
class RainOptions:
    """Parameters of the rain. Each picture draws its own values, uniformly from (low, high).

    Lengths are fractions of the picture's shorter side, so that photographs of any size look alike.
    """

    density: Range = (0.06, 0.2)
    """Fraction of the picture that streaks cover."""
    length: Range = (0.07, 0.18)
    """Length of the nearest streaks."""
    width: Range = (0.004, 0.008)
    """Width of the nearest streaks at half their brightness; at least one pixel."""
    angle: Range = (-25.0, 25.0)
    """Degrees from the vertical; positive values lean to the right at the top."""
    opacity: Range = (0.4, 0.8)
    """Opacity of the nearest and brightest streaks, 0 to 1."""
    haze: Range = (0.0, 0.15)
    """Fraction of the light that the veil absorbs where it is thickest, 0 to 1."""
    additive: Range = (0.0, 0.0)
    """0: streaks cover what is behind them. 1: they only add light, as in most synthetic sets (Rain100L, Rain800)."""
    drizzle: Range = (0.0, 0.0)
    """Opacity of fine rain: dense streaks about one pixel wide, over the whole picture, 0 to 1."""
    layers: int = 3
    """Number of depths. Farther streaks are shorter, thinner, fainter and more numerous."""

    def __post_init__(self) -> None:
        least = {"length": 1e-3, "width": 1e-4, "angle": -80.0}
        most = {"density": 0.9, "length": 1.0, "width": 0.2, "angle": 80.0}
        most |= dict.fromkeys(("opacity", "haze", "additive", "drizzle"), 1.0)
        for name, limit in most.items():
            low, high = getattr(self, name)
            if not least.get(name, 0.0) <= low <= high <= limit:
                raise ValueError(
                    f"rain {name} must be LOW or LOW:HIGH between {least.get(name, 0.0):g} and {limit:g}, not "
                    f"{low:g}:{high:g}"
                )
        if not 1 <= self.layers <= 8:
            raise ValueError(f"rain layers must be from 1 to 8, not {self.layers}")

    def limits(self, name: str) -> Range:
        """The range (low, high) of an option."""
        return getattr(self, name)


@torch.no_grad()
def render_rain(
    clean: Tensor,
    options: RainOptions | Sequence[RainOptions] | None = None,
    generator: torch.Generator | None = None,
    *,
    side: int | None = None,
) -> Tensor:
    """Render rain on images.

    First a veil of haze is added, thicker towards the top, where scenes are far away. Then streaks are added from the
    farthest layer to the nearest. A layer is sparse noise convolved with one motion-blurred drop. A streak has the
    light of its drop, which shows the bright sky: dark places change more than bright ones, and nothing becomes
    brighter than that light, unless `additive` is above 0. Fine rain (`drizzle`) comes last: white noise convolved with
    a thin drop, of which only what is brighter than a threshold shows.

    Args:
        clean: (images, 1 or 3, height, width) float in [-1, 1].
        options: of the rain; None for the defaults. Of several, each image draws one; they have equally many layers.
        generator: of the random draws. With a CPU generator, the rain is the same on every device.
        side: length in pixels that the options' lengths are fractions of; default the shorter side. For a crop, pass
            the shorter side of its photograph.

    Returns:
        the same shape, dtype and device.

    Raises:
        ValueError: the shape is wrong, `options` is empty, or the layers of several options differ.
    """
    kinds = [options or RainOptions()] if options is None or isinstance(options, RainOptions) else list(options)
    if not kinds:
        raise ValueError("options holds no kind of rain: give at least one, or None for the defaults")
    layers = _layers(kinds)
    if clean.dim() != 4 or clean.shape[1] not in (1, 3):
        raise ValueError(f"clean must be (images, 1 or 3, height, width), not {tuple(clean.shape)}")
    images, _, height, width = clean.shape
    device = clean.device
    source = device if generator is None else generator.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=source).to(device)

    kind = (draw(images, 1, 1) * len(kinds)).floor() if len(kinds) > 1 else None

    def of_kind(edges: list[float]) -> Tensor | float:
        if kind is None:
            return edges[0]
        values = torch.full_like(kind, edges[0])
        for place, edge in enumerate(edges[1:], 1):  # without a table, which a CUDA graph could not copy to the device
            values = torch.where(kind == place, edge, values)
        return values

    def between(name: str) -> Tensor:
        low, high = (of_kind(list(edges)) for edges in zip(*(k.limits(name) for k in kinds), strict=True))
        return low + (high - low) * draw(images, 1, 1)

    def has(name: str) -> bool:
        return any(k.limits(name)[1] > 0 for k in kinds)

    side = side or min(height, width)
    density, length, thick = between("density"), between("length") * side, between("width") * side
    angle, opacity, haze = between("angle"), between("opacity"), between("haze")
    light = 0.8 + 0.2 * draw(images, 1, 1, 1)  # of sky and drops

    x = clean.float().add(1).div(2)
    clouds = F.interpolate(draw(images, 1, 4, 5), (height, width), mode="bicubic", align_corners=False)
    fall = torch.linspace(1.0, 0.3, height, device=device)[:, None]
    veil = haze[:, None] * (fall * (0.7 + 0.3 * clouds)).clamp(0, 1)
    x = x + veil * (0.9 * light - x)

    down = torch.fft.fftfreq(height, 1 / height, device=device)[:, None]  # signed distance from row 0, wrapped
    right = torch.fft.fftfreq(width, 1 / width, device=device)[None, :]

    def fall_as(drops: Tensor, lean: Tensor, long: Tensor, wide: Tensor) -> Tensor:
        along = (down * lean.cos() - right * lean.sin()).abs()  # (B, H, W)
        across = down * lean.sin() + right * lean.cos()
        ends = 0.35 * long  # streaks fade in and out
        drop = ((long / 2 - along) / ends + 0.5).clamp(0, 1) * torch.exp(-4 * math.log(2) * (across / wide) ** 2)
        return torch.fft.irfft2(torch.fft.rfft2(drops) * torch.fft.rfft2(drop), s=(height, width))

    # Options that are off draw nothing: the rain of the others stays the same.
    adds = between("additive")[:, None] if has("additive") else None

    def show(x: Tensor, cover: Tensor) -> Tensor:
        covered = cover * (light - x).clamp(min=0)
        return x + (covered if adds is None else (1 - adds) * covered + adds * cover * light)

    for layer in reversed(range(layers)):
        near = 0.6**layer
        lean = torch.deg2rad(angle + 4 * draw(images, 1, 1) - 2)
        long = length * near * (0.7 + 0.6 * draw(images, 1, 1))
        wide = (thick * near).clamp(min=1.0)
        # the clamp to `height` counts only the part of a streak inside the image
        chance = density / layers / (long.clamp(max=height) * wide).clamp(min=1.0)
        # squaring makes bright drops rare
        drops = (draw(images, height, width) < chance) * draw(images, height, width).square().mul(0.8).add(0.2)
        x = show(x, (opacity * near**0.5 * fall_as(drops, lean, long, wide).clamp(0, 1))[:, None])
    if has("drizzle"):
        strength, threshold = between("drizzle"), 2 * draw(images, 1, 1) - 0.5
        ramp = 0.6 + 2.4 * draw(images, 1, 1)  # from faint to full, in standard deviations
        lean = torch.deg2rad(angle + 4 * draw(images, 1, 1) - 2)
        long = (length * (0.2 + draw(images, 1, 1))).clamp(min=2.0)
        fine = fall_as(draw(images, height, width), lean, long, 1 + 0.5 * draw(images, 1, 1))
        deviation = fine.std((1, 2), correction=min(1, height * width - 1), keepdim=True)
        fine = (fine - fine.mean((1, 2), keepdim=True)) / deviation.clamp(min=1e-6)
        x = show(x, (strength * ((fine - threshold) / ramp).clamp(0, 1))[:, None])
    return x.mul(2).sub(1).clamp(-1, 1).to(clean.dtype)


@gathering()
def write_rain(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: RainOptions | None = None,
    *,
    seed: int = 0,
    unpaired: bool = False,
    test: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Render rain on a picture or on every picture of a folder, and write 8-bit PNG files.

    Args:
        source: a picture or a folder.
        out: receives the folders `rain` and `norain`. With `unpaired`, it receives `trainA` and `trainB`, each from one
            half of the pictures, so that trainB never contains the clean version of a picture in trainA.
        options: of the rain; None for the defaults.
        seed: the rain on a picture depends only on (seed, position in the sorted folder).
        unpaired: see `out`.
        test: number of pictures that are held out and written as pairs to `test/rain` and `test/norain`.
        progress: called with a sentence after each picture.

    Returns:
        folder -> number of pictures in it.

    Raises:
        DataError: there are too few pictures, an output folder exists, or a file cannot be read. Nothing is written.
        InUse: another process writes to `out`.
    """
    source, out = Path(source), Path(out)
    options = options or RainOptions()
    if not 0 <= seed < 2**64:
        raise DataError(f"seed should be between 0 and 2**64-1, not {seed}")
    if test < 0:
        raise DataError(f"test should be at least 0, not {test}")
    files = find_images(source) if source.is_dir() else [source]
    needed = test + (2 if unpaired else 1 if not test else 0)
    if len(files) < needed:
        raise DataError(f"{source} holds {counted(len(files), 'picture')}; at least {needed} are needed")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    half = (len(files) - test + 1) // 2
    parts: dict[str, tuple[str, str]] = {"test": ("test/rain", "test/norain")}
    if unpaired:
        parts |= {"rainy": ("trainA", ""), "clean": ("", "trainB")}
    else:
        parts |= {"pair": ("rain", "norain")}
    kinds = ["test"] * test + (["rainy"] * half + ["clean"] * len(files) if unpaired else ["pair"] * len(files))
    kind_of = dict(zip(order, kinds, strict=False))

    tops = sorted({f.split("/")[0] for kind in set(kind_of.values()) for f in parts[kind] if f})
    check_folder(out, " and ".join(tops))
    top, own = (os.path.join(os.path.realpath(folder), "") for folder in (source, out))
    if source.is_dir() and own.startswith(top):
        raise DataError(f"{out} is in {source}, which would then hold rainy pictures: take another folder for --out")
    names = distinct_names(files, source if source.is_dir() else source.parent, ".png")
    folders = [parts[kind_of[place]] for place in range(len(files))]
    with hold(out, "fastnce rain", "take another folder for --out"):
        check_free(out, tops)
        sweep(out, held=True)
        return _write(names, folders, out, options, seed, progress)


def _write(
    names: dict[Path, Path],
    folders: list[tuple[str, str]],
    out: Path,
    options: RainOptions,
    seed: int,
    progress: Callable[[str], None] | None,
) -> dict[str, int]:
    temporary = out / partial_name()
    counts: dict[str, int] = {}
    try:
        for place, (file, name) in enumerate(names.items()):
            clean = load_image(file, 3)[None]
            rainy_folder, clean_folder = folders[place]
            if rainy_folder:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**63)
                save_image(render_rain(clean, options, generator)[0], temporary / rainy_folder / name)
            if clean_folder:
                save_image(clean[0], temporary / clean_folder / name)
            for folder in filter(None, (rainy_folder, clean_folder)):
                counts[folder] = counts.get(folder, 0) + 1
            if progress is not None:
                progress(f"{place + 1}/{len(names)} {file.name}")
        move_together(temporary, out, sorted(entry.name for entry in temporary.iterdir()))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def parse_range(name: str, text: str) -> Range:
    """Parse "0.1" or "0.1:0.3" to (low, high); raise ValueError for anything else."""
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise ValueError(f"--{name} must be a number or LOW:HIGH, not {text!r}") from None


def parse_kinds(name: str, text: str) -> list[RainOptions]:
    """Parse kinds of rain with semicolons between them, each as `parse_ranges` takes it; no text is the default rain.

    Raises:
        ValueError: an unknown key, a value that is not a range, or kinds whose layers differ.
    """
    kinds = [RainOptions(**parse_ranges(name, part)) for part in text.split(";") if part.strip()] or [RainOptions()]
    _layers(kinds, f"{name}: ")
    return kinds


def _layers(kinds: Sequence[RainOptions], where: str = "") -> int:
    """The number of layers of all kinds; ValueError if they differ, with `where` before it."""
    if len({kind.layers for kind in kinds}) != 1:
        raise ValueError(f"{where}kinds of rain must have equally many layers, not {[kind.layers for kind in kinds]}")
    return kinds[0].layers


def parse_ranges(name: str, text: str) -> dict[str, Any]:
    """Parse "density=0.1:0.3, angle=-10:10, layers=2" to arguments of `RainOptions`; `name` is the option's name.

    Raises:
        ValueError: an unknown key, or a value that is not a range.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key == "layers" and value.isdecimal() and len(value) < 10:
            found[key] = int(value)
        elif key in RANGES:
            try:
                found[key] = parse_range(key, value)
            except ValueError:
                raise ValueError(f"{name}: {key} must be a number or LOW:HIGH, not {value!r}") from None
        else:
            raise ValueError(
                f"{name}: {part!r} is not a range of rain; write KEY=LOW:HIGH with KEY one of {', '.join(RANGES)}, or "
                f"layers=N"
            )
    return found


def join_negative(arguments: list[str]) -> list[str]:
    """Join `--angle -10:10` to `--angle=-10:10`: argparse takes a value that begins with a dash for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--angle" and argument[:1] == "-":
            joined[-1] = f"--angle={argument}"
        else:
            joined.append(argument)
    return joined


RANGES = [f.name for f in fields(RainOptions) if f.name != "layers"]
"""Names of the options that are ranges, in order."""
