"""PReNet and PRN (Ren et al., CVPR 2019, https://arxiv.org/abs/1901.09221), for their published weights.

The networks are written here from the paper and from the names and shapes of the weights. A checkout of csdwren/PReNet
has the weights of Rain100L in ``logs/Rain100L``. Measure them on the pairs of a folder, with one CSV file per network::

    python -m tests.outside.prenet CHECKOUT RAIN100L OUT
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import DerainingMetrics, __version__
from fastnce.evaluate.pairs import Pair, find_pairs
from fastnce.evaluate.quality import to_levels

NETWORKS = {"PReNet": "PReNet6", "PRN": "PRN6", "PReNet_r": "PReNet6_r", "PRN_r": "PRN6_r"}
"""Name in the published table: its folder of weights."""
STAGES = 6
BLOCKS = 5
GATES = ("i", "f", "o", "g")
COLUMNS = ("picture", "psnr_y", "ssim_y", "psnr_y_rounded", "ssim_y_rounded")

Weights = dict[str, Tensor]


def load_weights(checkout: Path, network: str, data: str = "Rain100L") -> Weights:
    """Read the published weights of one network.

    Args:
        checkout: folder of csdwren/PReNet.
        network: one of `NETWORKS`.
        data: the set that they were trained for.
    """
    path = checkout / "logs" / data / NETWORKS[network] / "net_latest.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


@torch.inference_mode()
def derain(weights: Weights, rainy: Tensor) -> Tensor:
    """Remove the rain in six stages. Each stage sees the rainy picture and the output of the stage before.

    The names of the weights tell the form: the gates of an LSTM make it a PReNet, and one residual block instead of
    five is used five times (the ``_r`` networks).

    Args:
        rainy: float32 (pictures, 3, height, width) in [0, 1].

    Returns:
        The same shape, not clipped.
    """
    # on a CPU, channels last takes two thirds of the time
    rainy = rainy.contiguous(memory_format=torch.channels_last)
    left = {
        name: weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
        for name, weight in weights.items()
    }

    def taken(name: str) -> tuple[Tensor, Tensor]:
        return left.pop(f"{name}.weight"), left.pop(f"{name}.bias")

    first, last = taken("conv0.0"), taken("conv.0")
    gates = None
    if "conv_i.0.weight" in left:
        parts = [taken(f"conv_{gate}.0") for gate in GATES]
        gates = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
    blocks = []
    while f"res_conv{len(blocks) + 1}.0.weight" in left:
        name = f"res_conv{len(blocks) + 1}"
        blocks.append((taken(f"{name}.0"), taken(f"{name}.2")))
    if left or len(blocks) not in (1, BLOCKS):
        raise ValueError(f"these are no weights of PReNet or PRN: {len(blocks)} blocks, and {sorted(left)} left over")
    blocks *= BLOCKS // len(blocks)

    output, cell = rainy, None
    shape = (len(rainy), first[0].shape[0], *rainy.shape[2:])
    state = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    for _ in range(STAGES):
        x = F.conv2d(torch.cat([rainy, output], 1), *first, padding=1).relu_()
        if gates:
            sums = F.conv2d(torch.cat([x, state], 1), *gates, padding=1)
            take, keep, show = sums[:, : 3 * x.shape[1]].sigmoid().chunk(3, 1)
            new = take * sums[:, 3 * x.shape[1] :].tanh()
            cell = new if cell is None else keep * cell + new
            x = state = show * cell.tanh()
        for one, two in blocks:
            inner = F.conv2d(x, *one, padding=1).relu_()
            x = F.conv2d(inner, *two, padding=1).relu_().add_(x).relu_()
        output = rainy + F.conv2d(x, *last, padding=1)
    return output


def measure(weights: Weights, pairs: Iterable[Pair]) -> Iterator[dict[str, float | str]]:
    """Yield the measures of each pair: of the levels as the published script saves them, and of rounded ones.

    The script saves ``uint8(255 * output)``, which cuts the fraction off.
    """
    for pair in pairs:
        rainy, truth = (to_levels(picture[None]).byte() for picture in pair.load())
        output = derain(weights, rainy / 255).clamp(0, 1) * 255
        cut, rounded = (DerainingMetrics().update(levels.byte(), truth)[0] for levels in (output, output.round()))
        yield {
            "picture": pair.rainy.stem,
            **{key: cut[key] for key in ("psnr_y", "ssim_y")},
            **{f"{key}_rounded": rounded[key] for key in ("psnr_y", "ssim_y")},
        }


def main(checkout: str, data: str, out: str, *networks: str) -> None:
    """Measure networks (by default all) on a set, and write OUT/NETWORK.csv; its first line says what was measured."""
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    source = f"csdwren/PReNet {commit.stdout.strip() or 'of an unknown commit'}"
    pairs = find_pairs(Path(data))
    Path(out).mkdir(parents=True, exist_ok=True)
    for network in networks or NETWORKS:
        weights = load_weights(Path(checkout), network)
        with open(Path(out) / f"{network}.csv", "w", newline="") as file:
            file.write(f"# {network} of {source} on Rain100L; fastnce {__version__}, torch {torch.__version__}, CPU\n")
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in measure(weights, pairs):
                writer.writerow({key: f"{x:.6f}" if isinstance(x, float) else x for key, x in row.items()})
                file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
