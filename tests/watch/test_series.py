"""Curves out of metrics.jsonl: thinned without hiding a spike, read only once, damaged lines left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastnce.watch import series
from fastnce.watch.series import Curve, Metrics
from tests.watch.made import lines, training


def test_thinning_keeps_extremes_and_means():
    values = np.random.default_rng(0).normal(size=20_000)
    values[12_345], values[777] = 50.0, -60.0
    curve = Curve()
    for start in range(0, len(values), 130):  # as it grows
        part = values[start : start + 130]
        curve.add(list(range(start, start + len(part))), part.tolist())
    assert series.SPANS / 4 < len(curve) <= series.SPANS
    assert curve.count.sum() == len(values)
    assert curve.total.sum() == pytest.approx(values.sum())
    assert (curve.high.max(), curve.low.min()) == (50.0, -60.0)
    spike = int(curve.high.argmax())
    assert curve.first[spike] <= 12_345 <= curve.last[spike]
    shown = curve.thinned(series.SPANS)
    assert set(np.diff(shown.first)) == {shown.width}  # early steps are no coarser than late ones
    for first, last, mean in zip(curve.first[:50], curve.last, curve.mean, strict=False):
        assert mean == pytest.approx(values[first : last + 1].mean())


def test_a_thinned_copy_leaves_the_curve_alone():
    curve = Curve()
    curve.add(list(range(500)), [float(i) for i in range(500)])
    copy = curve.thinned(20)
    assert len(copy) <= 20
    assert copy.count.sum() == 500
    assert len(curve) == 500
    assert curve.width == 1


def test_only_new_lines_are_read(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    metrics.update()
    assert metrics.curves == {}
    lines(file, training(range(1, 6)))
    with file.open("a") as out:
        out.write('{"step": 6, "G_GAN": 0.')  # being written
    metrics.update()
    assert metrics.step == 5
    seen = []
    original = series.parsed
    monkeypatch.setattr(series, "parsed", lambda found: seen.extend(found) or original(found))
    with file.open("a") as out:
        out.write("25}\n")
    metrics.update()
    assert metrics.curves["G_GAN"].mean.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0.25])
    assert [line for line in seen if line] == [b'{"step": 6, "G_GAN": 0.25}']


def test_damaged_lines_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps(line).encode() for line in training(range(1, 4))]
    bad = [
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"step": "7", "NCE": 1}',
        b'{"step": -1, "NCE": 1}',
        b'{"step": 2',
        b"3",
        b"",
        b'{"step": true, "NCE": 1}',
        b'}, {"step": 2, "NCE": 99}, {',
    ]
    file.write_bytes(b"\n".join([bad[0], good[0], *bad[1:5], good[1], *bad[5:], good[2]]) + b"\n")
    metrics = Metrics(file)
    metrics.update()
    assert metrics.curves["NCE"].last.tolist() == [1, 2, 3]
    assert metrics.curves["NCE"].mean.max() < 5


def test_values_that_are_not_finite_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    huge = 10**400
    lines(file, [{"step": 1, "G": "nan"}, {"step": 2, "G": "-inf"}, {"step": 3, "G": 2.0}, {"step": 4, "G": huge}])
    lines(file, [{"step": 5, "G": "word"}, {"step": 6, "G": True}, {"step": 7, "G": [1]}])
    metrics = Metrics(file)
    metrics.update()
    assert metrics.curves["G"].last.tolist() == [3]
    assert metrics.curves["G"].not_finite == 3


def test_steps_that_are_done_again_replace_the_old_ones(tmp_path):
    """A run that was killed continues from its last checkpoint."""
    file = tmp_path / "metrics.jsonl"
    lines(file, training(range(1, 31)))
    lines(file, [{"step": 30, "held_out_psnr_y": 1.0}])
    metrics = Metrics(file)
    metrics.update()
    assert metrics.validated is not None
    lines(file, [line | {"NCE": 7.0} for line in training(range(21, 26))])
    metrics.update()
    nce = metrics.curves["NCE"]
    assert nce.last.tolist() == list(range(1, 26))
    assert nce.mean[20:].tolist() == [7.0] * 5
    assert nce.mean[19] == pytest.approx(4.98)
    assert metrics.validated is None
    assert len(metrics.curves["held_out_psnr_y"]) == 0


def test_another_file_begins_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines(file, training(range(1, 31)))
    metrics = Metrics(file)
    metrics.update()
    file.unlink()
    lines(file, training(range(1, 4)))
    metrics.update()
    assert metrics.curves["NCE"].last.tolist() == [1, 2, 3]


def test_of_a_long_file_a_part_is_parsed_and_every_validation(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    held_out = {3, 5_000, 19_999}
    with file.open("w") as out:
        for line in training(range(1, 20_001)):
            out.write(json.dumps(line) + "\n")
            if line["step"] in held_out:
                out.write(json.dumps({"step": line["step"], "held_out_psnr_y": float(line["step"])}) + "\n")
    size = file.stat().st_size
    monkeypatch.setattr(series, "READ_ALL", size // 10)
    monkeypatch.setattr(series, "CHUNK", size // 100)
    parsed = []
    original = series.parsed
    monkeypatch.setattr(series, "parsed", lambda found: parsed.extend(found) or original(found))
    metrics = Metrics(file)
    metrics.update()
    assert 1_500 < len(parsed) < 3_000
    assert metrics.curves["held_out_psnr_y"].mean.tolist() == sorted(held_out)
    nce = metrics.curves["NCE"]
    assert nce.first[0] == 1
    assert np.diff(nce.first).max() < 400  # spread over the whole file
    assert nce.mean == pytest.approx(5 - (nce.first + nce.last) / 2000, abs=0.01)


def test_names_are_limited(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines(file, [{"step": 1, **{f"loss_{i}": 1.0 for i in range(5_000)}}])
    metrics = Metrics(file)
    metrics.update()
    assert len(metrics.curves) == series.CURVES
