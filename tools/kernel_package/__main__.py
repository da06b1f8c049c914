"""Write fastnce's loss as a package for Hugging Face's `kernels`.

python -m tools.kernel_package --out DIR       # then: kernels.get_local_kernel(Path("DIR"))

DIR has the source tree for kernel-builder (build.toml, flake.nix, torch-ext/) and the built variants (build/). The exit
code is 2 if DIR exists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.kernel_package.build import write


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_package",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args(arguments)
    try:
        variants = write(options.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {', '.join(variant.name for variant in variants)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
