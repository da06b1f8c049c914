"""Translate one picture, several, or every picture of a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..common.gathered import gathering
from ..common.messages import counted
from ..common.writing import FILES, check_folder, check_not_replaced, distinct_names, sweep
from ..data import DataError, find_images
from .index import Index
from .photographs import Photograph, check_format, read_photograph, write_photograph
from .translator import Translator

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
"""Suffixes of the files that a translation can be written to."""
MOST_AT_ONCE = 1_024
"""Largest batch, in pictures. Up to four batches may wait in memory."""


@gathering()
def translate_files(
    translator: Translator,
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    suffix: str | None = None,
    *,
    batch: int = 1,
    bits: int | None = None,
    progress: Callable[[str], None] | None = None,
    limit: int = 0,
    load_size: tuple[int, int] | None = None,
    index: Index | None = None,
) -> list[Path]:
    """Translate pictures, or every picture of a folder (keeping its subfolders); return the written translations.

    Alpha and colour profile are kept if the format supports them.

    Args:
        translator: the model.
        source: a picture or a folder, or several. If `out` is inside one, the pictures in `out` are not translated.
        out: a folder, created if necessary. For one picture, a name such as x.png is that of the written file, unless
            there is a folder of this name. Files may be replaced, but never a picture of `source` or the model.
        suffix: the format of the written files; None: that of `out` if it names a file, else ".png".
        batch: number of pictures of the same size to translate at once.
        bits: 8, 16, or None for the source's depth if the format supports it (see `check_format`).
        progress: called with "done/total, images/s" after each picture.
        limit: translate so many pictures at most, the first of each folder's sorted names; 0 takes all.
        load_size: the (height, width) that pictures are resized to first; None keeps their size.
        index: also write a page of inputs and outputs, and possibly truths.

    Raises:
        ValueError: there are no pictures, the format does not support `bits`, `out` does not fit `source` or
            `suffix`, or a translation would replace its source; nothing is written. Or some pictures cannot be used:
            the others are written first, and the message names all bad ones. Or the disk refuses a file: the
            translation stops, and the message names the file and the number of written pictures.
    """
    if not 1 <= batch <= MOST_AT_ONCE:
        raise ValueError(f"batch must be from 1 to {MOST_AT_ONCE:,} pictures, not {batch}")
    sources = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(one) for one in source]
    out = Path(out)
    file, suffix = _named(sources, out, suffix)
    check_format(suffix, bits, translator.out_channels)
    roots = _pictures(sources, out, limit, [] if index is None else index.gallery.folders)
    pictures = list(roots)
    names = distinct_names(pictures, roots, suffix)
    targets = {path: file or out / name for path, name in names.items()}
    written_too: list[Path] = []
    if index is not None:
        index.plan(names, suffix, translator.out_channels)
        targets = {path: index.target(path, target) for path, target in targets.items()}
        written_too = index.files()
    check_not_replaced([*targets.values(), *written_too], [*pictures, *translator.sources])
    for folder in {target.parent for target in (*targets.values(), *written_too)}:
        sweep(folder)
    written: list[Path] = []
    bad: list[str] = []
    waiting: dict[tuple[int, ...], list[tuple[Path, Path, Photograph]]] = {}  # by size
    begin = time.perf_counter()

    def flush(size: tuple[int, ...]) -> None:
        group = waiting.pop(size)
        try:
            results = translator(torch.stack([photograph.pixels for _, _, photograph in group]))
        except ValueError as error:
            bad.extend(f"{path}: {error}" for path, _, _ in group)
            return
        for result, (path, target, photograph) in zip(results, group, strict=True):
            if not torch.isfinite(result).all():
                bad.append(f"{path}: the generator's output is not finite; nothing was written")
                continue
            try:
                write_photograph(result, target, photograph, bits)
            except DataError as error:
                bad.append(str(error))
            except OSError as error:
                done = f"{len(written)} of {counted(len(pictures), 'picture')} were written"
                bad.append(f"{target}: {error.strerror or error}; {done}")
                if error.errno is None:  # an error of the format, not of the disk: other pictures may succeed
                    continue
                raise DataError("\n".join(bad)) from error
            else:
                written.append(target)
                if index is not None:
                    index.add(path, target, photograph, translator.out_channels, load_size)
        if progress is not None:
            rate = len(written) / (time.perf_counter() - begin)
            progress(f"{len(written)}/{counted(len(pictures), 'picture')}, {rate:.2f} images/s")

    def read(path: Path) -> Photograph:
        return read_photograph(path, translator.channels, *([] if load_size is None else [load_size]))

    for path, target in targets.items():
        try:
            photograph = read(path)
        except DataError as error:
            bad.append(str(error))
            continue
        size = tuple(photograph.pixels.shape)
        waiting.setdefault(size, []).append((path, target, photograph))
        if len(waiting[size]) == batch:
            flush(size)
        elif sum(map(len, waiting.values())) > 4 * batch:  # many different sizes: do not keep all in memory
            flush(next(iter(waiting)))
    for size in list(waiting):
        flush(size)
    if index is not None and written:
        index.write()
    if bad:
        raise DataError("\n".join(bad))
    return written


KINDS = {".jpeg": ".jpg", ".tif": ".tiff"}
"""Second names of formats."""


def _pictures(sources: Sequence[Path], out: Path, limit: int, pages: Sequence[Path]) -> dict[Path, Path]:
    """The pictures to translate, each with the folder that its name is relative to.

    Args:
        pages: folders of pictures that an earlier page may show; they are left out, as those in `out` are.
    """
    roots: dict[Path, Path] = {}
    folders = [f"{os.path.realpath(folder)}{os.sep}" for folder in (out, *pages)]
    for source in sources:
        found = find_images(source) if source.is_dir() else [source]
        root = f"{os.path.realpath(source)}{os.sep}"
        if own := tuple(folder for folder in folders if folder != root and folder.startswith(root)):
            found = [path for path in found if not os.path.realpath(path.parent / "x").startswith(own)]
        if not found:
            raise ValueError(f"{source}: no pictures here")
        for path in found:
            roots.setdefault(path, source if source.is_dir() else source.parent)
    return dict(list(roots.items())[: limit or None])


def _named(sources: Sequence[Path], out: Path, suffix: str | None) -> tuple[Path | None, str]:
    """Return the one file to write, None if `out` is a folder, and the suffix of what is written."""
    own = out.suffix.lower()
    if len(sources) > 1 or sources[0].is_dir() or out.is_dir() or own not in FILES:
        check_folder(out, "the translated pictures")
        return None, suffix or ".png"
    if own not in FORMATS:
        raise ValueError(f"{out} ends with {own}; a translation is written as {', '.join(FORMATS)}")
    if suffix is not None and KINDS.get(suffix, suffix) != KINDS.get(own, own):
        raise ValueError(f"{out} ends with {own}, but --format asks for {suffix.lstrip('.')}: leave --format out")
    return out, own
