"""A user's own code, correct and wrong, for the tests of import paths."""

from fastnce.commands.main import main

SMALL = [
    "data.load_size=36",
    "data.crop_size=32",
    "network.generator=resnet_4blocks",
    "network.width=2",
    "network.discriminator_width=2",
    "loss.projection=8",
    "loss.patches=16",
    "run.steps=2",
    "run.sample_every=0",
    "run.monitor_every=0",
]

CODE = '''
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fastnce.methods import CUT, CUTOptions, Group, Method, Phase, option
from fastnce.nce import Weights
from fastnce.networks import InstanceNorm
from fastnce.networks.layers import ReflectionPad


@dataclass
class KeepOptions:
    strength: float = option(3.0, "weight of the L1 distance: keeps the input", low=0)
    kind: Literal["plain", "square"] = option("plain", "of the distance")


class Keep(Method):
    """An autoencoder."""

    Options = KeepOptions
    sections = {"optim": {"lr": 0.001}}

    def __init__(self, options, network):
        super().__init__()
        self.options = options
        self.generator = network.build_generator()

    def generators(self):
        return {"Gen": self.generator}

    def groups(self):
        return {"G": Group((self.generator,))}

    def phases(self):
        return (Phase(self.loss, ("G",)),)

    def generate(self, batch, draws):
        return {"fake": self.generator(batch.a)}

    def loss(self, batch, outputs, draws):
        loss = self.options.strength * (outputs["fake"] - batch.a).abs().mean()
        return loss, {"keep": loss}

    def translate(self, a):
        return self.generator(a)


class Smaller(Keep):
    def translate(self, a):
        return self.generator(a)[:, :, ::2]


class SmallerValues(Keep):
    """Meta tensors cannot show what this returns."""

    def translate(self, a):
        return self.generator(a) if float(a.mean()) == 7 else self.generator(a)[0]


class OddPictures(Keep):
    def pictures(self, batch):
        return {"A": batch.a, "loss": batch.a.mean()}


class NoPhases(Keep):
    phases = Method.phases
    translate = Method.translate


@dataclass
class OddOptions(CUTOptions):
    table: dict = field(default_factory=dict)


class Odd(CUT):
    Options = OddOptions


class Misnamed(Keep):
    sections = {"optim": {"learning_rate": 1}}


class Residual(Keep):
    """Its translation is more than its generator."""

    def translate(self, a):
        return a - 0.5 * self.generator(a)


class Frozen(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        next(self.generator.parameters()).requires_grad_(False)


class Still(Keep):
    def groups(self):
        return {"G": Group((self.generator,), lr=0.0)}


class Homeless(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.aux = nn.Linear(2, 2)

    def groups(self):
        return {"G": Group((self.generator, self.aux))}


class OddName(Keep):
    def generators(self):
        return {"G 1": self.generator}


class NoGenerator(Keep):
    def generators(self):
        return {}


class NotADict(Keep):
    def generators(self):
        return [self.generator]


class BareGroup(Keep):
    def groups(self):
        return {"G": (self.generator,)}


class UnknownGroup(Keep):
    def phases(self):
        return (Phase(self.loss, ("Q",)),)


class OnePhase(Keep):
    def phases(self):
        return Phase(self.loss, ("G",))


class NoPhase(Keep):
    def phases(self):
        return ()


class ListState(Keep):
    def extra_state_modules(self):
        return [1]


class OddSections(Keep):
    sections = ["optim"]


class WrongDefault(Keep):
    sections = {"network": {"width": "4"}}


class TextRate(Keep):
    def groups(self):
        return {"G": Group((self.generator,), lr="1e-3")}


class TwoGroups(Keep):
    def groups(self):
        return {"G": Group((self.generator,)), "H": Group((self.generator,))}


class AllFrozen(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator.requires_grad_(False)


class FloatLoss(Keep):
    def loss(self, batch, outputs, draws):
        return 3.0, {}


class DetachedLoss(Keep):
    def loss(self, batch, outputs, draws):
        loss, logged = super().loss(batch, outputs, draws)
        return loss.detach(), logged


class OnlyLoss(Keep):
    def loss(self, batch, outputs, draws):
        return super().loss(batch, outputs, draws)[0]


class LoggedMap(Keep):
    def loss(self, batch, outputs, draws):
        return super().loss(batch, outputs, draws)[0], {"map": outputs["fake"]}


class Failing2(Keep):
    def loss(self, batch, outputs, draws):
        one, two = (1, 2, 3)


class Longer(CUT):
    """CUT once more: its defaults are CUT's."""


class Unbuilt(Keep):
    def __init__(self, options, network):
        raise TypeError("no luck")


class Net(nn.Module):
    factor = 2

    def __init__(self, in_channels, out_channels, width, norm="instance"):
        super().__init__()
        self.norm = norm
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, layers=(), encode_only=False):
        features = self.first(x)
        if encode_only:
            return [features]
        output = self.last(features).tanh()
        return (output, [features]) if layers else output


class FeatureNet(Net):
    def feature_channels(self, layers):
        return [self.first.out_channels for _ in layers]


class Blocks(nn.Module):
    """Everything that tiles and recomputation need."""

    factor = smallest = 4

    def __init__(self, in_channels, out_channels, width):
        super().__init__()
        self.down = nn.Conv2d(in_channels, width, 4, 2, padding=1)
        self.norm = InstanceNorm(width)
        self.block = nn.Sequential(ReflectionPad(1), nn.Conv2d(width, width, 3))
        self.up = nn.ConvTranspose2d(width, out_channels, 4, 2, padding=1)

    def forward(self, x, layers=(), encode_only=False):
        return self.up(self.block(self.norm(self.down(x)).relu())).tanh()

    def tile_layers(self):
        return [self.down, self.norm, nn.ReLU(), *self.block, self.up, nn.Tanh()]

    def residual_blocks(self):
        return [self.block]


class Sixths(Blocks):
    """The least side that it takes is no multiple of its factor."""

    factor, smallest = 6, 50

    def forward(self, x, layers=(), encode_only=False):
        assert x.shape[2] % 6 == x.shape[3] % 6 == 0, x.shape
        assert min(x.shape[2:]) >= 50, x.shape
        return super().forward(x, layers, encode_only)


MEAN = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)  # a tensor of the module


class Tied(Net):
    """One weight under two names, a part under two names, and a constant of the module."""

    def __init__(self, in_channels, out_channels, width):
        super().__init__(in_channels, out_channels, width)
        self.second = nn.Conv2d(in_channels, width, 3, padding=1)
        self.second.weight = self.first.weight
        self.encoder = nn.Sequential(self.first, self.second)[:1]

    def forward(self, x, layers=(), encode_only=False):
        return super().forward(x - MEAN.to(x.device) + self.second(x).mean(), layers, encode_only)


class WrongTiles(Blocks):
    def tile_layers(self):
        return super().tile_layers()[:-1]


class KeywordOnly(Net):
    def forward(self, x, *, layers=(), encode_only=False):
        return super().forward(x, layers, encode_only)


class NestedFeatures(Net):
    def forward(self, x, layers=(), encode_only=False):
        found = super().forward(x, layers, encode_only)
        return (found, found) if encode_only else found

    def feature_channels(self, layers):
        return [self.first.out_channels for _ in layers]


class Dense(nn.Module):
    def __init__(self, in_channels, out_channels, width):
        super().__init__()
        self.mix = nn.Linear(in_channels, out_channels)

    def forward(self, x, layers=(), encode_only=False):
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


class LateStart(Net):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(in_channels, out_channels, width)
        first, self.first = self.first, None
        del self.first
        self.unused = nn.Conv2d(7, 7, 1)
        self.first = first

    def parameters(self, recurse=True):
        return iter([*self.unused.parameters(), *self.first.parameters(), *self.last.parameters()])


class Half(Net):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(in_channels, out_channels, width)
        self.half()


class Lazy(Net):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(in_channels, out_channels, width)
        self.more = nn.LazyConv2d(3, 1)


class OddFactor(Net):
    factor = "two"


class WrongWhenWide(Net):
    def forward(self, x, layers=(), encode_only=False):
        output = super().forward(x, layers, encode_only)
        return output if x.shape[2] == x.shape[3] else output[..., 1:]


class WrongFeatures(Net):
    def feature_channels(self, layers):
        return [5 for _ in layers]


class Plain(Net):
    def forward(self, x):
        return super().forward(x)


class Halving(Net):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(x, layers, encode_only)[..., ::2]


class Failing(Net):
    def __init__(self, in_channels, out_channels, width):
        raise KeyError("weights")


class Judge(nn.Module):
    def __init__(self, in_channels, width):
        super().__init__()
        self.model = nn.Conv2d(in_channels, 1, 4, stride=4)

    def forward(self, x):
        return self.model(x)


class MixedBatch(Judge):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


class Mute(Judge):
    def forward(self, x):
        return None


def weight(queries, keys, groups, *, power: float = 1.0, hard=True):
    grouped = keys.unflatten(0, (groups, -1))
    return Weights(pair_log_weight=power * (grouped @ grouped.mT))


def infinite(queries, keys, groups):
    rows = len(queries) // groups
    weights = torch.ones(groups, rows, rows)
    return Weights(pair_weight=weights / (weights - torch.eye(rows)[0]))


def diagonal(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_log_weight=torch.full((rows,), torch.nan).diag().expand(groups, rows, rows))


def whole_numbers(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_weight=torch.ones(groups, rows, rows, dtype=torch.int64))


def arrays(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_weight=torch.ones(groups, rows, rows).numpy())


def elsewhere(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_log_weight=torch.ones(groups, rows, rows, device="meta"))


def unsure(queries, keys, groups):
    return Weights(decoupled="yes")


def leaves(queries, keys, groups):
    raise SystemExit(3)


def no_weights(queries, keys, groups):
    return queries


def wrong_shape(queries, keys, groups):
    return Weights(pair_weight=torch.ones(3, 3))


def broken(queries, keys, groups):
    return queries @ keys


class Data:
    steps_per_epoch = 4

    def __init__(self, options, *, channels, seed, rank, world, device):
        self.options, self.channels, self.device = options, channels, device

    def batch(self, step, *, decaying=False):
        generator = torch.Generator().manual_seed(step)
        shape = 2, self.options.batch, self.channels, 32, 32
        a, b = torch.rand(shape, generator=generator) * 2 - 1
        return a.to(self.device), b.to(self.device)

    def samples(self, count):
        return self.batch(0)

    def digest(self):
        return "noise"


class Silent(Data):
    digest = property()


class OddSize(Data):
    def batch(self, step, *, decaying=False):
        return tuple(one[..., :31] for one in super().batch(step))


class OneDomain(Data):
    def batch(self, step, *, decaying=False):
        return super().batch(step)[0]


def darkness(output, truth):
    return output.mean()


darkness.lower_is_better = True


def numberless(output, truth):
    return output


NOT_CALLABLE = 3
'''


def error_line(capsys) -> str:
    """Return the last line of standard error without its prefix."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fastnce: ")
    return line.removeprefix("fastnce: ")


def refused(capsys, *arguments: str) -> str:
    """Run a command that must fail, and return its message."""
    assert main([*arguments]) == 2
    return error_line(capsys)


def train(folder, here, method, *settings, out="run", steps=2) -> int:
    options = [s for s in SMALL if not (method.endswith("Keep") and s.startswith("loss."))]
    return main(["train", method, "--data", str(folder), "--out", str(here / out), *options, *settings])
