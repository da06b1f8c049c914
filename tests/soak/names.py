"""Unusual names of pictures, folders and reports: a command works, and the files that it reports exist."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published

from .common import TINY, Campaign, Child, Ended, Outcome, survey, warm

LONGEST = 255
"""Bytes of a name on most disks."""
PIECES = (
    *(
        "new\nline",
        "tab\t",
        "cr\r",
        "esc\x1b[31m",
        "bell\x07",
        "del\x7f",
        "\x01",
        "\u202egnp",
        "\u200b",
        "\u2028",
        "\ufeff",
    ),
    *("\x01", "\udcff", "\udc80\udcfe", "\u00e9", "e\u0301", "\U0001f40e", "\u4e2d", "\u0130", "\u00df"),
    *(
        "-",
        "--out=x",
        "-h",
        "--",
        "@",
        "~",
        "~root",
        "=",
        "a=b",
        "data.batch=4",
        "#",
        "%s",
        "%n%d",
        "{0}",
        "{}",
        "\\",
        "\\n",
    ),
    *("'", '"', "`id`", "$HOME", "$(id)", "*", "?", "[a]", ";", "&", "|", "<", ">", "!", ":", ",", "C:"),
    *(
        " ",
        "  ",
        "a ",
        " a",
        ".",
        "..",
        "...",
        "a.",
        "con",
        "nul.txt",
        "x.png",
        "x.tiff",
        "trainA",
        "test",
        "rain",
        "1",
    ),
)
WHOLE = (".", "..", "")


def odd(rng: Random, suffix: str = "") -> str:
    """Return a name that disks allow."""
    while True:
        name = "".join(rng.choice(PIECES) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        if rng.random() < 0.1:  # the longest possible name
            unit = rng.choice(["n", "\u00e9", "\U0001f40e", "\udcff", "%s"])
            name += unit * ((LONGEST - len(os.fsencode(name + suffix))) // len(os.fsencode(unit)))
        name += suffix
        if name not in WHOLE and "/" not in name and len(os.fsencode(name)) <= LONGEST:
            return name


def hidden(name: str) -> bool:
    return name.startswith(".")


def pictures(folder: Path, *names: str) -> Path:
    """Write pictures of noise with any names, each different."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([*os.fsencode(name)]).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path, "JPEG" if name.endswith(".jpg") else "PNG")
    return folder


def shown(text: object) -> str:
    """Return a text as standard output prints it."""
    return str(text).encode("utf-8", "backslashreplace").decode()


class Try:
    """A working folder in which the model and good pictures have plain names."""

    def __init__(self, place: Path, model: Path, rng: Random):
        self.place, self.model, self.rng = place, model, rng
        self.wrong: list[str] = []
        self.name, self.dashed, self.refusable = "", False, False

    def path(self, *names: str) -> str:
        """Return a path in the working folder: absolute, with a leading "./", or bare (a dash makes it an option)."""
        relative = os.path.join(*names)
        how = self.rng.choice(["absolute", "dotted", "bare"])
        if how == "bare":
            self.dashed |= relative.startswith("-")
            return relative
        return str(self.place / relative) if how == "absolute" else f"./{relative}"

    def option(self, name: str, value: str) -> list[str]:
        """Return an option with its value, sometimes joined by "=", after which a value may begin with a dash."""
        if self.rng.random() < 0.5:
            return [f"{name}={value}"]
        return [name, value]

    def run(self, *arguments: object) -> Ended:
        home = {"XDG_CACHE_HOME": str(self.place / "home")}
        ended = Child([str(a) for a in arguments], lambda: (os.chdir(self.place), os.environ.update(home))[0]).end(60)
        usage = ended.code == 2 and self.dashed and ("usage: " in ended.err or "usage: " in ended.out)
        if not usage and not (self.dashed and ended.code == 0):
            self.wrong += ended.wrong(0, 2) if self.refusable or self.dashed else ended.wrong(0)
        return ended

    def says(self, condition: bool, what: str, ended: Ended) -> None:
        if not condition:
            self.wrong.append(f"{what}: {(ended.err or ended.out)[-300:]!r}")

    def whole(self, folder: Path, count: int, ended: Ended) -> None:
        """Check that a folder contains `count` valid pictures and nothing else."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.says(len(files) == count, f"{len(files)} files are there, {count} were reported", ended)
        for file in files:
            with Image.open(file) as image:
                image.load()


def translate(it: Try) -> None:
    """Unusual names of pictures, their folder and --out."""
    rng = it.rng
    name, folder, out = odd(rng, rng.choice([".png", ".PNG", ".jpg"])), odd(rng), odd(rng)
    it.name = f"{name!a:.80} in {folder!a:.80} to {out!a:.80}"
    if folder == out:
        return
    photos = pictures(it.place / folder / rng.choice(["", "sub"]), "plain.png", name)
    there = 2 - hidden(name)
    if rng.random() < 0.3 and not hidden(name):
        source, there = it.path(os.path.relpath(photos / name, it.place)), 1
    else:
        source = it.path(folder)
    ended = it.run("translate", it.model, source, *it.option("--out", it.path(out)), "--device", "cpu")
    if ended.code == 0 and "usage" not in ended.out:
        it.says(f"{there} picture" in ended.out, f"of {there} pictures", ended)
        it.says(shown(out) in ended.out, "the folder is not named", ended)
        it.whole(it.place / out, there, ended)


def rain(it: Try) -> None:
    rng = it.rng
    name, folder, out = odd(rng, ".png"), odd(rng), odd(rng)
    it.name = f"{name!a:.80} in {folder!a:.80} to {out!a:.80}"
    if folder == out:
        return
    pictures(it.place / folder, "plain.png", name)
    ended = it.run("rain", it.path(folder), *it.option("--out", it.path(out)))
    if ended.code == 0 and "usage" not in ended.out:
        counts = [int(count) for count in re.findall(r"(\d+) in (?:no)?rain", ended.out)]
        it.says(counts == [2 - hidden(name)] * 2, "other counts", ended)
        it.whole(it.place / out, sum(counts), ended)


def unpair(it: Try) -> None:
    rng = it.rng
    name, folder, out = odd(rng, ".png"), odd(rng), odd(rng)
    it.name = f"{name!a:.80} in {folder!a:.80} to {out!a:.80}"
    if folder == out:
        return
    pictures(it.place / folder, *(f"{side}/{n}" for side in ("rain", "norain") for n in ("m.png", name)))
    it.refusable = True  # one scene is not enough, and some names denote a side
    ended = it.run("unpair", it.path(folder), *it.option("--out", it.path(out)))
    if ended.code == 0 and "usage" not in ended.out:
        counts = [int(count) for count in re.findall(r"(\d+) in train[AB]", ended.out)]
        it.says(counts == [1, 1], "other counts", ended)
        it.whole(it.place / out, sum(counts), ended)
    else:
        it.says(not (it.place / out).exists(), "refused, and written", ended)


def evaluate(it: Try) -> None:
    rng = it.rng
    name, folder = odd(rng, ".png"), odd(rng)
    report, table, sheet = (f"{end[1:]}-{odd(rng, end)}" for end in (".json", ".csv", ".png"))
    if max(len(os.fsencode(name)) for name in (report, table, sheet)) > LONGEST:
        report, table, sheet = "r.json", "t.csv", "s.png"
    it.name = f"{name!a:.80} in {folder!a:.80} to {report!a:.80}"
    pictures(it.place / folder, *(f"{side}/{n}" for side in ("rain", "norain") for n in ("m.png", name)))
    it.refusable = True
    options = {"--data": folder, "--json": report, "--csv": table, "--sheet": sheet}
    given = [text for option, value in options.items() for text in it.option(option, it.path(value))]
    ended = it.run("evaluate", "--inputs-only", *given, "--device", "cpu")
    made = [it.place / file for file in (report, table, sheet)]
    if ended.code == 0 and "usage" not in ended.out:
        names = {row["name"] for row in json.loads(made[0].read_text())["pictures"]}
        # bytes that are not Unicode were written as escapes, which JSON reads back
        wanted = {"m"} if hidden(name) else {"m", Path(name).stem}
        it.says(names == wanted, f"the report names {names}", ended)
        with Image.open(made[2]) as image:
            image.load()
    else:
        it.says(not any(file.exists() for file in made), "refused, and written", ended)


def cache(it: Try) -> None:
    """Unusual names of the data folder, --config and the cache's folder."""
    rng = it.rng
    name, folder, config, kept = odd(rng, ".png"), odd(rng), odd(rng, ".toml"), odd(rng)
    it.name = f"{name!a:.80} in {folder!a:.80}, {config!a:.80}, {kept!a:.80}"
    if len({folder, config, kept}) < 3:
        return
    pictures(it.place / folder, *(f"train{domain}/{n}" for domain in "AB" for n in ("m.png", name)))
    (it.place / config).write_text("[data]\nload_size = 36\ncrop_size = 32\n")
    place = it.path(kept)
    bare = place != place.strip("\"' \n\t\r") or place != place.strip()  # quotes and blanks around a value are removed
    where = [] if bare or rng.random() < 0.5 else [f"data.cache_dir={place}"]
    it.refusable = shown(folder) != folder or (bool(where) and shown(kept) != kept)  # a configuration is text
    given = [*it.option("--data", it.path(folder)), *it.option("--config", it.path(config))]
    ended = it.run("cache", *given, *where)
    if ended.code == 0 and "usage" not in ended.out:
        top = it.place / kept if where else it.place / folder / ".fastnce-cache"
        made = sorted(file.name for file in top.glob("*.bin"))
        it.says(len(made) == 4 and all(shown(file) in ended.out for file in made), f"made are {made}", ended)


def train(it: Try) -> None:
    """Train for one step, read the configuration back, and export the run."""
    rng = it.rng
    name, folder, out = odd(rng, ".png"), odd(rng), odd(rng)
    it.name = f"{name!a:.80} in {folder!a:.80} to {out!a:.80}"
    if folder == out:
        return
    pictures(it.place / folder, *(f"train{domain}/{n}" for domain in "AB" for n in ("m.png", name)))
    data = it.path(folder)
    given = [*it.option("--data", data), *it.option("--out", it.path(out))]
    it.refusable = shown(folder) != folder  # a configuration is text
    ended = it.run("train", "fastcut", *given, *TINY, "run.steps=1", "run.sample_every=1", "run.samples=1")
    if ended.code == 0 and "usage" not in ended.out:
        run = it.place / out
        it.refusable = False
        stored = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        written, place = stored["data"]["dir"], it.place / Path(data)
        same = os.path.isabs(written) and os.path.isdir(written) and os.path.samefile(written, place)
        it.says(same, "config.toml has another folder", ended)
        exported = it.run("export", str(run), "--out", str(it.place / "plain-out"))
        files = list((it.place / "plain-out").iterdir()) if exported.code == 0 else []
        it.says(bool(files) and all(str(file) in exported.out for file in files), "not exported", exported)


COMMANDS = (translate, rain, unpair, evaluate, cache, train)


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    model = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "model")[0]

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        command = COMMANDS[number % len(COMMANDS)]
        it = Try(place, model, rng)
        command(it)
        return f"{command.__name__} with {it.name}", it.wrong

    return survey(count, seed, folder, attempt)


CAMPAIGN = Campaign(
    "names",
    "A command accepts every name that the disk accepts for pictures, folders and reports, and the files that it "
    "reports exist; if it refuses a name, it prints a message and writes nothing.",
    300,
    campaign,
)
