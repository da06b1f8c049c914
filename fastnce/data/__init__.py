"""Image files: find, decode, cache, crop and mirror on the device; render rain on them."""

from .cache import build_cache
from .encoding import save_image
from .folder import find_images, load_image
from .opening import DataError
from .unpaired import UnpairedData

__all__ = ["DataError", "UnpairedData", "build_cache", "find_images", "load_image", "save_image"]
