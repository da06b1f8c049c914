"""PatchSampleF creates and loads either all of its MLPs or none."""

from __future__ import annotations

import pytest
import torch

from fastnce import PatchSampleF


def maps(*channels, side=4):
    return [torch.randn(2, c, side, side) for c in channels]


def test_a_refused_call_creates_no_mlps():
    """The first call that is not refused creates the MLPs."""
    right = maps(3, 5)
    for arguments in (
        ([*maps(3), torch.randn(2, 5, 4)],),
        ([right[0], right[1].int()],),
        ([right[0], right[1].to("meta")],),
        (right, -1),
        (right, 2.5),
        (right, 4, [[1], [16]]),
        (right, 4, [[1], [0.5]]),
        (right, 4, [[1]]),
    ):
        sampler = PatchSampleF(nc=4)
        with pytest.raises(ValueError, match=" must | move one"):
            sampler(*arguments)
        assert not sampler.mlp_init
        assert not list(sampler.parameters())
        assert sampler(right, 4)[0][1].shape == (8, 4)
        with pytest.raises(ValueError, match="3 layers were given, but the projector has MLPs for 2"):
            sampler(right + maps(2), 4)
        with pytest.raises(ValueError, match="MLP 1 takes 5 channels, map 1 has 6"):
            sampler(maps(3, 6), 0)


def test_one_seed_gives_the_published_weights():
    """The MLPs are drawn before the locations, layer by layer."""
    torch.manual_seed(3)
    first = PatchSampleF(nc=4)
    first(maps(3, 5), 6)  # (the maps are drawn first)
    torch.manual_seed(3)
    maps(3, 5)
    again = PatchSampleF(nc=4, in_channels=[3, 5])
    for name, weight in again.state_dict().items():
        assert torch.equal(first.state_dict()[name], weight)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("change", ["missing", "unexpected", "size", "width", "hole", "no tensor"])
def test_a_refused_load_changes_nothing(built, change):
    state = dict(PatchSampleF(nc=4, in_channels=[3, 5]).state_dict())
    changes = {
        "unexpected": {"mlp_0.0.scale": torch.ones(4)},
        "size": {"mlp_1.2.weight": torch.ones(4, 5)},
        "width": {
            f"mlp_1.{n}": torch.ones(s)
            for n, s in [("0.weight", (6, 5)), ("0.bias", 6), ("2.weight", (6, 6)), ("2.bias", 6)]
        },
        "no tensor": {"mlp_1.0.weight": None},
    }
    state |= changes.get(change, {})
    for name in {"missing": ["mlp_1.2.bias"], "hole": [name for name in state if name.startswith("mlp_0")]}.get(
        change, []
    ):
        del state[name]
    sampler = PatchSampleF(nc=7, in_channels=[3, 5] if built else None)
    before = {name: tensor.clone() for name, tensor in sampler.state_dict().items()}
    with pytest.raises(RuntimeError, match="mlp_"):
        sampler.load_state_dict(state)
    assert (sampler.nc, sampler.mlp_init) == (7, built)
    assert before.keys() == sampler.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sampler.state_dict().items())
    assert sampler(maps(3, 5), 4)[0][0].shape == (8, 7)
    inside = torch.nn.ModuleDict({"F": PatchSampleF(nc=7)})  # as a part of another module
    with pytest.raises(RuntimeError, match="mlp_"):
        inside.load_state_dict({f"F.{name}": tensor for name, tensor in state.items()})
    assert (inside["F"].nc, inside["F"].mlp_init) == (7, False)


def test_a_load_that_is_not_strict():
    """Matching tensors are loaded, as in nn.Module; MLPs cannot be created from a part of their tensors."""
    source = PatchSampleF(nc=4, in_channels=[3])
    state = dict(source.state_dict())
    kept = state.pop("mlp_0.2.bias")
    built = PatchSampleF(nc=4, in_channels=[3])
    built.mlp_0[2].bias.data.fill_(9.0)
    assert built.load_state_dict(state, strict=False).missing_keys == ["mlp_0.2.bias"]
    assert torch.equal(built.mlp_0[0].weight, source.mlp_0[0].weight)
    assert built.mlp_0[2].bias.tolist() == [9.0] * 4
    with pytest.raises(RuntimeError, match="weight and bias of mlp_0.0"):
        PatchSampleF().load_state_dict(state, strict=False)
    unbuilt = PatchSampleF()
    extra = {**state, "mlp_0.2.bias": kept, "other": torch.ones(1)}
    with pytest.raises(RuntimeError, match="other"):
        unbuilt.load_state_dict(extra)
    assert not unbuilt.mlp_init
    assert unbuilt.load_state_dict(extra, strict=False).unexpected_keys == ["other"]
    assert unbuilt.nc == 4
    assert torch.equal(unbuilt.mlp_0[2].bias, kept)
