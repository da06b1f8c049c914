"""Open the images that a configuration names: for training, for validation, and to cache them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..common.gathered import gathering
from ..common.messages import counted
from ..common.streams import print_line
from ..config.config import Config
from ..config.options import MAX_PIXELS, exchanges_pairs, sides
from ..data.cache import cache_places
from ..data.limit import accepting
from ..data.own import OwnData, open_own
from ..data.rain import parse_kinds
from ..data.rained import RainedData
from ..data.removal import remove_caches
from ..data.single import SinglePictureData
from ..data.unpaired import UnpairedData
from ..engine.distributed import Ranks
from ..engine.held_out import Lone, find_unpaired, find_validation, unpaired
from ..engine.validate import Validation
from ..evaluate.metrics import Measures
from ..evaluate.pairs import Pair
from ..methods import Method
from ..methods.checks import Sizes
from ..translate.translator import Translator
from .checks import check_images, check_plan, decays


def open_validation(
    config: Config, measures: Measures, device: torch.device, ranks: Ranks, quiet: bool
) -> Validation | None:
    """Find the held-out images in `data.validate`, DIR/test or DIR, also if `data.dataset` gives the training images.

    Returns:
        None if validation is off, or nothing is there to be measured (a line says so).

    Raises:
        ValueError: `run.best` or `run.metrics` names a measure, and there are no images for it.
    """
    run, options = config.run, config.data
    if not run.validate_every:
        return None
    pairs: list[Pair | Lone] = []
    folder = options.validate or options.dir
    if folder and not (options.validate and unpaired(folder)):
        pairs += find_validation(
            options.dir, options.validate, run.validate_pictures, options.rain_side, exchanges_pairs(options)
        )
    paired = bool(pairs)
    reference: list[Path] = []
    if not paired and unpaired(folder):
        lone, reference = find_unpaired(folder, run.validate_pictures, options.direction)
        pairs += lone
    metric = measures.deciding(paired) if pairs else None
    if metric is not None:
        return Validation(
            pairs,
            config.network.in_channels,
            device,
            Translator,
            ranks,
            options.skip_bad,
            metric,
            measures.more,
            measures.networks,
            reference,
            truth_channels=config.network.out_channels,
        )
    if pairs:
        why = f"{folder}/testA and testB are not paired; run.metrics=fid or kernel_lite0 measures them"
    else:
        where = f"{options.dir}/test holds no pairs" if options.dir else "there is no data.dir"
        why = f"{where}, and data.validate names none"
    if measures.best is not None or measures.more:
        named = run.metrics or run.best
        raise ValueError(f"{named} has nothing to measure: {why}")
    if not quiet:
        print_line(f"nothing is validated: {why}")
    return None


@gathering()
def open_checked(
    config: Config,
    method: Method,
    device: torch.device,
    ranks: Ranks,
    quiet: bool = False,
    *,
    about_caches: bool = True,
) -> UnpairedData | SinglePictureData | OwnData:
    """`open_data`, and refuse images that would end the run later.

    Args:
        method: as `check_plan` returns.
        about_caches: if a cache was built, say where it is and how to remove it.

    Raises:
        ValueError: an image cannot be read, or its size does not fit.
    """
    options = config.data
    data = open_data(config, device, ranks, quiet)
    if about_caches and isinstance(data, UnpairedData) and data.built and not quiet:
        print_line(_about_caches(config, data, sum(data.built.values())))
    if isinstance(data, OwnData):
        a, b = ({(h, w): f"images of {w}x{h} from data.dataset"} for h, w in data.first_sizes)
        method.check_sizes(options.batch, a, b, "let the data set return another size")
    elif isinstance(data, UnpairedData) and data.target.fixed is None:
        changes = decays(config) and data.target.decaying() != data.target
        check_images(config, method, [_named(data.sizes(decaying=late)) for late in (False, True)[: 1 + changes]])
    if config.run.sample_every or config.run.monitor_every:
        data.samples(max(config.run.samples, 2))  # so that an unreadable file is named now, not at step 500
    return data


def _named(sizes: tuple[dict[tuple[int, int], Path], ...]) -> tuple[Sizes, Sizes]:
    a, b = (
        {size: f"pictures of {size[1]}x{size[0]}, such as {file}," for size, file in found.items()} for found in sizes
    )
    return a, b


def cache_run(config: Config) -> Iterator[str]:
    """Build the caches that training with this configuration reads; yields one line per file."""
    if config.data.dataset:
        yield f"nothing is cached: data.dataset={config.data.dataset} reads its images itself"
        return
    with accepting(config.data.max_pixels, MAX_PIXELS), gathering():
        data = open_checked(config, check_plan(config), torch.device("cpu"), Ranks(), about_caches=False)
        if not isinstance(data, UnpairedData):
            yield "nothing is cached: data.preprocess=zoom_and_patch reads its two pictures when training starts"
            return
        before = data.cached()
        after = data.cached(decaying=True) if config.optim.n_epochs_decay else {}
    for path, size in {**before, **after}.items():
        halves = [name for name, files in (("before", before), ("while", after)) if path in files]
        target = data.target if path in before else data.target.decaying()
        yield f"{path}  {_mib(size)}, {target.words()}, read {' and '.join(halves)} the learning rate falls"
    for path, reason in data.skipped:
        yield f"skipped {path}: {reason}"
    yield _about_caches(config, data, sum({**before, **after}.values()))


def remove_caches_of(config: Config) -> Iterator[str]:
    """Remove the caches of the images that a configuration names; yields lines that say what was removed.

    Raises:
        ValueError: as `fastnce.data.removal.remove_caches`.
    """
    if config.data.dataset:
        raise ValueError(f"data.dataset={config.data.dataset} reads its images itself and has no cache to remove")
    removed = remove_caches(config.data.dir, config.data.cache_dir or None)
    if not removed:
        places = " or ".join(map(str, cache_places(Path(config.data.dir), config.data.cache_dir or None)))
        yield f"there is no cache of {config.data.dir} in {places}"
    for place in dict.fromkeys(path.parent for path in removed):
        sizes = [size for path, size in removed.items() if path.parent == place]
        yield f"removed {len(sizes)} cache files ({_mib(sum(sizes))}) from {place}"


def _about_caches(config: Config, data: UnpairedData, size: int) -> str:
    options = config.data
    words = ["fastnce", "cache", "--remove", "--data", options.dir]
    words += [f"data.cache_dir={options.cache_dir}"] if options.cache_dir else []
    pictures = counted(data.cached_pictures, "picture")
    return f"cached {pictures} in {data.place} ({_mib(size)}); `{shlex.join(words)}` deletes it"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def open_data(
    config: Config, device: torch.device, ranks: Ranks, quiet: bool = False
) -> UnpairedData | SinglePictureData | OwnData:
    """Open the data set that a configuration names."""
    options, network = config.data, config.network
    channels = network.in_channels, network.out_channels
    if options.dataset:
        return open_own(
            options.dataset,
            options,
            channels=channels,
            batch=options.batch,
            seed=config.run.seed,
            rank=ranks.rank,
            world=ranks.world,
            device=device,
            exchanged=options.direction == "BtoA",
        )
    common: dict[str, Any] = {
        "phase": options.phase,
        "direction": options.direction,
        "max_images": options.max_images,
        "channels": channels,
        "flip": options.flip,
        "batch": options.batch,
        "seed": config.run.seed,
        "rank": ranks.rank,
        "world": ranks.world,
        "device": device,
    }
    if options.preprocess == "zoom_and_patch":
        if options.rain:
            raise ValueError("data.preprocess=zoom_and_patch trains on one picture a domain: leave data.rain at 0")
        if not isinstance(options.crop_size, int):
            raise ValueError("data.preprocess=zoom_and_patch takes square crops: data.crop_size must be one number")
        zoom = 1 / options.random_scale_max
        return SinglePictureData(options.dir, crop_size=options.crop_size, zoom=zoom, **common)
    if options.rain:
        rain = parse_kinds("data.rain_like", options.rain_like)
        common |= {"share": options.rain, "rain": rain}
    return (RainedData if options.rain else UnpairedData)(
        options.dir,
        load_size=sides(options.load_size),
        crop_size=sides(options.crop_size),
        preprocess=options.preprocess,
        shuffle=options.shuffle,
        cache_dir=options.cache_dir or None,
        skip_bad=options.skip_bad,
        progress=None if quiet else print_line,
        **common,
    )
