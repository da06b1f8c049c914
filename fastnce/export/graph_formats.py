"""Write a generator as a graph that other programs run: the formats torch, onnx and aoti."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..translate.exported import CARD, CONFIG
from . import aoti_format, onnx_format, torch_format
from .card import as_json, card, details
from .folder import Content, check_target, write_folder
from .graph import Checked, check, prepared, trace
from .source import Source

GRAPHS: dict[str, ModuleType] = {"torch": torch_format, "onnx": onnx_format, "aoti": aoti_format}
"""Each module has FILE, LOADED_BY, `missing`, `write` and `load`."""


@dataclass(frozen=True)
class Written:
    """The model's path first, then the others; and what was checked, as a sentence."""

    paths: list[Path]
    checked: Checked
    sentence: str


def write_graph(source: Source, out: Path, format: str, dtype: str = "float32") -> Written:
    """Write the model, config.json and README.md, after the model is loaded again and compared with the network.

    Args:
        format: one of `GRAPHS`.
        dtype: of the weights, and of most of the computation: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: a package or a compiler is missing, the network cannot be written in this form, the file computes
            something else, or the folder holds something else. Nothing is left behind then.
        OSError: names the file that could not be written; an earlier export is untouched.
    """
    module = GRAPHS[format]
    check_target(out, format, [module.FILE])
    if reason := module.missing(dtype):
        raise ValueError(reason)
    network = prepared(source, dtype)
    program = trace(source, network, format)
    file, found = module.FILE, list[Checked]()

    def model(path: Path) -> None:
        module.write(program, path)
        found.append(check(source, network, module.load(path), file))

    def text(path: Path) -> None:  # after the model, of which it tells
        path.write_text(card(source, format, [file], dtype, sentence_of(source, module, found[0])), encoding="utf-8")

    contents: dict[str, Content] = {file: model, CONFIG: as_json(details(source, format, [file], dtype)), CARD: text}
    paths = write_folder(out, contents)
    return Written(paths, found[0], sentence_of(source, module, found[0]))


def sentence_of(source: Source, module: ModuleType, checked: Checked) -> str:
    """What was checked, in words."""
    sizes = ", ".join(" x ".join(map(str, size)) for size in checked.sizes)
    return (
        f"Loaded again by {module.LOADED_BY} and compared with {source.name} in float32 on pictures of {sizes} "
        f"(images x height x width): the largest difference is {checked.difference:.2g}, and {checked.allowed:.2g} is "
        f"allowed."
    )
