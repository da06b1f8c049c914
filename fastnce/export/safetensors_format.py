"""The format safetensors: model.safetensors and the config.json that says which network it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

from ..translate.exported import CARD, CONFIG, WEIGHTS, read_folder
from .card import as_json, card, details
from .folder import check_target, write_folder
from .source import DTYPES, Source, weights_of

FORMAT = "safetensors"


def write_safetensors(source: Source, out: Path, dtype: str = "float32", own_card: str = "") -> list[Path]:
    """Write model.safetensors, config.json and README.md; they are read again before an earlier export is replaced.

    Args:
        dtype: of the weights, "float32", "float16" or "bfloat16". `fastnce` computes in float32 with any of them.
        own_card: the text of README.md; empty: what `card` writes.

    Raises:
        ValueError: what `save_weights` and `check_target` refuse.
        OSError: names the file that could not be written; an earlier export is untouched.
    """
    check_target(out, FORMAT, [WEIGHTS], own_card)
    weights = save_weights(source, dtype)
    checked = f"Read again after writing: the network of {CONFIG} takes {WEIGHTS}, and every weight is the one of the "
    checked += "trained generator." if dtype == "float32" else f"trained generator, rounded to {dtype}."
    contents: dict[str, bytes | Callable[[Path], None]] = {
        WEIGHTS: weights,
        CONFIG: as_json(details(source, FORMAT, [WEIGHTS], dtype)),
        CARD: (own_card or card(source, FORMAT, [WEIGHTS], dtype, checked)).encode("utf-8", "replace"),
    }
    return write_folder(out, contents, partial(_check, source, dtype))


def save_weights(source: Source, dtype: str = "float32") -> bytes:
    """The bytes of model.safetensors.

    Args:
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: the generator is code of the user's own, which config.json cannot describe; a weight is not finite,
            or too large for `dtype`.
    """
    check_readable(source)
    weights = weights_of(source, DTYPES[dtype])
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            wide = torch.isfinite(source.network.state_dict()[key]).all()
            reason = f"is too large for {dtype}: take another --dtype" if wide else "holds numbers that are not finite"
            raise ValueError(f"{key} of {source.name} {reason}")
    return save(weights, metadata={"format": "pt"})


def check_readable(source: Source) -> None:
    """Raise ValueError if reading the generator again would need code of the user's own."""
    if source.own:
        raise ValueError(
            f"{source.name} is code of its own, {source.own}, which config.json cannot describe and which is never "
            f"imported from an export: --format torch or onnx takes the computation along"
        )


def _check(source: Source, dtype: str, folder: Path) -> None:
    """Raise RuntimeError if what was written is not the generator."""
    read = read_folder(folder).network
    found, wanted = read.state_dict(), weights_of(source, DTYPES[dtype])
    for key, tensor in wanted.items():
        if not torch.equal(found[key], tensor.to(found[key].dtype)):
            raise RuntimeError(f"{key} of {source.name} is read again with other values than it was written with")
    if type(read) is not type(source.network):
        raise RuntimeError(f"{source.name} is read again as {type(read).__name__}")
