"""The loss API refuses every invalid argument with one sentence."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce, project_patches, sample_patch_ids
from fastnce.nce import Weights, patch_nce_layers


def refused(make, sentence):
    """Check that `make` raises a ValueError of one line that contains the sentence."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        make()
    assert "\n" not in str(caught.value)


NO_TENSORS = [(None, "None"), (0.5, "0.5"), ([[1.0]], "a list"), (np.ones((6, 4)), "a numpy.ndarray")]
ROWS = torch.zeros(6, 4)


def contrast(name, value):
    """Call `patch_nce` on ROWS with one more tensor."""
    options = {name: value} if name == "extra_keys" else {"weights": Weights(**{name: value})}
    return patch_nce(ROWS, ROWS, **options)


@pytest.mark.parametrize(("value", "name"), NO_TENSORS)
def test_values_that_are_not_tensors_are_refused(value, name):
    refused(lambda: patch_nce(value, ROWS), f"queries must be a tensor, (rows, dim), not {name}")
    refused(lambda: patch_nce(ROWS, value), f"keys must be a tensor, (rows, dim), not {name}")
    refused(lambda: PatchNCELoss()(value, ROWS), f"queries must be a tensor, (rows, dim), not {name}")
    refused(lambda: patch_nce_layers([[value]], [[ROWS]]), f"queries[0][0] must be a tensor, not {name}")
    refused(lambda: patch_nce_layers([[ROWS]], [[ROWS, value]]), f"keys[0][1] must be a tensor, not {name}")
    ids = [torch.arange(2)]
    refused(lambda: project_patches([value], ids), f"maps[0] must be a tensor, not {name}")
    refused(lambda: PatchSampleF()([value]), f"feats[0] must be a tensor, not {name}")
    refused(lambda: PatchNCEHead([3])([value], maps(3)), f"query_maps[0] must be a tensor, not {name}")
    refused(lambda: PatchNCEHead([3])(maps(3), [value]), f"key_maps[0] must be a tensor, not {name}")
    refused(lambda: PatchNCEHead([3]).draw_ids([value]), f"maps[0] must be a tensor, not {name}")
    if value is not None:
        for weight in ("extra_keys", "pair_log_weight", "pair_weight", "query_weight"):
            refused(lambda w=weight: contrast(w, value), f"{weight} must be a tensor, not {name}")
        refused(lambda: project_patches(maps(3), [value]), f"patch_ids[0] must be an int64 tensor, not {name}")


@pytest.mark.parametrize("name", ["extra_keys", "pair_log_weight", "pair_weight", "query_weight"])
def test_weights_of_a_wrong_dtype_or_device_are_refused(name):
    right = {"extra_keys": (3, 4), "query_weight": (6,)}.get(name, (6, 6))
    assert contrast(name, torch.zeros(right, dtype=torch.float16)).isfinite()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        wrong = torch.ones(right, dtype=dtype)
        refused(lambda w=wrong: contrast(name, w), f"{name} must have a floating dtype, not {dtype}")
    refused(
        lambda: contrast(name, torch.ones(right, device="meta")),
        f"{name} is on meta, queries are on cpu: move one of them",
    )


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, torch.tensor(2)])
def test_counts(value):
    """Counts are whole numbers of at least 1: 0 does not mean a default, and True is not 1."""
    for name, make in {
        "images": lambda: patch_nce(ROWS, ROWS, images=value),
        "locations": lambda: sample_patch_ids(value, 3),
        "patches": lambda: sample_patch_ids(9, value),
        "nc": lambda: PatchSampleF(nc=value),
        "in_channels[1]": lambda: PatchSampleF(in_channels=[3, value]),
        "dim": lambda: PatchNCEHead([3], dim=value),
        "directions": lambda: PatchNCEHead([3])(maps(3), maps(3), directions=value),
    }.items():
        refused(make, f"{name} must be ")
    refused(lambda: PatchNCEHead([3], patches=value), "patches must be ")
    refused(lambda: patch_nce_layers([[ROWS]], [[ROWS]], images=value), "images must be ")
    if value is not None:  # None means the batch size of the options, or one set of ids
        refused(lambda: PatchNCELoss()(ROWS, ROWS, images=value), "images must be ")
        refused(lambda: sample_patch_ids(9, 3, images=value), "images must be ")
    if value != 0 or isinstance(value, torch.Tensor):
        refused(lambda: PatchSampleF()(maps(3), value), "num_patches must be ")


def test_numpy_integers_are_accepted():
    rows = torch.randn(6, 4)
    assert patch_nce(rows, rows, images=np.int64(2)) == patch_nce(rows, rows, images=2)
    assert PatchSampleF(nc=np.int32(4))(maps(3), np.int64(5))[0][0].shape == (10, 4)


BAD_TEMPERATURES = [0, -0.1, float("nan"), float("inf"), 1e-31, 1e31, True, "0.07", None]


@pytest.mark.parametrize("value", BAD_TEMPERATURES, ids=str)
def test_temperatures(value):
    for make in (
        lambda: patch_nce(ROWS, ROWS, temperature=value),
        lambda: patch_nce_layers([[ROWS, ROWS]], [[ROWS, ROWS]], temperature=[0.07, value]),
        lambda: PatchNCELoss(temperature=value),
        lambda: PatchNCEHead([3], temperature=value),
        lambda: PatchNCEHead([3, 4], temperature=[0.07, value]),
    ):
        refused(make, "temperature must be ")


def test_a_temperature_that_is_a_tensor():
    """Functions take it. Modules hold numbers, and say how to learn T."""
    t = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    for make in (
        lambda: PatchNCELoss(temperature=t),
        lambda: PatchNCELoss(t),
        lambda: PatchNCEHead([3], temperature=[t]),
    ):
        refused(make, "to learn it, pass the tensor to patch_nce, or use PatchNCEHead with learn_temperature=True")
    for given, why in (
        (torch.ones(2), "temperature must be a number or a tensor of one element, not (2,)"),
        (torch.ones((), dtype=torch.int64), "temperature must have a floating dtype, not torch.int64"),
        (torch.zeros(()), "temperature must be from 1e-30 to 1e+30, not 0"),
        (torch.tensor(-0.1), "temperature must be from 1e-30 to 1e+30, not -0.1"),
        (torch.tensor(torch.nan), "temperature must be from 1e-30 to 1e+30, not nan"),
        (torch.ones((), device="meta"), "temperature is on meta, queries are on cpu: move one of them"),
    ):
        refused(lambda given=given: patch_nce(ROWS, ROWS, temperature=given), why)
        refused(lambda given=given: patch_nce_layers([[ROWS]], [[ROWS]], temperature=[given]), why)
    refused(lambda: patch_nce_layers([[ROWS]], [[ROWS]], temperature=[t, t]), "one number or 1, not 2")
    refused(lambda: PatchNCEHead([3], temperature=2.0, learn_temperature=True), "must begin from 0.01 to 1, not 2")
    q, k = torch.randn(2, 6, 4, dtype=torch.float64)
    for number in (np.float32(0.3), np.float64(0.3), 1):
        assert patch_nce(q, k, temperature=number) == patch_nce(q, k, temperature=float(number))
    assert PatchNCEHead([3, 3], temperature=np.array([0.1, 0.2])).temperatures == [0.1, 0.2]


def test_choices_are_checked_in_the_constructor():
    for name, make in {
        "negatives": lambda wrong: PatchNCEHead([3], negatives=wrong),
        "negatives ": lambda wrong: PatchNCELoss(negatives=wrong),
        "negatives  ": lambda wrong: patch_nce(ROWS, ROWS, negatives=wrong),
        "implementation": lambda wrong: PatchNCEHead([3], implementation=wrong),
        "implementation ": lambda wrong: PatchSampleF(implementation=wrong),
        "implementation  ": lambda wrong: PatchNCELoss(implementation=wrong),
        "init_type": lambda wrong: PatchSampleF(init_type=wrong),
        "init_type ": lambda wrong: PatchNCEHead([3], init_type=wrong),
        "reduction": lambda wrong: patch_nce(ROWS, ROWS, reduction=wrong),
    }.items():
        for wrong in ("images", 0, ["image"]):
            refused(lambda make=make, wrong=wrong: make(wrong), f"{name.strip()} must be ")
    refused(lambda: PatchNCEHead([3], negatives="images"), 'negatives must be "image" or "batch", not \'images\'')
    refused(lambda: PatchSampleF(init_gain="0.02"), "init_gain must be a number")
    refused(lambda: patch_nce_layers([[ROWS]] * 2, [[ROWS]] * 2, extra_keys="others"), "extra_keys must be a list")


def options(**changes):
    opt = {"nce_T": 0.1, "batch_size": 2, "nce_includes_all_negatives_from_minibatch": False, **changes}
    return SimpleNamespace(**{name: value for name, value in opt.items() if value is not None})


def test_the_drop_in_loss_reads_its_options():
    q, k = torch.randn(2, 6, 4, dtype=torch.float64)
    expected = patch_nce(q, k, temperature=0.1, reduction="none")
    assert torch.equal(PatchNCELoss(0.1)(q, k), expected)
    for name in ("nce_T", "batch_size", "nce_includes_all_negatives_from_minibatch"):
        refused(lambda name=name: PatchNCELoss(options(**{name: None})), f"opt has no {name}")
    every = "nce_includes_all_negatives_from_minibatch"
    refused(lambda: PatchNCELoss(options(**{every: "False"})), f"opt.{every} must be True or False, not 'False'")
    refused(lambda: PatchNCELoss(options(batch_size=0)), "opt.batch_size must be at least 1, not 0")
    refused(lambda: PatchNCELoss(options(nce_T=-1.0)), "temperature must be from 1e-30 to 1e+30, not -1.0")
    refused(lambda: PatchNCELoss(options(), temperature=0.2), "not both")
    refused(lambda: PatchNCELoss(0.1, negatives="batch"), "not both")
    refused(lambda: PatchNCELoss("0.1"), "opt has no nce_T")
    # As published, batch_size is not used with negatives of the whole minibatch, so the last batch may be smaller.
    everything = options(nce_includes_all_negatives_from_minibatch=True, batch_size=4)
    assert torch.equal(PatchNCELoss(everything)(q, k), expected)


def maps(*channels, images=2, side=4):
    return [torch.randn(images, c, side, side) for c in channels]


@pytest.mark.parametrize("use_mlp", [True, False])
def test_both_sides_of_a_head_must_match(use_mlp):
    head = PatchNCEHead([3, 5], dim=4, patches=6, use_mlp=use_mlp)
    right = maps(3, 5)
    assert head(right, maps(3, 5)).isfinite()
    for other in (
        [right[0], torch.randn(2, 5, 8, 2)],  # the same number of locations
        [right[0], torch.randn(2, 5, 4, 2)],
        [right[0], torch.randn(1, 5, 4, 4)],
        [torch.randn(2, 3, 8, 8), right[1]],
    ):
        for sides in ((right, other), (other, right)):
            refused(lambda sides=sides: head(*sides), "query and key map ")
            refused(lambda sides=sides: head(*sides, patch_ids=[torch.arange(2)] * 2), "query and key map ")
    fewer = [right[0], torch.randn(1, 5, 4, 4)]
    refused(lambda: head(fewer, fewer), "query map 1 has 1 images, query map 0 has 2")
    refused(lambda: head(right, right[:1]), "key_maps must be a list of maps, one per layer: 2, not 1")
    refused(
        lambda: head(right[0], right), "query_maps must be a list of maps, one per layer, not a torch.float32 tensor"
    )
    refused(lambda: head(right, [m.to("meta") for m in right]), "key_maps are on meta, query_maps on cpu")
    refused(lambda: head(right, [right[0], right[1].to("meta")]), "key_maps[1] is on meta, key_maps[0] on cpu")
    refused(lambda: head(right, right, directions=3), "2 images cannot be shared equally among directions=3")
    if use_mlp:
        refused(lambda: head(maps(3, 6), right), "MLP 1 takes 5 channels, map 1 has 6")
        refused(lambda: head(right, maps(3, 6)), "MLP 1 takes 5 channels, map 1 has 6")
        other = PatchNCEHead([3, 6], dim=4)  # for the domain of the keys
        assert head(right, maps(3, 6), key_projector=other).isfinite()
        refused(lambda: head(right, right, key_projector=PatchSampleF()), "the projector has MLPs for 0")
        refused(lambda: head(right, right, key_projector="other"), "key_projector must be a PatchSampleF or None")
    else:
        refused(lambda: head(right, maps(3, 6)), "query and key map 1 must have the same shape")
        refused(lambda: head(right, [right[0], right[1].double()]), "must have one dtype")


def test_ids_of_a_head():
    head, sides = PatchNCEHead([3], dim=4), (maps(3, images=4), maps(3, images=4))
    one = torch.arange(5)

    def loss(patch_ids, directions=2):
        return lambda: head(*sides, patch_ids=patch_ids, directions=directions)

    torch.testing.assert_close(loss([[one], [one.expand(2, -1)]])(), loss([one])())
    refused(loss([[one]]), "patch_ids must be a list of lists, one per direction: 2, not 1")
    refused(loss([[one], [one, one]]), "patch_ids[1] must be a list of tensors, one per layer: 1, not 2")
    refused(loss([[one], [one[:3]]]), "patch_ids[1][0] must have as many patches as direction 0")
    # four sets for four images, but not two per direction
    refused(loss([[one.expand(1, -1)], [one.expand(3, -1)]]), "patch_ids[0][0] must be (patches,) or (2, patches)")
    refused(loss([[one], [one.float()]]), "patch_ids[1][0] must be an int64 tensor")
    refused(loss([[one.tolist()]], 1), "patch_ids[0][0] must be an int64 tensor, not a list")
    refused(loss([one.int()], 1), "patch_ids[0] must be int64 on cpu, not torch.int32")
    refused(loss([one, one], 1), "patch_ids must be a list of tensors, one per map: 1, not 2")
    refused(loss(one, 1), "patch_ids must be a list of")


@pytest.mark.parametrize("whole", [np.int32, np.uint8, np.int64])
def test_ids_of_the_drop_in_sampler_are_whole_numbers(whole):
    sampler, feats = PatchSampleF(nc=4, in_channels=[3]), maps(3)
    expected, _ = sampler(feats, 4, [torch.tensor([1, 7, 3])])
    for ids in (np.array([1, 7, 3], dtype=whole), torch.tensor([1, 7, 3], dtype=torch.int32), [1, 7, 3]):
        rows, taken = sampler(feats, 4, [ids])
        assert torch.equal(rows[0], expected[0])
        assert taken[0].dtype == torch.int64
    for wrong in ([0.5, 1.7], np.array([1.0]), torch.tensor([True, False]), torch.tensor([1 + 2j])):
        refused(lambda wrong=wrong: sampler(feats, 4, [wrong]), "patch_ids[0] must hold whole numbers, not torch.")
    for wrong in (["one"], [None], [[1, [2]]], 3):
        refused(lambda wrong=wrong: sampler(feats, 4, wrong), "patch_ids must hold whole numbers, one set per map")
    refused(lambda: sampler(feats, 4, [[1], [2]]), "patch_ids must hold one set per map: 1 maps, 2 sets")
    refused(lambda: sampler(feats, 4, [[]]), "patch_ids[0] must be (patches,) or (2, patches), not (0,)")
    refused(lambda: sampler(feats, 4, [[16]]), "patch_ids[0] must be in 0..15, but range from 16 to 16")


def mlp(channels=3, hidden=6, dim=4):
    return [torch.randn(shape) for shape in ((hidden, channels), (hidden,), (dim, hidden), (dim,))]


def test_maps_and_mlps_must_match():
    x, ids = maps(3)[0], torch.arange(5)
    right = mlp()
    hidden = (x.flatten(2).mT[:, :5].flatten(0, 1) @ right[0].T + right[1]).relu()
    rows = hidden @ right[2].T + right[3]
    expected = rows / (rows.norm(dim=1, keepdim=True) + 1e-7)
    torch.testing.assert_close(project_patches([x], [ids], [right])[0], expected)
    for place, shape in ((1, (4,)), (2, (4, 5)), (3, (6,)), (0, (6,)), (2, (4,))):
        wrong = [torch.randn(shape) if i == place else t for i, t in enumerate(right)]
        refused(
            lambda wrong=wrong: project_patches([x], [ids], [wrong]), "mlps[0] must be (dim, 3), (dim,), (dim, dim)"
        )
    for place in range(4):
        other = [t.double() if i == place else t for i, t in enumerate(right)]
        refused(lambda other=other: project_patches([x], [ids], [other]), "mlps must have one dtype")
        there = [t.to("meta") if i == place else t for i, t in enumerate(right)]
        refused(lambda there=there: project_patches([x], [ids], [there]), "mlps[0] is on meta, its map on cpu")
        array = [t.numpy() if i == place else t for i, t in enumerate(right)]
        refused(lambda array=array: project_patches([x], [ids], [array]), "mlps[0] must be a tensor")
    refused(lambda: project_patches([x], [ids], [right[:3]]), "mlps[0] must be (weight1, bias1, weight2, bias2)")
    refused(lambda: project_patches([x], [ids], [right, right]), "mlps must be a list of MLPs, one per map: 1, not 2")
    refused(lambda: project_patches([x], [ids], [mlp(5)]), "MLP 0 takes 5 channels, map 0 has 3")
    refused(lambda: project_patches([x], [ids, ids]), "patch_ids must be a list of tensors, one per map: 1, not 2")
    refused(lambda: project_patches(x, [ids]), "maps must be a list of maps, one per layer")
    for wrong in (x.int(), x.cfloat(), x[0], x[:0], x[:, :, :0]):
        refused(lambda wrong=wrong: project_patches([wrong], [ids]), "maps[0] must ")
        refused(lambda wrong=wrong: PatchSampleF()([wrong]), "feats[0] must ")
        refused(lambda wrong=wrong: PatchSampleF()([wrong], 0), "feats[0] must ")


def test_directions_and_layers_must_match():
    q = torch.randn(6, 4)
    refused(lambda: patch_nce_layers(torch.randn(2, 6, 4), [[q]]), "queries must be a list of lists, one per direction")
    refused(lambda: patch_nce_layers([q], [q]), "queries[0] must be a list of tensors, one per layer")
    refused(lambda: patch_nce_layers([], []), "queries must be a list of lists, one per direction, not empty")
    refused(lambda: patch_nce_layers([[q], [q.double()]], [[q], [q.double()]]), "one shape and dtype")
    refused(lambda: patch_nce_layers([[q, q.to("meta")]], [[q, q.to("meta")]]), "queries are on cpu and meta")
    refused(
        lambda: patch_nce_layers([[q]], [[q]], extra_keys=[[q.int()]]), "extra_keys[0][0] must have a floating dtype"
    )
    refused(lambda: patch_nce_layers([[q]], [[q.to("meta")]]), "keys is on meta, queries are on cpu")


def test_checks_can_be_traced():
    """The checks cause no graph break."""
    rows, weight = torch.randn(2, 6, 4), torch.rand(2, 3, 3)
    weights = Weights(pair_weight=weight, query_weight=weight.flatten()[:6])
    options = {"images": 2, "weights": weights, "extra_keys": rows[0]}
    loss = torch.compile(lambda q, k: patch_nce(q, k, **options), backend="eager", fullgraph=True)
    torch.testing.assert_close(loss(*rows), patch_nce(*rows, **options))
    head, sides, ids = PatchNCEHead([3], dim=4), maps(3) * 2, [torch.arange(6)]
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled([sides[0]], [sides[1]], patch_ids=ids), head([sides[0]], [sides[1]], patch_ids=ids)
    )
