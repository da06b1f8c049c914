"""The command `fastnce evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..common.streams import ProgressLine
from ..data.folder import DIRECTIONS, check_phase
from ..data.limit import accepting
from ..engine.choices import pick_device
from ..evaluate.distribution import INSTALL, WEIGHTS_FLAG
from ..evaluate.features import INSTALL as INSTALL_LITE0
from ..evaluate.gallery import LABELS, Gallery
from ..evaluate.pairs import RAIN_SIDE_HELP, RAIN_SIDES
from ..evaluate.report import evaluate as measure
from ..translate.chosen import CHECKPOINTS, chosen_model, last_and_best, step_loaded
from ..translate.load import load_translator
from ..translate.named import model_path
from ..translate.translator import Translator
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


def main(arguments: list[str]) -> int:
    """Measure PSNR, SSIM, FID and other distances of a model, or of the inputs themselves, on a test set."""
    parser = command_parser("evaluate", main)
    parser.add_argument("model", type=model_path, nargs="?", metavar="RUN|FILE.pth|NAME", help=MODEL_HELP)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="TEST", help="folder with rain/ and norain/, or testA and testB"
    )
    parser.add_argument("--rain-side", default="right", choices=RAIN_SIDES, help=RAIN_SIDE_HELP)
    parser.add_argument(
        "--direction",
        default="",
        choices=DIRECTIONS,
        help="what is input and what is truth (default: as the run trained)",
    )
    parser.add_argument("--inputs-only", action="store_true", help="measure the inputs, without a model")
    parser.add_argument("--generator", default="", help=GENERATOR_HELP)
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="of a run; default: both where they differ, which takes twice the time",
    )
    parser.add_argument("--epoch", default="", metavar="N|best|last", help=EPOCH_HELP)
    parser.add_argument("--num", type=positive, default=0, metavar="N", help=NUM_HELP)
    parser.add_argument("--phase", default="test", metavar="test", help="the folders of an unpaired set: testA, testB")
    parser.add_argument("--train-mode", action="store_true", help=TRAIN_MODE_HELP)
    parser.add_argument(
        "--index", type=Path, metavar="DIR", help="write inputs, outputs and truths, and DIR/index.html"
    )
    parser.add_argument("--fid", action="store_true", help=f"also compute FID and KID ({INSTALL})")
    parser.add_argument(
        "--features", action="store_true", help=f"also compute frechet_lite0 and kernel_lite0 ({INSTALL_LITE0})"
    )
    parser.add_argument(WEIGHTS_FLAG, type=Path, metavar="FILE", help="torch-fidelity's Inception weights, for --fid")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line per picture to FILE")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw input, output, truth and difference")
    parser.add_argument("--tiles", default="auto", choices=("auto", "exact", "fast"), help=TILES_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    add_max_pixels(parser)
    parser.check_words(arguments)
    args = parser.parse_args(arguments)
    if (args.model is None) != args.inputs_only:
        raise ValueError("fastnce evaluate takes either a model or --inputs-only")
    if args.feature_extractor_weights_path and not args.fid:
        raise ValueError(f"{WEIGHTS_FLAG} has no effect without --fid")
    if args.checkpoint and args.model is None:
        raise ValueError(f"--checkpoint {args.checkpoint} has no effect with --inputs-only")
    for option in ("epoch", "train_mode"):
        if getattr(args, option) and args.model is None:
            raise ValueError(f"--{option.replace('_', '-')} has no effect with --inputs-only")
    if args.epoch and args.checkpoint:
        raise ValueError(f"--epoch {args.epoch} and --checkpoint {args.checkpoint} name checkpoints: leave one out")
    if args.train_mode and args.tiles != "auto":
        raise ValueError("--train-mode takes each picture whole: leave --tiles out")
    check_phase(args.phase, f"--phase {args.phase}")
    side = "B" if args.generator == "G_B" else "A"
    gallery = (
        None if args.index is None else Gallery(args.index, f"{args.model or 'inputs'}, {args.data}", LABELS[side])
    )
    with ProgressLine() as line, accepting(args.max_pixels, MAX_PIXELS):
        device = pick_device(args.device)
        translator = best = None
        name = ""
        if args.model is not None:
            how = {"tiles": args.tiles, "say": line.say, "trust_code": args.trust_code}
            path, generator = chosen_model(args.model, args.epoch, args.generator)
            load: Callable[[Path], Translator] = partial(load_translator, device=device, generator=generator, **how)
            if args.epoch:
                translator, name = load(path), f"epoch {args.epoch}" if args.epoch.isdecimal() else args.epoch
                name = name if step_loaded(translator) is not None else ""
            else:
                translator, best, name = last_and_best(path, load, args.checkpoint, line.say)
            for model in (translator, best):
                if args.train_mode and model is not None:
                    model.train_mode()
        report = measure(
            args.data,
            translator,
            best=best,
            checkpoint=name,
            steps=(step_loaded(translator) if name else None, step_loaded(best)),
            rain_side=args.rain_side,
            direction=args.direction,
            channels=translator.channels if translator is not None else 3,
            device=device,
            fid=args.fid,
            features=args.features,
            feature_weights=args.feature_extractor_weights_path or "",
            json_file=args.json,
            csv_file=args.csv,
            sheet=args.sheet,
            gallery=gallery,
            num=args.num,
            phase=args.phase,
            progress=line,
        )
    print(report.summary())
    if gallery is not None:
        print(gallery.page)
    return 0
