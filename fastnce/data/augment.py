"""Crop, mirror and normalise a batch on the device in one gather from flat storage.

There is no loop over pictures, and the host reads nothing back from the device. The host sends one small integer per
picture and property; the device computes the address of every pixel.
"""

import warnings

import numpy as np
import torch

from .cached import PictureCache
from .folder import DataError
from .order import Draw

PINNED = ("cuda", "xpu")  # devices to which page-locked memory is copied asynchronously


def send(small: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without waiting for the device."""
    if device.type in PINNED:
        small = small.pin_memory()
    return small.to(device, non_blocking=True)


def gather_crops(flat: torch.Tensor, places: torch.Tensor, height: int, width: int, channels: int) -> torch.Tensor:
    """Cut one window out of each picture.

    Args:
        flat: (elements,) uint8, or int16 with the bits of uint16: pictures of (H, W, channels) one after another.
        places: (5, B) int64 on the device of `flat`: first pixel of the picture, its width, top, left, mirrored or not.
        height, width: of the window. It must lie inside every picture.

    Returns:
        (B, channels, height, width) float32 in [-1, 1], channels-last in memory.
    """
    first, stride, top, left, mirrored = places.view(5, -1, 1, 1)  # each (B, 1, 1)
    y = torch.arange(height, device=flat.device).view(1, -1, 1)
    x = torch.arange(width, device=flat.device).view(1, 1, -1)
    x = torch.where(mirrored.bool(), width - 1 - x, x)  # (B, 1, width)
    pixel = first + (top + y) * stride + left + x  # (B, height, width)
    values = flat.view(-1, channels).index_select(0, pixel.flatten())  # (B*height*width, channels)
    values = values.view(-1, height, width, channels).permute(0, 3, 1, 2)
    if flat.dtype == torch.int16:
        return values.to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32).div_(32767.5).sub_(1)
    return values.to(torch.float32).div_(127.5).sub_(1)


class PictureStore:
    """The pictures of one cache file, as a source of crops on a device.

    Args:
        cache: the decoded pictures.
        device: where the batches are made.
        resident: keep the whole file in the device's memory. Otherwise only the windows of each batch are sent, from
            page-locked memory and without waiting. On the CPU the mapped file is read directly in both cases.
    """

    def __init__(self, cache: PictureCache, device: torch.device, resident: bool) -> None:
        self.cache, self.device = cache, device
        self.channels = cache.channels
        bits = torch.uint8 if cache.pixels.dtype == np.uint8 else torch.int16
        with warnings.catch_warnings():  # the file is mapped read-only on purpose
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            flat = torch.from_numpy(cache.pixels.view(np.uint8 if bits == torch.uint8 else np.int16))
        if resident and device.type != "cpu":
            cache.check()
        self.flat = flat.to(device) if resident or device.type == "cpu" else None
        self._host = flat
        # None if the device's memory holds everything
        self._mapped = getattr(cache.pixels, "_mmap", None) if self.flat is None or device.type == "cpu" else None

    def crops(self, draw: Draw, size: tuple[int, int] | None, flip: bool, *, trim: bool = False) -> torch.Tensor:
        """Return (B, channels, height, width) float32 in [-1, 1] on the device.

        Args:
            draw: which pictures, crops and flips.
            size: (height, width) of the window. None takes whole pictures, which must then all have the same size.
            flip: whether to apply the flips of `draw`.
            trim: never take the last position of the window, and keep a side that is shorter than the window's. What is
                kept must have the same size for all pictures.

        Raises:
            DataError: the cache file was truncated (the system would kill a process that reads beyond its end), or a
                picture in it is damaged and its source has changed.
        """
        if self._mapped is not None and self._mapped.size() < self.cache.pixels.nbytes:
            raise DataError(f"{self.cache.path} was truncated while it was read; the next start builds it again")
        self.cache.check(draw.index)
        offset, rows, columns = self.cache.index[draw.index].T  # each (B,)
        height, width = size if size is not None else (int(rows[0]), int(columns[0]))
        if trim:
            height, width = min(height, int(rows[0])), min(width, int(columns[0]))
        positions = 0 if trim else 1  # beside those that the difference of the sides gives
        top = (draw.top * (rows - height + positions)).astype(np.int64)
        left = (draw.left * (columns - width + positions)).astype(np.int64)
        mirrored = (draw.flip & flip).astype(np.int64)
        first = offset // self.channels
        if self.flat is not None:
            places = send(torch.from_numpy(np.stack([first, columns, top, left, mirrored])), self.device)
            return gather_crops(self.flat, places, height, width, self.channels)

        count = len(draw.index)
        shape = (count, height, width, self.channels)
        # Allocate per batch: the page-locked allocator does not reuse a block while a copy still reads it.
        windows = torch.empty(shape, dtype=self._host.dtype, pin_memory=self.device.type in PINNED)
        for i in range(count):
            picture = self._host[offset[i] : offset[i] + rows[i] * columns[i] * self.channels]
            picture = picture.view(int(rows[i]), int(columns[i]), self.channels)
            windows[i] = picture[top[i] : top[i] + height, left[i] : left[i] + width]
        zero = np.zeros(count, np.int64)
        first = np.arange(count) * (height * width)
        places = send(torch.from_numpy(np.stack([first, zero + width, zero, zero, mirrored])), self.device)
        return gather_crops(windows.to(self.device, non_blocking=True).view(-1), places, height, width, self.channels)
