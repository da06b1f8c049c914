"""Print the presets: paper, terms, networks, parameters and defaults; of a named one also what each option does."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import nn

from ..common.options import describe
from ..common.streams import write_out
from ..methods import NetworkOptions
from ..methods.presets import PRESETS, UNRECORDED, Preset, find_preset
from .parsing import command_parser

COLUMNS = 100
NAME_HELP = "a preset, or your own: mypaper.py:MyMethod"
RECORDED = "yes: recordings of the published code are replayed step by step in float64"
NOT_RECORDED = "no: there is no released code with these settings to record"


def networks_of(preset: Preset) -> dict[str, nn.Module]:
    """Build a preset's networks at its default sizes on the meta device, without memory for weights."""
    network = NetworkOptions(**preset.sections.get("network", {}))
    with torch.device("meta"):
        return preset.method(preset.options(), network).networks()


def terms(options: Any) -> list[str]:
    """Return the weighted terms of an options object, such as "gan 1" for `lambda_gan`."""
    values = {name: value for name, (value, _) in describe(options).items() if name.startswith("lambda_")}
    if getattr(options, "gan_mode", "") != "wgangp":
        values.pop("lambda_gp", None)
    return [f"{name.removeprefix('lambda_')} {value:g}" for name, value in values.items() if value]


def rows(name: str, preset: Preset) -> list[tuple[str, str]]:
    """Return the lines about a preset: (heading, text)."""
    options = preset.options()
    sizes = {net: sum(p.numel() for p in module.parameters()) for net, module in networks_of(preset).items()}
    network = NetworkOptions(**preset.sections.get("network", {}))
    details = {
        key: value for key, (value, _) in describe(options).items() if not key.startswith("lambda_") and value != []
    }
    changed = [f"{section}.{key}={value}" for section, keys in preset.sections.items() for key, value in keys.items()]
    return [
        ("paper", preset.paper),
        ("terms", ", ".join(terms(options))),
        ("networks", f"{network.generator} and {network.discriminator}, width {network.width}"),
        ("parameters", ", ".join(f"{net} {count:,}" for net, count in sizes.items()) + f"; {sum(sizes.values()):,}"),
        ("loss", " ".join(f"{key}={value}" for key, value in details.items())),
        ("overrides", " ".join(changed) or "none: the defaults of data, network and optim"),
    ]


def main(arguments: list[str]) -> int:
    """List the methods with their papers, terms, networks and defaults; with NAME, one method and all its options."""
    parser = command_parser("methods", main)
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help=NAME_HELP)
    name = parser.parse_args(arguments).name
    lines = []
    for one, preset in [(name, find_preset(name))] if name else PRESETS.items():
        lines.append(one)
        about = rows(one, preset)
        if name in PRESETS:
            about.insert(1, ("recorded", NOT_RECORDED if name in UNRECORDED else RECORDED))
        for heading, text in about:
            lines += wrapped(heading, text)
        if name:
            lines += ["  options"]
            for key, (value, text) in describe(preset.options()).items():
                lines += [f"    loss.{key}={value}", *(f"        {line}" for line in textwrap.wrap(text, COLUMNS - 8))]
        lines.append("")
    write_out("\n".join(lines) + "\n")
    return 0


def wrapped(heading: str, text: str) -> list[str]:
    """Return the lines of a heading and its text."""
    parts = textwrap.wrap(text, COLUMNS - 14, break_on_hyphens=False)
    return [f"  {heading if i == 0 else '':<11} {line}" for i, line in enumerate(parts)]
