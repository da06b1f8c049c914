"""The ResNet generator of CUT and CycleGAN, with feature taps (Johnson et al., ECCV 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common.taps import Slot, Tap, given_tokens
from .layers import (
    BlurDown,
    BlurUp,
    LastConvolution,
    Norm,
    ReflectionPad,
    full_precision,
)
from .norms import norm_layer
from .runs import apply_run, blurs, changed, joins, pads, run_all, run_block, run_from, run_one, tapped


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with reflection padding, and a skip connection."""

    def __init__(self, channels: int, norm: Norm = "instance", dropout: bool = False, norm_affine: bool = False):
        super().__init__()
        bias = norm == "instance"
        self.conv_block = nn.Sequential(
            ReflectionPad(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels, norm_affine),
            nn.ReLU(True),
            *([nn.Dropout(0.5)] if dropout else []),
            ReflectionPad(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels, norm_affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.conv_block), x, residual=x)

    def joins(self, x: Tensor) -> bool:
        """Whether the layers beside the block may compute its first pad, and the block what follows it."""
        first, last = self.conv_block[0], self.conv_block[-1]
        if type(self) is not ResnetBlock or changed(self) or changed(self.conv_block):
            return False
        return pads(first, x) and joins(last) and last.fused(x)  # type: ignore[operator]

    def between(self, x: Tensor, padded: Tensor | None, margin: int, blur: int) -> tuple[Tensor, Tensor | None]:
        """Apply the block to x, whose pad is already computed if it is given. See `run_block`."""
        modules = list(self.conv_block)
        return (
            run_block(modules, x, x, margin, blur)
            if padded is None
            else run_block(modules[1:], padded, x, margin, blur)
        )


class ResnetGenerator(nn.Module):
    """Encoder, residual blocks and decoder, with the published module names `model.N`.

    Args:
        in_channels, out_channels: of the images.
        width: channels after the first convolution (published `ngf`).
        blocks: number of residual blocks, such as 9, 6 or 4.
        norm: "instance", "batch" or "none".
        dropout: apply dropout inside the residual blocks.
        antialias: use blur-down and blur-up instead of strided and transposed convolutions.
        antialias_up: the same for the decoder alone; default `antialias`.
        norm_affine: learn a weight and a bias in every instance norm.
    """

    factor = 4
    """Height and width of an image must be multiples of this."""
    hands_out_taps = True
    """Whether `forward` hands out taps if it is asked to."""
    smallest = 8
    """Smallest side of an image: the residual blocks pad maps of a quarter of it by reflection."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        blocks: int = 9,
        norm: Norm = "instance",
        dropout: bool = False,
        antialias: bool = True,
        antialias_up: bool | None = None,
        norm_affine: bool = False,
    ):
        super().__init__()
        antialias_up = antialias if antialias_up is None else antialias_up
        bias = norm == "instance"
        layers: list[nn.Module] = [
            ReflectionPad(3),
            nn.Conv2d(in_channels, width, 7, bias=bias),
            norm_layer(norm, width, norm_affine),
            nn.ReLU(True),
        ]
        for channels in (width, 2 * width):
            stride = 1 if antialias else 2
            layers += [
                nn.Conv2d(channels, 2 * channels, 3, stride=stride, padding=1, bias=bias),
                norm_layer(norm, 2 * channels, norm_affine),
                nn.ReLU(True),
                *([BlurDown(2 * channels)] if antialias else []),
            ]
        layers += [ResnetBlock(4 * width, norm, dropout, norm_affine) for _ in range(blocks)]
        for channels in (4 * width, 2 * width):
            half = channels // 2
            if antialias_up:
                layers += [BlurUp(channels), nn.Conv2d(channels, half, 3, padding=1, bias=bias)]
            else:
                layers += [nn.ConvTranspose2d(channels, half, 3, stride=2, padding=1, output_padding=1, bias=bias)]
            layers += [norm_layer(norm, half, norm_affine), nn.ReLU(True)]
        layers += [ReflectionPad(3), LastConvolution(width, out_channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        self.out_channels = out_channels
        # The encoder's features depend only on the image, so those of the pass that made the output can be reused.
        self.features_repeat = norm != "batch" and not dropout

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False, taps: bool = False):
        """Translate images, return features, or both.

        Args:
            x: (images, channels, height, width) in [-1, 1], with sides that are multiples of 4.
            layers: ascending positions in `model` whose outputs are returned as features.
            encode_only: stop after the last of these layers.
            taps: features may be `Tap`s where they are outputs of convolutions before a norm.

        Returns:
            the output; with `layers`, (output, features); with `encode_only`, the list of features.
        """
        features: list[Tensor | Tap] = []
        tap: Tap | None = None
        modules = list(self.model)
        last = len(modules) - 2  # the last convolution and the tanh
        stop = layers[-1] if encode_only and layers else len(modules)
        # The published ReLUs work in place: a norm's feature is the output of its ReLU, if that is computed.
        kept = [i + 1 if i != stop and isinstance(modules[i + 1], nn.ReLU) else i for i in layers if i < last]
        index = 0
        padded: Tensor | None = None  # x, padded for the block that follows
        while index < len(modules):
            module, length = modules[index], 1
            run = run_from(modules, index, x, kept)
            if run is not None:
                x, length, tap = apply_run(module, x, run, tap), run.length, None
            elif taps and index in layers and index != stop and self.hands_out_taps and tapped(modules, index, x):
                x = run_one(modules, index, x)
                tap = Tap(x, module.bias, Slot())  # type: ignore[arg-type]
                features.append(tap)
                index += 1
                continue
            elif isinstance(module, ResnetBlock) and module.joins(x):
                margin, blur = (0, 0) if index == stop else _after(modules[index + 1 :], x, index in layers)
                x, ready = module.between(x, padded, margin, blur)
                padded, length = (ready, 1) if margin else (None, 1 if ready is None else 2)
            else:
                tap = None
                x = full_precision(module, x) if index >= last else run_one(modules, index, x, layers)
            if index - 1 in layers and isinstance(module, nn.ReLU):
                features[-1] = x
            for done in range(index, index + length):
                if done in layers:
                    features.append(x)
                    if done == stop:
                        return given_tokens(features)
            index += length
        return (x, given_tokens(features)) if layers else x

    @torch.no_grad()
    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the features at `layers`; raise ValueError for a layer that does not exist."""
        check_layers(layers, len(self.model))
        channels: list[int] = []
        current = 0
        for layer in self.model:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                current = layer.out_channels
            elif current == 0:
                first = next(m for m in self.model if isinstance(m, nn.Conv2d))
                current = first.in_channels
            channels.append(current)
        return [channels[layer] for layer in layers]


def _after(followers: Sequence[nn.Module], x: Tensor, tapped: bool) -> tuple[int, int]:
    """Return (margin, blur): what a residual block computes for the modules after it.

    Args:
        tapped: the block's own output is needed, and a blur would replace it.
    """
    module = followers[0] if followers else None
    if isinstance(module, ResnetBlock) and module.joins(x):
        return module.conv_block[0].margin, 0  # type: ignore[return-value]
    if not tapped and isinstance(module, BlurUp) and blurs(module, x):
        return 0, module.blur
    return 0, 0


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise ValueError for layers that do not exist or are not in ascending order."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        gaps = max(1, min(len(layers), count) - 1)  # spread over the first half, as CUT's are
        example = ",".join(str(place) for place in sorted({i * (count // 2) // gaps for i in range(gaps + 1)}))
        raise ValueError(
            f"loss.nce_layers={list(layers)} does not fit network.generator: its layers are ascending positions from 0 "
            f"to {count - 1}, for example loss.nce_layers={example}"
        )
