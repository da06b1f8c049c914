"""The papers: networks, losses and published defaults."""

from ..common.options import option
from .base import Batch, Draws, Group, Method, NetworkOptions, Phase
from .cut import CUT, CUTOptions
from .cyclegan import CycleGAN, CycleGANOptions
from .dcdgan import DCDGAN, DCDGANOptions
from .dclgan import DCLGAN, DCLGANOptions
from .presets import PRESETS, Preset, find_preset
from .simdcl import SimDCL, SimDCLOptions
from .sincut import SinCUT, SinCUTOptions

__all__ = [
    "CUT",
    "DCDGAN",
    "DCLGAN",
    "PRESETS",
    "Batch",
    "CUTOptions",
    "CycleGAN",
    "CycleGANOptions",
    "DCDGANOptions",
    "DCLGANOptions",
    "Draws",
    "Group",
    "Method",
    "NetworkOptions",
    "Phase",
    "Preset",
    "SimDCL",
    "SimDCLOptions",
    "SinCUT",
    "SinCUTOptions",
    "find_preset",
    "option",
]
