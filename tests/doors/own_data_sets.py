"""A user's own data sets, correct and wrong. They extend `Data` of `tests.doors.own_code.CODE`."""

DATA_SETS = '''

class NumberDigest(Data):
    def digest(self):
        return 5


class NoDigest(Data):
    def digest(self):
        pass


class TupleDigest(Data):
    def digest(self):
        return ("a", 1)


class FailingDigest(Data):
    def digest(self):
        raise KeyError("files")


class ChangingDigest(Data):
    calls = 0

    def digest(self):
        self.calls += 1
        return f"call {self.calls}"


class HalfSteps(Data):
    steps_per_epoch = 2.5


class NoSteps(Data):
    steps_per_epoch = None


class MethodSteps(Data):
    def steps_per_epoch(self):
        return 4


class ZeroSteps(Data):
    steps_per_epoch = 0


class TrueSteps(Data):
    steps_per_epoch = True


class LateSteps(Data):
    @property
    def steps_per_epoch(self):
        return 2.5


class FailingSteps(Data):
    @property
    def steps_per_epoch(self):
        raise OSError("no disk")


class TensorSteps(Data):
    steps_per_epoch = torch.tensor(4)


class Changed(Data):
    def change(self, step, images):
        return images

    def batch(self, step, *, decaying=False):
        return tuple(self.change(step, one) for one in super().batch(step))

    def samples(self, count):
        return Data.batch(self, 0)


class Half(Changed):
    def change(self, step, images):
        return images.half()


class Double(Changed):
    def change(self, step, images):
        return images.double()


class Elsewhere(Changed):
    def change(self, step, images):
        return images.to("meta")


class Levels(Changed):
    def change(self, step, images):
        return (images + 1) * 127.5


class Nan(Changed):
    def change(self, step, images):
        return images.index_fill(3, torch.tensor(0), float("nan"))


class Infinite(Changed):
    def change(self, step, images):
        return images.index_fill(3, torch.tensor(0), float("inf"))


class NearlyOne(Changed):
    def change(self, step, images):
        return images.index_fill(3, torch.tensor(0), 1.0005)


class FailingBatch(Changed):
    def change(self, step, images):
        raise ValueError("no index")


class Later(Changed):
    """Every batch but the first is changed."""

    def change(self, step, images):
        return self.later(images) if step else images


class LaterDouble(Later):
    later = staticmethod(lambda images: images.double())


class LaterElsewhere(Later):
    later = staticmethod(lambda images: images.to("meta"))


class LaterMore(Later):
    later = staticmethod(lambda images: torch.cat([images, images]))


class LaterGray(Later):
    later = staticmethod(lambda images: images[:, :1])


class LaterSize(Later):
    later = staticmethod(lambda images: images.repeat(1, 1, 1, 2))


class AnySize(LaterSize):
    one_size = False


class LaterNone(Data):
    def batch(self, step, *, decaying=False):
        return super().batch(step) if step == 0 else None


class OddOneSize(Data):
    one_size = "no"


class OddSkipped(Data):
    skipped = ["a.png"]


class OddCount(Data):
    size_a = size_b = "many"


class NoSamples(Data):
    def samples(self, count):
        return None


class EmptySamples(Data):
    def samples(self, count):
        return tuple(one[:0] for one in self.batch(0))


class GraySamples(Data):
    def samples(self, count):
        return tuple(one[:, :1] for one in self.batch(0))


class FlatSamples(Data):
    def samples(self, count):
        return tuple(one[0] for one in self.batch(0))


class DoubleSamples(Data):
    def samples(self, count):
        return tuple(one.double() for one in self.batch(0))


class UnequalSamples(Data):
    def samples(self, count):
        a, b = self.batch(0)
        return a, torch.cat([b, b])


class FailingSamples(Data):
    def samples(self, count):
        raise RuntimeError("no files")


class Hungry(Changed):
    def change(self, step, images):
        raise MemoryError


class FailingInit(Data):
    def __init__(self, options, **rest):
        raise ValueError("no folder")


class Assigned:
    """All members are assigned in the constructor."""

    def __init__(self, *arguments, **options):
        self.inner = Data(*arguments, **options)
        self.steps_per_epoch, self.batch = 4, self.inner.batch
        self.samples, self.digest = self.inner.samples, self.inner.digest


class Forwarding:
    def __init__(self, *arguments, **options):
        self.inner = Data(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def build(*arguments, **options):
    return Data(*arguments, **options)


class Unfinished:
    steps_per_epoch = 4

    def batch(self, step, *, decaying=False): ...


class BatchIsAList(Data):
    batch = [1, 2]
'''
