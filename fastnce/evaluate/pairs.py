"""Paired test sets: match each rainy picture with its truth.

These layouts are recognised, in the folder itself or in its subfolder ``test``, with any picture format:

- two folders (``rain`` and ``norain``, ``input`` and ``gt``, ... see `RAINY` and `CLEAN`), matched by name:
  the same stem, ``rain-001``/``norain-001``, ``000``/``000gt``, ``0_rain``/``0_clean``, and several rainy pictures
  for one truth as ``001x2``/``001`` (Rain100H, Rain200) and ``901_14``/``901`` (Rain1400);
- a folder of rainy pictures, with the truths in its parent folder (Rain100L as PReNet unpacks it);
- both in one folder, distinguished by their names;
- strips: one picture with the truth on its left half and the rainy picture on its right half (Rain800). `rain_side`
  selects the opposite order.

Names are compared in NFC, so that the encoding of accents does not matter, and without regard to case. If two truths
differ only in case, the one with the rainy picture's case is taken.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
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
RAIN_SIDES = ("right", "left")
RAIN_SIDE_HELP = "the half of strips that is rainy (default %(default)s)"
SIDE_STRIPS, SIDE_MAJORITY = 20, 0.75  # number of strips that are checked for rain, and the share that must agree
STRIP_AGREEMENT = 0.8  # mean correlation of the halves: measured 0.97 on Rain800, 0.2 on single pictures of Rain100L


@dataclass(frozen=True)
class Pair:
    """One rainy picture and its truth; `rainy` and `clean` are the same file for a strip.

    Args:
        name: unique in the set, also if case is ignored.
        rain_side: the half of a strip that is rainy, "right" or "left".
    """

    name: str
    rainy: Path
    clean: Path
    rain_side: str = "right"

    @property
    def strip(self) -> bool:
        return self.rainy == self.clean

    def exchanged(self) -> Pair:
        """Return the pair with the truth as input and the rainy picture as truth."""
        side = RAIN_SIDES[1 - RAIN_SIDES.index(self.rain_side)] if self.strip else self.rain_side
        return replace(self, rainy=self.clean, clean=self.rainy, rain_side=side)

    def load(self, channels: int = 3, truth_channels: int | None = None) -> tuple[Tensor, Tensor]:
        """Load (rainy, clean), float32 (channels, height, width) in [-1, 1]; raise DataError as `load_image` does.

        Args:
            channels: of the rainy picture, and of the truth unless `truth_channels` is given.
        """
        rainy = load_image(self.rainy, channels)
        same = self.strip and truth_channels in (None, channels)
        clean = rainy if same else load_image(self.clean, truth_channels or channels)
        if not self.strip:
            return rainy, clean
        half = rainy.shape[2] // 2
        left, right = slice(half), slice(rainy.shape[2] - half, None)
        wet, dry = (left, right) if self.rain_side == "left" else (right, left)
        return rainy[:, :, wet], clean[:, :, dry]


def find_pairs(root: str | os.PathLike[str], rain_side: str = "right", split: str = "test") -> list[Pair]:
    """Find all pairs of a test set, in the order of the rainy pictures' names.

    Args:
        root: the folder of the set.
        rain_side: the half of strips that is rainy, "right" or "left"; other layouts ignore it. If most strips look as
            if the other half were rainy, a warning says so, and the result stays the same.
        split: "test" or "train": which folders to take if the set has both, such as train_strips and test_strips. A
            warning names them.

    Raises:
        DataError: the layout is unknown (the message names the content of the folder); or pictures have no partner,
            several partners, or a partner of another size (the message names all of them).
    """
    check_rain_side(rain_side)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; it should hold a test set, such as rain/ and norain/")
    for folder in dict.fromkeys((root, root / split, root / "test")):
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
        strips = here or [file for name in _strip_folders(folder, split) for file in find_images(folder / name)]
        if strips and _are_strips(strips):
            _check_spelling(strips, folder, root)
            pairs = [Pair(file.stem, file, file, rain_side) for file in strips]
            _warn_of_rain_side(pairs, root)
            return _distinct(pairs, folder)
    names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise DataError(
        f"{root} is not a paired test set: it holds {held or 'nothing'}, and should hold rain/ and norain/ (or input/ "
        f"and gt/), pictures named rain-001 and norain-001, or strips with the truth on the left half"
    )


def check_rain_side(rain_side: str) -> None:
    """Raise DataError unless `rain_side` names a half."""
    if rain_side not in RAIN_SIDES:
        raise DataError(f"rain_side={rain_side!r} should be one of {', '.join(RAIN_SIDES)}: the half that is rainy")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _strip_folders(folder: Path, split: str) -> list[str]:
    """Folders of strips, of one split if there are both: measuring training pictures would look too good."""
    names = [name for name in _folders(folder) if "strip" in name.lower()]
    other = "train" if split == "test" else "test"
    wanted = [name for name in names if split in name.lower()]
    if not wanted or not any(other in name.lower() for name in names):
        return names
    warnings.warn(f"{folder} holds {', '.join(names)}: only {', '.join(wanted)} is taken", stacklevel=3)
    return wanted


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    present = {name.lower(): name for name in _folders(folder)}
    return next((folder / present[name] for name in names if name in present), None)


def _marked(file: Path, word: str) -> bool:
    return re.search(rf"^{word}[-_ ]?\d|\d[-_ ]?{word}$", file.stem.lower()) is not None


def _plain(stem: str) -> list[str]:
    """Variants of a name: as it is, without its word for rainy or clean, and a number without leading zeros."""
    stem = _composed(stem)
    words = rf"^{_ANY_WORD}(?:[-_ ]+(?=.)|(?=\d))|(?:(?<=.)[-_ ]+|(?<=\d)){_ANY_WORD}$"
    bare = re.sub(words, "", stem, flags=re.IGNORECASE)
    return list(dict.fromkeys([stem, bare, (bare.lstrip("0") or "0") if bare.isdigit() else bare]))


def _keys(stem: str) -> list[str]:
    """Possible names of a rainy picture's truth, the most literal first."""
    keys = _plain(stem)
    bare = keys[min(1, len(keys) - 1)]
    for ending in (r"x\d+$", r"_\d+$"):  # several rainy pictures for one truth
        keys += _plain(re.sub(rf"(?<=\d){ending}", "", bare, flags=re.IGNORECASE))
    return list(dict.fromkeys(keys))


def _matched(rainy_top: Path, rainy: list[Path], clean_top: Path, clean: list[Path], root: Path) -> list[Pair]:
    if not rainy or not clean:
        raise DataError(f"{root}: there are {len(rainy)} rainy and {len(clean)} clean pictures, both are needed")
    for top, files in ((rainy_top, rainy), (clean_top, clean)):
        _check_spelling(files, top, root)
    by_key: dict[str, list[Path]] = {}
    for file in clean:
        for key in dict.fromkeys(key.lower() for key in _plain(file.stem)):
            by_key.setdefault(key, []).append(file)
    pairs: list[Pair] = []
    problems: list[str] = []
    used: set[Path] = set()
    cases: dict[tuple[Path, str], Path] = {}
    for file in rainy:
        key = next((key for key in _keys(file.stem) if key.lower() in by_key), "")
        found = by_key.get(key.lower(), [])
        if len(found) > 1:  # the same name in several subfolders: take the one in the same subfolder
            place = _place(file, rainy_top)
            found = [truth for truth in found if _place(truth, clean_top) == place] or found
        if len(found) > 1:
            found = [truth for truth in found if key in _plain(truth.stem)] or found
        if len(found) != 1:
            what = "no truth" if not found else f"{len(found)} truths"
            problems.append(f"{file.relative_to(root)} has {what}")
            continue
        (truth,) = found
        used.add(truth)
        twin = cases.setdefault((truth, _composed(str(file.with_suffix(""))).lower()), file)
        if twin.stem != file.stem:
            problems.append(f"{file.relative_to(root)} and {twin.name} differ only in case and share a truth")
            continue
        sizes = [probe_picture(path)[:2] for path in (file, truth)]
        if sizes[0] != sizes[1]:
            (h, w), (th, tw) = sizes
            problems.append(f"{file.relative_to(root)} is {w}x{h}, its truth {truth.relative_to(root)} is {tw}x{th}")
            continue
        pairs.append(Pair(file.relative_to(rainy_top).with_suffix("").as_posix(), file, truth))
    problems += [f"{file.relative_to(root)} has no rainy picture" for file in clean if file not in used]
    if problems:
        count = "1 picture does" if len(problems) == 1 else f"{len(problems)} pictures do"
        raise DataError(f"{root}: {count} not pair: {'; '.join(problems)}")
    return _distinct(pairs, rainy_top)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _place(file: Path, top: Path) -> str:
    return _composed(file.parent.relative_to(top).as_posix())


def _check_spelling(files: list[Path], top: Path, root: Path) -> None:
    """Raise DataError if two names differ only in the encoding of their accents."""
    seen: dict[str, Path] = {}
    for file in files:
        twin = seen.setdefault(_composed(file.relative_to(top).with_suffix("").as_posix()), file)
        if twin.with_suffix("") != file.with_suffix(""):
            names = " and ".join(ascii(path.relative_to(root).as_posix()) for path in (twin, file))
            raise DataError(
                f"{root}: {names} look the same (their accents are encoded differently): rename one of them"
            )


def _distinct(pairs: list[Pair], top: Path) -> list[Pair]:
    """Make names unique: a pair with a used name gets its path or file name, as for a.jpg beside a.png."""
    taken: set[str] = set()
    named: list[Pair] = []
    for pair in pairs:
        place = pair.rainy.relative_to(top)
        names = [pair.name, place.with_suffix("").as_posix(), place.as_posix()]
        numbered = (f"{place.as_posix()}-{count}" for count in itertools.count(2))
        name = next(name for name in itertools.chain(names, numbered) if _composed(name).lower() not in taken)
        taken.add(_composed(name).lower())
        named.append(replace(pair, name=name))
    return named


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


def _warn_of_rain_side(pairs: list[Pair], root: Path) -> None:
    """Warn if the halves taken as clean look rainy. The warning changes no result, so a false one does no harm."""
    checked = [pairs[i * len(pairs) // min(len(pairs), SIDE_STRIPS)] for i in range(min(len(pairs), SIDE_STRIPS))]
    against = sum(streaks(*pair.load(1)) < 0 for pair in checked)
    if against >= SIDE_MAJORITY * len(checked):
        taken = pairs[0].rain_side
        other = next(side for side in RAIN_SIDES if side != taken)
        warnings.warn(
            f"{root}: {against} of {len(checked)} strips look as if it rained on their {other} half, which is taken as "
            f"clean; if so, take --rain-side {other} (in training data.rain_side={other})",
            stacklevel=3,
        )


def streaks(first: Tensor, second: Tensor) -> float:
    """Return a score above 0 if the first of two images (1, height, width) of one scene shows rain, not the second.

    Streaks are bright and thin. From each image, its means over 9 pixels of a row are subtracted, and the rest is
    divided by its standard deviation, as haze reduces contrast. The difference of the two results then has few large
    values with the sign of the rainy image and many small values of the other sign. The mean of the cubes shows the
    sign of the large ones.
    """
    fine = [
        picture - F.avg_pool2d(picture, (1, 9), stride=1, padding=(0, 4), count_include_pad=False)
        for picture in (first.double(), second.double())
    ]
    first, second = (part / part.std().clamp(min=1e-6) for part in fine)
    return float((first - second).pow(3).mean())
