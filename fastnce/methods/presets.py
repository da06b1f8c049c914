"""The papers and their published defaults, by the name that `fastnce train` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .base import Method, NetworkOptions
from .cut import CUT, CUTOptions
from .cyclegan import CycleGAN, CycleGANOptions
from .dcdgan import DCDGAN, DCDGANOptions
from .dclgan import DCLGAN, DCLGANOptions
from .simdcl import SimDCL, SimDCLOptions
from .sincut import SinCUT, SinCUTOptions


@dataclass(frozen=True)
class Preset:
    """A paper's published defaults: its class, its options, and what it changes in the other sections."""

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
