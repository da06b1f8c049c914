"""FID and KID between two sets of images, computed by torch-fidelity (extra ``eval``) with its Inception network.

FID: Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017. KID: Binkowski et al., "Demystifying
MMD GANs", ICLR 2018. FID of few images is far too high: compare it only between sets of equal sizes.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.imports import first_line
from .quality import to_levels

FEATURES = 2048
"""Features of one image: the last pooling of Inception v3."""
INSTALL = "pip install 'torch-fidelity>=0.4'"
WEIGHTS_FLAG = "--feature-extractor-weights-path"


def require_fidelity() -> None:
    """Raise ValueError if torch-fidelity cannot be imported. Call this before anything is translated."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ValueError(f"FID and KID need torch-fidelity: {INSTALL} ({error})") from None
    except RuntimeError as error:
        raise ValueError(
            f"torch-fidelity needs a torchvision that was built for PyTorch {torch.__version__}: install both from the "
            f"same place ({first_line(error)})"
        ) from None


class Inception:
    """The network whose features FID and KID compare: Inception v3 with the weights of the original FID code.

    Args:
        device: where it computes.
        weights: a file of weights as torch-fidelity publishes it. Empty: torch-fidelity takes its own from the folder
            of `torch.hub`, or fetches them once.

    Raises:
        ValueError: torch-fidelity is not installed, or the weights are not there or not usable.
    """

    width = FEATURES

    def __init__(self, device: torch.device | str = "cpu", weights: str | os.PathLike[str] = ""):
        require_fidelity()
        from torch_fidelity.utils import create_feature_extractor

        file = str(weights)
        if file:
            _check_weights(Path(file))
        try:
            network = create_feature_extractor(
                "inception-v3-compat",
                [str(FEATURES)],
                cuda=False,
                verbose=False,
                feature_extractor_weights_path=file or None,
            )
        except (OSError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            if file:
                raise ValueError(
                    f"{file} does not fit torch-fidelity's Inception network: its tensors have other names or shapes, "
                    f"as those of another network"
                ) from None
            raise ValueError(_missing(error)) from None
        self.device = torch.device(device)
        self.network = network.to(self.device)

    @property
    def measures(self) -> Mapping[str, Callable[[Tensor, Tensor], float]]:
        """The distances on these features, by name."""
        return {"fid": fid, "kid": lambda features, reference: kid(features, reference)[0]}

    def compute(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        """See `fid_kid`."""
        return fid_kid(features, reference)

    @torch.no_grad()
    def features(self, picture: Tensor) -> Tensor:
        """Compute the features of one image.

        Args:
            picture: (1, 1 or 3, height, width) in [-1, 1]. It is clipped and rounded to 8 bits, as in a file.

        Returns:
            (2048,) float64 on the CPU; NaN if the image is not finite.
        """
        if not torch.isfinite(picture).all():
            return torch.full((FEATURES,), float("nan"), dtype=torch.float64)
        levels = to_levels(picture.cpu().clamp(-1, 1)).to(torch.uint8).expand(-1, 3, -1, -1)
        (found,) = self.network(levels.to(self.device))
        return found[0].double().cpu()


def _check_weights(file: Path) -> None:
    """Raise ValueError unless a file holds tensors. torch-fidelity itself would run code that a file contains."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}, which should hold torch-fidelity's Inception weights")
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except PermissionError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except Exception:  # the texts of PyTorch advise to run the code of a damaged file
        raise ValueError(
            f"{file} does not hold torch-fidelity's Inception weights: it is damaged, or no file of tensors that "
            f"torch.save wrote"
        ) from None
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise ValueError(f"{file} does not hold torch-fidelity's Inception weights, which are a table of tensors")
    begin = file.stem.rpartition("-")[2]
    if file.name == _published().name and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(begin):
        raise ValueError(f"{file} is damaged: its SHA-256 should begin with {begin}, as its name says; fetch it again")


class _Published(NamedTuple):
    """The file of weights that torch-fidelity fetches."""

    source: str
    name: str


def _published() -> _Published:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return _Published(URL_INCEPTION_V3, URL_INCEPTION_V3.rpartition("/")[2])


def _missing(error: BaseException) -> str:
    source, name = _published()
    return (
        f"FID and KID need the file {name}, which torch-fidelity could not load ({first_line(error)}): fetch "
        f"{source} and put it into {torch.hub.get_dir()}/checkpoints, or name it by run.feature_weights=FILE "
        f"(fastnce evaluate: {WEIGHTS_FLAG} FILE)"
    )


def check_counts(outputs: int, reference: int, measures: str = "FID and KID") -> None:
    """Raise ValueError if the sets are too small for these measures."""
    if min(outputs, reference) < 2:
        raise ValueError(f"measuring {measures} takes at least two pictures of each set, not {outputs} and {reference}")


def fid(features: Tensor, reference: Tensor) -> float:
    """Compute the Fréchet Inception distance (Heusel et al., equation 6); NaN if a feature is not finite.

    Args:
        features, reference: (images, 2048) as `Inception.features` gives them, at least two images each.

    Raises:
        ValueError: there are fewer images.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    check_counts(len(features), len(reference))
    if not (features.isfinite().all() and reference.isfinite().all()):
        return float("nan")
    statistics = (fid_features_to_statistics(each) for each in _rotated(features, reference))
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def _rotated(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The same features in the subspace that they span, which leaves FID as it is.

    The eigenvalues of a 2048x2048 matrix take ten seconds on a CPU, those of 50 images a moment.
    """
    both = torch.cat([features, reference]).double()
    if len(both) < both.shape[1]:
        both = both - both.mean(dim=0)
        both = both @ torch.linalg.qr(both.T).Q
    return both[: len(features)], both[len(features) :]


def kid(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compute the kernel Inception distance (x 1, not x 100) over 100 subsets of up to 1,000 images.

    Args:
        features, reference: as for `fid`.

    Returns:
        the mean over the subsets and its standard deviation; NaN if a feature is not finite.

    Raises:
        ValueError: there are fewer than two images of a set.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    check_counts(len(features), len(reference))
    if not (features.isfinite().all() and reference.isfinite().all()):
        return float("nan"), float("nan")
    size = min(1000, len(features), len(reference))
    # float32, as torch-fidelity extracts features itself: the difference of kernels keeps few digits of it
    found = kid_features_to_metric(features.float(), reference.float(), kid_subset_size=size, verbose=False)
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def fid_kid(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Compute "fid", "kid" and "kid_std" of features as for `fid`; raise ValueError as it does."""
    mean, deviation = kid(features, reference)
    return {"fid": fid(features, reference), "kid": mean, "kid_std": deviation}
