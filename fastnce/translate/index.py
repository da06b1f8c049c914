"""The page of a translation: inputs, outputs and truths side by side, also in the layout of a published test.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluate.gallery import SHOWN, Gallery
from .photographs import Photograph, read_photograph


class Index:
    """What a translation writes beside its outputs.

    Args:
        gallery: writes the page, inputs and truths.
        published: outputs are written as OUT/images/fake_B/NAME.png too, and nowhere else.
        truths: pictures of the other domain; the picture with number i gets number i, and they start again at the end.
    """

    def __init__(self, gallery: Gallery, published: bool = False, truths: Sequence[Path] = ()):
        self.gallery, self.published, self.truths = gallery, published, truths
        self._names: dict[Path, Path] = {}
        self._numbers: dict[Path, int] = {}

    def plan(self, names: Mapping[Path, Path], suffix: str, channels: int) -> None:
        """Take the name of each picture.

        Raises:
            ValueError: browsers cannot show what is to be written.
        """
        if self.published and suffix != ".png":
            raise ValueError(f"the published layout has PNG files, not {suffix.lstrip('.')}: leave --format out")
        if suffix not in SHOWN or channels not in (1, 3):
            what = suffix.lstrip(".") if suffix not in SHOWN else f"pictures of {channels} channels"
            raise ValueError(f"a page cannot show {what}: leave --index out, or take --format png")
        self._names = {path: name.with_suffix("") for path, name in names.items()}
        self._numbers = {path: number for number, path in enumerate(names)}

    def target(self, picture: Path, usual: Path) -> Path:
        """The file of a picture's translation."""
        return self.gallery.place(self._names[picture], 1) if self.published else usual

    def files(self) -> list[Path]:
        """Every other file that may be written."""
        own = [self.gallery.place(name, which) for name in self._names.values() for which in (0, 2)]
        return [*own, self.gallery.page]

    def add(
        self, picture: Path, target: Path, photograph: Photograph, channels: int, size: tuple[int, int] | None
    ) -> None:
        """Write the input and the truth of a picture that has been translated.

        Args:
            picture: the source.
            target: its translation.
            photograph: the source as the model saw it.
            channels: of the truth.
            size: the (height, width) that the truth is resized to.
        """
        name = self._names[picture]
        self.gallery.save(name, 0, photograph.pixels)
        self.gallery.show(name, 1, target)
        if self.truths:
            truth = read_photograph(self.truths[self._numbers[picture] % len(self.truths)], channels, size)
            self.gallery.save(name, 2, truth.pixels)

    def write(self) -> None:
        """Write the page, in the order of the pictures."""
        self.gallery.write(list(self._names.values()))
