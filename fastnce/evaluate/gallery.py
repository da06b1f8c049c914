"""Inputs, outputs and truths as files, with a page that shows them side by side: the results of a published test.py.

    OUT/index.html
    OUT/images/real_A/NAME.png  fake_B/NAME.png  real_B/NAME.png

The page is one file of plain HTML without scripts. It names its pictures by relative paths, so it works from any place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from ..common.writing import check_folder, write_whole
from ..data import save_image

LABELS = {"A": ("real_A", "fake_B", "real_B"), "B": ("real_B", "fake_A", "real_A")}
"""The published names of input, output and truth, by the domain that is translated."""
SHOWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Formats that browsers show."""
MARK = '<meta name="generator" content="fastnce index">'
"""In the head of every page: a file without it is somebody else's, and is not replaced."""
STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em;background:#fff;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.4em;text-align:left;font-weight:normal;vertical-align:top}"
    "img{max-width:32vw;max-height:80vh;image-rendering:auto;display:block}h2{font-size:1em;margin:1.5em 0 0}"
)


class Gallery:
    """Pictures that are written one after another, and the page that is written at the end.

    Args:
        out: the folder, created if necessary. A page of an earlier gallery is replaced.
        title: of the page.
        labels: the names of input, output and truth.

    Raises:
        ValueError: something else is where the page or its pictures belong, such as another index.html.
    """

    def __init__(self, out: Path, title: str, labels: tuple[str, str, str] = LABELS["A"]):
        check_folder(out, "index.html and its pictures")
        self.out, self.title, self.labels = out, title, labels
        self._rows: dict[str, dict[str, Path]] = {}
        for folder in (out / "images", *self.folders):
            check_folder(folder, "pictures of the page")
        if self.page.is_dir():
            raise ValueError(f"{self.page}: a folder is in the way, a file is needed")
        _check_own(self.page)

    @property
    def folders(self) -> list[Path]:
        """The folders of inputs, outputs and truths."""
        return [self.out / "images" / label for label in self.labels]

    def place(self, name: str | Path, which: int) -> Path:
        """The file of a picture in the published layout; `which`: 0 the input, 1 the output, 2 the truth."""
        return self.out / "images" / self.labels[which] / f"{name}.png"

    def files(self, name: str | Path) -> list[Path]:
        """Every file that a picture may get."""
        return [self.place(name, which) for which in range(3)]

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def save(self, name: str | Path, which: int, picture: Tensor) -> None:
        """Write a picture (channels, height, width) in [-1, 1], and show it.

        Raises:
            DataError, OSError: see `save_image`.
        """
        save_image(picture, self.place(name, which))
        self.show(name, which, self.place(name, which))

    def show(self, name: str | Path, which: int, file: Path) -> None:
        """Show a picture that is written already, somewhere below the folder."""
        self._rows.setdefault(str(name), {})[self.labels[which]] = file

    def write(self, order: Sequence[str | Path] = ()) -> Path:
        """Write the page, and return its path.

        Args:
            order: the names in the order of the page; empty: as they came.

        Raises:
            OSError: the disk refuses it.
        """
        names = [str(name) for name in order if str(name) in self._rows] or list(self._rows)
        rows = [(name, {label: self._rows[name].get(label) for label in self.labels}) for name in names]
        write_whole(self.page, _page(self.title, rows, self.out).encode("utf-8", "backslashreplace"))
        return self.page


def _check_own(page: Path) -> None:
    """ValueError if there is a page that no gallery has written."""
    if not page.exists():
        return
    if page.is_file():  # opening a pipe could wait forever
        with page.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    raise ValueError(f"{page} exists and is no page of fastnce: move it away, or write to another place")


def _page(title: str, rows: Sequence[tuple[str, Mapping[str, Path | None]]], out: Path) -> str:
    body = []
    for name, pictures in rows:
        cells = [
            f'<td>{escape(label)}<a href="{address}"><img src="{address}" alt="{escape(label)}"></a></td>'
            for label, file in pictures.items()
            if file is not None
            for address in [_address(file.relative_to(out))]
        ]
        body.append(f"<h2>{_shown(name)}</h2>\n<table><tr>{''.join(cells)}</tr></table>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{MARK}<title>{_shown(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{_shown(title)}</h1>\n" + "\n".join(body) + "\n</html>\n"
    )


def _shown(text: str) -> str:
    """Text for a page; bytes of a file name that are no text become escapes."""
    return escape(text.encode("utf-8", "backslashreplace").decode())


def _address(file: Path) -> str:
    """The relative address of a file, in which no character of a name has a meaning."""
    return quote(file.as_posix().encode("utf-8", "surrogateescape"))
