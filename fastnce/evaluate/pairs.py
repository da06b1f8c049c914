"""Paired test sets: which rainy picture belongs to which truth.

Recognised, with any format of picture, in the folder itself or in its subfolder ``test``:

- two folders (``rain`` and ``norain``, ``input`` and ``gt``, ... see `RAINY` and `CLEAN`), matched by name:
  the same stem, ``rain-001``/``norain-001``, ``000``/``000gt``, ``0_rain``/``0_clean``, and several rainy pictures
  for one truth as ``001x2``/``001`` (Rain100H, Rain200) and ``901_14``/``901`` (Rain1400);
- a folder of rainy pictures, the truths in the folder above it (Rain100L as PReNet unpacks it);
- both in one folder, told apart by their names;
- strips: one picture that holds the truth on its left half and the rainy one on its right (Rain800).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..data import DataError, find_images, load_image
from ..data.folder import probe_picture

RAINY = ("rain", "rainy", "rainy_image", "rainy_images", "input", "inputs", "lq", "data", "degraded")
CLEAN = (
    *("norain", "no_rain", "gt", "groundtruth", "ground_truth", "target", "targets", "clean", "clear", "truth"),
    *("label", "labels", "hq"),
)
_RAINY_WORD = r"(?:rainy|rain|input|lq)"
_CLEAN_WORD = r"(?:norain|no_rain|groundtruth|ground_truth|gt|clean|clear|target|truth|hq)"
_ANY_WORD = rf"(?:{_CLEAN_WORD}|{_RAINY_WORD})"
STRIP_AGREEMENT = 0.8  # mean correlation of the halves: measured 0.97 on Rain800, 0.2 on single pictures of Rain100L


@dataclass(frozen=True)
class Pair:
    """One rainy picture and its truth; `rainy` and `clean` are the same file for a strip."""

    name: str
    rainy: Path
    clean: Path

    @property
    def strip(self) -> bool:
        return self.rainy == self.clean

    def load(self, channels: int = 3) -> tuple[Tensor, Tensor]:
        """Rainy and clean, float32 (channels, height, width) in [-1, 1]; DataError as `load_image`."""
        rainy = load_image(self.rainy, channels)
        if not self.strip:
            return rainy, load_image(self.clean, channels)
        half = rainy.shape[2] // 2
        return rainy[:, :, rainy.shape[2] - half :], rainy[:, :, :half]


def find_pairs(root: str | os.PathLike[str]) -> list[Pair]:
    """All pairs of a test set, in the order of the rainy pictures' names.

    Raises:
        DataError: no layout that is known (the message says what lies there), or pictures without a partner, with more
            than one, or of another size than their partner: all of them are named.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; it should hold a test set, such as rain/ and norain/")
    for folder in (root, root / "test"):
        if not folder.is_dir():
            continue
        rainy, clean = _subfolder(folder, RAINY), _subfolder(folder, CLEAN)
        if rainy is not None and clean is not None:
            return _matched(rainy, find_images(rainy), clean, find_images(clean), root)
        here = sorted(file for file in find_images(folder) if file.parent == folder)
        if rainy is not None and here:
            return _matched(rainy, find_images(rainy), folder, here, root)
        truths = [file for file in here if _marked(file, _CLEAN_WORD)]
        if truths:
            return _matched(folder, [file for file in here if file not in truths], folder, truths, root)
        strips = here or [f for name in _folders(folder) if "strip" in name.lower() for f in find_images(folder / name)]
        if strips and _are_strips(strips):
            return [Pair(file.stem, file, file) for file in strips]
    names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise DataError(
        f"{root} is no paired test set: it holds {held or 'nothing'}, and should hold rain/ and norain/ (or input/ and "
        f"gt/), pictures named rain-001 and norain-001, or strips with the truth on the left half"
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    present = {name.lower(): name for name in _folders(folder)}
    return next((folder / present[name] for name in names if name in present), None)


def _marked(file: Path, word: str) -> bool:
    return re.search(rf"^{word}[-_ ]?\d|\d[-_ ]?{word}$", file.stem.lower()) is not None


def _plain(stem: str) -> list[str]:
    """A name, the name without its word for rainy or clean, and a number without its zeros."""
    stem = stem.lower()
    bare = re.sub(rf"^{_ANY_WORD}(?:[-_ ]+(?=.)|(?=\d))|(?:(?<=.)[-_ ]+|(?<=\d)){_ANY_WORD}$", "", stem)
    return list(dict.fromkeys([stem, bare, (bare.lstrip("0") or "0") if bare.isdigit() else bare]))


def _keys(stem: str) -> list[str]:
    """What the truth of a rainy picture may be called, the most literal first."""
    keys = _plain(stem)
    bare = keys[min(1, len(keys) - 1)]
    for ending in (r"x\d+$", r"_\d+$"):  # several rainy pictures for one truth
        keys += _plain(re.sub(rf"(?<=\d){ending}", "", bare))
    return list(dict.fromkeys(keys))


def _matched(rainy_top: Path, rainy: list[Path], clean_top: Path, clean: list[Path], root: Path) -> list[Pair]:
    if not rainy or not clean:
        raise DataError(f"{root}: there are {len(rainy)} rainy and {len(clean)} clean pictures, both are needed")
    by_key: dict[str, list[Path]] = {}
    for file in clean:
        for key in _plain(file.stem):
            by_key.setdefault(key, []).append(file)
    pairs: list[Pair] = []
    problems: list[str] = []
    used: set[Path] = set()
    for file in rainy:
        found = next((by_key[key] for key in _keys(file.stem) if key in by_key), [])
        if len(found) > 1:  # the same names in several subfolders: the one that lies alike
            place = file.parent.relative_to(rainy_top)
            found = [truth for truth in found if truth.parent.relative_to(clean_top) == place] or found
        if len(found) != 1:
            what = "no truth" if not found else f"{len(found)} truths"
            problems.append(f"{file.relative_to(root)} has {what}")
            continue
        (truth,) = found
        used.add(truth)
        sizes = [probe_picture(path)[:2] for path in (file, truth)]
        if sizes[0] != sizes[1]:
            (h, w), (th, tw) = sizes
            problems.append(f"{file.relative_to(root)} is {w}x{h} and its truth {truth.relative_to(root)} {tw}x{th}")
            continue
        pairs.append(Pair(file.relative_to(rainy_top).with_suffix("").as_posix(), file, truth))
    problems += [f"{file.relative_to(root)} has no rainy picture" for file in clean if file not in used]
    if problems:
        raise DataError(f"{root}: {len(problems)} pictures do not pair: {'; '.join(problems)}")
    return pairs


def _are_strips(files: list[Path]) -> bool:
    """Whether the halves of the first pictures show the same scene."""
    agreement = []
    for file in files[:16]:
        pixels = load_image(file, 1)[0].numpy()
        if pixels.shape[1] < 2:
            return False
        half = pixels.shape[1] // 2
        left, right = (
            np.asarray(Image.fromarray(part).resize((32, 32), Image.Resampling.BOX)).ravel()
            for part in (pixels[:, :half], pixels[:, -half:])
        )
        spread = left.std() * right.std()
        agreement.append(float(((left - left.mean()) * (right - right.mean())).mean() / spread) if spread > 0 else 0.0)
    return float(np.mean(agreement)) >= STRIP_AGREEMENT
