"""The command `fastnce models`."""

from __future__ import annotations

from ..common.streams import write_out
from ..models import folder, names
from ..translate.exported import ABOUT, CARD, about, read_details
from .parsing import command_parser
from .runs import table

HEADINGS = ("model", "what it does", "trained on", "licence")


def main(arguments: list[str]) -> int:
    """List the trained models that come with fastnce: what each does, its training pictures, its licence."""
    command_parser("models", main).parse_args(arguments)
    rows: list[tuple[str, ...]] = [HEADINGS]
    for name in names():
        said = about(read_details(folder(name)))
        rows.append((name, *(said.get(key, "not stated") for key in ABOUT)))
    cards = [f"measured figures of {name}: {folder(name) / CARD}" for name in names()]
    write_out(table(rows) + "\nfastnce translate MODEL PICTURES --out OUT\n" + "\n".join(cards) + "\n")
    return 0
