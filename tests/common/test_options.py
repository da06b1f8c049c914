"""Every option of every preset declares the values that it takes and rejects others with one sentence."""

from __future__ import annotations

import math
import re
from types import UnionType
from typing import get_args, get_origin

import pytest

from fastnce.common import options
from fastnce.common.options import Accepts, describe, kinds, option, range_of
from fastnce.config import Config, resolve
from fastnce.config.build import plan
from fastnce.config.check import check
from fastnce.config.config import from_preset
from fastnce.config.stored import from_dict
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.methods import CUT, CUTOptions, CycleGAN, CycleGANOptions, NetworkOptions
from fastnce.methods.presets import PRESETS

HUGE = 10**400
KEYS = [
    (preset, section, key)
    for preset in PRESETS
    for section in Config.SECTIONS
    for key in kinds(getattr(from_preset(preset, PRESETS[preset]), section))
]


def kind_of(hint) -> type:
    """The type of one element. A size is one or two whole numbers."""
    return get_args(hint)[0] if get_origin(hint) is list else int if isinstance(hint, UnionType) else hint


def around(hint, accepts: Accepts) -> tuple[list, list]:
    """Values just inside a range, and values just outside or of another type; for a list, of its elements."""
    kind = kind_of(hint)
    if kind is bool:
        return [True, False], [0, 1, 1.0, "x", [True], None]
    if kind is str:
        return list(accepts.choices) or ["", "x"], [
            0,
            True,
            ["x"],
            None,
            "\udcff",
            "a\0b",
            *(["x"] * bool(accepts.choices)),
        ]
    inside, outside = [accepts.low], [math.nan, math.inf, -math.inf, HUGE, -HUGE, True, "x", None, [[accepts.low]]]
    if kind is int:
        most = options.BITS_64 if accepts.high is None else accepts.high
        return [*inside, most], [*outside, accepts.low - 1, most + 1, accepts.low + 0.5]
    inside += [math.nextafter(accepts.low, math.inf)]
    outside += [math.nextafter(accepts.low, -math.inf)]
    if accepts.below is not None:
        inside, outside = [*inside, math.nextafter(accepts.below, 0)], [*outside, accepts.below]
    if accepts.high is not None:
        inside, outside = [*inside, accepts.high], [*outside, math.nextafter(accepts.high, math.inf)]
    return inside, outside


def refused(words: str, call, *arguments) -> None:
    """Check that the call raises ValueError with one short sentence that contains these words."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_every_option_declares_its_values():
    for preset, section, key in KEYS:
        holder = getattr(from_preset(preset, PRESETS[preset]), section)
        hint, accepts = kinds(holder)[key]
        assert describe(holder)[key][1], key
        if kind_of(hint) in (int, float):
            assert accepts.low is not None, f"{section}.{key} states no range"
        elif hint is str:
            assert accepts.choices or accepts.anything, f"{section}.{key} states neither choices nor anything=True"
        else:
            assert kind_of(hint) is bool, key


def test_an_option_without_a_range_is_detected():
    """The test above would fail for it: a field without declared values has an empty `Accepts`."""
    assert option(1, "a number").metadata["accepts"] == Accepts()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_at_its_ends(preset):
    """Values set by a program: those inside the range are accepted, those outside are rejected by name."""
    for _, section, key in (k for k in KEYS if k[0] == preset):
        config = from_preset(preset, PRESETS[preset])
        holder = getattr(config, section)
        hint, accepts = kinds(holder)[key]
        good, bad = around(hint, accepts)
        if get_origin(hint) is list:
            good, bad = [[value] for value in good], [[value] for value in bad] + [good[0], "x", {}]
            if accepts.ascending:
                bad += [[], [3, 3], [4, 2]]
        if isinstance(hint, UnionType):
            good += [[value, value] for value in good] + [tuple(good)]
            bad = bad[:-1] + [[bad_one, 64] for bad_one in bad] + [[], [64], [64, 64, 64]]
        for value in good:
            setattr(holder, key, value)
            options.check(holder, section)
        for value in bad:
            setattr(holder, key, value)
            refused(f"{section}.{key} must be ", check, config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_on_the_command_line(preset):
    """On the command line every value is text."""
    for _, section, key in (k for k in KEYS if k[0] == preset):
        holder = getattr(from_preset(preset, PRESETS[preset]), section)
        hint, accepts = kinds(holder)[key]
        if hint is str:
            wrong = ["neither", "[1]"] if accepts.choices else []
        elif hint is bool:
            wrong = ["", "2", "1.0", "'true'", "[true]", "1979-05-27", "{a=1}", "nan"]
        else:
            wrong = ["x", "nan", "inf", "-inf", "true", str(HUGE), "1" + "0" * 5000, "1979-05-27", "{a=1}", "1#1"]
            wrong += [repr(accepts.low - 1), "1\n2", "[" * 3000, "[[1]]"]
        for text in wrong:
            refused(f"{section}.{key} must be ", resolve, preset, None, [f"{section}.{key}={text}"])


REFUSED = {  # chosen by hand, from the meaning of each key
    "data.batch": ["0", "-1", "1000000"],
    "data.load_size": ["0", "-4", "[286]", "[286, true]", "1000000000000"],
    "data.crop_size": ["0", "-256", "30", "[64, 66]", "512"],
    "data.rain": ["-0.1", "1.1"],
    "network.width": ["0", "-64", "1000000"],
    "network.discriminator_layers": ["0", "1000000"],
    "network.init_gain": ["0", "-0.02"],
    "loss.lambda_gan": ["-1"],
    "loss.lambda_nce": ["-1", "nan"],
    "loss.nce_layers": ["[]", "[-1]", "[8, 4]", "[4, 4]"],
    "loss.temperature": ["0", "-0.07", "1e-320"],
    "loss.patches": ["-1", "9223372036854775808"],
    "loss.projection": ["0"],
    "optim.lr": ["0", "-1", "1e39"],
    "optim.beta1": ["-0.1", "1", "1.5"],
    "optim.beta2": ["-0.1", "1"],
    "optim.n_epochs": ["-1"],
    "optim.ema": ["-0.5", "1", "1.5"],
    "optim.accumulate": ["0", "-2"],
    "optim.max_bad_steps": ["-1"],
    "run.seed": ["-1", "18446744073709551616"],
    "run.steps": ["-3"],
    "run.minutes": ["-1", "1e400"],
    "run.log_every": ["-1"],
    "run.sample_every": ["-1"],
    "run.samples": ["-1", "1000000"],
    "run.monitor_every": ["-1"],
    "run.validate_every": ["-1"],
    "run.save_every": ["-1"],
    "run.keep": ["1", "0", "-1"],
    "run.threads": ["-1", "100000"],
    "run.precision": ["fp8", ""],
    "run.compile": ["yes", "1"],
}


def test_values_without_meaning_are_refused():
    for key, values in REFUSED.items():
        for value in values:
            refused(key, resolve, "cut", None, [f"{key}={value}"])


def test_accepted_spellings():
    """A whole number may be written as 1e5, the text "true" as true. A seed has 64 bits."""
    config = resolve(
        "cut",
        None,
        ["run.steps=1e5", "run.compile=true", "run.seed=18446744073709551615", "loss.nce_layers=0,4.0", "optim.lr=1"],
    )
    assert (config.run.steps, config.run.compile, config.run.seed) == (100_000, "true", 2**64 - 1)
    assert (config.loss.nce_layers, config.optim.lr) == ([0, 4], 1.0)
    none = ["data.crop_size=[64.0, 96]", "run.log_every=0", "run.save_every=0", "run.samples=0", "loss.patches=0"]
    assert resolve("cut", None, none).data.crop_size == [64, 96]
    assert [type(value) for value in (config.run.steps, config.optim.lr)] == [int, float]


RELATIONS = [
    ("cut", ["optim.n_epochs=0", "optim.n_epochs_decay=0"], "optim.n_epochs=0 and optim.n_epochs_decay=0"),
    ("cut", ["data.batch=6", "optim.accumulate=4"], "data.batch=6 cannot be computed in optim.accumulate=4"),
    ("cut", ["data.load_size=200"], "data.load_size=200 is too small for data.crop_size=256"),
    ("cut", ["data.load_size=[286, 200]", "data.preprocess=scale_width_and_crop"], "data.load_size=[286, 200] is too"),
    ("cut", ["data.crop_size=30"], "data.crop_size=30 must have sides that are multiples of 4"),
    ("cut", ["data.rain_like=density=2"], "data.rain_like: rain density must be"),
    ("cut", ["data.rain_like=layers=²"], "data.rain_like: 'layers=²' is not a range"),
    ("dcdgan", ["loss.rendered_rain=angle=nan"], "loss.rendered_rain: rain angle must be"),
]


@pytest.mark.parametrize(("preset", "overrides", "sentence"), RELATIONS)
def test_values_that_contradict_each_other(preset, overrides, sentence):
    refused(sentence, resolve, preset, None, overrides)


@pytest.mark.parametrize(
    ("preset", "overrides", "sentence"),
    [
        ("cut", ["loss.lambda_gan=0", "loss.lambda_nce=0"], "every term has weight 0"),
        ("dclgan", ["loss.lambda_gan=0", "loss.lambda_nce=0", "loss.lambda_idt=0"], "every term has weight 0"),
        ("cut", ["loss.nce_layers=[0, 99]"], "positions from 0 to 31"),
        ("cut", ["loss.temperatures=[0.1]"], "1 are given for 5 layers"),
        ("sincut", ["network.resolution=4096", "network.width=1"], "network.width=1"),
        ("sincut", ["network.resolution=4096", "network.discriminator_width=8"], "network.discriminator_width=8"),
    ],
)
def test_options_that_do_not_go_with_the_networks(preset, overrides, sentence):
    """They are found without allocating the networks."""
    refused(sentence, plan, resolve(preset, None, overrides))


def test_some_modes_ignore_load_size():
    resolve("cut", None, ["data.preprocess=crop", "data.load_size=64"])
    resolve("cut", None, ["data.preprocess=none", "data.load_size=64", "data.crop_size=30"])
    resolve("cut", None, ["data.preprocess=scale_width_and_crop", "data.load_size=[64, 286]"])


def test_options_of_methods_built_by_hand_are_checked():
    network = NetworkOptions(generator="resnet_4blocks", width=2, discriminator_width=2)
    refused("loss.lambda_nce must be a number", CUT, CUTOptions(lambda_nce=math.nan), network)
    refused("loss.lambda_gp must be a number", CycleGAN, CycleGANOptions(lambda_gp=-1.0), network)
    refused("network.width must be a whole number", CUT, CUTOptions(), NetworkOptions(width=0))


def test_messages_and_lists_state_the_same_range():
    """A range reads the same in the list of options and in an error message."""
    refused("data.batch must be a whole number from 1 to 65,536, not 0", resolve, "cut", None, ["data.batch=0"])
    refused("optim.ema must be a number from 0 to below 1, not 1", resolve, "cut", None, ["optim.ema=1"])
    refused("run.keep must be a whole number of at least 2, not 1", resolve, "cut", None, ["run.keep=1"])
    listed = {key: range_of(holder, key) for holder in (OptimOptions(), RunOptions()) for key in kinds(holder)}
    assert (listed["ema"], listed["keep"], listed["tf32"], listed["track"]) == (
        "0 to below 1",
        "at least 2",
        "",
        "",
    )
    lines = {line.split(" = ")[0]: line for line in resolve("cut").as_toml().splitlines() if " = " in line}
    assert lines["batch"].endswith("# images of each domain per step [1 to 65,536]")


def test_a_stored_configuration():
    """A configuration of another version can be read. One with impossible networks is refused."""
    stored = resolve("cut").as_dict()
    stored["run"]["keep"], stored["run"]["gone"] = 1, 5
    stored["network"]["build_generator"] = 3
    config = from_dict(stored)
    assert config.run.keep == 1
    assert callable(config.network.build_generator)
    stored["network"]["width"] = "x"
    refused("network.width must be a whole number", from_dict, stored)
    stored["network"] = [1]
    refused("network must be a table", from_dict, stored)
    refused("must be a table of sections", from_dict, [])


def test_a_run_from_before_the_gradient_penalty_continues():
    """A stored wgangp run without `lambda_gp` had no penalty; the difference is reported."""
    for overrides, different in ([], []), (["loss.gan_mode=wgangp"], ["loss.lambda_gp: 0.0, now 10.0"]):
        config = resolve("cut", None, overrides)
        stored = config.as_dict()
        del stored["loss"]["lambda_gp"]
        assert config.differences(stored) == different


def test_error_messages_are_short(tmp_path):
    """A message quotes only a part of a wrong value: a file may hold a name of megabytes."""
    long, file = "x" * 100_000, tmp_path / "c.toml"
    for text in (f"[loss]\n{long} = 1", f"[{long}]", f"{long} = 1"):
        file.write_text(text)
        with pytest.raises(ValueError, match="xxx") as caught:
            resolve("cut", file)
        assert len(str(caught.value)) < 500
    for arguments in ((long,), ("cut", None, [long]), ("cut", None, [f"loss.{long}=1"])):
        with pytest.raises(ValueError, match="xxx") as caught:
            resolve(*arguments)
        assert len(str(caught.value)) < 500
