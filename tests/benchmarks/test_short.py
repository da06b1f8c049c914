"""The parts of a check on a GPU."""

from __future__ import annotations

from benchmarks import cases, chain, compiled, short, waterfall


def test_the_parts_of_the_check_on_a_gpu(planned, monkeypatch):
    found = planned(short.steps, short)
    assert [(case.benchmark.removeprefix("step "), case.size["images"]) for case in found] == list(short.STEPS)
    for case in found:
        ours, theirs = case.providers
        assert (ours.name, ours.mode) == ("fastnce bf16", "captured")
        assert theirs.note == "stands in for the published step"
    monkeypatch.setattr(chain, "_chain_providers", lambda *_: iter(()))  # building them needs the device
    monkeypatch.setattr(cases.Context, "free_bytes", lambda _: 2**36)
    cases_of_loss = planned(short.loss, short)
    assert [(case.benchmark, case.size["patches"], case.size["images"]) for case in cases_of_loss] == [
        ("chain, bf16", 256, 1),
        ("chain", 256, 1),
        ("infonce", 16384, 1),
        ("infonce", 65536, 1),
        ("chain, bf16", 256, 16),
        ("chain", 256, 16),
        ("infonce", 256, 1),
    ]
    assert "fastnce, unit rows" in {p.name for p in cases_of_loss[2].providers}
    assert [p.mode for case in planned(short.compiled, compiled) for p in case.providers] == [
        "captured",
        "compile, captured",
    ]


def test_every_stage_of_the_waterfall_is_captured(planned):
    (interleaved,) = planned(lambda context: waterfall.measure_stages("cut", 1, context), waterfall)
    assert [p.mode for p in interleaved.providers] == ["captured"] * 12 + ["eager"]
    in_turn = planned(lambda context: waterfall.measure_stages("cut", 8, context), waterfall)
    assert [len(case.providers) for case in in_turn] == [1] * 13
