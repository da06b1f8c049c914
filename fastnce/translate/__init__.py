"""Translate pictures of any size with a trained generator."""

from .files import translate_files
from .load import load_translator
from .translator import Translator

__all__ = ["Translator", "load_translator", "translate_files"]
