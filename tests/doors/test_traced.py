"""Checks of a user's own code leave right code as it is, and more wrong code is named."""

import json

import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.config.build import plan
from fastnce.engine import memory
from fastnce.methods.contract import COLUMNS
from fastnce.methods.weighting import find_weighting
from fastnce.networks import build_generator
from fastnce.networks.tracing import trace_shapes
from fastnce.translate import load_translator
from tests.doors.own_code import CODE, SMALL, refused
from tests.doors.own_traced import TRACED

KEEP = [s for s in SMALL if not s.startswith(("loss.", "run."))]
LOOK = ["run.steps=2", "run.monitor_every=1", "run.sample_every=1", "run.samples=2", "run.log_every=1"]


@pytest.fixture
def own(here):
    """The working folder; its mine.py has the code of `TRACED` too."""
    (here / "mine.py").write_text(CODE + TRACED)
    return here


def go(own, folder, name, *settings, out="run"):
    return ["train", f"mine.py:{name}", "--data", str(folder), "--out", str(own / out), *KEEP, *LOOK, *settings]


def weights(run):
    return load_file(run / "checkpoints" / "step-00000002" / "training.safetensors")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Cached", []),
        ("Hooked", []),
        ("Values", []),
        ("Keep", ["network.generator=mine.py:CachedNet"]),
        ("Keep", ["network.generator=mine.py:HookedNet"]),
        ("Keep", ["network.generator=mine.py:ValuesNet"]),
        ("Keep", ["network.generator=mine.py:Extracting"]),
        ("Keep", ["network.generator=mine.py:WeightNorm"]),
        ("Keep", ["network.generator=mine.py:Derivative"]),
        ("OwnNet", []),
        ("OwnWeightNorm", []),
    ],
)
def test_right_code_trains_and_translates(folder, own, name, settings):
    assert main(go(own, folder, name, *settings)) == 0
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    translator = load_translator(own / "run", trust_code=True)
    assert torch.equal(translator(image), translator(image))
    assert translator(image).isfinite().all()


@pytest.mark.parametrize("name", ["ReadingNet", "MaskingNet", "Address", "Numpy"])
def test_networks_that_read_values_are_refused(own, name):
    with pytest.raises(ValueError, match="it reads a value of a tensor, such as by .item"):
        build_generator(f"mine.py:{name}")


def test_constants_of_traced_code_stay_tensors(folder, own):
    config = resolve("mine.py:Cached", None, [*KEEP, "network.generator=mine.py:CachedNet"])
    method = plan(config)
    code = type(method).translate.__globals__
    assert type(code["WEIGHTS"]) is type(code["box"](3)) is torch.Tensor
    assert code["box"](3).sum() == pytest.approx(3)
    assert code["WEIGHTS"].device.type == "cpu"


def test_a_discriminator_may_keep_constants(folder, own):
    layers = ["loss.nce_layers=0,4", "loss.projection=8", "loss.patches=16"]
    run = ["--data", str(folder), "--out", str(own / "run"), *KEEP, *LOOK, *layers]
    assert main(["train", "fastcut", *run, "network.discriminator=mine.py:CachedJudge"]) == 0


def test_planning_leaves_random_numbers(own):
    config = resolve("mine.py:Values", None, [*KEEP, "network.generator=mine.py:ValuesNet"])
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    method = plan(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert method.schedule == [0.0, 0.5, 1.0]


def test_checks_do_not_change_the_weights(own):
    """The first build is checked, the second one is not."""
    built = []
    for _ in range(2):
        torch.manual_seed(5)
        built.append(build_generator("mine.py:FeatureNet", width=3).state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


def test_own_networks_are_traced_without_memory(own):
    network = build_generator("mine.py:FeatureNet", width=4)
    output = trace_shapes(network, 1000, 3, 4000, 4000)
    assert output.shape == (1000, 3, 4000, 4000)


def test_published_networks_of_an_own_method_must_fit_into_memory(own, monkeypatch):
    config = resolve("mine.py:Keep", None, KEEP)
    plan(config)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="networks of 0 M parameters take at least .* lower network.width"):
        plan(config)


def test_samples_stay_as_they_are(folder, own):
    assert main(go(own, folder, "InPlace")) == 0
    first, last = (Image.open(own / "run" / "samples" / f"step-0000000{i}.png") for i in (1, 2))
    column = (0, 0, 32, first.height)  # A
    assert ImageStat.Stat(first.crop(column)).sum == ImageStat.Stat(last.crop(column)).sum
    rows = [json.loads(line) for line in (own / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["identity_psnr"] < 60 for row in rows)


def test_the_columns_are_those_of_metrics(folder, own):
    assert main(go(own, folder, "Keep")) == 0
    found = json.loads((own / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(found) == {*COLUMNS, "keep"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Dense1", "Linear has no convolution: give it the attribute in_channels"),
        ("SameName", "Gen names two networks"),
        ("Watched", "discriminator_losses() must return a dict of tuples of names"),
        ("WatchedText", "discriminator_losses() must return a dict of tuples of names"),
        ("Identity", "identity_losses() must return a tuple of names"),
        ("Betas", "group G has betas=(2, 3), which must be None or two numbers from 0 to below 1"),
        ("OneBeta", "group G has betas=0.5, which must be None or two numbers"),
        ("TrueRate", "group G has lr=True, which must be None or a number of at least 0"),
        ("Unprepared", "prepare must be callable as prepare(batch)"),
        ("TranslateMore", "translate must be callable as translate(a)"),
        ("NoTranslate", "translate must be a method translate(a), not 3"),
        ("OddDraw", "draw(rng) must return fastnce.methods.Draws, not an empty dict"),
        (
            "OwnReading",
            "network Gen cannot be checked: it reads a value of a tensor, such as by .item(), .numpy(), assert",
        ),
        ("OwnBroken", "network Gen fails on crops of 32x32: KeyError: 'a'"),
        ("FewArguments", "loss must be callable as loss(batch, outputs, draws)"),
        ("NoArguments", "check_options must be callable as check_options(batch_size)"),
        ("TuplePhases", "phases must be a method phases(), not an empty tuple"),
        ("TextPenalty", "gp must be a number, not 'x'"),
        ("Whole", "translate() of Whole returns torch.uint8 instead of floats in [-1, 1]"),
    ],
)
def test_wrong_members_are_named_before_training(folder, own, capsys, name, sentence):
    assert sentence in refused(capsys, *go(own, folder, name))
    assert not (own / "run").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Column", "Column.loss logs 'step', a name that metrics.jsonl has for another number: rename it"),
        ("SameLoss", "two phases log 'keep': give each loss a name of its own"),
        ("Leaves", "own code ended the run by sys.exit(7) (mine.py, line "),
        ("NoPictures", "must return a dict of images (1, channels, height, width), not an empty dict"),
        ("NumberedPictures", "must return a dict of images (1, channels, height, width), not {0: 'a torch.float32"),
        ("EmptyPictures", "not {'A': 'a torch.float32 tensor of shape (1, 0, 32, 32) on cpu'}"),
        ("GrowingPictures", "must return A in one size for all samples, not [(3, 32, 9), (3, 32, 10)]"),
    ],
)
def test_wrong_results_are_named(folder, own, capsys, name, sentence):
    assert sentence in refused(capsys, *go(own, folder, name))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["network.generator=mine.py:Keeping"], "the first step computes with a tensor that your code kept from"),
        ([], "translate() of KeepingTranslate computes with a tensor that your code kept from the check"),
    ],
)
def test_tensors_kept_from_the_checks_are_named(folder, own, capsys, settings, sentence):
    name = "Keep" if settings else "KeepingTranslate"
    assert sentence in refused(capsys, *go(own, folder, name, *settings))


def test_networks_have_values(own):
    with pytest.raises(ValueError, match="first.weight is on the device meta; give it values"):
        build_generator("mine.py:OnMeta")


def test_channels_of_features_are_whole_numbers(own):
    network = build_generator("mine.py:RealChannels", width=2)
    with pytest.raises(ValueError, match=r"feature_channels\(\[0\]\) must return whole numbers of at least 1, not 2.0"):
        network.feature_channels([0])


def test_samples_of_a_data_set_have_the_range_of_batches(folder, own, capsys):
    sentence = refused(capsys, *go(own, folder, "Keep", "data.dataset=mine.py:BrightSamples"))
    assert "samples(2) must return images in [-1, 1]; A ranges from" in sentence


def test_a_weighting_may_need_many_rows(own):
    assert find_weighting("mine.py:sixteen") is not None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("eighth_bits", "pair_weight must be floats on the device of the queries, not torch.float8_e5m2 on cpu"),
        ("sparse", "pair_weight must be dense, not torch.sparse_coo"),
        ("long_error", "of 8 rows in 2 groups: RuntimeError: first line$"),
    ],
)
def test_weights_that_kernels_cannot_read_are_refused(own, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_weighting(f"mine.py:{name}")
