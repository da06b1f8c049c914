"""Write a trained generator for others: weights that are read again, a card, and what describes them."""

from .card import card, details
from .folder import write_folder
from .graph_formats import GRAPHS, Written, write_graph
from .published_format import write_published
from .safetensors_format import save_weights, write_safetensors
from .source import DTYPES, Source, open_source

__all__ = [
    "DTYPES",
    "GRAPHS",
    "Source",
    "Written",
    "card",
    "details",
    "open_source",
    "save_weights",
    "write_folder",
    "write_graph",
    "write_published",
    "write_safetensors",
]
