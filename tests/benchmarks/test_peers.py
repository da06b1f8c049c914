"""Losses of other projects are taken from their files and compared with ours."""

import pytest

from benchmarks import peers

OTHER = """
from somewhere import anything


class Loss(nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.scale = {scale} / opt.nce_T

    def forward(self, feat_q, feat_k):
        logits = feat_q @ feat_k.T * self.scale
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
"""


@pytest.mark.parametrize(("scale", "equal"), [(1.0, True), (1.1, False)])
def test_a_loss_of_a_file_is_compared(tmp_path, scale, equal):
    file = tmp_path / "loss.py"
    file.write_text(OTHER.format(scale=scale))
    losses = peers.providers([f"other={file}:Loss"], 32)
    (_, value, gradient, seconds), (name, other_value, other_gradient, _) = peers.compare(losses, 32, 1)
    assert (value, gradient, name) == (0, 0, "other")
    assert seconds > 0
    assert (other_value < 1e-4) == (other_gradient < 1e-4) == equal


def test_a_file_without_the_class_is_refused(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("")
    with pytest.raises(ValueError, match=r"empty\.py has no class PatchNCELoss"):
        peers.providers([f"x={file}"], 32)
