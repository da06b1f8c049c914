"""`loss.weighting_options`: values for the keyword arguments of a weighting."""

import pytest

from fastnce.methods.weighting import find_weighting


def test_values_reach_the_function():
    assert find_weighting("monce", "eps=2, iterations=7, hard=false").keywords == {
        "eps": 2.0,
        "iterations": 7,
        "hard": False,
    }
    assert find_weighting("hdce").keywords == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("eps=1,eps=2", "eps is given twice"),
        ("eps", "write eps=VALUE, not 'eps'"),
        ("ep", "monce has no option 'ep'"),
        ("iterations=1.5", "iterations must be of type int"),
        ("hard=1", "hard must be of type bool"),
        ("iterations=0", "loss.weighting=monce: iterations must be at least 1"),
    ],
)
def test_wrong_values_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_weighting("monce", options)
