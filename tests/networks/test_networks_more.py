"""SinCUT's networks and the restorer: sizes, precision, double backward, features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnce.methods.losses import r1_penalty
from fastnce.networks import Restorer, StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.networks.build import build_discriminator, build_generator
from fastnce.networks.stylegan2 import Blur, Noise, UpConv, conv_layer


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_published_sizes():
    assert parameters(build_generator("stylegan2", width=10, resolution=64)) == 3_068_404
    assert parameters(build_discriminator("stylegan2", width=8, resolution=64)) == 5_885_473


def test_blur_by_hand():
    blur = Blur(2, 1)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 1] = 64.0
    y = blur(x)
    assert y.shape == (1, 1, 4, 4)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    expected = torch.zeros(4, 4)
    expected[0:4, 0:4] = row[:, None] * row[None, :]
    torch.testing.assert_close(y[0, 0], expected)


def test_halving_1x1_computes_only_the_pixels_that_the_convolution_reads():
    layer = conv_layer(3, 5, 1, halve=True, activate=False)
    x = torch.randn(2, 3, 8, 6)
    whole = Blur(1, 1)(x)  # every position; the strided convolution takes every second one
    plain = F.conv2d(whole, layer[1].weight * layer[1].scale, stride=2)
    torch.testing.assert_close(layer(x), plain)


def test_up_conv_is_the_modulated_convolution_of_ones():
    up = UpConv(3, 4).double()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    outputs = []
    for image in x:  # a separate convolution per image, as with styles
        weight = up.scale * up.weight[0]
        demodulated = weight / (weight.square().sum((1, 2, 3)) + 1e-8).sqrt()[:, None, None, None]
        outputs.append(F.conv_transpose2d(image[None], demodulated.transpose(0, 1), stride=2))
    wide = torch.cat(outputs)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 4
    kernel = (row[:, None] * row[None, :]).expand(4, 1, 4, 4)
    torch.testing.assert_close(up(x), F.conv2d(F.pad(wide, (1, 1, 1, 1)), kernel, groups=4), rtol=1e-9, atol=1e-9)
    assert up(x).shape == (2, 4, 10, 14)


def test_noise_is_off_in_eval_mode_and_starts_at_zero():
    noise = Noise()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(noise(x), x)
    with torch.no_grad():
        noise.weight.fill_(1.0)
    added = noise(x) - x
    torch.testing.assert_close(added[:, 0], added[:, 2])
    assert added.std() > 0.5
    assert noise.eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stylegan2_in_every_precision(dtype):
    generator = StyleGAN2Generator(width=1, resolution=32).to(dtype)
    discriminator = StyleGAN2Discriminator(width=1, resolution=32).to(dtype)
    x = torch.randn(2, 3, 32, 32).to(dtype).requires_grad_()
    y = generator(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    judged = discriminator(y)
    assert judged.shape == (2, 1)
    gradients = torch.autograd.grad(judged.sum(), [x, *generator.encoder.parameters()])
    assert all(g.isfinite().all() for g in gradients)


def test_stylegan2_translates_any_even_size():
    generator = StyleGAN2Generator(width=1, resolution=64).eval()
    assert generator(torch.randn(1, 3, 50, 38)).shape == (1, 3, 50, 38)


def test_discriminator_is_twice_differentiable():
    torch.manual_seed(1)
    discriminator = StyleGAN2Discriminator(in_channels=1, width=1, resolution=8).double()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = discriminator.convs[1].conv2[1].weight
    slope = torch.autograd.grad(r1_penalty(discriminator(x), x), weight)[0]
    index, step = (0, 1, 2, 1), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[index] += sign * step
        values.append(float(r1_penalty(discriminator(x), x).detach()))
        with torch.no_grad():
            weight[index] -= sign * step
    assert slope[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
    assert slope[index].abs() > 1e-8


def test_discriminator_names_its_size_in_the_error():
    with pytest.raises(ValueError, match="takes crops of 64x64, not 32x64"):
        StyleGAN2Discriminator(width=1)(torch.zeros(1, 3, 32, 64))


def small(name):
    return build_generator(name, width=4, resolution=32)


@pytest.mark.parametrize("name", ["stylegan2", "restorer"])
@pytest.mark.parametrize("layers", [[0, 2, 4], [1], [0, 5]])
def test_features(name, layers):
    generator = small(name).eval()
    x = torch.randn(2, 3, 32, 24)
    output, features = generator(x, layers)
    torch.testing.assert_close(output, generator(x))
    encoded = generator(x, layers, encode_only=True)
    assert [f.shape[1] for f in features] == generator.feature_channels(layers)
    for kept, alone in zip(features, encoded, strict=True):
        torch.testing.assert_close(kept, alone, rtol=0, atol=0)
    if layers[0] == 0:
        assert features[0] is x


@pytest.mark.parametrize("name", ["stylegan2", "restorer"])
def test_layers_that_do_not_exist_are_refused(name):
    with pytest.raises(ValueError, match="ascending positions from 0 to"):
        small(name).feature_channels([0, 99])


def test_restorer_starts_as_the_identity_and_learns():
    restorer = Restorer(width=4, middle=2)
    x = torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(restorer(x), x, rtol=0, atol=0)
    optimizer = torch.optim.Adam(restorer.parameters(), 1e-2)
    target = 0.5 * x
    errors = []
    for _ in range(20):
        loss = F.mse_loss(restorer(x), target)
        errors.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in restorer.parameters())


def test_restorer_has_the_layers_of_cut():
    restorer = Restorer(width=4)
    assert restorer.feature_channels([0, 4, 8, 12, 16]) == [3, 8, 16, 16, 16]
    features = restorer(torch.randn(1, 3, 32, 32), [0, 4, 8, 12, 16], encode_only=True)
    assert [f.shape[2] for f in features] == [32, 16, 8, 8, 8]


def test_restorer_block_by_hand():
    restorer = Restorer(width=2, middle=0).double()
    block = restorer.encoder[2]
    with torch.no_grad():
        block.beta.normal_()
        block.gamma.normal_()
        block.norm1.weight.normal_()
        block.norm1.bias.normal_()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def norm(layer, x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        scaled = (x - mean) / (variance + 1e-6).sqrt()
        return scaled * layer.weight[None, :, None, None] + layer.bias[None, :, None, None]

    y = block.depthwise(block.widen1(norm(block.norm1, x)))
    y = y[:, :2] * y[:, 2:]
    y = y * block.attention(F.adaptive_avg_pool2d(y, 1))
    plain = x + block.beta * block.project1(y)
    z = block.widen2(norm(block.norm2, plain))
    plain = plain + block.gamma * block.project2(z[:, :2] * z[:, 2:])
    torch.testing.assert_close(block(x), plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "restorer", "in_channels": 1}, "in_channels=1 and out_channels=3 must be equal"),
        ({"name": "restorer", "norm": "batch"}, "neither batch norm nor dropout"),
        ({"name": "stylegan2", "dropout": True}, "neither batch norm nor dropout"),
        ({"name": "stylegan2", "resolution": 4}, "resolution must be at least 8, not 4"),
        ({"name": "unet"}, "generator must be one of"),
    ],
)
def test_wrong_networks_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        build_generator(**options)
