"""Builds a run from its configuration, and trains it."""

from .run import train_run

__all__ = ["train_run"]
