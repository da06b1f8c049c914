"""The command `fastnce translate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.messages import counted, nearest
from ..common.streams import ProgressLine
from ..config.options import MOST_SIDE
from ..data.folder import check_phase, domain_folders
from ..data.limit import accepting
from ..engine.choices import pick_device
from ..evaluate.gallery import LABELS, Gallery
from ..translate.chosen import chosen_model
from ..translate.files import FORMATS, translate_files
from ..translate.index import Index
from ..translate.load import load_translator
from ..translate.named import model_path
from .parsing import (
    EPOCH_HELP,
    GENERATOR_HELP,
    MAX_PIXELS,
    MODEL_HELP,
    NUM_HELP,
    TILES_HELP,
    TRAIN_MODE_HELP,
    TRUST_HELP,
    add_max_pixels,
    command_parser,
    positive,
)

OUT_HELP = "folder for the translated pictures; for one picture also the name of a file, such as x.png"
LAYOUT_HELP = "published: OUT/images/real_A, fake_B, real_B and OUT/index.html, as test.py writes them; always PNG"
PHASE_HELP = "the one DIR is a data set: translate its testA (its testB for G_B), for the phase test"
LOAD_SIZE_HELP = "resize pictures to N x N first, as test.py does (there N is 256); default: their own size"


def main(arguments: list[str]) -> int:
    """Translate pictures of any size with a run, a published .pth file or a model that comes with fastnce."""
    parser = command_parser("translate", main)
    parser.add_argument("model", type=model_path, metavar="RUN|FILE.pth|NAME", help=MODEL_HELP)
    parser.add_argument("source", type=Path, nargs="+", metavar="IMAGE|DIR", help="pictures, and folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR|FILE", help=OUT_HELP)
    parser.add_argument("--generator", default="", help=GENERATOR_HELP)
    parser.add_argument("--epoch", default="", metavar="N|best|last", help=EPOCH_HELP)
    parser.add_argument("--num", type=positive, default=0, metavar="N", help=NUM_HELP)
    parser.add_argument("--phase", default="", metavar="test", help=PHASE_HELP)
    parser.add_argument("--direction", choices=("AtoB", "BtoA"), help="of --phase; default: as the run trained")
    parser.add_argument("--load-size", type=positive, default=0, metavar="N", help=LOAD_SIZE_HELP)
    parser.add_argument("--index", action="store_true", help="write OUT/index.html, which shows inputs and outputs")
    parser.add_argument("--layout", choices=("published",), help=LAYOUT_HELP)
    parser.add_argument("--train-mode", action="store_true", help=TRAIN_MODE_HELP)
    parser.add_argument("--format", help="png (default), jpg, webp, bmp, tiff or npy")
    parser.add_argument("--bits", type=int, choices=(8, 16), help="depth of the written files; default as the source")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="translate N pictures of one size at once")
    parser.add_argument("--tiles", default="auto", choices=("auto", "exact", "fast"), help=TILES_HELP)
    parser.add_argument("--tile-size", type=int, default=1024, metavar="N", help="side of a tile in pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    add_max_pixels(parser)
    parser.check_words(arguments)
    args = parser.parse_intermixed_args(arguments)
    for source in args.source:
        if not source.exists():
            raise ValueError(f"{source}: no such picture or folder")
    suffix = None if args.format is None else f".{args.format.lower()}"
    if suffix not in (None, *FORMATS):
        meant = nearest(args.format, [name.lstrip(".") for name in FORMATS])
        raise ValueError(f"--format must be png, jpg, webp, bmp, tiff or npy, not {args.format!r}{meant}")
    _check_together(args)
    gallery = None
    if args.index or args.layout:  # now, because what is in the way is said before anything is read
        gallery = Gallery(args.out, "", LABELS["B" if args.generator == "G_B" else "A"])
    path, generator = chosen_model(args.model, args.epoch, args.generator)
    with ProgressLine() as line, accepting(args.max_pixels, MAX_PIXELS):
        translator = load_translator(
            path,
            pick_device(args.device),
            generator,
            tiles=args.tiles,
            tile_size=args.tile_size,
            say=line.say,
            trust_code=args.trust_code,
        )
        if args.train_mode:
            translator.train_mode()
        sources, truths = _sides(args, translator.direction)
        index = None
        if gallery is not None:
            gallery.title = f"{args.model.name}, {args.phase or sources[0].name}, {args.epoch or 'last'}"
            index = Index(gallery, args.layout == "published", truths)
        written = translate_files(
            translator,
            sources,
            args.out,
            suffix,
            batch=args.batch,
            bits=args.bits,
            progress=line,
            limit=args.num,
            load_size=(args.load_size, args.load_size) if args.load_size else None,
            index=index,
        )
    print(f"{counted(len(written), 'picture')} written to {args.out}")
    if index is not None:
        print(index.gallery.page)
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Refuse options that do not fit together."""
    if args.load_size > MOST_SIDE:
        raise ValueError(f"--load-size {args.load_size} must be at most {MOST_SIDE:,} pixels")
    if args.load_size % 4:
        raise ValueError(f"--load-size {args.load_size} must be a multiple of 4, as the published code makes it")
    if args.direction and not args.phase:
        raise ValueError(f"--direction {args.direction} says which folder --phase reads: add --phase test")
    check_phase(args.phase, f"--phase {args.phase}")
    if args.phase and (len(args.source) > 1 or not args.source[0].is_dir()):
        raise ValueError(f"--phase {args.phase} reads {args.phase}A of one data set: name its folder")
    if args.train_mode and (args.tiles != "auto" or args.batch != 1):
        raise ValueError("--train-mode takes each picture whole and alone: leave --tiles and --batch out")


def _sides(args: argparse.Namespace, trained: str) -> tuple[list[Path], list[Path]]:
    """The pictures to translate, and those of the other domain, in the order of their names.

    Args:
        trained: the direction of the run, which --direction may replace.
    """
    if not args.phase:
        return args.source, []
    a, b = domain_folders(args.source[0], args.phase)
    if (args.generator == "G_B") != ((args.direction or trained) == "BtoA"):
        a, b = b, a
    return [a.path], [b.file(place) for place in range(len(b))]
