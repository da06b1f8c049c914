"""Write the files of an export: all of them or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..common.locking import hold
from ..common.writing import check_folder, flush_to_disk, named, partial_name, sweep
from ..translate.exported import CARD, CONFIG, read_details
from .card import is_untouched, read_card

Content = bytes | Callable[[Path], None]
"""The bytes of a file, or a function that writes it to a path."""
LOCK = ".fastnce-export-lock"


def check_target(out: Path, format: str, files: Iterable[str], own_card: str = "") -> None:
    """Refuse a folder that an export must not write to. An earlier export of the same format is replaced.

    Args:
        files: names of the model's files.
        own_card: a text that README.md may have, though it is edited: it will be written again.

    Raises:
        ValueError: it is a file, a run or its checkpoint, or holds an export of another format, a config.json or a
            model of another program, or a README.md that is edited or of no export.
    """
    check_folder(out, f"the model, {CONFIG} and {CARD}")
    if (out / "checkpoints").is_dir() or (out / "state.json").exists() or any(out.glob("step-*/state.json")):
        raise ValueError(
            f"{out} belongs to a run, and an export in it would not be read: take another folder for --out"
        )
    if os.path.lexists(out / CARD):
        text = read_card(out / CARD)
        if not is_untouched(text) and not (text and text == own_card):
            raise ValueError(
                f"{out / CARD} was edited or is of no export, and would be replaced: move it, or take another folder "
                f"for --out"
            )
    if not os.path.lexists(out / CONFIG):
        there = next((out / name for name in files if os.path.lexists(out / name)), None)
        if there is not None and not os.path.lexists(out / CARD):
            raise ValueError(
                f"{there} is of no export, as {CONFIG} is not beside it, and would be replaced: move it, or take "
                f"another folder for --out"
            )
        return
    try:
        earlier = read_details(out)["format"]
    except ValueError as error:
        raise ValueError(f"{error}; take another folder for --out") from None
    if earlier != format:
        raise ValueError(f"{out} holds an export of the format {earlier}: take another folder for --out")


def write_folder(out: Path, contents: Mapping[str, Content], check: Callable[[Path], None] | None = None) -> list[Path]:
    """Write files into a folder, all of them or none: after an error or a kill the earlier ones are whole.

    The files are written to a hidden folder beside them first. Then they replace the earlier ones one after another;
    config.json is the last. A kill within these renames leaves files of both exports; reading refuses weights that do
    not fit.

    Args:
        out: is created if it does not exist.
        contents: by file name.
        check: is called with the hidden folder, before an earlier file is replaced; it raises if a file is wrong.

    Returns:
        the paths, in the order of `contents`.

    Raises:
        InUse: another process exports there.
        OSError: names the file that could not be written.
    """
    with hold(out, "fastnce export", name=LOCK):
        sweep(out, held=True)
        partial = out / partial_name()
        earlier = out / partial_name()
        try:
            partial.mkdir()
            for name, content in contents.items():
                try:
                    if callable(content):
                        content(partial / name)
                    else:
                        (partial / name).write_bytes(content)
                    flush_to_disk(partial / name)
                except OSError as error:
                    raise named(error, out / name) from None
            if check is not None:
                check(partial)
            earlier.mkdir()
            names = sorted(contents, key=lambda name: name == CONFIG)
            _replace(partial, out, names, earlier)
            flush_to_disk(out)
        finally:
            for folder in (partial, earlier):
                shutil.rmtree(folder, ignore_errors=True)
    return [out / name for name in contents]


def _replace(source: Path, out: Path, names: Iterable[str], earlier: Path) -> None:
    """Move the files of `source` into `out`. After an error or a signal, put back those that they replaced.

    Args:
        earlier: an empty folder on the same disk.
    """
    moved: list[str] = []
    try:
        for name in names:
            if (out / name).is_file():
                _keep(out / name, earlier / name)
            moved.append(name)
            try:
                os.replace(source / name, out / name)
            except OSError as error:
                raise named(error, out / name) from None
    except BaseException:
        for name in moved:
            with suppress(OSError):  # a disk that fails for good: raise the first error
                if (earlier / name).exists():
                    os.replace(earlier / name, out / name)
                elif not (source / name).exists():
                    (out / name).unlink()
        raise


def _keep(file: Path, place: Path) -> None:
    """Give a file a second name; copy it where the disk has no links."""
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copy2(file, place)
