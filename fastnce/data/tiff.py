"""Decide from a TIFF file's tags whether PIL reads it correctly.

PIL chooses a mode from some of the tags. It silently reads files that do not fit the mode as noise, as a negative or on
another scale. Each kind of file that passes these checks was compared with the meaning of its tags.
"""

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
FILL_ORDER = 266
STRIPS, TILES = 273, 324  # their offsets
COLOUR_MAP, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING, REFERENCE = 320, 332, 338, 339, 530, 532
PLAIN, JPEG = 1, 7
FAX = (2, 3, 4)
COMPRESSIONS = (PLAIN, *FAX, 5, JPEG, 8, 32773, 32946, 34925, 50000)  # with LZW, Deflate, PackBits, LZMA and Zstd
WHITE_IS_ZERO, GREY, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLOURS = {WHITE_IS_ZERO: 1, GREY: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
DEPTHS = {
    **dict.fromkeys((WHITE_IS_ZERO, GREY), (1, 2, 4, 8, 16)),
    **dict.fromkeys((RGB, CMYK), (8, 16)),
    PALETTE: (1, 2, 4, 8),
    YCBCR: (8,),
}
OTHER_COLOURS = {
    4: "a transparency mask",
    **dict.fromkeys((8, 9, 10), "Lab colours"),
    **dict.fromkeys((32803, 34892), "raw values of a sensor"),
    **dict.fromkeys((32844, 32845), "LogLuv colours"),
}
KINDS = {2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}
FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)
MOST_TAGS, MOST_VALUES = 1 << 16, 1 << 16
INTEGERS = {3: "H", 4: "I"}
BYTES = (1, 2, 6, 7)  # types whose values PIL keeps as bytes, such as those of colour profiles
LISTS = (BITS, STRIPS, STRIPS + 6, TILES, TILES + 1, EXTRA_SAMPLES, SAMPLE_FORMAT)  # PIL makes lists of these anyway


def bits_of(tags: Mapping[int, Any]) -> int:
    """Return the bits per sample, of the deepest if they differ."""
    return max(_several(tags, BITS, 1))


def refusal(tags: Mapping[int, Any]) -> str:
    """Return why a file with these tags is refused and what is accepted, to follow its name; empty if accepted."""
    bits, samples = set(_several(tags, BITS, 1)), tags.get(SAMPLES, 1)
    compression, photometric, planar = tags.get(COMPRESSION, PLAIN), tags.get(PHOTOMETRIC), tags.get(PLANAR, 1)
    extra = _several(tags, EXTRA_SAMPLES)
    kinds = set(_several(tags, SAMPLE_FORMAT, 1))
    if kinds != {1}:
        kind = KINDS.get(max(kinds), "samples of no known kind")
        return f"holds {max(bits)}-bit {kind}; unsigned integers of 8 or 16 bits are read"
    if compression not in COMPRESSIONS:
        return f"is compressed as TIFF's scheme {compression}; LZW, Deflate, PackBits, JPEG or none are read"
    if photometric is None:
        return "does not say what its values mean; its tag PhotometricInterpretation should"
    if photometric not in COLOURS:
        held = OTHER_COLOURS.get(photometric, f"colours of PhotometricInterpretation {photometric}")
        return f"holds {held}; grey, palette, RGB, CMYK and YCbCr are read"
    if len(bits) > 1 or not bits <= set(DEPTHS[photometric]):
        depths = ", ".join(map(str, sorted(bits)))
        return f"holds samples of {depths} bits; {', '.join(map(str, DEPTHS[photometric]))} are read of such colours"
    if samples != COLOURS[photometric] + len(extra) and not (photometric == RGB and samples == 4 and not extra):
        return (
            f"has {samples} samples per pixel, but its tags name {COLOURS[photometric]} colours and {len(extra)} extra "
            "samples; the numbers should agree"
        )
    if photometric == PALETTE and 0 < max(_several(tags, COLOUR_MAP, 0)) < 256:
        return "has a palette of 8-bit values, which PIL would read as black; TIFF's palettes hold 16-bit values"
    if photometric == CMYK and tags.get(INK_SET, 1) != 1:
        return "holds inks other than CMYK; grey, palette, RGB, CMYK and YCbCr are read"
    if photometric == YCBCR and compression != JPEG:
        reference = tuple(map(float, _several(tags, REFERENCE, *FULL_RANGE)))
        if compression == PLAIN or _several(tags, SUBSAMPLING, 2, 2) != (1, 1) or reference != FULL_RANGE:
            return "holds YCbCr that is not JPEG's; RGB, or YCbCr compressed as JPEG, is read"
    if 0 in _several(tags, STRIPS) + _several(tags, TILES):
        return "leaves tiles out (a sparse TIFF); all of them should be written"
    if planar != 1 and samples > 1:
        strange = extra and (photometric != RGB or extra not in ((1,), (2,)))
        if strange or (compression == PLAIN and (16 in bits or extra == (1,))):
            return (
                f"holds {max(bits)}-bit planes one after the other, which PIL misreads; interleaved samples "
                "(PlanarConfiguration 1), planes without extra samples in Deflate, or .npy are read"
            )
        if compression == JPEG or photometric == YCBCR:
            return "holds JPEG or YCbCr planes one after the other; PlanarConfiguration 1 (interleaved) is read"
    reversible = compression == PLAIN and (photometric == GREY or (photometric == WHITE_IS_ZERO and max(bits) < 8))
    if tags.get(FILL_ORDER, 1) != 1 and compression not in FAX and not reversible:
        return "holds the bits of its bytes in reverse; FillOrder 1 is read"
    return ""


def refusal_of_head(file: BinaryIO) -> str:
    """Return why PIL should not even read the tags; empty if it may, or if the file is not a TIFF.

    PIL makes a Python number of each value in the tags. A picture may have as many values as pixels: one strip each.
    """
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16 or struct.unpack(f"{order}H", head[2:4])[0] not in (42, 43):
        return ""
    large = 43 in head[2:4]
    file.seek(*struct.unpack(order + ("Q" if large else "I"), head[8:16] if large else head[4:8]))
    length, entry = (8, f"{order}HHQ8s") if large else (2, f"{order}HHI4s")
    (tags,) = struct.unpack(order + ("Q" if large else "H"), file.read(length).rjust(length, b"\0"))
    if tags > MOST_TAGS:
        return f"holds {tags:,} tags; a picture has a few dozen"
    block = file.read(tags * struct.calcsize(entry))
    found = list(struct.iter_unpack(entry, block[: len(block) // struct.calcsize(entry) * struct.calcsize(entry)]))
    pixels = 1
    for tag, kind, _, value in found:
        if tag in (WIDTH, HEIGHT) and kind in INTEGERS:
            pixels *= struct.unpack_from(order + INTEGERS[kind], value)[0]
    most = max(((count, tag) for tag, kind, count, _ in found if kind not in BYTES or tag in LISTS), default=(0, 0))
    if most[0] > MOST_VALUES + pixels:
        return f"holds {most[0]:,} values in its tag {most[1]}, more than it has pixels"
    return ""


def refusal_of_file(file: BinaryIO) -> str:
    """Return why PIL does not recognise this file as a picture; empty if it is not a TIFF."""
    file.seek(0)
    head = file.read(8)
    if head[:4] == b"MM\0\x2b":
        return "is a big-endian BigTIFF, which PIL does not read; little-endian or classic TIFF is read"
    if head[:4] not in (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0"):
        return ""
    tags = ImageFileDirectory_v2(head + file.read(8 if head[2] == 0x2B else 0))
    file.seek(tags.next)
    tags.load(file)
    extra = _several(tags, EXTRA_SAMPLES)
    return refusal(tags) or (
        f"is a TIFF that PIL does not read ({bits_of(tags)}-bit samples of PhotometricInterpretation "
        f"{tags.get(PHOTOMETRIC)} and extra samples {extra}); grey without extra samples, or 8-bit RGB, is read"
    )


def _several(tags: Mapping[int, Any], tag: int, *default: float) -> tuple[Any, ...]:
    value = tags.get(tag, default)
    return tuple(value) if isinstance(value, tuple | list) else (value,)
