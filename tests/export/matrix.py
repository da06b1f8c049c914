"""Every generator at its published width in every graph format and dtype, checked: a table.

python -m tests.export.matrix                          # all; takes about an hour on two cores
python -m tests.export.matrix --formats torch onnx --networks unet_256 --dtypes float32
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fastnce.export import DTYPES, GRAPHS, write_graph
from tests.export.networks import WHOLE, source_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", choices=WHOLE, default=list(WHOLE))
    parser.add_argument("--formats", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    print("| generator | format | weights | MB | largest difference | allowed |", flush=True)
    print("|---|---|---|--:|--:|--:|", flush=True)
    for name in args.networks:
        torch.manual_seed(0)
        source = source_of(WHOLE[name]())
        for dtype in args.dtypes:
            for form in args.formats:
                start = f"| {name} | {form} | {dtype} |"
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        written = write_graph(source, Path(folder) / "out", form, dtype)
                    except ValueError as error:
                        print(f"{start} | {error} | |", flush=True)
                        continue
                    size, found = written.paths[0].stat().st_size / 1e6, written.checked
                    print(f"{start} {size:.1f} | {found.difference:.1e} | {found.allowed:.1e} |", flush=True)


if __name__ == "__main__":
    main()
