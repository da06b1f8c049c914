"""`benchmarks/measure.py`: order of the measurements, time limits, rates and floors. No time is asserted."""

from __future__ import annotations

import time

import torch

from benchmarks import cases, measure
from fastnce.common import timing

CPU = torch.device("cpu")


def test_energy_and_launches_are_measured_after_all_times(monkeypatch):
    order = []

    def timed(calls, *_, **__):
        order.append("alone" if list(calls) == [""] else "interleaved")
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(measure, "time_interleaved", timed)
    monkeypatch.setattr(measure, "joules", lambda *_: order.append("joules") or 3.0)
    monkeypatch.setattr(measure, "launches", lambda *_: order.append("launches") or 7)
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 1)
    context = cases.Context(CPU)
    calls = [cases.Provider("a", lambda x: x, energy=True), cases.Provider("b", lambda x: x)]
    rows = []
    for name in ("one", "two"):
        rows += measure.measure(cases.Case(name, {"images": 1}, lambda: (torch.ones(3),), calls), context)
    assert {(row.joules, row.launches) for row in rows} == {(None, None)}
    again = list(measure.measure_rest(context))
    assert order == ["alone", "alone", "interleaved"] * 2 + ["joules"] * 2 + ["launches"] * 4
    assert {row.key() for row in again} == {row.key() for row in rows}
    assert [(row.joules, row.launches) for row in rows] == [(3.0, 7), (None, 7)] * 2
    assert not list(measure.measure_rest(context))


def test_losses_have_the_figures_of_triton_after_all_times(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "time_interleaved", lambda calls, *_, **__: {name: [9.0] for name in calls})
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 1)
    monkeypatch.setattr(measure, "joules", lambda *_: order.append("joules") or 3.0)
    monkeypatch.setattr(measure, "launches", lambda *_: order.append("launches") or 7)

    def do_bench(call, device, mode):
        order.append((call().item(), device, mode))
        if mode == "compile":
            raise RuntimeError("out of memory")
        return 2.0, 1.0, 4.0

    monkeypatch.setattr(measure, "do_bench", do_bench)
    providers = [cases.Provider("a", lambda x: x * 5, energy=True), cases.Provider("b", lambda x: x, mode="compile")]
    context = cases.Context(CPU)
    work = {"size": {}, "make_inputs": lambda: (torch.ones(1),)}
    plain = list(measure.measure(cases.Case("plain", providers=providers[:1], **work), context))
    loss = list(measure.measure(cases.Case("loss", providers=providers, do_bench=True, **work), context))
    list(measure.measure_rest(context))
    assert order == ["joules"] * 2 + [(5.0, CPU, "eager"), (1.0, CPU, "compile")] + ["launches"] * 3
    figures = [(row.do_bench_ms, row.do_bench_p20_ms, row.do_bench_p80_ms) for row in plain + loss]
    assert figures == [(None,) * 3, (2.0, 1.0, 4.0), (None,) * 3]
    assert loss[0].p50_ms == 9.0
    assert loss[1].note == "no do_bench: RuntimeError"


def test_the_first_call_is_the_time_alone_of_a_slow_call(monkeypatch):
    called = []
    monkeypatch.setattr(measure, "SLOW", -1.0)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, _: call())
    monkeypatch.setattr(measure, "time_interleaved", lambda calls, *_, **__: {name: [] for name in calls})
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [cases.Provider("x", lambda x: called.append(x))])
    (row,) = measure.measure(case, cases.Context(CPU, quick=True))
    assert (row.note, row.rounds, len(called)) == (measure.ALONE, 1, 2)
    assert row.p50_ms > 0


def test_nothing_starts_after_the_time_is_over():
    called = []
    provider = cases.Provider("x", lambda x: called.append(x))
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [provider])
    (row,) = measure.measure(case, cases.Context(CPU, quick=True, until=time.monotonic() + 1.0))
    assert (row.note, called) == (measure.OVER, [])


def test_slow_calls_stop_at_the_end_of_the_time():
    calls = {name: (lambda: time.sleep(0.05)) for name in "ab"}
    times = timing.time_interleaved(calls, CPU, 5.0, until=time.monotonic() + 0.12)
    assert 2 <= sum(len(t) for t in times.values()) <= 4


def test_rates_and_floors_of_a_row():
    limits = {"matmul_bfloat16_flop_per_s": 1e9, "copy_bytes_per_s": 1e9, "launch_eager_s": 1e-3}
    row = cases.Row("toy", "x", "eager", images=4, dtype="bfloat16", p50_ms=2000.0, launches=7, joules=3.0)
    provider = cases.Provider("x", lambda: None, bytes=1e8)
    case = cases.Case("toy", {}, tuple, [provider], flop=1e9, bytes=5.0, steps=600)
    measure._Ready(row, case, provider, provider.call, 2, provider.call, "").take([4000.0], limits)
    assert (row.steps_per_s, row.images_per_s) == (0.5, 2.0)
    assert (row.floor_ms, row.floor_fraction, row.ceiling_fraction) == (1000.0, 0.5, 0.5)
    assert row.launch_floor_ms == 7.0
    assert row.joules_per_1000_images == 750.0
    assert row.note == "600 steps: 20.0 minutes"


def test_the_check_after_the_timing_is_in_the_note():
    provider = cases.Provider("x", lambda x: x, note="first", check=lambda: "not captured")
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [provider], steps=1)
    (row,) = measure.measure(case, cases.Context(CPU, quick=True))
    assert row.note == "first; not captured; 1 steps: 0.0 minutes"


def test_a_provider_that_raises_has_a_row_without_times():
    def broken(x):
        raise MemoryError("too large")

    providers = [cases.Provider("good", lambda x: x + 1), cases.Provider("bad", broken)]
    case = cases.Case("toy", {"patches": 3}, lambda: (torch.ones(3),), providers)
    good, bad = measure.measure(case, cases.Context(CPU, quick=True))
    assert good.p50_ms > 0
    assert bad.p50_ms is None
    assert bad.note == "did not run: MemoryError: too large"


def test_interleaved_times_have_a_round_each():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.time_interleaved(calls, CPU, 0.0, min_rounds=4, least_ms=0.0)
    assert [len(t) for t in times.values()] == [4, 4]
    assert order[-8:] == list("abbaabba")
    assert timing.percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    limits = {"matmul_float32_flop_per_s": 1e9, "copy_bytes_per_s": 1e6}
    assert timing.floor_ms(1e9, 2e6, "float32", limits) == 2000.0
    assert timing.floor_ms(1e9, 1e3, "float32", limits) == 1000.0
    assert timing.floor_ms(1e9, 1e3, "float32", {}) is None
