"""Terms of hDCE with SRC, NEGCUT, QS-Attn and F-LSeSim against plain writings of their formulas; their options."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.engine.loop import train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.methods import Batch, Draws, hneg_src
from fastnce.methods.hneg_src import HnegSRCOptions, gamma_at
from fastnce.methods.jitter import color_jitter
from fastnce.nce.negatives import NegativeGenerator, contrast_with
from fastnce.nce.relations import relation_loss
from fastnce.nce.selection import query_attention, route
from fastnce.nce.spatial import contrast_similarity, self_similarity, spatial_loss
from fastnce.networks.vgg import KEY, VGG16
from tests.engine.test_engine import Toy, small_method
from tests.methods.test_methods_more import build, pictures
from tests.vgg import narrow_weights


def rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_relations_are_compared_by_jensen_and_shannon():
    q, k = rows(2, 5, 3), rows(2, 5, 3)
    wanted = 0.0
    for image in range(2):
        p, s = ((x[image] @ x[image].T).softmax(0) for x in (q, k))
        m = (p + s) / 2
        wanted += float((p * (p / m).log()).sum() + (s * (s / m).log()).sum()) / 2 / 2
    q.requires_grad_()
    k.requires_grad_()
    found = relation_loss(q.flatten(0, 1), k.flatten(0, 1), images=2)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-12)
    of_q, of_k = torch.autograd.grad(found, (q, k), allow_unused=True)
    assert of_q.abs().max() > 0
    assert of_k is None


def test_gamma_moves_to_its_last_value():
    options = HnegSRCOptions(gamma=50.0, gamma_min=10.0, curriculum=True, step_gamma_epoch=3)
    assert [gamma_at(options, epoch, 4) for epoch in range(1, 5)] == [40.0, 30.0, 20.0, 1.0]
    options.step_gamma_epoch = 0
    assert gamma_at(options, 4, 4) == 10.0
    options.curriculum = False
    assert gamma_at(options, 4, 4) == 50.0


def test_gamma_changes_the_loss_of_the_next_step():
    method, batch = build("hneg-src", gamma=100.0, gamma_min=0.01, curriculum=True), pictures()
    losses = []
    for epoch in (1, 10):
        method.begin_epoch(epoch, 10)
        torch.manual_seed(0)
        losses.append(method.g_loss(batch, method.generate(batch, Draws()), Draws())[1]["HDCE"])
    assert losses[0] > losses[1] + 0.01


def test_the_loop_tells_each_epoch_also_after_a_stop(tmp_path):
    method = small_method()
    seen = []
    method.begin_epoch = lambda *epoch: seen.append(epoch)
    optim = OptimOptions(n_epochs=2, n_epochs_decay=1)
    train(method, Toy(), optim, RunOptions(steps=3, log_every=1), tmp_path, quiet=True)
    assert seen == [(1, 3), (2, 3)]
    train(method, Toy(), optim, RunOptions(log_every=1), tmp_path, quiet=True)
    assert seen[2:] == [(2, 3), (3, 3)]


def test_negatives_that_are_given():
    q, k, negatives = rows(6, 4), rows(6, 4), rows(2, 3, 4).requires_grad_()
    found = contrast_with(q, k, negatives, 0.2)
    for row in range(6):
        logits = torch.stack([q[row] @ k[row], *(q[row] @ n for n in negatives[row // 3])]) / 0.2
        assert float(found[row]) == pytest.approx(float(F.cross_entropy(logits, torch.tensor(0))), rel=1e-12)
    assert torch.autograd.grad(found.sum(), negatives)[0].abs().min() > 0


def test_the_generator_of_negatives():
    network = NegativeGenerator(2, dim=4, noise=3).double()
    assert list(network.state_dict())[:2] == ["mlp_0.0.weight", "mlp_0.0.bias"]
    codes = [rows(2, 4).requires_grad_() for _ in range(2)]
    noise = torch.randn(2, 5, 3, dtype=torch.float64)
    network.draw = lambda images, count, like: noise
    made = network(codes, 5)
    both = torch.cat([codes[1][1], noise[1, 4]])
    plain = network.mlp_1(both)
    torch.testing.assert_close(made[1][1, 4], plain / (plain.norm() + 1e-7))
    assert torch.autograd.grad(made[0].sum(), codes[0])[0].abs().max() > 0  # unlike LearnedNegatives


def test_a_running_average_ignores_bad_steps():
    method = build("negcut", momentum=0.75, learn_temperature=True)
    first = method.head.learned_temperature.log_scale.item()
    with torch.no_grad():
        weights = dict(method.head.named_parameters())
        for name, mean in method.average.named_parameters():
            mean.fill_(1.0)
            weights[name].fill_(5.0)
    method.finish(torch.tensor(True))
    assert all((mean == 1).all() for mean in method.average.parameters())
    method.finish(torch.tensor(False))
    assert all((mean == 2).all() for mean in method.average.parameters())
    assert weights.keys() - dict(method.average.named_parameters()).keys() == {"learned_temperature.log_scale"}
    assert method.head.learned_temperature.log_scale.item() == first


@pytest.mark.parametrize("preset", ["hneg-src", "negcut", "qsattn"])
def test_a_learned_temperature_has_the_slope_of_the_loss(preset, monkeypatch):
    monkeypatch.setattr(hneg_src, "softplus", lambda loss: loss)  # show what is differentiated
    method = build(preset, learn_temperature=True).double()
    batch = Batch(*(x.double() for x in pictures()))
    log_scale = method.head.learned_temperature.log_scale

    def loss() -> Tensor:
        torch.manual_seed(0)
        losses = method.g_loss(batch, method.generate(batch, Draws()), Draws())[1]
        return losses["HDCE" if preset == "hneg-src" else "NCE"]

    (slope,) = torch.autograd.grad(loss(), log_scale)
    with torch.no_grad():
        higher = (log_scale.add_(1e-4), loss())[1]
        lower = (log_scale.sub_(2e-4), loss())[1]
    assert slope.item() == pytest.approx((higher - lower).item() / 2e-4, rel=1e-5)
    assert abs(slope.item()) > 1e-3


@pytest.mark.parametrize("kind", ["global", "local", "local_global"])
def test_attention_as_in_the_paper(kind):
    source, other = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    ids, attention = query_attention(source, 6, kind, "paper")
    routed = route(other, ids, attention, kind, "paper")
    for image in range(2):
        f, g = (x[image].flatten(1).T for x in (source, other))  # (locations, channels)
        whole = (f @ f.T).softmax(1)
        padded = [F.pad(x[image], (3, 3, 3, 3)) for x in (source, other)]
        windows = [
            torch.stack([x[:, y : y + 7, z : z + 7].flatten(1).T for y in range(4) for z in range(5)]) for x in padded
        ]  # (locations, 49, channels)
        near = torch.stack([(windows[0][i] @ f[i]).softmax(0) for i in range(20)])
        chosen = whole if kind == "global" else near
        entropy = -(chosen * chosen.log()).sum(1)
        assert ids[image].tolist() == entropy.argsort()[:6].tolist()
        for place, i in enumerate(ids[image].tolist()):
            wanted = near[i] @ windows[1][i] if kind == "local" else whole[i] @ g
            torch.testing.assert_close(routed[image, :, place, 0], wanted)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("window", [3, 5, 9])
def test_self_similarity(window, normalised):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    ids = torch.tensor([0, 13, 47, 20])
    found = self_similarity(x, ids, window, normalised)
    centred = x - x.mean((2, 3), keepdim=True)
    centred = F.normalize(centred, dim=1) if normalised else centred / math.sqrt(3)
    for image in range(2):
        for place, i in enumerate(ids.tolist()):
            row, column = divmod(i, 8)
            keys = centred[image]
            if window < 6:
                top, left = (min(max(p - window // 2, 0), n - window) for p, n in ((row, 6), (column, 8)))
                keys = keys[:, top : top + window, left : left + window]
            wanted = torch.einsum("c,cyx->yx", centred[image, :, row, column], keys).flatten()
            torch.testing.assert_close(found[image, place], wanted if normalised else (wanted / 10).tanh())


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["cos", "l1"])
def test_the_spatial_loss_compares_the_largest_similarities(kind, normalised):
    source, target = torch.randn(2, 2, 3, 9, dtype=torch.float64)
    found = spatial_loss(source, target, kind, normalised)
    distance = (lambda d: d.abs()) if normalised else (lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5))
    parts = []
    for s, t in zip(source.flatten(0, 1), target.flatten(0, 1), strict=True):
        kept = t >= t.sort(descending=True).values[2]
        s, t = s * kept, t * kept
        parts.append(distance(1 - s @ t / (s.norm() * t.norm())) if kind == "cos" else distance(9 / 2 * (s - t)).mean())
    assert float(found) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-9)


def test_locations_find_each_other_among_those_of_another_image():
    s, t, o = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    found = contrast_similarity(s, t, o, 0.3)
    a, b, c = (F.normalize(x, dim=2) for x in (s, t, o))
    parts = [
        F.cross_entropy(torch.cat([a[n] @ b[n].T, a[n] @ c[n].T, b[n] @ c[n].T], 1) / 0.3, torch.arange(4))
        for n in range(2)
    ]
    assert float(found) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-12)


def test_colours_change_as_colorsys_says():
    x = torch.rand(2, 3, 3, 4, dtype=torch.float64)
    still = torch.full((2, 4), 0.5)
    torch.testing.assert_close(color_jitter(x * 2 - 1, still), x * 2 - 1)
    turned = color_jitter(x * 2 - 1, torch.tensor([[0.5, 0.5, 0.5, 0.9]] * 2, dtype=torch.float64))
    for image, y, z in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[image, :, y, z].tolist())
        wanted = colorsys.hsv_to_rgb((hue + 0.8 * 0.3) % 1, saturation, value)
        assert (turned[image, :, y, z] + 1).div(2).tolist() == pytest.approx(wanted, abs=1e-9)
    bright = color_jitter(x - 1, torch.tensor([[1.0, 0.5, 0.5, 0.5]] * 2, dtype=torch.float64))
    torch.testing.assert_close(bright, 1.5 * x - 1)
    flat = color_jitter(x * 2 - 1, torch.tensor([[0.5, 0.5, 0.0, 0.5]] * 2, dtype=torch.float64))
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(flat, (x + grey) - 1, atol=1e-6, rtol=0)


def test_vgg_reads_both_kinds_of_files_and_names_what_is_wrong():
    weights = narrow_weights()
    released = {f"relu1_1.{KEY.fullmatch(key)[1]}.{KEY.fullmatch(key)[2]}": w for key, w in weights.items()}
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    one, other = (VGG16(13, w)(x, [1, 12]) for w in (weights, released))
    assert [m.shape[1:] for m in one] == [(3, 32, 32), (6, 2, 2)]
    assert all(torch.equal(m, n) for m, n in zip(one, other, strict=True))
    first = (((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
             / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))  # fmt: skip
    plain = F.conv2d(first, weights["features.0.weight"], weights["features.0.bias"], padding=1).relu()
    torch.testing.assert_close(VGG16(1, weights)(x, [0])[0], plain)
    with pytest.raises(ValueError, match=r"^FILE holds no VGG16: features\.28 is not there$"):
        VGG16(13, {key: w for key, w in weights.items() if "28" not in key}, "FILE")
    with pytest.raises(ValueError, match=r"features\.2 are \(3, 1, 3, 3\) and \(3,\), not \(3, 3, 3, 3\)"):
        VGG16(13, weights | {"features.2.weight": torch.rand(3, 1, 3, 3)}, "FILE")


@pytest.mark.parametrize("preset", ["hneg-src", "qsattn", "fsesim"])
def test_a_batch_is_the_mean_of_its_images(preset):
    method = build(preset, pool_size=0)
    batch, layers = pictures(2), len(method.layers)
    ids = [torch.arange(12)] * (3 if preset == "qsattn" else layers)
    if preset == "fsesim":
        ids = [ids[0], torch.arange(9), torch.arange(9)]
    draws = Draws(patch_ids=[ids, ids])

    def losses(part: Batch) -> dict[str, Tensor]:
        return method.g_loss(part, method.generate(part, draws), draws)[1]

    whole, parts = losses(batch), [losses(Batch(batch.a[i : i + 1], batch.b[i : i + 1])) for i in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("hneg-src", {"weighting": "monce"}, "loss.weighting=monce has no effect in hneg-src"),
        ("hneg-src", {"lambda_nce": 0.0}, "loss.lambda_src=1.0 compares codes that only hDCE trains"),
        ("negcut", {"symmetric": True}, "loss.symmetric=True has no effect in negcut"),
        ("negcut", {"projector": "sample"}, "loss.projector=sample has no effect in negcut"),
        ("negcut", {"lambda_nce": 0.0}, "loss.lambda_nce must be above 0"),
        ("negcut", {"patches": 1}, "loss.patches"),
        ("qsattn", {"selection": "attention"}, "has no effect in qsattn, which has loss.attention"),
        ("fsesim", {"jitter": True}, "loss.jitter=true needs loss.learned=true"),
        ("fsesim", {"vgg_weights": "nowhere.pth"}, "nowhere.pth: no such file"),
        ("fsesim", {"network": {"in_channels": 2}}, "network.in_channels must be 1 or 3, not 2"),
        ("lsesim", {"lambda_identity": 1.0, "network": {"in_channels": 1}}, "must be equal, or both weights 0"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(preset, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(preset, **changes)
    assert "\n" not in str(caught.value)


def test_spatial_losses_need_trained_weights_and_large_crops():
    method = build("lsesim")
    with pytest.raises(ValueError, match="leave fewer than 2x2 locations at ReLU 9"):
        method.check(1, 12, 16)
    method.options.vgg_weights = ""
    with pytest.raises(ValueError, match="name the file of its weights with loss.vgg_weights"):
        method.check(1, 32, 32)


@pytest.mark.parametrize("preset", ["hneg-src", "negcut"])
def test_the_temperature_may_be_learned(preset):
    """The losses are those of the same temperature as a constant, and the temperature gets a gradient."""
    learned, batch = build(preset, nce_layers=[0, 4], learn_temperature=True, temperature=0.2), pictures(2)
    constant = build(preset, nce_layers=[0, 4], temperature=0.2)
    constant.load_state_dict(learned.state_dict(), strict=False)
    draws = Draws()
    outputs = learned.generate(batch, draws)
    torch.manual_seed(1)
    loss, _ = learned.g_loss(batch, outputs, draws)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, constant.g_loss(batch, constant.generate(batch, draws), draws)[0])
    (gradient,) = torch.autograd.grad(loss, list(learned.head.learned_temperature.parameters()))
    assert gradient.abs().max() > 0


def test_a_grid_is_contrasted_whole():
    method = build("hneg-src", nce_layers=[0, 4], projector="reshape", patches=3)
    maps, _, _ = method.maps(method.generate(pictures(), Draws()), Draws())
    assert [len(ids) for ids in method._shared_ids(maps, Draws())] == [16, 16]


@pytest.mark.parametrize("channels", [(3, 1), (1, 3)])
def test_lsesim_contrasts_grey_with_colour(channels):
    """A grey image is the same as its three equal channels."""
    network = {"in_channels": channels[0], "out_channels": channels[1]}
    method = build("lsesim", network=network, vgg_layers=[4], patch_size=4)
    grey, colour = torch.rand(2, 1, 32, 32, dtype=torch.float64), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    a, b = (grey if count == 1 else colour for count in channels)
    method.jitter = lambda pictures: pictures * 0.9
    draws = Draws(patch_ids=[[torch.arange(9)]])
    found, _ = method.f_loss(Batch(a, b), {"fake_B": b}, draws)
    alike = Batch(*(x.expand(-1, 3, -1, -1) for x in (a, b)))
    torch.testing.assert_close(found, method.f_loss(alike, {"fake_B": alike.b}, draws)[0])
