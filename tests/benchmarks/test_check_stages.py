"""What the stages of `benchmarks/check.py` stand on: smoke checks, the profile, kernels that travel, and patience."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import profiled, smoke, triton_cache, watch

# --- compiled kernels that travel --------------------------------------------------------------------------------


def test_a_packed_cache_is_found_where_it_was_unpacked(tmp_path, monkeypatch):
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "here"))
    entry = FileCacheManager("KEY")
    files = {name: entry.put(f"{name} of it", name, binary=False) for name in ("k.cubin", "k.json", "k.ptx", "k.ttir")}
    entry.put_group("k.json", files)
    assert triton_cache.pack(tmp_path / "here", tmp_path / "packed.tar.xz") == 1

    there = tmp_path / "other" / "place"
    assert triton_cache.unpack(tmp_path / "packed.tar.xz", there) == 1
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            path.unlink()  # the first machine is not there
    monkeypatch.setattr(knobs.cache, "dir", str(there))
    found = FileCacheManager("KEY").get_group("k.json")
    assert {name: Path(path).read_text() for name, path in found.items()} == {
        "k.cubin": "k.cubin of it",
        "k.json": "k.json of it",
    }


def test_what_is_no_packed_cache_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "broken.tar.xz"
    whole = tmp_path / "whole.tar.xz"
    (tmp_path / "here" / "KEY").mkdir(parents=True)
    (tmp_path / "here" / "KEY" / "k.cubin").write_bytes(bytes(range(256)) * 40)
    triton_cache.pack(tmp_path / "here", whole)
    # the last has a file, but no entry that Triton would find
    for words in (b"nothing of the kind", whole.read_bytes()[:150], whole.read_bytes()):
        file.write_bytes(words)
        assert triton_cache.main(["unpack", str(file), str(tmp_path / "cache")]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {file} is no packed cache")
        assert not (tmp_path / "cache").exists()
    assert triton_cache.main(["unpack", str(whole), str(file)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert triton_cache.main(["unpack", str(tmp_path / "none"), str(tmp_path / "cache")]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here: it would build for minutes")
def test_nothing_is_built_without_a_device(tmp_path, capsys):
    assert triton_cache.main(["build", str(tmp_path / "kernels.tar.xz")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: PyTorch finds no CUDA device")
    assert not list(tmp_path.iterdir())


def test_compilations_are_counted():
    from triton import knobs

    before = knobs.compilation.listener
    with triton_cache.Compilations() as counting:
        for hit in (True, False, True):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert knobs.compilation.listener is before
    assert counting.counted.sentence() == "2 of 3 kernels were in Triton's cache, 1 were compiled"


# --- smoke -------------------------------------------------------------------------------------------------------

SMALL = smoke.Size(
    patches=32,
    dim=64,
    channels=(3, 16, 24),
    sides=(14, 12, 10),
    map=(20, 10),
    step_side=32,
    network={"generator": "resnet_6blocks", "width": 8, "discriminator_width": 8},
)


def test_the_kernels_pass_the_smoke_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 0
    found = json.loads((tmp_path / "smoke.json").read_text())
    names = " ".join(check["name"] for check in found["checks"])
    for kernel in (
        "nce",
        "cosine",
        "chain of 3 layers",
        "repeated",
        "norm",
        "pad",
        "blur-down",
        "blur-up",
        "drawn",
        "cut",
    ):
        assert kernel in names
    assert all(check["ok"] for check in found["checks"])
    assert "checks are right" in capsys.readouterr().out


def test_a_wrong_kernel_fails_its_smoke_check(tmp_path, monkeypatch):
    right = smoke.fused.blur_up
    monkeypatch.setattr(smoke.fused, "blur_up", lambda x: right(x) * 1.01)
    monkeypatch.setattr(smoke, "GROUPS", (smoke.check_layers,))
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 1
    checks = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert {check["name"].split(",")[0] for check in checks if not check["ok"]} == {"blur-up"}


def test_a_check_that_raises_or_compares_zeros_is_a_failed_one(tmp_path, monkeypatch):
    def raises(device, size):
        raise RuntimeError("no such kernel")
        yield

    def zeros(device, size):
        yield from smoke.compared("zeros", lambda x: 0 * x, lambda x: 0 * x, [torch.ones(3)], (1.0, 1.0))

    monkeypatch.setattr(smoke, "GROUPS", (raises, zeros))
    monkeypatch.setattr(smoke, "default_device", lambda: torch.device("cpu"))
    assert smoke.main([str(tmp_path / "smoke.json")], SMALL) == 1
    checks = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert [check["ok"] for check in checks] == [False, False, False]
    assert "no such kernel" in checks[0]["name"]


# --- the profile -------------------------------------------------------------------------------------------------


def test_kernels_are_added_up_by_name(tmp_path):
    launches = [("a", 0.0, 4.0), ("b", 4.0, 5.0), ("a", 5.0, 7.0), ("c", 9.0, 10.0), ("d", 19.0, 20.0)]
    lines = profiled.lines_of("cut", 1, [profiled.Launch(*launch) for launch in launches], most=2)
    assert [(line.kernel, line.count, line.microseconds) for line in lines] == [
        ("a", 2, 6.0),
        ("b", 1, 1.0),
        (profiled.REST, 2, 2.0),
    ]
    assert sum(line.share for line in lines) == pytest.approx(1.0)
    assert {line.busy for line in lines} == {9.0 / 20.0}
    profiled.write(tmp_path / "profile.csv", lines)
    assert [line.kernel for line in profiled.read(tmp_path / "profile.csv")] == ["a", "b", profiled.REST]
    assert profiled.lines_of("cut", 1, []) == []


def test_a_step_that_fails_costs_no_others_profile(tmp_path, monkeypatch):
    def replayed(name, images, *_):
        if (name, images) == ("cut", 1):
            raise RuntimeError("out of memory")
        return [profiled.Launch("kernel", 0.0, 2.0)]

    monkeypatch.setattr(profiled, "replayed", replayed)
    assert profiled.main([str(tmp_path / "profile.csv")]) == 1
    lines = profiled.read(tmp_path / "profile.csv")
    assert [(line.step, line.images) for line in lines] == [("cut", 8), ("fastcut", 1)]


def test_spans_that_a_program_names_are_no_kernels():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=named, time_range=SimpleNamespace(start=1, end=3)
        )
        for name, kind, named in (("kernel", cuda, False), ("span", cuda, True), ("operator", cpu, False))
    ]
    profile = SimpleNamespace(events=lambda: events)
    assert profiled.launches_of(profile) == [profiled.Launch("kernel", 1, 3)]


# --- what hangs and what compiles --------------------------------------------------------------------------------


def seconds_until_hung(monkeypatch, rate, seconds=20.0):
    """On a clock of its own, for a process that the CPU works for at this rate (a number, or of the time)."""
    clock = [0.0]
    used = rate if callable(rate) else lambda now: rate * now
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch, "cpu_seconds", lambda group: used(clock[0]))
    patience = watch.Patience(1, seconds)
    while clock[0] < 1000:
        clock[0] += 0.1
        if patience.over(clock[0]):
            return clock[0]
    return None


def test_a_compiler_on_a_busy_machine_is_not_hung(monkeypatch):
    assert seconds_until_hung(monkeypatch, 0.0) == pytest.approx(20.0, abs=0.5)  # sleeps
    assert seconds_until_hung(monkeypatch, 1.0) == pytest.approx(20.0, abs=0.5)  # spins
    assert seconds_until_hung(monkeypatch, 0.25) == pytest.approx(80.0, abs=0.5)  # a quarter of a core
    # compiles for a while, then waits in vain
    assert seconds_until_hung(monkeypatch, lambda now: min(0.25 * now, 10.0)) == pytest.approx(48.0, abs=1.0)


def test_cpu_time_is_that_of_the_group_and_its_ended_children():
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    words = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint(flush=True)\n"
    words += "time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", words], start_new_session=True, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert watch.cpu_seconds(process.pid) >= 0.4
        assert watch.cpu_seconds(2**22 + 1) == 0.0  # no such group
    finally:
        process.kill()
        process.wait()
