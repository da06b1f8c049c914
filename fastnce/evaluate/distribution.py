"""FID and KID between two sets of images, computed by torch-fidelity (extra ``eval``) with its Inception weights."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from urllib.error import URLError

import torch
from torch import Tensor
from torch.utils.data import Dataset


class _Levels(Dataset):
    """A data set of uint8 (3, height, width), as torch-fidelity expects it."""

    def __init__(self, pictures: Sequence[Tensor]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def require_fidelity() -> None:
    """Raise ValueError if torch-fidelity is not installed. Call this before anything is translated."""
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another version of torch
        raise ValueError(f"FID and KID need torch-fidelity: pip install 'fastnce[eval]' ({error})") from None


def fid_kid(
    outputs: Sequence[Tensor], reference: Sequence[Tensor], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compute FID and KID between generated and real images.

    FID: Heusel et al., NeurIPS 2017. KID (x 1, not x 100): Binkowski et al., ICLR 2018, over 100 subsets of up to 1,000
    images. With few images FID is far too high; compare it only between sets of equal size.

    Args:
        outputs, reference: uint8 (3, height, width) each, at least two of each; sizes may differ.
        device: where Inception runs.

    Returns:
        "fid", "kid" and "kid_std".

    Raises:
        ValueError: torch-fidelity is not installed, its weights are not available, or the images are too few or have
            another dtype or shape.
    """
    require_fidelity()
    from torch_fidelity import calculate_metrics

    for picture in (*outputs, *reference):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
            raise ValueError(f"FID takes uint8 (3, height, width), not {picture.dtype} {tuple(picture.shape)}")
    if min(len(outputs), len(reference)) < 2:
        raise ValueError(f"FID needs at least two pictures of each set, not {len(outputs)} and {len(reference)}")
    one_size = len({tuple(picture.shape) for picture in (*outputs, *reference)}) == 1
    try:
        found = calculate_metrics(
            input1=_Levels(outputs),
            input2=_Levels(reference),
            cuda=torch.device(device).type == "cuda",
            fid=True,
            kid=True,
            kid_subset_size=min(1000, len(outputs), len(reference)),
            batch_size=32 if one_size else 1,
            save_cpu_ram=True,
            verbose=False,
        )
    except (URLError, ConnectionError, TimeoutError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"torch-fidelity could not get its Inception weights ({error}): fetch them once on a machine with a "
            f"connection and copy them to {torch.hub.get_dir()}/checkpoints"
        ) from None
    return {
        "fid": float(found["frechet_inception_distance"]),
        "kid": float(found["kernel_inception_distance_mean"]),
        "kid_std": float(found["kernel_inception_distance_std"]),
    }
