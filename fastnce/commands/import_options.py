"""The command `fastnce import-options`."""

from __future__ import annotations

import os
from pathlib import Path

from ..common.streams import write_out
from ..common.writing import check_not_replaced, sweep, write_whole
from ..published import convert, read_source
from ..published.models import WORDS
from .parsing import command_parser

SOURCE_HELP = (
    "train_opt.txt or test_opt.txt of a published run, or a published command: 'python train.py --dataroot DIR ...', "
    "as one text or as words"
)


def main(arguments: list[str]) -> int:
    """Turn the options of CUT, DCLGAN, DCD-GAN or CycleGAN into a configuration, and say what each is here."""
    parser = command_parser("import-options", main)
    parser.add_argument("source", nargs="*", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--out", type=Path, metavar="FILE.toml", help="write the configuration here; default: print it")
    parser.add_argument("--from", dest="repository", default="", metavar="|".join(WORDS), help="whose train.py it is")
    own, words = _apart(arguments)
    args = parser.parse_args(own)
    if not any(word.strip() for word in words):
        raise ValueError(
            "fastnce import-options needs SOURCE: a file such as checkpoints/NAME/train_opt.txt, or a command such as "
            "'python train.py --dataroot DIR --CUT_mode FastCUT'"
        )
    result = convert(read_source(words), args.repository)
    published = result.published
    header = f"model {published.model} of {published.repository} is the preset {published.method} here"
    if args.out is None:
        comments = [header, *result.lines, "run:", *(f"  {command}" for command in result.commands())]
        write_out("".join(f"# {line}\n" for line in comments) + ("" if published.test else result.as_toml()))
        return 0
    if published.test:
        raise ValueError("--out writes the configuration of a training, and this is a test: leave --out out")
    data = result.as_toml().encode()
    _check_place(args.out, words, data)
    write_whole(args.out, data)
    write_out("".join(f"{line}\n" for line in [header, *result.lines, *result.commands(str(args.out))]))
    return 0


def _apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the words of the published command, whose options argparse does not know."""
    own: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help") or word.startswith(("--out=", "--from=")):
            own.append(word)
        elif word in ("--out", "--from"):
            own += [word, *rest[:1]]
            del rest[:1]
        else:
            words.append(word)
    return own, words


def _check_place(out: Path, words: list[str], data: bytes) -> None:
    folder = out.absolute().parent
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it")
    if not folder.is_dir():
        raise ValueError(f"{out}: there is no folder {folder} to write it into")
    if os.path.lexists(out):
        check_not_replaced([out], [Path(word) for word in words if len(word) < 4096 and "\n" not in word])
        if (out.is_symlink() and not out.exists()) or (out.is_file() and out.read_bytes() not in (b"", data)):
            raise ValueError(f"{out} exists already and may have changes of yours: take another name for --out")
    sweep(folder)
