"""Impossible settings give one sentence before anything is written; intervals of 0; too little memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastnce.commands.main import main
from fastnce.data.unpaired import UnpairedData
from fastnce.engine import memory
from fastnce.engine.choices import pick_device
from fastnce.engine.launch import processes
from fastnce.engine.loop import TrainingFailed, due, train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.step import Step
from fastnce.methods import CycleGANOptions
from fastnce.methods.presets import PRESETS
from fastnce.training import train_run
from tests.engine.test_engine import SMALL, small_config, small_method

ENOUGH = 8 * 2**30


def error_of(capsys, code: int, *arguments: str) -> str:
    """Run a command that must end with this exit code and exactly one sentence on stderr; return the sentence."""
    assert main(list(arguments)) == code
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    return message


@pytest.fixture
def pictures(folder, tmp_path):
    """Links to the shared pictures in a folder of this test alone, so that the test detects a cache there."""
    for entry in folder.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / entry.name).symlink_to(entry)
    return tmp_path / "data"


WRONG = [
    ("cut", ["network.width=0"], "network.width must be a whole number from 1"),
    ("cut", ["network.width=1000000"], "network.width must be a whole number from 1"),
    ("cut", ["data.batch=1000000"], "data.batch must be a whole number from 1"),
    ("cut", ["run.threads=100000"], "run.threads must be a whole number from 0 to 1,024"),
    ("cut", ["run.log_every=-1"], "run.log_every must be a whole number of at least 0"),
    ("cut", ["run.steps=-3"], "run.steps must be a whole number of at least 0"),
    ("cut", ["optim.lr=nan"], "optim.lr must be a number from"),
    ("cut", ["optim.max_bad_steps=-1"], "optim.max_bad_steps must be a whole number of at least 0"),
    ("cut", ["loss.lambda_gan=0", "loss.lambda_nce=0"], "every term has weight 0"),
    ("cut", ["run.streams=true"], "run.streams=true needs a CUDA device"),
    ("cut", ["run.graph=true"], "run.graph=true needs a CUDA device"),
    ("cut", ["data.batch=4", "optim.accumulate=2", "loss.negatives=batch"], "optim.accumulate=2 would change"),
    ("cyclegan", ["network.generator=unet_128", "run.checkpoint_activations=true"], "no residual blocks"),
    ("cut", ["run.device=meta"], "run.device=meta cannot be used here"),
    ("cut", ["run.device=mps"], "the 'MPS' backend); use auto, cpu or an available device"),
    ("cut", ["run.device="], "run.device= cannot be used here"),
    ("cut", ["network.width=60000"], "take at least"),
    ("cut", ["data.batch=20000"], "a step with 20000 pictures of 32x32 at once takes at least"),
    ("cyclegan", ["loss.pool_size=1000000"], "loss.pool_size"),
]


@pytest.mark.parametrize(("preset", "overrides", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_nothing_is_written(preset, overrides, sentence, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: ENOUGH)
    small = [s for s in SMALL if preset != "cyclegan" or not s.startswith("loss.")]
    wide = ["data.load_size=140", "data.crop_size=128"] if overrides[0].endswith("unet_128") else []
    run = ["train", preset, "--data", str(pictures), "--out", str(tmp_path / "run"), *small, *wide]
    assert sentence in error_of(capsys, 2, *run, *overrides)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data"]
    assert not [entry for entry in pictures.iterdir() if entry.name.startswith(".")]


def test_a_dry_run_finds_errors_too(capsys):
    assert "positions from 0 to 26" in error_of(capsys, 2, "train", "cut", "--dry-run", *SMALL, "loss.nce_layers=0,99")
    assert "data.dir must be text" in error_of(capsys, 2, "train", "cut", "--dry-run", "--data", "\udcff", *SMALL)


FILES = {
    "[data]\nbatch = 0\n": "data.batch must be a whole number from 1",
    "[data]\nbatch = 1.5\n": "data.batch must be a whole number from 1 to 65,536, not 1.5",
    "[data]\nbatch = 1979-05-27\n": "data.batch must be a whole number",
    "[data]\nbatch = true\n": "data.batch must be a whole number from 1 to 65,536, not True",
    f"[data]\nbatch = 1{'0' * 400}\n": "data.batch must be a whole number",
    f"[data]\nbatch = 1{'0' * 5000}\n": "not TOML",
    f"[data]\nbatch = {'[' * 5000}\n": "not TOML",
    "[data]\nbatch = 1\nbatch = 2\n": "not TOML",
    "[data.batch]\nx = 1\n": "data.batch must be a whole number",
    "[data]\nx.batch = 1\n": "unknown key 'data.x'",
    "[[data]]\nbatch = 1\n": "'data' must be in a section",
    "[dta]\n": "unknown section 'dta'",
    "[data]\ncrop_size = [true, true]\n": "data.crop_size must be a whole number or [height, width]",
    "[data]\ndir = 'a\\u0000b'\n".replace("'", '"'): "data.dir must be text",
    "[optim]\nlr = nan\n": "optim.lr must be a number",
    "[optim]\nlr = inf\n": "optim.lr must be a number",
    "[loss]\nnce_layers = [0, true]\n": "loss.nce_layers must be a list of whole numbers",
    "[loss]\nnce_layers = [0.5]\n": "loss.nce_layers must be a list of whole numbers",
    "[loss]\nnce_layers = {a = 1}\n": "loss.nce_layers must be a list of whole numbers",
    "method = 5\n": "is for another method than cut",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text)[:40])
def test_invalid_configuration_files(text, tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(text)
    message = error_of(capsys, 2, "train", "cut", "--dry-run", "--config", str(path))
    assert FILES[text] in message
    assert f"--config {path}" in message
    assert len(message) < 600


def test_files_as_editors_write_them(tmp_path, capsys):
    """A byte order mark, CRLF line ends, whole numbers with a point. The printed configuration can be read back."""
    path = tmp_path / "c.toml"
    path.write_bytes(b'\xef\xbb\xbf[data]\r\nbatch = 3.0\r\ndir = "a\\u007fb"\r\n[run]\r\ncompile = true\r\n')
    assert main(["train", "cut", "--dry-run", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "\nbatch = 3 " in printed
    assert '\ncompile = "true" ' in printed
    path.write_text(printed)
    assert main(["train", "cut", "--dry-run", "--config", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_options_by_hand_are_refused_before_the_folder_is_made(folder, tmp_path):
    for name, options in (
        ("optim.lr", (OptimOptions(lr=-1), RunOptions())),
        ("run.keep", (OptimOptions(), RunOptions(keep=1))),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            train(small_method(), None, *options, tmp_path / "run")  # type: ignore[arg-type]
    data = SimpleNamespace(steps_per_epoch=1)
    for size, optim in ((0, OptimOptions()), (2, OptimOptions(accumulate=3))):
        with pytest.raises(ValueError, match=f"batch_size={size} must be at least 1 and a multiple of"):
            train(small_method(), data, optim, RunOptions(), tmp_path / "run", batch_size=size)  # type: ignore[arg-type]
    optim = OptimOptions(n_epochs=0, n_epochs_decay=0)
    with pytest.raises(ValueError, match="leave nothing to train: one must be at least 1"):
        train(small_method(), data, optim, RunOptions(), tmp_path / "run")  # type: ignore[arg-type]
    for changes, sentence in (
        ({"data.batch": 0}, "data.batch must be"),
        ({"method": "cutt"}, "unknown method 'cutt'"),
        ({"loss": CycleGANOptions()}, "loss must be CUTOptions for"),
        ({"data": None}, "data must be DataOptions for"),
    ):
        config = small_config(folder)
        for name, value in changes.items():
            *section, key = name.split(".")
            setattr(getattr(config, section[0]) if section else config, key, value)
        with pytest.raises(ValueError, match=sentence):
            train_run(config, str(tmp_path / "run"))
    assert not any(tmp_path.iterdir())


def test_an_interval_of_0_means_never(folder, tmp_path):
    assert [due(0, done) for done in range(3)] == [False] * 3
    assert [due(2, done) for done in range(1, 5)] == [False, True, False, True]
    never = ["run.log_every=0", "run.save_every=0", "run.monitor_every=0", "run.validate_every=0", "run.samples=0"]
    run = tmp_path / "run"
    assert train_run(small_config(folder, *never, "run.sample_every=1", "run.steps=3"), run, quiet=True) == 3
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [3]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert not (run / "samples").exists()


def test_out_of_memory_is_one_sentence(folder, tmp_path, capsys, monkeypatch):
    """A real error of the allocator within a step. On a device and in NumPy, the exception has another type."""

    def step(self, batch, draws):
        return torch.empty(2**52)

    monkeypatch.setattr(Step, "run", step)
    run = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / "run"), "--quiet", *SMALL]
    message = error_of(capsys, 1, *run)
    assert message.count("memory is too small for this training") == 1
    assert "lower data.batch, data.crop_size, network.width" in message
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):

        def fail(self, batch, draws, error=error):
            raise error

        monkeypatch.setattr(Step, "run", fail)
        data = UnpairedData(folder, load_size=36, crop_size=32)
        with pytest.raises(TrainingFailed, match="memory is too small"):
            train(small_method(), data, OptimOptions(), RunOptions(), tmp_path / "other", quiet=True)


def test_other_errors_are_not_about_memory(folder, tmp_path, monkeypatch):
    def fail(self, batch, draws):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Step, "run", fail)
    with pytest.raises(RuntimeError, match="of ours"):
        train_run(small_config(folder), tmp_path / "run", quiet=True)


def test_bytes_that_a_pass_keeps():
    """Counted by hand: a convolution keeps its input, a tanh its output, a ReLU its output once for two users."""
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 1)
        )
        picture = torch.empty(2, 3, 10, 12)
    assert memory.kept_bytes(network, picture) == 4 * 2 * 120 * (3 + 8 + 5)


def test_room_for_weights_and_for_a_step(monkeypatch):
    """Four copies of the weights, plus the bytes that a pass over two pictures keeps, in 32 and 16 bits."""
    cpu = torch.device("cpu")

    def planned():
        with torch.device("meta"):
            return small_method()

    weights = sum(4 * p.numel() for p in planned().parameters())
    buffers = sum(b.nbytes for b in planned().buffers())
    kept = memory.kept_bytes(planned().generator, torch.empty(2, 3, 32, 32, device="meta"))
    for bits, least in ((False, 4 * weights + buffers + kept), (True, 4 * weights + buffers + kept // 2)):
        monkeypatch.setattr(memory, "available_memory", lambda least=least: least)
        memory.check_room(planned(), 2, (32, 32), device=cpu, sixteen_bits=bits)
        monkeypatch.setattr(memory, "available_memory", lambda least=least: least - 1)
        with pytest.raises(ValueError, match="a step with 2 pictures of 32x32"):
            memory.check_room(planned(), 2, (32, 32), device=cpu, sixteen_bits=bits)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * weights + buffers - 1)
    with pytest.raises(ValueError, match="lower network.width"):
        memory.check_room(planned(), 2, None, device=cpu)
    memory.check_room(planned(), 2, (32, 32), device=torch.device("cuda"))
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.check_room(planned(), 10**9, (32, 32), device=cpu)


def test_a_pool_needs_room_too(monkeypatch):
    options = PRESETS["cyclegan"].options()
    options.pool_size = 1000
    network = small_config_network()
    with torch.device("meta"):
        method = PRESETS["cyclegan"].method(options, network)
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 1000 * 3 * 32 * 32 * 4)
    with pytest.raises(ValueError, match=r"loss\.pool_size"):
        memory.check_room(method, 1, (32, 32), device=torch.device("cpu"))


def small_config_network():
    from fastnce.methods import NetworkOptions

    return NetworkOptions(generator="resnet_4blocks", width=2, discriminator_width=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rain", "DATA", "--test", "-1"], "test should be at least 0, not -1"),
        (["rain", "DATA", "--seed", "-1"], "seed should be between 0 and 2**64-1, not -1"),
        (["rain", "DATA", "--seed", str(2**64)], "seed should be between 0 and 2**64-1"),
        (["rain", "DATA", "--layers", "0"], "layers must be from 1 to 8"),
        (["rain", "DATA", "--density", "nan"], "density must be"),
        (["demo", "--steps", "0"], "--steps must be at least 1, not 0"),
        (["demo", "--minutes", "nan"], "minutes must be a number of at least 0"),
        (["demo", "--minutes", "-1"], "minutes must be a number of at least 0"),
        (["train", "cut", "--data", "DATA", "--nproc", "1000000", "run.device=cpu"], "--nproc 1000000 is too many"),
        (
            ["train", "cut", "--data", "DATA", "--nproc", "1" * 5000, "run.device=cpu"],
            "--nproc must be auto or a number",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_numbers_of_other_commands(arguments, sentence, folder, tmp_path, capsys):
    arguments = [str(folder / "trainB") if a == "DATA" else a for a in arguments]
    assert sentence in error_of(capsys, 2, *arguments, "--out", str(tmp_path / "out"))
    assert not any(tmp_path.iterdir())


def test_processes_and_devices():
    assert processes("2", "cpu") == 2
    with pytest.raises(ValueError, match="from 1 on, not '²'"):
        processes("²", "cpu")
    with pytest.raises(ValueError, match="stores no data"):
        pick_device("meta")
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--quick", "--device", "meta"])


def test_two_places_for_the_pictures_and_pictures_as_a_run(folder, tmp_path, capsys):
    other = ["train", "cut", "--data", str(folder), "--out", str(tmp_path / "run"), "data.dir=elsewhere"]
    assert "differ: give one of them" in error_of(capsys, 2, *other)
    into = ["train", "cut", "--data", str(folder), "--out", str(folder)]
    assert "is the folder of the pictures" in error_of(capsys, 2, *into)
    assert "data.batch needs a value, such as data.batch=1" in error_of(capsys, 2, "train", "cut", "data.batch")
    assert not (tmp_path / "run").exists()
    assert not (folder / "checkpoints").exists()
