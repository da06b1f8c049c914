"""Mutated configuration files are read correctly, or refused by a message that names the file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random

from fastnce.config import resolve
from fastnce.config.config import from_preset
from fastnce.methods.presets import PRESETS

from .command_lines import LARGE, tiny
from .common import Campaign, Child, Ended, Outcome, survey, training_pictures, warm

LONGEST = 1000
"""Longest error message in characters."""
VALUES = (
    *("true", "nan", "-inf", "0", "-1", "1e400", "1" + "0" * 30, "9" * 5000, "0x1F", "0o7", "0b2", "1_000", "1__0"),
    *("'x'", '""', '"""two\nlines"""', "'''x'''", "[]", "[1,2]", "[1,2,]", "[[1]]", "[true]", "[1.5]", "['a']", "{}"),
    *(
        "{a=1}",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "1.0",
        "-0.0",
        "1e-400",
        "[nan]",
        "[1,'a']",
        '"\\u0000"',
        '"\\ud800"',
    ),
    *('"\\U0001F40E"', "[32,32]", "[32.0,32.0]", "4.0", "4 # four", "'", '"\\x"', "[" * 2000, "[" * 200 + "]" * 200),
    *("'" + "x" * 100_000 + "'", "1e5000", "+1", "+.5", "1.", "TRUE", "inf # no", "2 3"),
)
LINES = (
    *(
        "[data]",
        "[x]",
        "[data.x]",
        "[[loss]]",
        "[run]",
        "data = 5",
        "data.batch = 1",
        '"run.steps" = 3',
        '[""]',
        "=",
        "[",
    ),
    *(
        "\u00e9 = 1",
        "\ufeff",
        "method = 5",
        "method = []",
        'method = "cut"',
        "a.b.c.d = 1",
        "[network]\nwidth = 2",
        "\0",
        "\r",
    ),
    *(
        "# " + "x" * 10_000_000,
        "[" + "a." * 5000 + "b]",
        "x" * 100_000 + " = 1",
        "a" + ".a" * 3000 + " = 1",
        "]",
        "'''",
    ),
    *("[data]\nbatch = 1\nbatch = 2", "[run]\n[run]", "\x0c", "\u2028", "loss = {}", "loss = {patches = 4}", "-", "\\"),
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")


def changed_line(lines: list[str], rng: Random) -> None:
    """Change one line, or add, repeat, move or remove one."""
    keys = [i for i, line in enumerate(lines) if "=" in line]
    place = rng.choice(keys) if keys else 0
    way = rng.randrange(8)
    if way < 3 and keys:
        lines[place] = f"{lines[place].split('=')[0].strip()} = {rng.choice(VALUES)}"
    elif way == 3:
        lines.insert(rng.randint(0, len(lines)), rng.choice(LINES))
    elif way == 4:
        lines.insert(rng.randint(0, len(lines)), rng.choice(lines))
    elif way == 5:
        del lines[rng.randrange(len(lines))]
    elif way == 6 and keys:
        key = lines[place].split("=")[0].strip()
        other = rng.choice([f"{key}x", key.upper(), f'"{key}"', f"{key}.a", "\u00e9", "", f"{key} ", f"{key}\t"])
        lines[place] = lines[place].replace(key, other, 1)
    elif keys:
        lines[place] = lines[place].replace("=", rng.choice(["==", ":", " ", "= =", "=\n", "\0="]), 1)


def mutated(text: str, rng: Random) -> bytes:
    """The file in another way each time."""
    lines = text.splitlines()
    way = rng.random()
    if way < 0.05:
        rng.shuffle(lines)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        changed_line(lines, rng)
    ending = rng.choice(["\n", "\n", "\n", "\r\n", "\r"])
    data = ending.join([*lines, ""]).encode(rng.choice(ENCODINGS) if rng.random() < 0.1 else "utf-8", "replace")
    if way > 0.8:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8, 100])):
            place = rng.randrange(len(changed))
            changed[place] = rng.choice([changed[place] ^ 1 << rng.randrange(8), rng.randrange(256)])
        data = bytes(changed)
    elif way > 0.75:
        data = data[: rng.randrange(len(data))]
    elif way > 0.7:
        data = rng.choice(
            [b"", b"\n" * 1000, b"#\n", rng.randbytes(1000), bytes(1000), data * 2, b"\xef\xbb\xbf" + data]
        )
    return data


def differences(data: bytes, printed: str) -> list[str]:
    """Return the keys of a file whose values differ from the printed configuration."""
    found = []
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # all kinds of line ends are equal
    stored, taken = tomllib.loads(text), tomllib.loads(printed)
    stored.get("data", {}).pop("dir", None)  # --data overrides it
    for section, values in stored.items():
        if section == "method":
            continue
        for key, value in values.items():
            now = taken[section][key]
            as_text = str(value).lower() if isinstance(value, bool) and isinstance(now, str) else value
            if now != as_text:
                found.append(f"{section}.{key} is {value!r:.60} in the file and {now!r:.60} in the run")
    return found


def attempt(number: int, rng: Random, place: Path, data: Path) -> tuple[str, list[str]]:
    method = rng.choice(list(PRESETS))
    whole = resolve(method, None, tiny(method)) if method != "sincut" else from_preset(method, PRESETS[method])
    file = place / "c.toml"
    # the first file is intact and must be accepted
    given = whole.as_toml().encode() if number == 0 else mutated(whole.as_toml(), rng)
    file.write_bytes(given)
    arguments = ["train", method, "--config", str(file), "--data", str(data), "--out", str(place / "run")]

    def run(*more: str) -> Ended:
        return Child([*arguments, *more], inside(place), 2 << 30).end(60)

    ended = run("--dry-run")
    wrong = ended.wrong(0) if number == 0 else ended.wrong(0, 2)
    if ended.code == 0 and not wrong:
        wrong += differences(given, ended.out)
        if method != "sincut" and rng.random() < 0.2 and not any(LARGE.search(line) for line in given_values(given)):
            wrong += run(*tiny(method), "run.steps=1").wrong(0, 2)
    elif ended.code == 2:
        if len(ended.err) > LONGEST + len(str(file)) or ended.err.count("\n") != 1:
            wrong.append(f"{len(ended.err)} characters in {ended.err.count(chr(10))} lines")
        if (place / "run").exists():
            wrong.append("refused, but files were written")
    return f"{method} with {file} of {len(given)} bytes", wrong


def given_values(data: bytes) -> list[str]:
    """Return the values in the file, without comments."""
    lines = data.decode("utf-8-sig").splitlines()
    return [line.partition("=")[2].partition("#")[0] for line in lines if not line.startswith(("lambda", "seed"))]


def inside(place: Path) -> Callable[[], None]:
    return lambda: os.chdir(place)


def campaign(count: int, seed: int, folder: Path) -> Outcome:
    warm()
    data = training_pictures(folder / "data", 2)
    return survey(count, seed, folder, lambda number, rng, place: attempt(number, rng, place, data))


CAMPAIGN = Campaign(
    "toml",
    "A configuration file of any content is read as by a TOML reader, or refused in one message.",
    500,
    campaign,
)
