"""Random command lines, valid and invalid: they end as documented, leave no partial file, and lose no file."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from random import Random

from fastnce.common.options import describe, kinds
from fastnce.config import Config
from fastnce.config.config import from_preset
from fastnce.methods.presets import PRESETS
from tests.vgg import narrow_vgg

from .common import TINY, Campaign, Outcome, survey, tree, warm
from .judge import attempt_line, judged, place_of, prepare_template

NUMBERS = (
    *("0", "1", "-1", "2", "3", "4", "8", "1.5", "0.0", "-0.0", "1e-3", "1e3", "007", "0x10", "0b1", "1_000", "10**3"),
    *("1e30", "1e400", "-1e400", "inf", "-inf", "nan", "1e-320", "999999999999", "18446744073709551616"),
    *("9223372036854775807", "-9223372036854775809", "1979-05-27"),
)
TEXTS = (
    *("", "''", '""', " ", "\u00e9", "\U0001f40e", "true", "false", "yes", "[]", "[1]", "[1,2]", "[1,2,3]", "[[1]]"),
    *(
        "[-1]",
        "[nan]",
        "[true]",
        "{}",
        "{a=1}",
        "none",
        "auto",
        "cpu",
        "cuda:7",
        "meta",
        "cpu:3",
        "xpu",
        "../..",
        "a/b",
    ),
    *(
        "a" * 300,
        "--",
        "-",
        "=",
        "1\n2",
        "1#x",
        "'1'",
        "0,4,8",
        "4,8",
        "99",
        "-4,8",
        "4,4",
        "8,4",
        "1e2,3",
        "true,false",
    ),
    *("bf16", "fp16", "unet_128", "stylegan2", "restorer", "pixel", "n_layers", "batch", "hinge", "wgangp", "crop"),
    *("zoom_and_patch", "none", "instance", "attention", "monce", "hdce", "\x1b[31m", "\t", "\x7f", "\udcff"),
)
PLACES = (
    *(
        "data",
        "run",
        "pub/latest_net_G.pth",
        "pub/latest_net_D.pth",
        "pub/latest_net_F.pth",
        "pub",
        "text.txt",
        "empty",
    ),
    *(
        "text.txt",
        "nothere",
        "",
        ".",
        "..",
        "full",
        "null",
        "data/trainA",
        "data/trainA/0.png",
        "data/test",
        "data/test/rain",
    ),
    *("run/checkpoints", "run/checkpoints/latest", "run/checkpoints/step-00000001", "run/config.toml", "ok.toml"),
    *("run/checkpoints/step-00000001/generator.safetensors", "bad.toml", "none.toml", "-x", "x" * 300, "x/" * 3000),
    *("OUT/a", "OUT/b/c", "OUT/a.png", "OUT/a.json", "a\u00e9\U0001f40e", "\udcff\udcfe"),
)
OUTS = (
    "OUT/a",
    "OUT/b",
    "OUT/b/c/d",
    "OUT/" + "x" * 300,
    "OUT/\u00e9\U0001f40e",
    "text.txt",
    "OUT/\udcff",
    "OUT/ ",
    "empty",
)
REPORTS = (
    "OUT/a.json",
    "OUT/a.csv",
    "OUT/s.png",
    "OUT/s.PNG",
    "nodir/x.json",
    "",
    "OUT",
    ".",
    "full",
    "null",
    "text.txt",
)
OPTIONS = {
    "train": "--data=PLACE --out=OUT --config=PLACE --dry-run --nproc=COUNT --quiet --help --bogus",
    "translate": "--out=OUT --generator=WORD --format=WORD --bits=N --batch=N --tiles=WORD --tile-size=N --device=WORD",
    "evaluate": "--data=PLACE --rain-side=WORD --direction=WORD --inputs-only --generator=WORD --fid --json=FILE "
    "--csv=FILE --sheet=FILE --tiles=WORD --device=WORD",
    "rain": "--out=OUT --unpaired --test=N --seed=N --layers=N --density=RANGE --length=RANGE --width=RANGE "
    "--angle=RANGE --opacity=RANGE --haze=RANGE",
    "unpair": "--out=OUT --test=PLACE --rain-side=WORD",
    "cache": "--data=PLACE --config=PLACE --method=METHOD",
    "export": "--out=OUT --label=WORD",
    "demo": "--out=OUT --steps=N --minutes=N",
    "doctor": "WORD",
    "bench": "WORD",
    "methods": "WORD",
}
WEIGHTS = {"train": 40, "translate": 14, "evaluate": 12, "rain": 10, "unpair": 6, "cache": 8, "export": 6}
WORDS = (
    "png",
    "jpg",
    "npy",
    "tiff",
    "webp",
    "bmp",
    "gif",
    "G",
    "G_A",
    "G_B",
    "exact",
    "fast",
    "auto",
    "cpu",
    "left",
    "8",
)
LARGE = re.compile(r"\d{3}|\d[eE]|whole|compile")
"""Values with which a step may take minutes; such a run is tried with --dry-run only."""


PLAUSIBLE = {
    "--format": ("png", "jpg", "npy", "tiff", "webp", "bmp"),
    "--bits": ("8", "16"),
    "--tiles": ("auto", "exact", "fast"),
    "--tile-size": ("128", "1024"),
    "--device": ("cpu", "auto"),
    "--generator": ("G",),
    "--rain-side": ("left", "right"),
    "--direction": ("AtoB", "BtoA"),
    "--data": ("data", "data/test"),
    "--test": ("1", "data/test"),
    "--config": ("ok.toml",),
    "--method": ("cut", "fastcut", "dclgan"),
    "--label": ("mine",),
    "--json": ("OUT/a.json",),
    "--csv": ("OUT/a.csv",),
    "--sheet": ("OUT/s.png",),
    "--out": ("OUT/a", "OUT/b/c"),
    "--nproc": ("1",),
    **dict.fromkeys(("--density", "--length", "--opacity", "--haze"), ("0.1", "0.1:0.2")),
    **dict.fromkeys(("--batch", "--layers", "--seed"), ("1", "2", "3")),
    "--width": ("0.01",),
    "--angle": ("-10:10", "20"),
}
"""Values that are valid for at least some commands."""


def number(rng: Random) -> str:
    return rng.choice(NUMBERS) if rng.random() < 0.8 else str(rng.randint(-(2 ** rng.randint(1, 80)), 2**80))


def word(rng: Random) -> str:
    return rng.choice(TEXTS) if rng.random() < 0.5 else rng.choice(WORDS)


def value(rng: Random, kind: str) -> str:
    if kind == "PLACE":
        return rng.choice(PLACES)
    if kind == "OUT":
        return rng.choice(OUTS) if rng.random() < 0.85 else rng.choice(PLACES)
    if kind == "FILE":
        return rng.choice(REPORTS)
    if kind == "N":
        return number(rng)
    if kind == "COUNT":
        return rng.choice(["0", "1", "-1", "auto", "x", "", "1.5", "1e400", "9" * 20])
    if kind == "METHOD":
        return rng.choice(list(PRESETS)) if rng.random() < 0.9 else word(rng)
    if kind == "RANGE":
        return rng.choice([number(rng), f"{number(rng)}:{number(rng)}", "0.1:0.2", ":", "1:", "::", word(rng)])
    return word(rng)


def option(rng: Random, text: str, sober: bool) -> list[str]:
    """Return an option with its value, or a positional argument."""
    name, equals, kind = text.partition("=")
    if not equals:
        return [name if name.startswith("--") else value(rng, name)]
    if rng.random() < 0.03 and not sober:
        return [name]  # without its value
    drawn = rng.choice(PLAUSIBLE[name]) if sober and name in PLAUSIBLE else value(rng, kind)
    return [f"{name}={drawn}"] if rng.random() < 0.3 else [name, drawn]


def override(rng: Random, keys: list[str], sober: bool) -> str:
    key = rng.choice(keys)
    if sober:
        section, _, name = key.partition(".")
        options = getattr(from_preset("cut", PRESETS["cut"]), section)
        if name not in kinds(options):
            return "data.flip=false"
        kind, accepts = kinds(options)[name]
        usual = ("true", "false") if kind is bool else accepts.choices or ("1",)
        return f"{key}={rng.choice(usual)}"
    if rng.random() < 0.06:
        key = rng.choice([f"{key}x", key.replace(".", "", 1), key.upper(), f".{key}", key.split(".")[0]])
    if rng.random() < 0.04:
        return word(rng)
    return f"{key}={number(rng) if rng.random() < 0.55 else rng.choice(TEXTS)}"


def keys_of(method: str) -> list[str]:
    config = from_preset(method, PRESETS[method])
    return [f"{section}.{key}" for section in Config.SECTIONS for key in describe(getattr(config, section))]


def tiny(method: str) -> list[str]:
    """Return the options of a fast step, without those that the method does not have."""
    known = keys_of(method) if method in PRESETS else keys_of("cut")
    weights = [f"loss.vgg_weights={narrow_vgg()}"] if "loss.vgg_weights" in known else []
    return weights + [text for text in TINY if text.partition("=")[0] in known]


def training(rng: Random, sober: bool) -> list[str]:
    method = rng.choice(list(PRESETS)) if sober else value(rng, "METHOD")
    known = keys_of(method) if method in PRESETS else keys_of("cut")
    arguments = [method, *tiny(method), "run.save_every=1"]
    if sober or rng.random() < 0.85:
        arguments += ["--data", "data" if sober or rng.random() < 0.85 else value(rng, "PLACE")]
    if sober or rng.random() < 0.85:
        arguments += ["--out", "OUT/a" if sober else value(rng, "OUT")]
    drawn = [override(rng, known, sober) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    arguments += drawn
    if rng.random() < 0.6 or any(LARGE.search(text) for text in drawn):
        arguments.append("--dry-run")
    return [*arguments, "run.steps=1"]


def command_line(rng: Random) -> list[str]:
    """Return a random command line; 40 % of them have only plausible values ("sober")."""
    sober = rng.random() < 0.4
    command = rng.choices(list(OPTIONS), [WEIGHTS.get(name, 1) for name in OPTIONS])[0]
    arguments: list[str] = []
    if command == "train":
        arguments = training(rng, sober)
    elif command == "translate":
        arguments = ["run", "data/trainA"] if sober else [rng.choice(["run", value(rng, "PLACE")]), value(rng, "PLACE")]
    elif command == "evaluate":
        arguments = [
            rng.choice(["run", "--inputs-only", "run" if sober else value(rng, "PLACE")]),
            "--data",
            "data/test",
        ]
    elif command == "cache":
        arguments = ["--data", "data", *tiny("cut"), override(rng, keys_of("cut"), sober)]
        arguments = ["data.load_size=36" if LARGE.search(a) and "size" in a else a for a in arguments]
    elif command in ("rain", "unpair", "export"):
        usual = {"rain": "data/trainB", "unpair": "data/test", "export": "run"}[command]
        arguments = [usual if sober or rng.random() < 0.6 else value(rng, "PLACE")]
    elif rng.random() < 0.5:
        arguments = ["--help"]
    if command in ("translate", "rain", "unpair", "export") and (sober or rng.random() < 0.9):
        arguments += ["--out", "OUT/a" if sober else value(rng, "OUT")]
    left_out = ["--fid"] if has_fidelity() else []
    known = [text for text in OPTIONS[command].split(" ") if text not in left_out]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        arguments += option(rng, rng.choice(known), sober)
    if command in ("demo", "doctor", "bench") and "--help" not in arguments:
        arguments.append("--bogus")  # a valid command would take minutes
    if arguments and rng.random() < 0.05:
        arguments.append(rng.choice(arguments))
    if rng.random() < 0.04 and "--dry-run" in arguments:
        rng.shuffle(arguments)
    if rng.random() < 0.03:
        command = rng.choice([word(rng), "--version", "--help", "help", command.upper()])
    return [text.replace("\0", "") for text in ([command, *arguments] if rng.random() > 0.02 else arguments[:1])]


def has_fidelity() -> bool:
    """Return whether torch-fidelity is installed, which would download weights for FID."""
    return importlib.util.find_spec("torch_fidelity") is not None


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    template = prepare_template(folder)
    before = tree(template)
    codes: dict[int | None, int] = {}

    def attempt(trial: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        arguments = command_line(rng)
        work = place_of(template, place)
        ended = attempt_line(arguments, work)
        codes[ended.code] = codes.get(ended.code, 0) + 1
        return f"fastnce {arguments!a:.1000}", judged(arguments, ended, work, before)

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"ends: {', '.join(f'{n} with exit code {code}' for code, n in sorted(codes.items()))}")
    return outcome


CAMPAIGN = Campaign(
    "command-lines",
    "Any command line ends with exit code 0, 1 or 2, and with an error message if it fails; no file is lost except "
    "those named for writing, and no file is partial.",
    2000,
    campaign,
)
