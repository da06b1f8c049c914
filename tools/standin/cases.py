"""The cases of the matrix: every preset, in every precision, in every form of the step; and options of presets."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("bf16", "fp16", "fp32")
FORMS = {"eager": False, "parts": True, "whole": "whole"}
"""The step's argument `compile` by the name of the form. Every form is captured and replayed."""
MINUTES = {"eager": 5, "parts": 30, "whole": 60}
"""The time limit of a case by its form: most of it is compiling."""


SMALL_RESNET = {"generator": "resnet_6blocks", "width": 8, "discriminator_width": 8}
SMALL = {"width": 8, "discriminator_width": 8}


@dataclass(frozen=True)
class Size:
    """How small a preset is trained: changed network options, images per domain, and their side in pixels."""

    network: dict[str, Any]
    images: int = 1
    side: int = 64


@dataclass(frozen=True)
class Variant:
    """A preset with other options: of its size, of the method, and of the section `optim`."""

    preset: str
    size: Size
    options: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "cut": Size(SMALL_RESNET),
    "fastcut": Size(SMALL_RESNET),
    "hneg-src": Size(SMALL_RESNET),
    "negcut": Size(SMALL_RESNET),
    "fsesim": Size(SMALL_RESNET),
    "lsesim": Size(SMALL_RESNET),
    "qsattn": Size(SMALL_RESNET),
    "sincut": Size({"width": 1, "discriminator_width": 1}, images=2),  # its negatives are from the other image
    "cyclegan": Size(SMALL_RESNET),
    "dclgan": Size(SMALL_RESNET),
    "dclgan-paper": Size(SMALL_RESNET),
    "simdcl": Size(SMALL_RESNET),
    "dcdgan": Size(SMALL_RESNET),
    "dcdgan-plus": Size(SMALL),
    "dcdgan-released": Size(SMALL_RESNET),
}
"""The size of every preset."""

PUBLISHED = {name: Size({}, side=256) for name in SIZES} | {"sincut": Size({}, images=16)}
"""The published size of every preset: crops of 256 pixels, or SinCUT's 16 crops of 64."""

AUGMENT = "color,translation,cutout"
SPECTRAL = Size({**SMALL_RESNET, "spectral_norm": True})
VARIANTS = {
    "cut+temperature": Variant("cut", SIZES["cut"], {"learn_temperature": True}),
    "cut+augment": Variant("cut", SIZES["cut"], {"augment": AUGMENT}),
    "cut+spectral": Variant("cut", SPECTRAL),
    "cut+adamw": Variant(
        "cut", SIZES["cut"], optim={"optimizer": "adamw", "weight_decay": 0.01, "schedule": "plateau"}
    ),
    "dclgan+options": Variant(
        "dclgan", SPECTRAL, {"learn_temperature": True, "augment": AUGMENT, "flip_equivariance": True}
    ),
}
VARIANTS |= {f"{name}+published": Variant(name, size) for name, size in PUBLISHED.items()}
"""What changes the launches of a step: options, and the published size. A case may name one in place of a preset."""


@dataclass(frozen=True)
class Case:
    """One cell of the matrix, which a process of its own computes. `preset` may be the name of a variant."""

    preset: str
    precision: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.preset}/{self.precision}/{self.form}"

    @property
    def variant(self) -> Variant:
        """The preset, its size and its options."""
        return VARIANTS.get(self.preset) or Variant(self.preset, SIZES[self.preset])

    @property
    def seconds(self) -> float:
        """The time limit."""
        return 60 * MINUTES[self.form]


LEFT_OUT = {
    ("dcdgan-plus", form): "compiling its 18 gated blocks did not end within 12 minutes"
    for form in FORMS
    if FORMS[form]
}
"""The presets and forms that are not in the matrix, and why. Feature layer 16 needs that many blocks at any size."""


def is_in(name: str, precision: str, form: str) -> bool:
    """Return whether the matrix has this case.

    Presets of the published size are in it uncompiled in bf16. Other variants are in it uncompiled, and compiled in
    parts in bf16.
    """
    if name.endswith("+published"):
        return (form, precision) == ("eager", "bf16")
    if name in VARIANTS:
        return form == "eager" or (form, precision) == ("parts", "bf16")
    return (name, form) not in LEFT_OUT


CASES = [
    Case(name, precision, form)
    for form in FORMS
    for name in (*SIZES, *VARIANTS)
    for precision in PRECISIONS
    if is_in(name, precision, form)
]
"""All cases, the fast ones first."""


def find(name: str) -> Case:
    """Return the case of this name.

    Raises:
        ValueError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"unknown case {name!r}: --list shows all")


def select(patterns: Sequence[str]) -> list[Case]:
    """Return the cases that match any of the patterns; all if there are no patterns.

    A pattern is the name of a case in which each part may be a wildcard, or a part of it: "cut", "*/bf16", "whole".

    Raises:
        ValueError: a pattern matches no case.
    """
    found = []
    for pattern in patterns:
        matches = [case for case in CASES if _matches(case, pattern)]
        if not matches:
            raise ValueError(f"--only {pattern} matches no case: --list shows all")
        found += matches
    return [case for case in CASES if case in found] if patterns else list(CASES)


def _matches(case: Case, pattern: str) -> bool:
    parts = (case.preset, case.precision, case.form)
    return fnmatch.fnmatchcase(case.name, pattern) or pattern in parts
