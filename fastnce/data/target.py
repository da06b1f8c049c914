"""The size of pictures before they are cropped or trimmed."""

from dataclasses import dataclass
from typing import Any

from .folder import DataError, pair

PREPROCESS = (
    *("resize_and_crop", "crop", "scale_width_and_crop", "scale_shortside_and_crop", "none"),
    *("resize", "scale_width", "scale_shortside"),
    *("trim", "resize_and_trim", "scale_width_and_trim", "scale_shortside_and_trim"),
)
SINGLE = "zoom_and_patch"
"""The mode of `SinglePictureData`."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """The preprocessing that resizes a picture before cropping; `load` and `crop` are (height, width).

    The modes are the published ones (`get_transform` of CUT). First "resize" resizes to `load`; "scale_width" sets the
    width and takes at least the height of `crop`; "scale_shortside" enlarges a picture that is smaller than `load`.
    Then "crop" or "trim" takes a window of `crop`. A picture that is smaller than `crop` is enlarged by the mode
    "crop" (published training fails) and kept by the mode "trim". At last the sides are rounded to multiples of 4,
    which resizes a second time. "none" only rounds.
    """

    preprocess: str
    load: Size
    crop: Size
    channels: int

    @classmethod
    def checked(cls, preprocess: str, load: int | Size, crop: int | Size, channels: int) -> "Target":
        """Check the settings; raise DataError if they contradict each other."""
        if preprocess not in PREPROCESS:
            raise DataError(f"data.preprocess={preprocess} is none of {', '.join(PREPROCESS)}")
        if channels < 1:
            raise DataError(f"channels should be at least 1, not {channels}")
        load, crop = pair("load_size", load), pair("crop_size", crop)
        if preprocess in ("crop", "trim", "none"):
            load = crop  # these modes ignore load_size: nothing changes when the learning rate decays
        target = cls(preprocess, load, crop, channels)
        if not target.window:
            return target
        if crop[0] % 4 or crop[1] % 4:
            raise DataError(f"the sides of data.crop_size should be multiples of 4, not {_sides(crop)}")
        if load[1] < crop[1] or (load[0] < crop[0] and target.scaling != "scale_width"):
            raise DataError(
                f"data.load_size={_sides(load)} is too small for data.crop_size={_sides(crop)}: it should be at least "
                f"as large"
            )
        return target

    @property
    def scaling(self) -> str:
        """How a picture is resized at first: "resize", "scale_width", "scale_shortside", or empty."""
        return next((word for word in ("resize", "scale_width", "scale_shortside") if word in self.preprocess), "")

    @property
    def window(self) -> str:
        """What is taken of the resized picture: "crop", "trim", or empty for the whole."""
        return next((word for word in ("crop", "trim") if word in self.preprocess), "")

    @property
    def fixed(self) -> Size | None:
        """The (height, width) of every batch; None if it depends on the pictures."""
        if self.window and (self.scaling or self.window == "crop"):
            return self.crop
        return _rounded(self.load) if self.scaling == "resize" else None

    def decaying(self) -> "Target":
        """Return the target for the decay of the learning rate: load_size becomes crop_size (published rule of CUT)."""
        return Target(self.preprocess, self.crop, self.crop, self.channels)

    def sizes(self, height: int, width: int) -> tuple[Size, Size]:
        """Return the (height, width) to which a picture of this size is resized first, and then."""
        first = self._scaled(height, width)
        if self.window == "crop":
            return first, first
        rounded = _rounded(first)
        if self.window == "trim":  # a side is trimmed or rounded, never both, so that rounding may come first
            kept = [side if side > most else even for side, even, most in zip(first, rounded, self.crop, strict=True)]
            return first, (kept[0], kept[1])
        return first, rounded

    def size(self, height: int, width: int) -> Size:
        """Return the (height, width) of a picture of this size in a cache."""
        return self.sizes(height, width)[1]

    def shown(self, height: int, width: int) -> Size:
        """Return the (height, width) of the part of a cached picture of this size that a batch shows."""
        return (min(height, self.crop[0]), min(width, self.crop[1])) if self.window else (height, width)

    def _scaled(self, height: int, width: int) -> Size:
        if self.scaling == "resize":
            return self.load
        if self.scaling == "scale_width":
            if width == self.load[1] and height >= self.crop[0]:
                return height, width
            return int(max(self.load[1] * height / width, self.crop[0])), self.load[1]
        if self.scaling != "scale_shortside" and self.window != "crop":
            return height, width
        scale = max(self.load[0] / height, self.load[1] / width)
        return (height, width) if scale <= 1 else (round(height * scale), round(width * scale))

    def words(self) -> str:
        """Say what `size` does, for messages."""
        height, width = self.load
        if self.scaling == "resize":
            height, width = self.load if self.window else _rounded(self.load)
            return f"resized to {width}x{height}"
        if self.scaling == "scale_width":
            return f"resized to a width of {width if self.window else _rounded(self.load)[1]}"
        if self.scaling == "scale_shortside" or self.window == "crop":
            return f"enlarged to {width}x{height} where smaller"
        what = f", where they are at most {width}x{height}" if self.window == "trim" else ""
        return f"sides rounded to multiples of 4{what}"

    def key(self) -> dict[str, Any]:
        """Return the settings that change the cached pixels, and only those."""
        name = f"{self.scaling}_and_crop" if self.scaling and self.window else self.preprocess
        key = {"filter": "bicubic", "preprocess": name, "channels": self.channels}
        if self.preprocess != "none":
            key["load"] = self.load
        if self.scaling == "scale_width":
            key["crop"] = self.crop
        return key


def named(published: str) -> str:
    """Return the mode that a value of the published `--preprocess` means.

    The published code looks for words anywhere in the value: the first of resize, scale_width and scale_shortside;
    zoom; crop; patch; trim; fixsize. It ignores all else. After "crop", "trim" has no effect.

    Raises:
        ValueError: the value has words that no data set here follows; the message says why.
    """
    if "fixsize" in published:
        raise ValueError(
            f"--preprocess {published}: fixsize needs a size that the published data sets do not give; "
            f"data.preprocess=resize with data.load_size=[HEIGHT, WIDTH] resizes to any size"
        )
    scaling = next((word for word in ("resize", "scale_width", "scale_shortside") if word in published), "")
    window = next((word for word in ("crop", "trim") if word in published), "")
    if "zoom" in published or "patch" in published:
        if "zoom" in published and "patch" in published and not (scaling or window):
            return SINGLE
        raise ValueError(
            f"--preprocess {published}: zoom and patch are only known together, as {SINGLE} of SinCUT; "
            f"data.random_scale_max=1 leaves the zoom out"
        )
    return "_and_".join(filter(None, (scaling, window))) or "none"


def _rounded(size: Size) -> Size:
    return round(size[0] / 4) * 4, round(size[1] / 4) * 4


def _sides(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else str(list(size))
