"""Paired test sets: which rainy picture belongs to which truth.

Recognised, with any format of picture, in the folder itself or in its subfolder ``test``:

- two folders (``rain`` and ``norain``, ``input`` and ``gt``, ... see `RAINY` and `CLEAN`), matched by name:
  the same stem, ``rain-001``/``norain-001``, ``000``/``000gt``, ``0_rain``/``0_clean``, and several rainy pictures
  for one truth as ``001x2``/``001`` (Rain100H, Rain200) and ``901_14``/``901`` (Rain1400);
- a folder of rainy pictures, the truths in the folder above it (Rain100L as PReNet unpacks it);
- both in one folder, told apart by their names;
- strips: one picture that holds the truth on its left half and the rainy one on its right (Rain800), or the other way
  round where `rain_side` says so.

Names are compared as they look, however their accents are encoded (NFC), and without regard to case; where two truths
differ in nothing but case, the one in the rainy picture's own case is meant.
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
SIDE_STRIPS, SIDE_MAJORITY = 20, 0.75  # so many strips are asked which half is rainy, and so many must agree
STRIP_AGREEMENT = 0.8  # mean correlation of the halves: measured 0.97 on Rain800, 0.2 on single pictures of Rain100L


@dataclass(frozen=True)
class Pair:
    """One rainy picture and its truth; `rainy` and `clean` are the same file for a strip.

    Args:
        name: differs from all other names of the set, also where case is ignored.
        rain_side: the half of a strip that is rainy, "right" or "left".
    """

    name: str
    rainy: Path
    clean: Path
    rain_side: str = "right"

    @property
    def strip(self) -> bool:
        return self.rainy == self.clean

    def load(self, channels: int = 3) -> tuple[Tensor, Tensor]:
        """Rainy and clean, float32 (channels, height, width) in [-1, 1]; DataError as `load_image`."""
        rainy = load_image(self.rainy, channels)
        if not self.strip:
            return rainy, load_image(self.clean, channels)
        half = rainy.shape[2] // 2
        left, right = rainy[:, :, :half], rainy[:, :, rainy.shape[2] - half :]
        return (left, right) if self.rain_side == "left" else (right, left)


def find_pairs(root: str | os.PathLike[str], rain_side: str = "right", split: str = "test") -> list[Pair]:
    """All pairs of a test set, in the order of the rainy pictures' names.

    Args:
        rain_side: the half of strips that is rainy, "right" or "left"; nothing in other layouts. A warning says where
            most strips look as if it were the other one; that changes nothing.
        split: "test" or "train": which to take of a set that holds both, such as train_strips and test_strips. A
            warning says so.

    Raises:
        DataError: no layout that is known (the message says what lies there), or pictures without a partner, with more
            than one, or of another size than their partner: all of them are named.
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
        f"{root} is no paired test set: it holds {held or 'nothing'}, and should hold rain/ and norain/ (or input/ and "
        f"gt/), pictures named rain-001 and norain-001, or strips with the truth on the left half"
    )


def check_rain_side(rain_side: str) -> None:
    """DataError where it names no half."""
    if rain_side not in RAIN_SIDES:
        raise DataError(f"rain_side={rain_side!r} should be one of {', '.join(RAIN_SIDES)}: the half that is rainy")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _strip_folders(folder: Path, split: str) -> list[str]:
    """Those of one split where there are both: training pictures measured as test pictures would look too good."""
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
    """A name, the name without its word for rainy or clean, and a number without its zeros."""
    stem = _composed(stem)
    words = rf"^{_ANY_WORD}(?:[-_ ]+(?=.)|(?=\d))|(?:(?<=.)[-_ ]+|(?<=\d)){_ANY_WORD}$"
    bare = re.sub(words, "", stem, flags=re.IGNORECASE)
    return list(dict.fromkeys([stem, bare, (bare.lstrip("0") or "0") if bare.isdigit() else bare]))


def _keys(stem: str) -> list[str]:
    """What the truth of a rainy picture may be called, the most literal first."""
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
        if len(found) > 1:  # the same names in several subfolders: the one that lies alike
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
            problems.append(f"{file.relative_to(root)} and {twin.name} differ in case alone and share a truth")
            continue
        sizes = [probe_picture(path)[:2] for path in (file, truth)]
        if sizes[0] != sizes[1]:
            (h, w), (th, tw) = sizes
            problems.append(f"{file.relative_to(root)} is {w}x{h} and its truth {truth.relative_to(root)} {tw}x{th}")
            continue
        pairs.append(Pair(file.relative_to(rainy_top).with_suffix("").as_posix(), file, truth))
    problems += [f"{file.relative_to(root)} has no rainy picture" for file in clean if file not in used]
    if problems:
        raise DataError(f"{root}: {len(problems)} pictures do not pair: {'; '.join(problems)}")
    return _distinct(pairs, rainy_top)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _place(file: Path, top: Path) -> str:
    return _composed(file.parent.relative_to(top).as_posix())


def _check_spelling(files: list[Path], top: Path, root: Path) -> None:
    """DataError where two names look the same and only their accents are encoded differently."""
    seen: dict[str, Path] = {}
    for file in files:
        twin = seen.setdefault(_composed(file.relative_to(top).with_suffix("").as_posix()), file)
        if twin.with_suffix("") != file.with_suffix(""):
            names = " and ".join(ascii(path.relative_to(root).as_posix()) for path in (twin, file))
            raise DataError(
                f"{root}: {names} look the same (their accents are encoded differently): rename one of them"
            )


def _distinct(pairs: list[Pair], top: Path) -> list[Pair]:
    """The pairs, those whose name another one has named by their path or file name as well: a.jpg beside a.png."""
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
    """Warn where the halves taken for clean look rainy; a set that looks so by mistake loses nothing."""
    looked_at = [pairs[i * len(pairs) // min(len(pairs), SIDE_STRIPS)] for i in range(min(len(pairs), SIDE_STRIPS))]
    against = sum(streaks(*pair.load(1)) < 0 for pair in looked_at)
    if against >= SIDE_MAJORITY * len(looked_at):
        taken = pairs[0].rain_side
        other = next(side for side in RAIN_SIDES if side != taken)
        warnings.warn(
            f"{root}: {against} of {len(looked_at)} strips look as if it rained on their {other} half, which is taken "
            f"as clean; if it does, say so with rain_side={other!r} (--rain-side {other}, data.rain_side={other})",
            stacklevel=3,
        )


def streaks(first: Tensor, second: Tensor) -> float:
    """Above 0 where the first of two pictures of one scene, (1, height, width), shows rain and the second does not.

    Streaks are bright and thin across. So each picture less its means over 9 pixels of a row, divided by the spread of
    what is left (haze takes contrast away), differs from the other by few large values of the rainy one's sign and many
    small ones of the other sign; the mean of their cubes tells which.
    """
    fine = [
        picture - F.avg_pool2d(picture, (1, 9), stride=1, padding=(0, 4), count_include_pad=False)
        for picture in (first.double(), second.double())
    ]
    first, second = (part / part.std().clamp(min=1e-6) for part in fine)
    return float((first - second).pow(3).mean())
