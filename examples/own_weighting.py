"""Your own weighting: negatives count more if they are similar to the positive key.

fastnce train fastcut --data DIR --out RUN \\
    loss.weighting=examples/own_weighting.py:weight loss.weighting_options=power=2
python examples/own_weighting.py                       # the same on small images, for three steps
"""

from __future__ import annotations

from pictures import train_small
from torch import Tensor

from fastnce.nce import Weights


def weight(queries: Tensor, keys: Tensor, groups: int, *, power: float = 1.0) -> Weights:
    """Add power * log((1 + k_i.k_j) / 2) to the logit of negative j of query i."""
    grouped = keys.unflatten(0, (groups, -1))  # (groups, rows of a group, dim)
    similarity = grouped @ grouped.mT
    return Weights(pair_log_weight=power * ((1 + similarity) / 2).clamp_min(1e-6).log())


def main() -> int:
    weighting = [f"loss.weighting={__file__}:weight", "loss.weighting_options=power=2.0"]
    return train_small("fastcut", "loss.nce_layers=0,4,8", *weighting)


if __name__ == "__main__":
    main()
