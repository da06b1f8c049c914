"""A run's configuration: preset, TOML file, overrides."""

from .config import Config
from .resolve import resolve

__all__ = ["Config", "resolve"]
