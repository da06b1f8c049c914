"""The size of pictures before cropping."""

from dataclasses import dataclass
from typing import Any

from .folder import DataError, pair

PREPROCESS = ("resize_and_crop", "crop", "scale_width_and_crop", "scale_shortside_and_crop", "none")


@dataclass(frozen=True)
class Target:
    """The preprocessing that resizes a picture before cropping; `load` and `crop` are (height, width).

    The modes are the published ones. "resize_and_crop" resizes to `load`. "crop" keeps the size and
    "scale_shortside_and_crop" only enlarges: both enlarge a picture that is smaller than `load`. "scale_width_and_crop"
    sets the width. "none" rounds the sides to multiples of 4.
    """

    preprocess: str
    load: tuple[int, int]
    crop: tuple[int, int]
    channels: int

    @classmethod
    def checked(
        cls, preprocess: str, load: int | tuple[int, int], crop: int | tuple[int, int], channels: int
    ) -> "Target":
        """Check the settings; raise DataError if they contradict each other."""
        if preprocess not in PREPROCESS:
            raise DataError(f"data.preprocess={preprocess} is none of {', '.join(PREPROCESS)}")
        if channels < 1:
            raise DataError(f"channels should be at least 1, not {channels}")
        load, crop = pair("load_size", load), pair("crop_size", crop)
        if preprocess in ("crop", "none"):
            load = crop  # these modes ignore load_size: nothing changes when the learning rate decays
        if preprocess != "none" and (crop[0] % 4 or crop[1] % 4):
            raise DataError(f"the sides of data.crop_size should be multiples of 4, not {_sides(crop)}")
        if load[1] < crop[1] or (load[0] < crop[0] and preprocess != "scale_width_and_crop"):
            raise DataError(
                f"data.load_size={_sides(load)} is too small for data.crop_size={_sides(crop)}: it should be at least "
                f"as large"
            )
        return cls(preprocess, load, crop, channels)

    def decaying(self) -> "Target":
        """Return the target for the decay of the learning rate: load_size becomes crop_size (published rule of CUT)."""
        return Target(self.preprocess, self.crop, self.crop, self.channels)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which a picture of this size is resized."""
        if self.preprocess == "resize_and_crop":
            return self.load
        if self.preprocess == "scale_width_and_crop":
            if width == self.load[1] and height >= self.crop[0]:
                return height, width
            return int(max(self.load[1] * height / width, self.crop[0])), self.load[1]
        if self.preprocess == "none":
            return round(height / 4) * 4, round(width / 4) * 4
        scale = max(self.load[0] / height, self.load[1] / width)
        return (height, width) if scale <= 1 else (round(height * scale), round(width * scale))

    def words(self) -> str:
        """Say what `size` does, for messages."""
        height, width = self.load
        if self.preprocess == "resize_and_crop":
            return f"resized to {width}x{height}"
        if self.preprocess == "scale_width_and_crop":
            return f"resized to a width of {width}"
        if self.preprocess == "none":
            return "sides rounded to multiples of 4"
        return f"enlarged to {width}x{height} where smaller"

    def key(self) -> dict[str, Any]:
        """Return the settings that change the cached pixels, and only those."""
        key = {"filter": "bicubic", "preprocess": self.preprocess, "channels": self.channels}
        if self.preprocess != "none":
            key["load"] = self.load
        if self.preprocess == "scale_width_and_crop":
            key["crop"] = self.crop
        return key


def _sides(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else str(list(size))
