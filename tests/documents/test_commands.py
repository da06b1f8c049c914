"""The commands in the documents are read by the parsers of the commands, and their keys exist."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from fastnce.commands.main import COMMANDS
from fastnce.commands.parsing import SuggestingParser
from fastnce.config import Config, resolve
from fastnce.methods import PRESETS
from tests.documents.blocks import pages

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = pages(ROOT)
KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(Config.SECTIONS)})\.\w+)=")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


class Parsed(Exception):
    """What a parser has read: the command is not run."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Read a command's arguments with its parser, and return them; a `ValueError` says what is wrong."""

    def ended(original):
        def read(parser, arguments=None, namespace=None):
            raise Parsed(original(parser, arguments, namespace))

        return read

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(SuggestingParser, name, ended(getattr(argparse.ArgumentParser, name)))

    def parse(command: str, arguments: list[str]) -> argparse.Namespace:
        try:
            COMMANDS[command](arguments)
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            raise ValueError(capsys.readouterr().err.strip()) from None
        raise AssertionError(f"fastnce {command} parses no arguments")

    return parse


def commands(text: str) -> list[tuple[int, list[str]]]:
    """Return the lines of blocks of shell commands that begin with `fastnce`, as line numbers and words."""
    found, inside, joined, start = [], False, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = line in ("```bash", "```sh", "```console")
            continue
        if not inside:
            continue
        start = start if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(joined, comments=True) if joined.startswith("fastnce ") else []
        for separator in ("|", "&&", ";", ">"):
            words = words[: words.index(separator)] if separator in words else words
        if len(words) > 1 and words[1] in COMMANDS:
            found.append((start, words[1:]))
        joined = ""
    return found


def keys(method: str) -> set[str]:
    values = resolve(method, None, []).as_dict()
    return {f"{section}.{key}" for section in Config.SECTIONS for key in values[section]}


EVERY_KEY = set().union(*map(keys, PRESETS))


@each_document
def test_the_parser_of_a_command_reads_its_examples(document, parse):
    for line, (command, *arguments) in commands(document.read_text()):
        try:
            args = parse(command, arguments)
        except ValueError as error:
            pytest.fail(f"{document.name}:{line}: {error}")
        if command == "train" and args.method in PRESETS:
            check_values(f"{document.name}:{line}", args.method, [*args.overrides, *args.change])


INLINE = re.compile(r"`fastnce ([a-z-]+) ([^`]*)`")


@each_document
def test_inline_commands_name_options_that_exist(document, parse, monkeypatch):
    def known(parser, *_):
        raise Parsed({name for action in parser._actions for name in action.option_strings})

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(SuggestingParser, name, known)
    for number, line in enumerate(document.read_text().splitlines(), 1):
        for command, words in INLINE.findall(line):
            flags = set(re.findall(r"(?<!\S)--[\w-]+", words))
            if command in COMMANDS and command != "import-options" and flags:  # that one takes published options too
                assert flags <= parse(command, ["SOURCE"]), f"{document.name}:{number} names {flags}"


def check_values(where: str, method: str, settings: list[str]) -> None:
    """Check keys and values, apart from values that stand for something else: RUN, mynets.py:Net."""
    real = [text for text in settings if not re.search(r"=.*([A-Z]{2,}|\.py:)", text)]
    try:
        resolve(method, None, real)
    except ValueError as error:
        pytest.fail(f"{where}: {error}")


@each_document
def test_keys_of_the_configuration_exist(document):
    for number, line in enumerate(document.read_text().splitlines(), 1):
        for key in KEY.findall(line):
            assert key in EVERY_KEY, f"{document.name}:{number} names {key}"


def test_commands_are_found_in_blocks():
    text = "fastnce train\n```bash\nls\nfastnce runs DIR \\\n  --json   # a comment\nfastnce train cut | head\n```\n"
    assert commands(text) == [(4, ["runs", "DIR", "--json"]), (6, ["train", "cut"])]
    total = sum(len(commands(path.read_text())) for path in DOCUMENTS)
    assert total > 50


def test_a_wrong_option_or_key_is_noticed(parse):
    with pytest.raises(ValueError, match="--shet"):
        parse("evaluate", ["RUN", "--data", "TEST", "--shet", "x.png"])
    with pytest.raises(pytest.fail.Exception, match="page.md:1: .*learning_rate"):
        check_values("page.md:1", "cut", ["optim.learning_rate=1"])
    check_values("page.md:1", "cut", ["network.generator=mynets.py:Net", "data.cache_dir=PLACE", "optim.lr=1e-4"])
    assert "data.batch" in EVERY_KEY
    assert "data.bacth" not in EVERY_KEY
