"""What describes an exported model: README.md, the model card, and config.json.

The card's front matter is what the Hugging Face Hub reads. `fastnce.translate.exported` reads config.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.imports import is_import_path
from ..common.messages import counted
from ..translate.exported import CARD, CONFIG, LARGEST, READABLE, VERSION, is_exported
from .source import Source, without_folders
from .usage import graph_usage

UNKNOWN = "license: unknown  # replace: such as apache-2.0, mit, cc-by-nc-4.0, or other with license_name, license_link"
"""The field to fill. `unknown` is a value that the hub accepts."""


def details(source: Source, format: str, files: Sequence[str], dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        format: such as "safetensors" or "onnx".
        files: names of the files beside it; the first is the model.
        dtype: of the weights, such as "float32".
    """
    facts = source.facts
    return {
        "fastnce": __version__,
        "version": VERSION,
        "format": format,
        "file": files[0],
        "method": facts.get("method", ""),
        "generator": source.name,
        "network": None if source.own else source.options,
        "reverse": source.reverse,
        "input": {
            "channels": source.in_channels,
            "multiple": source.factor,
            "smallest": source.smallest,
            "range": [-1, 1],
            "dtype": "float32",
        },
        "output": {"channels": source.out_channels},
        "weights": {"dtype": dtype},
        "direction": facts.get("direction", "AtoB"),
        "paired_direction": facts.get("paired_direction", "AtoB"),
        **({"about": facts["about"]} if "about" in facts else {}),
        "training": {key: facts[key] for key in _TRAINING if key in facts},
    }


_TRAINING = ("step", "epoch", "seen", "data", "config", "figures")


def as_json(content: dict[str, Any]) -> bytes:
    """The bytes of config.json."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def card(source: Source, format: str, files: Sequence[str], dtype: str, checked: str = "") -> str:
    """The text of README.md: front matter for the hub, then what is known of the model.

    Args:
        format, files, dtype: as `details` takes them.
        checked: a sentence about what was compared after writing; empty: none.
    """
    facts, about = source.facts, source.facts.get("about", {})
    title = _line(facts.get("method") or "an image translation")
    parts = [
        _front_matter(source),
        f"# A generator of {title}\n",
        _line(about.get("what") or "Replace this line: what the model translates, from which pictures to which.")
        + "\n",
        _table(source, format, files, dtype),
        checked and f"{checked}\n",
        "" if source.own and format in READABLE else _usage(format, files),  # its weights need its code
        _training(facts),
        _figures(facts),
        _configuration(facts),
        _licence(about),
    ]
    return sealed("\n".join(part for part in parts if part))


SEAL = re.compile(r"\n<!-- As fastnce wrote it: ([0-9a-f]{64}) -->\n?$")


def sealed(text: str) -> str:
    """The text with a last line, invisible on the hub, by which `is_untouched` knows that nobody has edited it."""
    text = text.encode("utf-8", "replace").decode()
    return f"{text}\n<!-- As fastnce wrote it: {_digest(text)} -->\n"


def is_untouched(text: str) -> bool:
    """Whether a README.md is a card as `card` returned it, which may be replaced. Ends of lines do not count."""
    text = text.replace("\r\n", "\n")
    seal = SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def read_card(file: Path) -> str:
    """The text of a README.md; empty if there is none that can be read. At most `LARGEST` bytes are read."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(LARGEST).decode("utf-8", "replace")


def edited_card(folder: Path) -> str:
    """The README.md of an exported folder that somebody has edited; empty for other sources and other cards."""
    text = read_card(folder / CARD) if is_exported(folder) else ""
    return "" if is_untouched(text) else text


def _front_matter(source: Source) -> str:
    method = source.facts.get("method", "")
    tags = ["fastnce", "unpaired-image-translation"]
    if isinstance(method, str) and method and not is_import_path(method):
        tags.append(method)
    known = str(source.facts.get("about", {}).get("license", ""))
    licence = f"license: {known}" if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", known) else UNKNOWN
    lines = ["---", "library_name: fastnce", "pipeline_tag: image-to-image", licence, "tags:"]
    return "\n".join([*lines, *(f"- {json.dumps(tag)}" for tag in tags), "---", ""])


def _table(source: Source, format: str, files: Sequence[str], dtype: str) -> str:
    numbers = sum(parameter.numel() for parameter in source.network.parameters())
    side = f"sides that are multiples of {source.factor}, at least {source.smallest}"
    turned = source.facts.get("direction") == "BtoA"  # A and B are those of the data folder
    way = "from B to A" if source.reverse != turned else "from A to B"
    if source.options is not None:
        kind = f"{without_folders(source.options['generator'])}, width {source.options['width']}"
    else:
        kind = without_folders(source.own) or type(source.network).__name__
    rows = [
        ("method", source.facts.get("method") or "not known"),
        ("generator", f"{source.name} ({kind}), {way}, {counted(numbers, 'parameter')}"),
        ("input", f"(images, {source.in_channels}, height, width), float32 in [-1, 1]; {side}"),
        ("output", f"(images, {source.out_channels}, height, width), about [-1, 1]"),
        ("files", f"{', '.join(files)}: {format}, weights in {dtype}"),
        ("written by", f"fastnce {__version__}"),
    ]
    return _rows(("", ""), rows)


def _usage(format: str, files: Sequence[str]) -> str:
    if format not in READABLE:
        return graph_usage(format, files[0])
    return (
        "## Use\n\n```python\nimport fastnce\nimport PIL.Image\n\n"
        'model = fastnce.load("FOLDER")  # the folder of this file\n'
        'model.translate(PIL.Image.open("picture.jpg")).save("translated.png")\n```\n\n'
        f"`fastnce translate FOLDER PICTURES --out OUT` translates files of any size. {CONFIG} says which network "
        f"{files[0]} belongs to; neither file holds code.\n"
    )


def _training(facts: dict[str, Any]) -> str:
    rows: list[tuple[str, Any]] = []
    data = facts.get("data", {})
    if data.get("name"):
        counts = [f"{counted(data[side], 'image')} of {side}" for side in "AB" if side in data]
        rows.append(("data folder", data["name"] + (f": {' and '.join(counts)}" if counts else "")))
    for key, name in (("step", "steps"), ("epoch", "epochs completed"), ("seen", "images seen of each domain")):
        if key in facts:
            rows.append((name, f"{facts[key]:,}"))
    return f"## Training\n\n{_rows(('', ''), rows)}" if rows else ""


def _figures(facts: dict[str, Any]) -> str:
    figures = facts.get("figures")
    rows = [(name, f"{value:.6g}") for name, value in (figures or {}).items()]
    return f"## Measured on held-out images\n\n{_rows(('measure', 'value'), rows)}" if rows else ""


def _configuration(facts: dict[str, Any]) -> str:
    text = facts.get("config")
    return f"## Configuration\n\n```toml\n{text}```\n" if text and "```" not in text else ""


def _licence(about: dict[str, str]) -> str:
    if "license" not in about:
        return (
            "## Licence\n\nNot stated yet: write it into the field `license` at the top of this file, and say here "
            "whose pictures the model was trained on.\n"
        )
    trained = f" Trained on {_line(about['trained_on'])}." if "trained_on" in about else ""
    return f"## Licence\n\n{_line(about['license'])}.{trained}\n"


def _rows(head: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_line(a)} | {_line(b)} |" for a, b in rows), ""])


def _line(value: Any) -> str:
    """A value as one line of a table, without characters that would end a cell or begin a tag."""
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").encode("utf-8", "replace").decode()
