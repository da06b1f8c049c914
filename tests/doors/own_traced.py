"""A user's own code that is easily spoiled by checks, and more wrong code. It extends `tests.doors.own_code.CODE`."""

TRACED = '''
import functools
import sys
import threading
import warnings

import torch.nn.functional as F

from fastnce.methods import Draws


@functools.lru_cache
def box(channels):
    return torch.ones(channels, 1, 3, 3) / 9


WEIGHTS = None


def weights(device):
    global WEIGHTS
    if WEIGHTS is None:
        WEIGHTS = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)
    return WEIGHTS


def blurred(x):
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), box(x.shape[1]), groups=x.shape[1])
    return y * weights(x.device)


class Cached(Keep):
    def translate(self, a):
        return blurred(self.generator(a))


class CachedNet(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(blurred(x), layers, encode_only)


class CachedJudge(Judge):
    def forward(self, x):
        return super().forward(blurred(x))


class Hooked(Keep):
    """Its hook changes the method that a copy does not know."""

    def __init__(self, options, network):
        super().__init__(options, network)
        self.seen = torch.zeros(())

        def hook(module, inputs, output):
            self.seen = 0.9 * self.seen + 0.1 * output.detach().mean()

        self.generator.register_forward_hook(hook)

    def loss(self, batch, outputs, draws):
        loss, logged = super().loss(batch, outputs, draws)
        return loss, {**logged, "seen": self.seen}


class HookedNet(FeatureNet):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []
        self.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

    def forward(self, x, layers=(), encode_only=False):
        before = 0 * self.seen.pop().detach().mean() if self.seen else 0
        return super().forward(x + before, layers, encode_only)


class Values(Keep):
    """Its constructor reads the values of what it makes."""

    def __init__(self, options, network):
        super().__init__(options, network)
        self.schedule = torch.linspace(0, 1, 3).tolist()
        self.teacher = network.build_generator().requires_grad_(False)
        self.teacher.load_state_dict(self.generator.state_dict())
        assert all(torch.isfinite(p).all() for p in self.parameters())

    def generators(self):
        return {"Gen": self.generator, "Teacher": self.teacher}


class Extracting(FeatureNet):
    """A hook hands a feature map to forward; deepcopy would refuse the lock."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lock, self.maps = threading.Lock(), []
        self.first.register_forward_hook(lambda module, inputs, output: self.maps.append(output))

    def forward(self, x, layers=(), encode_only=False):
        with self.lock:
            found = super().forward(x, layers, encode_only)
        used = 0 * self.maps.pop().mean()
        return [used + one for one in found] if encode_only else found if layers else used + found


class WeightNorm(FeatureNet):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = nn.utils.weight_norm(self.first)


class Derivative(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(x + torch.func.grad(lambda y: (y**3).sum())(x), layers, encode_only)


class OwnNet(Keep):
    """It builds a network by itself, and reads images before a step."""

    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator = Extracting(3, 3, 2)

    def prepare(self, batch):
        assert batch.a.isfinite().all()


class OwnWeightNorm(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator = WeightNorm(3, 3, 2)


class OnMeta(FeatureNet):
    def __init__(self, *arguments):
        with torch.device("meta"):
            super().__init__(*arguments)


class OwnReading(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator = ReadingNet(3, 3, 2)


class OwnBroken(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator = Broken(3, 3, 2)


class Broken(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return {}["a"]


KEPT = {}


class Keeping(FeatureNet):
    """Its constant is made from an input."""

    def forward(self, x, layers=(), encode_only=False):
        if "one" not in KEPT:
            KEPT["one"] = torch.ones_like(x[:1, :, :1, :1])
        return super().forward(x * KEPT["one"], layers, encode_only)


class KeepingTranslate(Keep):
    def translate(self, a):
        if "zero" not in KEPT:
            KEPT["zero"] = torch.zeros_like(a[:1, :, :1, :1])
        return self.generator(a) + KEPT["zero"]


class Address(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())))


class Numpy(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(torch.from_numpy(x.numpy()))


class RealChannels(FeatureNet):
    def feature_channels(self, layers):
        return [2.0 for _ in layers]


class FewArguments(Keep):
    def loss(self, batch, outputs):
        return outputs["fake"].mean(), {}


class NoArguments(Keep):
    def check_options(self):
        pass


class TuplePhases(Keep):
    phases = ()


class TextPenalty(Keep):
    gp = "x"


class ReadingNet(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(x if float(x.mean()) > 0 else -x, layers, encode_only)


class MaskingNet(FeatureNet):
    def forward(self, x, layers=(), encode_only=False):
        return super().forward(x - x[x > 0].mean(), layers, encode_only)


class ValuesNet(FeatureNet):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        assert float(next(self.parameters()).detach().norm()) > 0


class InPlace(Keep):
    def translate(self, a):
        return a.mul_(0.5).add_(self.generator(a))


class Dense1(Keep):
    def __init__(self, options, network):
        super().__init__(options, network)
        self.generator = nn.Linear(8, 8)


class Column(Keep):
    def loss(self, batch, outputs, draws):
        loss, logged = super().loss(batch, outputs, draws)
        return loss, {**logged, "step": loss}


class SameLoss(Keep):
    def phases(self):
        return Phase(self.loss, ("G",)), Phase(self.again, ("G",))

    def again(self, batch, outputs, draws):
        return self.loss(batch, self.generate(batch, draws), draws)


class SameName(Keep):
    def discriminators(self):
        return {"Gen": self.generator}


class Watched(Keep):
    def discriminator_losses(self):
        return ["D"]


class WatchedText(Keep):
    def discriminator_losses(self):
        return {"D": "D_real"}


class Identity(Keep):
    def identity_losses(self):
        return "keep"


class Betas(Keep):
    def groups(self):
        return {"G": Group((self.generator,), betas=(2, 3))}


class OneBeta(Keep):
    def groups(self):
        return {"G": Group((self.generator,), betas=0.5)}


class TrueRate(Keep):
    def groups(self):
        return {"G": Group((self.generator,), lr=True)}


class Unprepared(Keep):
    def prepare(self):
        pass


class TranslateMore(Keep):
    def translate(self, a, layers):
        return self.generator(a)


class NoTranslate(Keep):
    translate = 3


class OddDraw(Keep):
    def draw(self, rng):
        return {}


class Whole(Keep):
    def translate(self, a):
        return (self.generator(a) * 127.5).to(torch.uint8)


class Leaves(Keep):
    def loss(self, batch, outputs, draws):
        sys.exit(7)


class NoPictures(Keep):
    def pictures(self, batch):
        return {}


class NumberedPictures(Keep):
    def pictures(self, batch):
        return {0: batch.a}


class EmptyPictures(Keep):
    def pictures(self, batch):
        return {"A": batch.a[:, :0]}


class GrowingPictures(Keep):
    side = 8

    def pictures(self, batch):
        self.side += 1
        return {"A": batch.a[..., : self.side]}


def sixteen(queries, keys, groups):
    """A right weighting that needs more than four rows per group."""
    grouped = keys.unflatten(0, (groups, -1))
    similarity = grouped @ grouped.mT
    least = similarity.topk(16, dim=2).values[..., -1:]
    return Weights(pair_log_weight=torch.where(similarity >= least, 0.0, -1.0))


def eighth_bits(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_weight=torch.ones(groups, rows, rows).to(torch.float8_e5m2))


def sparse(queries, keys, groups):
    rows = len(queries) // groups
    return Weights(pair_weight=torch.ones(groups, rows, rows).to_sparse())


def long_error(queries, keys, groups):
    raise RuntimeError("first line\\nsecond line")


class BrightSamples(Data):
    def samples(self, count):
        return tuple(255 * one for one in super().samples(count))
'''
