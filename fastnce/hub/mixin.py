"""What fastnce asks of huggingface_hub: its mixin, and its errors as one sentence."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.imports import first_line
from ..translate.exported import CARD, CONFIG, WEIGHTS

INSTALL = "pip install huggingface_hub"
_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_OF_THE_HUB = ("huggingface_hub", "hf_xet", "httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3")
"""The packages whose errors are the hub's."""


def check_name(name: str) -> None:
    """Raise ValueError if a text is not the name of a model on the hub."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is neither a folder nor the name of a model on the hub, such as USER/NAME")


@functools.cache
def mixed() -> Any:
    """The class with huggingface_hub's mixin. It is made when it is first needed, as the package is an extra.

    Raises:
        ValueError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import ModelHubMixin, snapshot_download
    except ImportError:
        raise ValueError(f"the hub needs the package huggingface_hub, which is not installed: {INSTALL}") from None

    class Carrier(ModelHubMixin, library_name="fastnce", pipeline_tag="image-to-image", tags=["fastnce"]):
        """Carries the files of a model between a folder and the hub."""

        folder: Path
        save: Callable[[Path], Any]

        def _save_pretrained(self, save_directory: Path) -> None:
            self.save(save_directory)

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            **others: Any,
        ) -> Carrier:
            carrier = cls()
            carrier.folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[WEIGHTS, CONFIG, CARD],  # no other file is downloaded
                )
            )
            return carrier

    return Carrier


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Within: an error of the hub, or of the way to it, becomes a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if modules.isdisjoint(_OF_THE_HUB) and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise ValueError(f"{what}: {_sentence(error)}") from None


@contextmanager
def reading_config(name: str) -> Iterator[None]:
    """Within: the errors of the library, which expects a table in JSON in config.json, become a ValueError."""
    try:
        yield
    except (AttributeError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} cannot be loaded: its {CONFIG} is no table in JSON ({first_line(error)})") from None


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."
