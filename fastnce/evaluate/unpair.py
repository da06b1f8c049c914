"""Make an unpaired training set from pairs: rainy pictures of one half of the scenes, clean pictures of the other.

fastnce unpair PAIRS --out DIR --test TEST
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..common.gathered import gathering
from ..common.locking import hold
from ..common.writing import check_folder, check_free, move_together, partial_name, sweep
from ..data import DataError, save_image
from .pairs import Pair, find_pairs


@gathering()
def write_unpaired(
    pairs: str | os.PathLike[str],
    out: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    rain_side: str = "right",
) -> dict[str, int]:
    """Write `trainA` (rainy) and `trainB` (clean) of different scenes, and pairs to `test/rain` and `test/norain`.

    Scenes go to A and B in turn, in the order of their clean pictures' names. All rainy pictures of one scene stay
    together. Pictures are written as 8-bit PNG.

    Args:
        pairs, test: folders in any layout of `find_pairs`.
        out: must not contain these folders yet.
        progress: called with a sentence after each picture.
        rain_side: the half of strips that is rainy (see `find_pairs`).

    Returns:
        folder -> number of pictures in it.

    Raises:
        DataError: there are no pairs or fewer than two scenes, or an output folder exists. Nothing is written.
        InUse: another process writes to `out`.
    """
    out = Path(out)
    check_folder(out, "trainA and trainB")
    found = find_pairs(pairs, rain_side, split="train")
    scenes = {clean: place for place, clean in enumerate(sorted({pair.clean for pair in found}))}
    if len(scenes) < 2:
        raise DataError(f"{pairs} holds one scene; at least two are needed, one for rainy and one for clean pictures")
    held_out = find_pairs(test, rain_side) if test is not None else []
    tops = ["trainA", "trainB", *(["test"] if held_out else [])]
    with hold(out, "fastnce unpair", "take another folder for --out"):
        check_free(out, tops)
        sweep(out, held=True)
        return _write(found, scenes, held_out, tops, out, progress)


def _write(
    found: list[Pair],
    scenes: dict[Path, int],
    held_out: list[Pair],
    tops: list[str],
    out: Path,
    progress: Callable[[str], None] | None,
) -> dict[str, int]:
    temporary = out / partial_name()
    counts: dict[str, int] = {}

    def write(picture, folder: str, name: str) -> None:
        save_image(picture, temporary / folder / f"{name}.png")
        counts[folder] = counts.get(folder, 0) + 1

    try:
        written: set[Path] = set()
        for done, pair in enumerate(found, 1):
            rainy, clean = pair.load()
            if scenes[pair.clean] % 2 == 0:
                write(rainy, "trainA", pair.name)
            elif pair.clean not in written:
                written.add(pair.clean)
                write(clean, "trainB", pair.name)
            if progress is not None:
                progress(f"{done}/{len(found)} {pair.name}")
        for pair in held_out:
            rainy, clean = pair.load()
            write(rainy, "test/rain", pair.name)
            write(clean, "test/norain", pair.name)
        move_together(temporary, out, tops)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts
