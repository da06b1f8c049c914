"""Presets: the published defaults of each paper, by the name that `fastnce train` accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from ..common.imports import CodeError, is_import_path, load_object
from ..common.messages import brief, nearest
from ..common.options import check_kinds
from .base import Method, NetworkOptions
from .cut import CUT, CUTOptions
from .cyclegan import CycleGAN, CycleGANOptions
from .dcdgan import DCDGAN, DCDGANOptions
from .dclgan import DCLGAN, DCLGANOptions
from .hneg_src import HnegSRC, HnegSRCOptions
from .lsesim import LSeSim, LSeSimOptions
from .negcut import NEGCUT, NEGCUTOptions
from .qsattn import QSAttn, QSAttnOptions
from .simdcl import SimDCL, SimDCLOptions
from .sincut import SinCUT, SinCUTOptions


@dataclass(frozen=True)
class Preset:
    """The published defaults of a paper: its class, its options, and its values in the other sections."""

    method: Callable[[Any, NetworkOptions], Method]
    options: Callable[[], Any]
    paper: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


PRESETS = {
    "cut": Preset(
        CUT,
        CUTOptions,
        "Park et al., Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020",
        {"optim": {"n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "fastcut": Preset(
        CUT,
        CUTOptions.fastcut,
        "Park et al., Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020",
        {"optim": {"n_epochs": 150, "n_epochs_decay": 50}},
    ),
    "hneg-src": Preset(
        HnegSRC,
        HnegSRCOptions,
        "Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning, CVPR 2022 (released code)",
        {"optim": {"n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "negcut": Preset(
        NEGCUT,
        NEGCUTOptions,
        "Wang et al., Instance-wise Hard Negative Example Generation for Contrastive Learning, ICCV 2021",
        {"optim": {"n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "fsesim": Preset(
        LSeSim,
        LSeSimOptions,
        "Zheng et al., The Spatially-Correlative Loss for Various Image Translation Tasks, CVPR 2021 (fixed)",
        {"optim": {"lr": 1e-4, "n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "lsesim": Preset(
        LSeSim,
        LSeSimOptions.lsesim,
        "Zheng et al., The Spatially-Correlative Loss for Various Image Translation Tasks, CVPR 2021 (learned)",
        {"optim": {"lr": 1e-4, "n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "qsattn": Preset(
        QSAttn,
        QSAttnOptions,
        "Hu et al., QS-Attn: Query-Selected Attention for Contrastive Learning in I2I Translation, CVPR 2022",
        {"optim": {"n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "sincut": Preset(
        SinCUT,
        SinCUTOptions,
        "Park et al., Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020",
        {
            "network": {
                "generator": "stylegan2",
                "discriminator": "stylegan2",
                "width": 10,
                "discriminator_width": 8,
                "resolution": 64,
            },
            "optim": {"lr": 2e-3, "beta1": 0.0, "beta2": 0.99, "n_epochs": 8, "n_epochs_decay": 8},
            "data": {"crop_size": 64, "batch": 16, "preprocess": "zoom_and_patch"},
        },
    ),
    "cyclegan": Preset(
        CycleGAN,
        CycleGANOptions,
        "Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks, ICCV 2017",
        {
            "network": {"antialias": False, "antialias_up": False, "init_type": "normal"},
            "optim": {"n_epochs": 100, "n_epochs_decay": 100},
        },
    ),
    "dclgan": Preset(
        DCLGAN,
        DCLGANOptions,
        "Han et al., Dual Contrastive Learning for Unsupervised Image-to-Image Translation, CVPRW 2021 (released code)",
    ),
    "dclgan-paper": Preset(
        DCLGAN,
        DCLGANOptions.paper,
        "Han et al., Dual Contrastive Learning for Unsupervised Image-to-Image Translation, CVPRW 2021 (paper)",
        {"optim": {"lr": 1e-4}},
    ),
    "simdcl": Preset(
        SimDCL,
        SimDCLOptions,
        "Han et al., Dual Contrastive Learning for Unsupervised Image-to-Image Translation, CVPRW 2021 (released code)",
    ),
    "dcdgan": Preset(
        DCDGAN,
        DCDGANOptions,
        "Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning, CVPR 2022 (paper)",
        {
            "data": {"load_size": 512},
            "optim": {"lr": 1e-4, "n_epochs": 300, "n_epochs_decay": 300},
            "run": {"validate_every": 1000},
        },
    ),
    "dcdgan-plus": Preset(
        DCDGAN,
        DCDGANOptions.plus,
        "Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning, CVPR 2022, with rendered pairs",
        {
            "network": {
                "generator": "restorer",
                "width": 32,
                "discriminator": "n_layers",
                "discriminator_layers": 2,
                "norm": "none",
                "antialias": False,
                "init_type": "kaiming",
            },
            "data": {"preprocess": "crop", "load_size": 128, "crop_size": 128, "batch": 4},
            "optim": {"lr": 5e-4, "ema": 0.999, "n_epochs": 300, "n_epochs_decay": 300},
            "run": {"validate_every": 1000},
        },
    ),
    "dcdgan-released": Preset(
        DCLGAN,
        DCLGANOptions,
        "Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning, CVPR 2022 (released code)",
        {
            "data": {"load_size": 512},
            "optim": {"lr": 1e-4, "n_epochs": 300, "n_epochs_decay": 300},
            "run": {"validate_every": 1000},
        },
    ),
}


UNRECORDED = ("dclgan-paper", "dcdgan", "dcdgan-plus")
"""Presets that no released code has. Recordings of the released code are replayed for all others."""

REQUIRED = ("generators", "groups", "phases", "generate", "translate")
"""Members of `Method` that every method must define."""


def find_preset(name: str) -> Preset:
    """Return the preset of this name, or a preset for a user's own method.

    Args:
        name: a key of `PRESETS`, or the import path of a subclass of `Method` such as mypaper.py:MyMethod. Its
            `Options` is the dataclass of its section `loss`; `paper` and `sections` are optional, as in `Preset`.

    Raises:
        ValueError: an unknown name, or a class that lacks a member of the contract; the message names it.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if not is_import_path(name):
        known = f"known: {', '.join(PRESETS)}, or your own (mypaper.py:MyMethod)"
        raise ValueError(f"unknown method {brief(name)}{nearest(name, PRESETS)}; {known}")
    method = load_object(name, "method")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise CodeError(f"method={name} must be a subclass of fastnce.methods.Method")
    missing = [f"{member}()" for member in REQUIRED if getattr(method, member) is getattr(Method, member)]
    if missing:
        raise CodeError(f"method={name} lacks {', '.join(missing)}: see fastnce.methods.Method")
    options = getattr(method, "Options", None)
    if not (isinstance(options, type) and is_dataclass(options)):
        raise CodeError(f"method={name} needs a dataclass as its attribute Options, for the section loss")
    check_kinds(options, f"{name.rpartition(':')[2]}.Options")
    sections: Any = getattr(method, "sections", None)
    if sections is None:  # those of the published method that it extends
        near = (p.sections for cls in method.__mro__ for p in PRESETS.values() if p.method is cls)
        sections = next(near, {})
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise CodeError(f"method={name}: sections must be a dict of options by section, not {sections!r}")
    paper = getattr(method, "paper", "") or (method.__doc__ or name).strip().partition("\n")[0]
    return Preset(method, options, paper, sections)
