"""Show the scale of the distances on EfficientNet-Lite0 features: two test sets, halves of them, and few pictures.

    python experiments/feature_distance.py DIR --out benchmarks/results/feature-distance-DATE

DIR has testA and testB. Writes distances.csv: mean and standard deviation over draws without replacement; the first
rows are of whole sets and of every second picture. Writes machine.json: the versions, the command and images/s.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a script

from benchmarks import machine
from fastnce.data import find_images, load_image
from fastnce.evaluate.features import FRECHET, KERNEL, Lite0

HEAD = ("one", "other", "of_one", "of_other", "draws", FRECHET, "frechet_sd", KERNEL, "kernel_sd")


def measure(network: Lite0, draws: list[tuple[Tensor, Tensor]]) -> list[str]:
    """Return the mean and the standard deviation of both distances over pairs of sets, as text."""
    rows = [network.compute(*both) for both in draws]
    values = torch.tensor([[row[FRECHET], row[KERNEL]] for row in rows], dtype=torch.float64)
    spread = values.std(dim=0) if len(rows) > 1 else torch.full((2,), float("nan"), dtype=torch.float64)
    (far, near), (far_spread, near_spread) = values.mean(dim=0).tolist(), spread.tolist()
    return [f"{far:.3f}", f"{far_spread:.3f}", f"{near:.6f}", f"{near_spread:.6f}"]


def distances(network: Lite0, a: Tensor, b: Tensor, sizes: list[int], draws: int, seed: int) -> list[list[object]]:
    """Return the rows of the table for the features (images, width) of two sets."""
    table: list[list[object]] = [["testA", "testB", len(a), len(b), 1, *measure(network, [(a, b)])]]
    for name, rows in (("testA", a), ("testB", b)):
        halves = rows[::2], rows[1::2]
        table.append([name, name, *map(len, halves), 1, *measure(network, [halves])])
    generator = torch.Generator().manual_seed(seed)

    def mixed(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)]

    for size in sizes:
        if 2 * size <= len(a) and size <= len(b):
            apart = [(mixed(a)[:size], mixed(b)[:size]) for _ in range(draws)]
            table.append(["testA", "testB", size, size, draws, *measure(network, apart)])
            equal = [mixed(a)[: 2 * size].split(size) for _ in range(draws)]
            table.append(["testA", "testA", size, size, draws, *measure(network, equal)])
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR", help="folder with testA and testB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 25, 60], help="pictures of each set")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    network = Lite0()
    sets, count, seconds = [], 0, 0.0
    for side in "AB":
        pictures = [load_image(file, 3)[None] for file in find_images(args.data / f"test{side}")]
        began = time.process_time()
        sets.append(torch.stack([network.features(picture) for picture in pictures]))
        count, seconds = count + len(pictures), seconds + time.process_time() - began
    table = distances(network, sets[0], sets[1], args.sizes, args.draws, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "distances.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *table])
    facts = machine.facts(torch.device("cpu"))
    facts["command"] = " ".join(["python", "experiments/feature_distance.py", *(arguments or sys.argv[1:])])
    facts |= {"images_per_cpu_second": round(count / seconds, 1), "seed": args.seed, "threads": args.threads}
    (args.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    for row in table:
        print(*row)


if __name__ == "__main__":
    main()
