"""Recordings of the published implementations, and the replay program."""

from __future__ import annotations

import numpy as np
import pytest

from tests import replay
from tests.conftest import shared_folder

FOLDER = shared_folder()
FILES = sorted((FOLDER / "golden").glob("*.npz")) if FOLDER else []


@pytest.mark.skipif(not FILES, reason="no recordings here: set FASTNCE_SHARED to a folder with golden/")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recording(path):
    result = replay.replay(path)
    assert result.checks > 0
    assert result.worst <= 1.0, f"{result.where}: {result.worst:.3g} times its tolerance"


def nce_arrays(rows=6, dim=4, temperature=0.2):
    """Make a recording from the formula in NumPy."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, rows, dim)).astype(np.float32)
    logits = q.astype(np.float64) @ k.T.astype(np.float64) / temperature
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(np.diag(p))
    dq = (p @ k - k) / temperature / rows
    meta = f'{{"batch": 1, "patches": {rows}, "temperature": {temperature}, "negatives": "image"}}'
    return {"q": q, "k": k, "loss": loss, "dq": dq, "meta": np.frombuffer(meta.encode(), np.uint8)}


def test_main_counts_passes_failures_and_skips(tmp_path, capsys):
    good = nce_arrays()
    np.savez(tmp_path / "good.npz", **good)
    assert replay.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("1 passed, 0 failed\n")

    np.savez(tmp_path / "bad.npz", **{**good, "loss": good["loss"] * (1 + 1e-8)})
    meta = np.frombuffer(b'{"argv": ["--model", "unheard"], "losses": [], "optimizers": []}', np.uint8)
    np.savez(tmp_path / "other_step.npz", meta=meta)
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    assert replay.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED  bad" in out
    assert "FAILED  broken" in out
    assert "skipped other_step: not implemented: method unheard" in out
    assert out.endswith("1 passed, 2 failed, 1 skipped\n")


def test_main_requires_the_named_recordings(tmp_path, capsys):
    meta = np.frombuffer(b'{"argv": ["--model", "unheard"], "losses": [], "optimizers": []}', np.uint8)
    np.savez(tmp_path / "other_step.npz", meta=meta)
    assert replay.main([str(tmp_path), "--require", "other_step", "absent"]) == 1
    assert capsys.readouterr().out.endswith("0 passed, 2 failed\n")
    assert replay.main([str(tmp_path / "nowhere")]) == 2


def test_a_nan_is_a_failure(tmp_path):
    arrays = nce_arrays()
    arrays["dq"] = np.full_like(arrays["dq"], np.nan)
    np.savez(tmp_path / "nan.npz", **arrays)
    assert not replay.replay(tmp_path / "nan.npz").worst <= 1.0
