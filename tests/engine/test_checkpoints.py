"""Damaged and odd checkpoints, and those of a failing training: refused or skipped, never loaded wrongly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastnce.commands.main import main
from fastnce.common.writing import partial_name
from fastnce.engine import checkpoint
from fastnce.engine.checkpoint import Checkpoints, NotSaved, open_checkpoint
from fastnce.engine.loop import TrainingFailed
from fastnce.engine.state_file import read, sealed
from fastnce.engine.step import Step
from fastnce.engine.stored import follow, load_generators, read_state
from fastnce.engine.training_state import check_state
from fastnce.methods.presets import PRESETS
from fastnce.training import train_run
from tests.common.test_locking import killed_name
from tests.ends import one_sentence, write
from tests.engine.test_engine import SMALL, small_config

pytestmark = pytest.mark.usefixtures("few_blocks")

FILES = ("generator.safetensors", "training.safetensors", "state.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three steps with averaged weights; each step has a checkpoint."""
    top = tmp_path_factory.mktemp("trained")
    write(top / "data", "trainA/1.png", "trainB/1.png", "photos/a.png")
    config = small_config(top / "data", "run.steps=3", "run.save_every=1", "run.keep=3", "optim.ema=0.9")
    train_run(config, top / "run", quiet=True)
    return top


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def resume(trained: Path, run: Path, steps: int = 4) -> int:
    overrides = [f"run.steps={steps}", "run.save_every=1", "run.keep=3", "optim.ema=0.9"]
    return main(["train", "fastcut", "--data", str(trained / "data"), "--out", str(run), "--quiet", *SMALL, *overrides])


def reseal(folder: Path, **changes) -> None:
    """Recompute the digests after a change."""
    state = json.loads((folder / "state.json").read_text())
    for key in ("format", "digest"):
        state.pop(key, None)
    state["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:2]}
    (folder / "state.json").write_text(sealed(state | changes))


# ---- state.json ----


STATE = {
    "step": 6,
    "sha256": dict.fromkeys(FILES[:2], "0" * 64),
    "generators": ["G"],
    "data": "x",
    "progress": {"batch": 1, "ranks": 1, "epoch": 0, "pictures": 6, "seen": 6},
    "config": {"method": "cut", "loss": {"temperature": 0.07}},
    "validation": {"pairs": "x", "psnr_y": float("inf"), "run.metric": "a:b"},
}


def test_no_bit_of_a_state_can_change(tmp_path):
    """A file with one changed bit is refused or gives the same state (if the bit is in a space between values)."""
    file = tmp_path / "state.json"
    file.write_text(sealed(STATE))
    whole, content = read(file, 6), file.read_bytes()
    assert whole == STATE
    refused = 0
    with file.open("r+b", buffering=0) as opened:
        for place in range(8 * len(content)):
            os.pwrite(opened.fileno(), bytes([content[place // 8] ^ 1 << place % 8]), place // 8)
            try:
                assert read(file, 6) == whole
            except ValueError:
                refused += 1
            os.pwrite(opened.fileno(), content[place // 8 : place // 8 + 1], place // 8)
    assert refused > 0.9 * 8 * len(content)


ODD = [None, "x", -1, 10**30, [], {}, True, 1.5, [["G"]], [1], {"a": 1}, float("nan")]


@pytest.mark.parametrize("old", [False, True], ids=["sealed", "of an older version"])
def test_every_key_of_a_state_is_checked(old, tmp_path):
    file = tmp_path / "state.json"

    def told(state: dict) -> str:
        file.write_text(json.dumps(state) if old else sealed(state))
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            read(file, 6)
        return str(caught.value)

    for key in ("step", "sha256", "generators"):
        assert f"should hold {key}" in told({k: v for k, v in STATE.items() if k != key})
    fine = {"data": ("x",), "config": ({},), "generators": (), "validation": ()}
    for key in STATE:
        for value in ODD:
            if value not in fine.get(key, ()):
                assert f"should hold {key}" in told(STATE | {key: value}), (key, value)
    assert "is of step 7, and the folder of step 6" in told(STATE | {"step": 7})
    for part in STATE["progress"]:
        assert "should hold progress" in told(STATE | {"progress": STATE["progress"] | {part: -1}})
    for pairs in (
        {"psnr_y": 1.0},
        {"pairs": "x"},
        {"pairs": "x", "psnr_y": "best"},
        {"pairs": "x", "psnr_y": 1.0, "run.metric": 5},
        {"pairs": "x", "psnr_y": 1.0, "metric": "mine.py:f"},
    ):
        assert "should hold validation" in told(STATE | {"validation": pairs})
    assert "should hold generators" in told(STATE | {"generators": ["G", "G"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[]", "should hold a table, not list"),
        (b"NaN", "should hold a table, not float"),
        (b'{"step": "\xe9"}', "is no JSON"),
        (b'{"step": ' + b"9" * 10_000 + b"}", "is no JSON"),
        (b" " * (16 * 2**20 + 1), "far more than were ever written"),
        (b'{"format": 3}', "is of a newer fastnce"),
    ],
)
def test_a_state_that_is_none(content, message, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "state.json", None)


# ---- damage ----


def damages(file: Path) -> list[Callable[[], object]]:
    """Applied to state.json, the last three leave no checkpoint at all."""
    content = file.read_bytes()
    middle = len(content) // 2
    return [
        lambda: file.write_bytes(content[:middle]),
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]),
        file.unlink,
        lambda: (file.unlink(), file.symlink_to(file.name)),
        lambda: (file.unlink(), file.symlink_to("nothing")),
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_a_named_one_refused(name, trained, tmp_path, capsys):
    picture, out = trained / "data" / "photos" / "a.png", tmp_path / "out"
    read_by = {"translate": "generator.safetensors", "export": "training.safetensors"}

    def made(command: str, source: Path) -> int:
        capsys.readouterr()
        more = {"translate": [str(picture), "--device", "cpu"], "export": []}[command]
        return main([command, str(source), *more, "--out", str(out)])

    result = {"translate": out / "a.png", "export": out / "latest_net_F.pth"}
    for command, file in result.items():
        assert made(command, step(trained / "run", 2)) == 0
        result[command] = (file, file.read_bytes())
    whole = resumed(trained, tmp_path)
    for number in range(6):
        run = Path(shutil.copytree(trained / "run", tmp_path / str(number)))
        damages(step(run, 3) / name)[number]()
        for command, (file, before) in result.items():
            file.unlink()
            touched = name in ("state.json", read_by[command]) or command == "export"
            if touched and not (name == "state.json" and number >= 3):
                with pytest.warns(UserWarning, match=f"{step(run, 3)} is damaged .*: step-00000002 is taken"):
                    assert made(command, run) == 0
            else:
                assert made(command, run) == 0
            if touched:
                assert file.read_bytes() == before
                assert made(command, step(run, 3)) == 2
                assert f"{step(run, 3)} is damaged" in (message := one_sentence(capsys))
                assert "name another checkpoint, or the run" in message
            file.write_bytes(before)
        assert resume(trained, run) == 0
        assert read_state(step(run, 4))["sha256"] == whole
        shutil.rmtree(run)


def resumed(trained: Path, tmp_path: Path) -> dict[str, str]:
    """The digests of step 4 of an undisturbed run."""
    run = Path(shutil.copytree(trained / "run", tmp_path / "whole"))
    assert resume(trained, run) == 0
    return read_state(step(run, 4))["sha256"]


def test_all_damaged_is_said_with_a_remedy(run, trained, capsys):
    for number in (1, 2, 3):
        (step(run, number) / "training.safetensors").write_bytes(b"")
    assert resume(trained, run) == 2
    message = one_sentence(capsys)
    assert f"{run / 'checkpoints'}: every checkpoint is damaged (the newest, step-00000003: training.saf" in message
    assert "move the folder away to start anew" in message


ELSEWHERE = ["", "../step-00000003", "step-00000003/../step-00000002", "/etc", "x" * 5000, "\0", "."]


@pytest.mark.parametrize("content", ELSEWHERE)
def test_a_pointer_names_a_checkpoint_beside_it(content, run, trained):
    for name in ("best", "latest", "good"):
        pointer = run / "checkpoints" / name
        pointer.write_text(content)
        with pytest.raises(ValueError, match=f"{name} should hold the name of a checkpoint beside it"):
            follow(pointer)
    assert resume(trained, run) == 0
    pointer.write_text("step-00000099")
    with pytest.raises(ValueError, match="names step-00000099, which is not there any more: name another"):
        follow(pointer)
    pointer.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="should hold the name of"):
        follow(pointer)


def test_a_folder_with_another_name_than_its_step_is_no_checkpoint(run, trained):
    shutil.copytree(step(run, 3), step(run, 99))
    shutil.copytree(step(run, 3), run / "checkpoints" / "step-zzz")
    found = Checkpoints(run / "checkpoints", log=lambda _: None).load()
    assert found is not None
    assert found[2] == step(run, 3)


# ---- odd content under right digests ----


def header(change):
    def edit(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + length])
        names = [name for name in table if name != "__metadata__"]
        change(table, names)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return edit


CONTENTS = {
    "no bytes": lambda content: b"",
    "seven bytes": lambda content: b"1234567",
    "a header of 2**63 bytes": lambda content: struct.pack("<Q", 2**63 - 1) + b"{}",
    "a header of 2**40 bytes": lambda content: struct.pack("<Q", 2**40) + b"{}",
    "no tensors": lambda content: struct.pack("<Q", 2) + b"{}",
    "a huge shape": header(lambda t, names: t[names[0]].update(shape=[2**40, 2**40])),
    "an unknown dtype": header(lambda t, names: t[names[0]].update(dtype="F7")),
    "numbers of 4 bits": header(lambda t, names: t[names[0]].update(dtype="F4")),
    "overlapping tensors": header(lambda t, names: t[names[1]].update(data_offsets=t[names[0]]["data_offsets"])),
    "a name of a network that is not there": header(lambda t, names: t.update({"H/x": t.pop(names[0])})),
    "a name without a network": header(lambda t, names: t.update({"x": t.pop(names[0])})),
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("name", FILES[:2])
def test_odd_files_of_tensors_are_refused(name, what, run, trained, tmp_path, capsys):
    file = step(run, 3) / name
    file.write_bytes(CONTENTS[what](file.read_bytes()))
    reseal(step(run, 3))
    picture = str(trained / "data" / "photos" / "a.png")
    if name == "generator.safetensors":
        assert main(["translate", str(step(run, 3)), picture, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 2
    elif "a name" in what:  # it can be read, and the run names what does not fit
        assert resume(trained, run) == 2
    else:
        assert main(["export", str(step(run, 3)), "--out", str(tmp_path / "o")]) == 2
    assert str(step(run, 3)) in one_sentence(capsys)
    assert not (tmp_path / "o").exists()


def tensors_changed(change) -> dict[str, torch.Tensor]:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t.contiguous() for key, t in change(tensors).items()}

    return edit


def without(prefix: str):
    return tensors_changed(lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(prefix)})


def one(ending: str, change):
    def edit(tensors):
        key = next(key for key in tensors if key.endswith(ending))
        return tensors | {key: change(tensors[key])}

    return tensors_changed(edit)


TRAINING = {
    "no moments": without("adam/"),
    "no moments of one group": without("adam/D"),
    "no average": without("average/"),
    "no discriminator": without("network/D/"),
    "no count of bad steps": without("bad_steps"),
    "a moment of another shape": one("exp_avg", lambda t: torch.zeros(7)),
    "a moment that would be broadcast": one("exp_avg_sq", lambda t: t.flatten()[:1]),
    "a count that would be broadcast": tensors_changed(lambda t: t | {"bad_steps": torch.zeros(1)}),
    "whole numbers": one(".weight", lambda t: t.to(torch.int64)),
    "64 bits": one(".weight", lambda t: t.double()),
    "a tensor too many": tensors_changed(lambda t: t | {"adam/D/9.x/exp_avg": torch.zeros(1)}),
}


@pytest.mark.parametrize("what", TRAINING)
def test_a_run_continues_from_exactly_what_it_had(what, run, trained, capsys):
    file = step(run, 3) / "training.safetensors"
    save_file(TRAINING[what](load_file(file)), file)
    reseal(step(run, 3))
    assert resume(trained, run) == 2
    message = one_sentence(capsys)
    assert f"{step(run, 3)}: training.safetensors does not fit: " in message
    assert "remove that folder to continue from the one before" in message


NUMBERS = {
    "a moment that is not finite": one("exp_avg", lambda t: t * float("nan")),
    "an average that is not finite": lambda tensors: one(
        next(key for key in tensors if key.startswith("average/")), lambda t: t + float("inf")
    )(tensors),
    "a count that is no number": tensors_changed(lambda t: t | {"bad_steps": torch.tensor(float("nan"))}),
    "a count below zero": tensors_changed(lambda t: t | {"bad_steps": torch.tensor(-1.0)}),
    "a broken count": tensors_changed(lambda t: t | {"bad_steps": torch.tensor(0.5)}),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_the_state_denies_are_passed_over(what, run, trained, tmp_path, capsys):
    file = step(run, 3) / "training.safetensors"
    save_file(NUMBERS[what](load_file(file)), file)
    reseal(step(run, 3))
    assert resume(trained, run) == 0
    said = (run / "log.txt").read_text()
    assert f"{step(run, 3)} is damaged (training.safetensors " in said
    assert "step-00000002 is taken" in said


def test_generators_that_the_state_says_are_finite(run, trained, tmp_path, capsys):
    file = step(run, 3) / "generator.safetensors"
    save_file(one(".weight", lambda t: t * float("nan"))(load_file(file)), file)
    reseal(step(run, 3))
    picture = str(trained / "data" / "photos" / "a.png")
    assert main(["translate", str(run), picture, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 2
    assert f"{step(run, 3)}: generator.safetensors holds numbers that are not finite" in one_sentence(capsys)


def test_a_run_in_a_folder_whose_name_is_no_text(run, trained, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"\xff")
    try:
        shutil.copytree(run, odd)
    except OSError:
        pytest.skip("this disk takes names of text only")
    picture = str(trained / "data" / "photos" / "a.png")
    assert main(["translate", str(odd), picture, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    assert main(["export", str(odd), "--out", str(odd / "published")]) == 0
    assert resume(trained, odd) == 0


def test_what_a_run_has_is_compared_whole():
    wanted = {"a": torch.zeros(2), "extra/pool": torch.zeros(0), "loss_scale/scale": torch.zeros(())}
    check_state(wanted, {"a": torch.ones(2), "extra/pool": torch.zeros(4, 3, 2, 2)})
    check_state({"a": torch.zeros(2)}, {"a": torch.ones(2), "loss_scale/good": torch.zeros(())})
    with pytest.raises(ValueError, match=r"a is missing; b belongs to nothing here"):
        check_state({"a": torch.zeros(2)}, {"b": torch.zeros(2)})


@pytest.mark.parametrize("config", [{}, {"method": "evil"}, {"method": "fastcut", "network": {"width": -3}}])
def test_the_stored_configuration_is_checked(config, run, trained, tmp_path, capsys):
    reseal(step(run, 3), config=config)
    picture = str(trained / "data" / "photos" / "a.png")
    for command, more in (("translate", [picture]), ("export", [])):
        assert main([command, str(step(run, 3)), *more, "--out", str(tmp_path / "o")]) == 2
        assert str(step(run, 3)) in one_sentence(capsys)


def test_generators_are_read_as_they_were_named(run):
    reseal(step(run, 3), generators=["G_A"])
    with pytest.raises(ValueError, match=r"holds 'G/.*', which belongs to none of G_A"):
        load_generators(step(run, 3))


# ---- good ones ----


def values(number: float) -> dict[str, torch.Tensor]:
    return {"G/w": torch.full((3,), number)}


def save(store: Checkpoints, number: int, bad: int = 0, weight: float = 1.0) -> None:
    training = values(weight) | {"bad_steps": torch.tensor(float(bad))}
    store.save(number, values(weight), training, {"generators": ["G"], "config": {}})


def names(store: Checkpoints) -> list[int]:
    return [int(path.name[5:]) for path in store.steps()]


def test_a_row_of_bad_steps_does_not_push_out_the_last_good_checkpoint(tmp_path):
    store = Checkpoints(tmp_path)
    for number in (5, 10, 15):
        save(store, number)
    assert names(store) == [10, 15]
    assert store.good(19, 0) == tmp_path / "step-00000015"
    save(store, 20, bad=5)  # the last good step, 15, may have ruined the weights
    assert names(store) == [10, 15, 20]
    for number in (25, 30, 35, 40):
        save(store, number, bad=number - 15)
    assert names(store) == [10, 35, 40]
    assert store.good(40, 25) == tmp_path / "step-00000010"
    again = Checkpoints(tmp_path)
    again.load()
    assert again.good(45, 30) == tmp_path / "step-00000010"
    save(again, 45)
    save(again, 50)
    assert names(again) == [45, 50]
    assert follow(tmp_path / "good") == tmp_path / "step-00000045"


def test_what_a_pointer_on_the_disk_names_is_kept(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, log=lambda sentence: None)
    for number in (1, 2, 3):
        save(store, number)
    write = checkpoint.write_whole

    def failing(path, data):
        if path.name == "good":
            raise OSError(errno.EIO, "Input/output error")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_whole", failing)
    for number in (4, 5, 6, 7):
        save(store, number)
    assert (tmp_path / "good").read_text() == "step-00000002"
    assert names(store) == [2, 6, 7]
    monkeypatch.undo()
    save(store, 8)
    assert (tmp_path / "good").read_text() == "step-00000007"
    save(store, 9)
    assert names(store) == [8, 9]


def test_numbers_that_are_not_finite_are_never_good(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    for number in (3, 4, 5):
        save(store, number, weight=float("nan"))
    assert names(store) == [2, 4, 5]
    assert store.good(6, 0) == tmp_path / "step-00000002"
    assert read_state(tmp_path / "step-00000002")["sound"] is True
    assert read_state(tmp_path / "step-00000005")["sound"] is False
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for path in store.steps():
        path.rename(run / "checkpoints" / path.name)
    with pytest.warns(UserWarning, match="is damaged .*not finite.*: step-00000002 is taken") as told:
        assert open_checkpoint(run)[0].name == "step-00000002"
    assert len(told) == 2


def test_a_ruinous_rate_is_told_with_the_good_checkpoint(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    state = json.loads((step(run, 3) / "state.json").read_text())
    state["config"]["optim"]["lr"] = 1e30
    for number in (1, 2, 3):
        reseal(step(run, number), config=state["config"])
    config = small_config(
        trained / "data",
        *["run.steps=40", "run.save_every=1", "run.keep=2", "optim.ema=0.9", "optim.lr=1e30", "optim.max_bad_steps=6"],
    )
    with pytest.raises(TrainingFailed, match=r"steps in a row were not finite") as caught:
        train_run(config, run, quiet=True)
    good = step(run, 2)  # step 3 is not known to be good: no good step has followed
    assert f"the last good checkpoint is {good}" in str(caught.value)
    assert read_state(good)["sound"] is True


# ---- saving ----


def test_errors_of_the_disk_have_their_path_and_words(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "checkpoints")
    save(store, 1)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS):
        words = os.strerror(number)
        for error in (OSError(number, words), SafetensorError(f"I/O error: {words} (os error {number})")):

            def fail(tensors, path, error=error):
                Path(path).write_bytes(b"half")
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "save_file", fail)
                with pytest.raises(NotSaved) as caught:
                    save(store, 2)
            assert caught.value.errno == number
            assert f"step-00000002: no checkpoint of 28 bytes ({words})" in caught.value.strerror
            assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-00000001"]


def test_leftovers_go_at_the_next_start(run, trained):
    folder = run / "checkpoints"
    for name in (killed_name(), ".partial-00000009-123"):
        (folder / name).mkdir()
        (folder / name / "training.safetensors").write_bytes(b"half")
    step(run, 7).mkdir()
    (step(run, 7) / "generator.safetensors").write_bytes(b"half deleted")
    step(run, 8).mkdir()
    (step(run, 8) / "notes.txt").write_text("a user's")
    mine = folder / partial_name()
    mine.mkdir()
    assert resume(trained, run) == 0
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(
        [mine.name, "good", "latest", "step-00000002", "step-00000003", "step-00000004", "step-00000008"]
    )


def test_a_step_puts_back_what_it_gave(trained):
    config = small_config(trained / "data", "optim.ema=0.9")
    one_step, other = (Step(PRESETS["fastcut"].method(config.loss, config.network), config.optim) for _ in range(2))
    for group in one_step.groups.values():
        group.prepare()
    state = {key: t if key.endswith(".filt") else torch.rand_like(t) for key, t in one_step.state().items()}
    other.load_state(state)
    for key, tensor in other.state().items():
        assert torch.equal(tensor, state[key]), key
