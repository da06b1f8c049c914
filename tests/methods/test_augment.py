"""DiffAugment: its formula, its gradient, its random numbers, and what each discriminator sees."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.methods.augment import DRAWS, Augment
from tests.methods.test_methods_more import build, pictures
from tests.methods.test_wgangp import DISCRIMINATOR, METHODS, by_hand

ALL = "color,translation,cutout"


def plain_color(picture, numbers):
    brightness, saturation, contrast = numbers
    picture = picture + brightness - 0.5
    grey = sum(picture) / len(picture)
    picture = torch.stack([(channel - grey) * (2 * saturation) + grey for channel in picture])
    return (picture - picture.mean()) * (contrast + 0.5) + picture.mean()


def plain_translation(picture, numbers):
    """The pixels of an image with a border of zeros, read at shifted places."""
    out = torch.zeros_like(picture)
    height, width = picture.shape[1:]
    most = [int(side * 0.125 + 0.5) for side in (height, width)]
    down, right = (int(number * (2 * m + 1)) - m for number, m in zip(numbers, most, strict=True))
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                out[:, y, x] = picture[:, y + down, x + right]
    return out


def plain_cutout(picture, numbers):
    out = picture.clone()
    place = []
    for side, number in zip(picture.shape[1:], numbers, strict=True):
        size = int(side * 0.5 + 0.5)
        middle = int(number * (side + (1 - size % 2)))
        first = middle - size // 2
        place.append(slice(max(first, 0), first + size))
    out[:, place[0], place[1]] = 0
    return out


PLAIN = {"color": (plain_color, slice(0, 3)), "translation": (plain_translation, slice(3, 5))}
PLAIN["cutout"] = plain_cutout, slice(5, 7)


@pytest.mark.parametrize("kinds", ["color", "translation", "cutout", ALL, "cutout, color"])
@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (2, 1, 9, 7), (2, 4, 8, 8)])
def test_each_image_by_the_plain_formula(kinds, shape):
    images = torch.rand(shape, dtype=torch.float64) * 2 - 1
    uniform = torch.rand(shape[0], DRAWS)
    uniform[0], uniform[1] = 0.0, 1 - 2**-24  # the ends of the range
    wanted = []
    for image, numbers in zip(images, uniform.tolist(), strict=True):
        for kind in kinds.split(","):
            function, columns = PLAIN[kind.strip()]
            image = function(image, numbers[columns])
        wanted.append(image)
    found = Augment(kinds)(images, uniform)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_the_formula():
    images = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    uniform, augment = torch.rand(2, DRAWS), Augment(ALL)
    assert torch.autograd.gradcheck(lambda x: augment(x, uniform), images, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, uniform).square(), images, fast_mode=True)


def test_shifts_and_cutouts_take_every_value():
    image = torch.ones(600, 1, 16, 16)
    moved = Augment("translation")(image)[:, 0]
    rows = moved.amax(dim=2)
    assert {int(r.sum()) - 16 if r[0] == 0 else 16 - int(r.sum()) for r in rows} == {-2, -1, 0, 1, 2}
    cut = Augment("cutout")(image)[:, 0]
    assert {int(16 - r.sum()) for r in cut.amin(dim=2)} == {4, 5, 6, 7, 8}


def test_images_and_calls_have_their_own_numbers_from_the_seed():
    augment, images = Augment(ALL), torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1)
    torch.manual_seed(1)
    first, second = augment(images), augment(images)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(augment(images), first)


def test_ranks_draw_what_one_process_draws():
    """Image i of a rank is image i * world + rank of the whole batch."""
    images = torch.rand(4, 3, 16, 16)
    torch.manual_seed(1)
    whole = Augment(ALL)(images)
    for rank in range(2):
        augment = Augment(ALL)
        augment.rank, augment.world = rank, 2
        torch.manual_seed(1)
        assert torch.equal(augment(images[rank::2]), whole[rank::2])


def test_nothing_is_read_from_the_device_and_the_layout_stays():
    with FakeTensorMode():  # a tensor without values: reading one is an error
        found = Augment(ALL)(torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(DataDependentOutputException), FakeTensorMode():
        torch.rand(2).max().item()  # so the check above can fail


def method_of(preset, **changes):
    small = {} if preset == "sincut" else {"generator": "resnet_4blocks", **DISCRIMINATOR}
    layers = {} if preset in ("sincut", "cyclegan", "simdcl") else {"nce_layers": [0, 4, 8]}
    return build(preset, network=small, **{**METHODS.get(preset, {}), **layers, **changes})


@pytest.mark.parametrize("preset", [*METHODS, "lsesim"])
def test_discriminators_see_changed_images_only(preset):
    """Real and fake images are changed before every call, in the losses of discriminators and generators."""
    method, batch = method_of(preset, augment="cutout", gan_mode="lsgan"), pictures(1 if preset == "simdcl" else 2)
    seen: list[torch.Tensor] = []
    for network in method.discriminators().values():
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    outputs = method.generate(batch, Draws())
    for loss in (method.d_loss, method.g_loss):
        seen.clear()
        loss(batch, outputs, Draws())
        assert seen
        for image in torch.cat(seen):
            grey = (image == 0).all(dim=0).sum()  # a quarter to a half of each side of a 32x32 image
            assert 64 <= grey <= 256
    assert not any((images == 0).any() for images in batch)


@pytest.mark.parametrize("preset", METHODS)
def test_off_changes_nothing_and_draws_nothing(preset):
    method, batch = method_of(preset, gan_mode="lsgan"), pictures(1 if preset == "simdcl" else 2)
    outputs = method.generate(batch, Draws())
    method.d_loss(batch, outputs, Draws())  # fills pools
    before = torch.get_rng_state()
    assert method.augment(batch.a) is batch.a
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("preset", METHODS)
def test_the_loss_is_that_of_the_changed_images(preset):
    """By hand, with the numbers that the loss draws: D's loss, and for SinCUT the slope at the unchanged image."""
    method = method_of(preset, augment=ALL, gan_mode="lsgan")
    images = 1 if preset == "simdcl" else 2
    batch = pictures(images)
    outputs = method.generate(batch, Draws())
    torch.manual_seed(4)
    loss, _ = method.d_loss(batch, outputs, Draws())
    torch.manual_seed(4)
    first = [("fake_B", batch.b, "D")] if "D" in method.networks() else []
    sides = first or [("fake_B", batch.b, "D_A"), ("fake_A", batch.a, "D_B")]
    wanted = 0.0
    for name, real, judge in sides:
        order = [(outputs[name].detach(), 0.0), (real.clone().requires_grad_(), 1.0)]
        for image, target in order if judge == "D" else order[::-1]:
            judged = method.networks()[judge](Augment(ALL)(image, torch.rand(images, DRAWS)))
            wanted = wanted + 0.5 * (judged - target).square().mean()
            if preset == "sincut" and target:
                (slope,) = torch.autograd.grad(judged.sum(), image, create_graph=True)
                wanted = wanted + 0.5 * slope.square().sum() / images
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)


def test_the_penalty_of_wgangp_is_that_of_the_changed_mixture():
    """The slope is taken at the mixture of unchanged images, through the augmentation."""
    method, batch = method_of("cut", augment=ALL, gan_mode="wgangp"), pictures(2)
    outputs = method.generate(batch, Draws())
    torch.manual_seed(4)
    logged = method.d_loss(batch, outputs, Draws())[1]
    torch.manual_seed(4)
    for _ in range(2):
        torch.rand(2, DRAWS)
    mix, uniform = torch.rand(2, dtype=torch.float64), iter(torch.rand(2, DRAWS).split(1))
    wanted = by_hand(lambda x: method.discriminator(Augment(ALL)(x, next(uniform))), batch.b, outputs["fake_B"], mix)
    torch.testing.assert_close(logged["D_GP"], 0.5 * wanted, rtol=1e-10, atol=1e-12)


def test_the_generator_learns_through_the_augmentation():
    method, batch = method_of("cyclegan", augment=ALL, lambda_identity=0.0, lambda_a=0.0, lambda_b=0.0), pictures(1)
    outputs = method.generate(batch, Draws())
    torch.manual_seed(2)
    loss, _ = method.g_loss(batch, outputs, Draws())
    torch.manual_seed(2)
    uniform = torch.rand(1, DRAWS)
    judged = method.discriminator_a(Augment(ALL)(outputs["fake_B"], uniform))
    weights = [p for p in method.generator_a.parameters() if p.dim() == 4]
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    theirs = torch.autograd.grad((judged - 1).square().mean(), weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_with_it_train(precision):
    method = method_of("cut", augment=ALL, pool_size=2).float()
    step = Step(method, OptimOptions(lr=1e-3), precision)
    before = [p.clone() for p in method.discriminator.parameters() if p.dim() == 4]
    for _ in range(2):
        step.run(Batch(*(image.float() for image in pictures(1))), Draws())
    assert step.bad_steps == 0
    after = [p for p in method.discriminator.parameters() if p.dim() == 4]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kinds", ["colour", "color,color", "color,,cutout", "color;cutout"])
def test_other_kinds_are_one_sentence(kinds):
    with pytest.raises(ValueError, match=f"loss.augment={kinds} must name color, translation, cutout"):
        build("cut", augment=kinds)
