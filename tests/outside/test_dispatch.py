"""`python -m fastnce.accelerate` on unedited checkouts of CUT, DCLGAN, DCD-GAN and their forks."""

import pytest

from tests.outside.forks import IMPORTED, TRAINED, Fork, import_classes, table_of, train, write_pictures


def assert_table(fork: Fork, found: dict[str, dict[str, str]]) -> None:
    for kind, expected in (("replaced", fork.replaced), ("kept", fork.kept)):
        assert found[kind].keys() == expected.keys()
        for name, beginning in expected.items():
            assert found[kind][name].startswith(beginning)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_checkout_trains_alike(name, tmp_path):
    """Three steps of its own train.py print the same losses, and leave the same weights."""
    fork = TRAINED[name]
    fork.path()
    pictures = write_pictures(tmp_path / "data", 3 * fork.batch)
    fast, plain = (train(fork, pictures, tmp_path / str(way), accelerated=way) for way in (True, False))
    assert fast.finished.returncode == plain.finished.returncode == 0, fast.finished.stderr + plain.finished.stderr
    assert_table(fork, table_of(fast.finished))
    assert len(plain.losses) == 3
    assert fast.losses == plain.losses
    assert fast.weights.keys() == plain.weights.keys()
    compared = 0
    for key, value in plain.weights.items():
        if value.dim() > 1:  # a bias before a norm has no effect: its gradient is rounding, which Adam scales to 1
            difference = (fast.weights[key] - value).abs().max().item()
            assert difference <= (1e-12 if fork.gradients else 1e-8) * value.abs().max().item(), key
            compared += 1
    assert compared > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTED)
def test_which_classes_of_a_checkout_are_replaced(name, tmp_path):
    fork = IMPORTED[name]
    finished = import_classes(fork, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert_table(fork, table_of(finished))
