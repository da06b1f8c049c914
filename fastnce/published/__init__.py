"""The options of the published code, and what they are called here."""

from .conversion import Conversion, convert
from .reading import read_source
from .table import FLAGS

__all__ = ["FLAGS", "Conversion", "convert", "read_source"]
