"""torch-fidelity's Inception network with random weights: its real code runs without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SIDE = 107
"""Images are resized to this side instead of 299: an eighth of the work. The last features still have 2 x 2 places."""


def prepare_torchvision() -> None:
    """Let torchvision be imported beside a PyTorch without CUDA, which cannot load its compiled operators.

    torch-fidelity needs none of them. torchvision only wants to describe them.
    """
    if importlib.util.find_spec("torchvision") is None or _importable():
        return
    missing = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(missing)


_kept: list[torch.library.Library] = []
"""A library's operators vanish with it."""


def _importable() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        return False
    return True


def save_random_weights(file: Path) -> Path:
    """Write random weights in torch-fidelity's format. Their features are of the size of real ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    load, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *args, **kwargs: {}
    try:
        network = Unloaded("random", ["2048"])
    finally:
        module.load_state_dict_from_url = load
    generator = torch.Generator().manual_seed(0)
    weights = network.state_dict()
    for name, tensor in weights.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    torch.save(weights, file)
    return file
