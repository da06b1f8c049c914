"""The command `fastnce translate`."""

from __future__ import annotations

from pathlib import Path

from ..common.messages import nearest
from ..common.streams import ProgressLine
from ..data.limit import accepting
from ..engine.choices import pick_device
from ..translate.files import FORMATS, translate_files
from ..translate.load import load_translator
from .parsing import GENERATOR_HELP, MAX_PIXELS, MODEL_HELP, TILES_HELP, TRUST_HELP, add_max_pixels, command_parser

OUT_HELP = "folder for the translated pictures; for one picture also the name of a file, such as x.png"


def main(arguments: list[str]) -> int:
    """Translate pictures of any size with a run, a checkpoint or a published .pth file."""
    parser = command_parser("translate", main)
    parser.add_argument("model", type=Path, metavar="RUN|FILE.pth", help=MODEL_HELP)
    parser.add_argument("source", type=Path, metavar="IMAGE|DIR", help="a picture, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR|FILE", help=OUT_HELP)
    parser.add_argument("--generator", default="", help=GENERATOR_HELP)
    parser.add_argument("--format", help="png (default), jpg, webp, bmp, tiff or npy")
    parser.add_argument("--bits", type=int, choices=(8, 16), help="depth of the written files; default as the source")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="translate N pictures of one size at once")
    parser.add_argument("--tiles", default="auto", choices=("auto", "exact", "fast"), help=TILES_HELP)
    parser.add_argument("--tile-size", type=int, default=1024, metavar="N", help="side of a tile in pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    add_max_pixels(parser)
    parser.check_words(arguments)
    args = parser.parse_args(arguments)
    if not args.source.exists():
        raise ValueError(f"{args.source}: no such picture or folder")
    suffix = None if args.format is None else f".{args.format.lower()}"
    if suffix not in (None, *FORMATS):
        meant = nearest(args.format, [name.lstrip(".") for name in FORMATS])
        raise ValueError(f"--format must be png, jpg, webp, bmp, tiff or npy, not {args.format!r}{meant}")
    with ProgressLine() as line, accepting(args.max_pixels, MAX_PIXELS):
        how = {"tiles": args.tiles, "tile_size": args.tile_size, "say": line.say, "trust_code": args.trust_code}
        translator = load_translator(args.model, pick_device(args.device), args.generator, **how)
        written = translate_files(
            translator, args.source, args.out, suffix, batch=args.batch, bits=args.bits, progress=line
        )
    print(f"{len(written)} {'picture' if len(written) == 1 else 'pictures'} written to {args.out}")
    return 0
