"""Paths in a configuration, made absolute for the file that a run writes."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from ..common.imports import is_import_path
from ..common.options import kinds
from .config import Config

PATHS = ("data.dir", "data.validate", "data.cache_dir", "run.start_from", "loss.vgg_weights", "run.feature_weights")
"""Options that hold a path."""
CODE = ("data.dataset", "run.best", "run.metrics")
"""Options that may hold import paths, separated by commas, besides those whose choices allow one."""


def absolute(config: Config) -> Config:
    """Return a copy whose paths do not depend on the working directory: of folders, and of files of own code."""
    config = deepcopy(config)
    config.method = _absolute_code(config.method)
    for section in Config.SECTIONS:
        options = getattr(config, section)
        for key, (_, accepts) in kinds(options).items():
            value = getattr(options, key)
            if f"{section}.{key}" in PATHS and value:
                setattr(options, key, os.path.abspath(value))
            elif accepts.imports or f"{section}.{key}" in CODE:
                setattr(options, key, _absolute_code(value))
    return config


def _absolute_code(value: Any) -> Any:
    """The import paths with absolute files; names and the paths of modules are returned unchanged."""
    if not is_import_path(value):
        return value
    parts = [part.strip() for part in value.split(",")]
    return ",".join(
        f"{os.path.abspath(where)}:{name}" if (where := part.rpartition(":")[0]).endswith(".py") else part
        for part in parts
        for name in [part.rpartition(":")[2]]
    )
