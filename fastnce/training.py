"""Train as a configuration says: what `fastnce train` runs.

from fastnce.config import resolve
from fastnce.training import train_run
train_run(resolve("fastcut", overrides=["data.dir=DIR"]), Path("runs/mine"))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .common.imports import CodeError, place_in_own_code
from .common.locking import hold
from .common.streams import print_line
from .common.writing import sweep, write_whole
from .config import Config, build_method, check, plan, sides
from .data.own import OwnData, check_class, open_own
from .data.rain import RainOptions, parse_ranges
from .data.rained import RainedData
from .data.single import SinglePictureData
from .data.unpaired import UnpairedData
from .engine.accumulate import check_parts
from .engine.checkpoint import Checkpoints
from .engine.checks import check_run
from .engine.choices import pick_device, pick_precision
from .engine.distributed import Ranks, ranks_of_launcher, read_ranks
from .engine.loop import TrainingFailed, train
from .engine.memory import check_room, keep_freed_memory, out_of_memory, too_large
from .engine.progress import check_batch, check_pictures
from .engine.recompute import recompute_blocks
from .engine.validate import Validation, find_validation
from .evaluate.metrics import Metric, find_metric
from .methods import Method
from .translate.translator import Translator

__all__ = ["train_run"]


def train_run(config: Config, out: str | os.PathLike[str], *, quiet: bool = False) -> int:
    """Build everything that a configuration names, and train; returns the steps done.

    Args:
        out: the folder of the run. If it holds a run of the same configuration, that run continues.
        quiet: print nothing.

    Raises:
        ValueError: the configuration or its images cannot be trained, or (`InUse`) another process trains in `out`.
        TrainingFailed: as `fastnce.engine.loop.train`.
    """
    out = Path(out)
    check(config)
    check_place(config, out)
    with hold_run(out) if read_ranks().first else nullcontext():
        state = check_same_run(config, out, read_ranks().world)
        with ranks_of_launcher(config.run.device) as ranks:
            try:
                return _train_rank(config, out, ranks, quiet or not ranks.first, state)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, TrainingFailed) or not out_of_memory(error):  # it may quote the allocator
                    raise
                raise TrainingFailed(too_large(error)) from None
            except SystemExit as error:
                raise CodeError(
                    f"own code ended the run by sys.exit({error.code!r}){place_in_own_code(error)}"
                ) from error


@contextmanager
def hold_run(out: Path) -> Iterator[None]:
    """Within: no other process trains in this folder. Partial files of killed processes are removed first.

    Raises:
        InUse: another process trains in it.
    """
    with hold(out, "fastnce train", "take another --out"):
        for folder in (out, out / "samples"):
            sweep(folder, held=True)
        Checkpoints(out / "checkpoints").clean()
        yield


def _train_rank(config: Config, out: Path, ranks: Ranks, quiet: bool, state: dict[str, Any] | None) -> int:
    device = pick_device(ranks.device(config.run.device))
    if device.type == "cpu":
        keep_freed_memory()
    planned = check_plan(config)
    metric = check_code(config)
    check_run(planned, config.optim, config.run, device)
    _check_memory(config, device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with ranks.together(device):
        data = open_checked(config, planned, device, ranks, quiet)
        if state is not None:
            check_pictures(state, data.digest(), str(out))
        validation = _open_validation(config, metric, device, ranks, quiet)
    del planned  # a user's own has weights in memory
    torch.manual_seed(config.run.seed)
    method = build_method(config).to(device)
    with ranks.together(device):
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "config.toml", config.as_toml().encode("utf-8"))
    if not quiet:
        parameters = sum(p.numel() for p in method.parameters())
        sizes = [getattr(data, name, None) for name in ("size_a", "size_b")]
        pictures = "" if None in sizes else f"{sizes[0]:,} + {sizes[1]:,} pictures, "
        print_line(
            f"{config.method} on {device}: {parameters / 1e6:.1f} M parameters, {pictures}"
            f"{data.steps_per_epoch:,} steps an epoch; run in {out}"
        )
        for path, reason in getattr(data, "skipped", []):
            print_line(f"skipped {path}: {reason}")
    return train(
        method,
        data,
        config.optim,
        config.run,
        out,
        config=config.as_dict(),
        batch_size=config.data.batch,
        quiet=quiet,
        ranks=ranks,
        validation=validation,
    )


def check_plan(config: Config) -> Method:
    """Refuse a configuration that cannot be trained with any images or device, before allocating memory.

    Returns:
        the method as `plan` builds it.

    Raises:
        ValueError: options are out of range or contradict each other, or crops do not fit the networks.
    """
    planned = plan(config)
    check_parts(planned, config.optim.accumulate)
    planned.check_options(config.data.batch)
    if config.data.preprocess != "none" and not config.data.dataset:
        planned.check(config.data.batch, *sides(config.data.crop_size))
    return planned


def check_code(config: Config) -> Metric:
    """Import a user's own data set and metric, and check them without images.

    Returns:
        the metric.

    Raises:
        ValueError: they cannot be used, or an option has no effect with them.
    """
    if config.data.dataset:
        check_class(config.data.dataset)
        if config.data.rain:
            raise ValueError(
                f"data.rain={config.data.rain:g} has no effect with data.dataset={config.data.dataset}: leave it at 0, "
                f"and let the data set render rain (fastnce.data.rain.render_rain)"
            )
    return find_metric(config.run.metric, config.network.in_channels)


def _check_memory(config: Config, device: torch.device) -> None:
    planned = plan(config)
    if config.run.checkpoint_activations:
        recompute_blocks(planned)
    size = None if config.data.preprocess == "none" else sides(config.data.crop_size)
    sixteen_bits = pick_precision(config.run.precision, device) != "fp32"
    part = config.data.batch // config.optim.accumulate
    check_room(planned, part, size, device=device, sixteen_bits=sixteen_bits)


def _open_validation(
    config: Config, metric: Metric, device: torch.device, ranks: Ranks, quiet: bool
) -> Validation | None:
    """Find the held-out pairs in `data.validate` or DIR/test, also if `data.dataset` gives the training images."""
    if not config.run.validate_every:
        return None
    options = config.data
    pairs = (
        []
        if not (options.dir or options.validate)
        else find_validation(options.dir, options.validate, config.run.validate_pictures, options.rain_side)
    )
    if pairs:
        return Validation(pairs, config.network.in_channels, device, Translator, ranks, options.skip_bad, metric)
    if not quiet:
        where = f"{options.dir}/test holds no pairs" if options.dir else "there is no data.dir"
        print_line(f"nothing is validated: {where}, and data.validate names none")
    return None


def open_checked(
    config: Config, method: Method, device: torch.device, ranks: Ranks, quiet: bool = False
) -> UnpairedData | SinglePictureData | OwnData:
    """`open_data`, and refuse images that would end the run later.

    Args:
        method: as `check_plan` returns.

    Raises:
        ValueError: an image cannot be read, or its size does not fit.
    """
    options = config.data
    data = open_data(config, device, ranks, quiet)
    if isinstance(data, OwnData):
        a, b = ({(h, w): f"images of {w}x{h} from data.dataset"} for h, w in data.first_sizes)
        method.check_sizes(options.batch, a, b, "let the data set return another size")
    elif options.preprocess == "none" and isinstance(data, UnpairedData):
        a, b = (
            {size: f"pictures of {size[1]}x{size[0]}, such as {file}," for size, file in sizes.items()}
            for sizes in data.sizes()
        )
        method.check_sizes(options.batch, a, b, "resize the pictures or set data.preprocess=resize_and_crop")
    if config.run.sample_every or config.run.monitor_every:
        data.samples(max(config.run.samples, 2))  # so that an unreadable file is named now, not at step 500
    return data


def cache_run(config: Config) -> Iterator[str]:
    """Build the caches that training with this configuration reads; yields one line per file."""
    if config.data.dataset:
        yield f"nothing is cached: data.dataset={config.data.dataset} reads its images itself"
        return
    data = open_checked(config, check_plan(config), torch.device("cpu"), Ranks())
    before = data.cached()
    after = data.cached(decaying=True) if config.optim.n_epochs_decay else {}
    for path, size in {**before, **after}.items():
        halves = [name for name, files in (("before", before), ("while", after)) if path in files]
        yield f"{path}  {size / 2**20:.1f} MiB, read {' and '.join(halves)} the learning rate falls"
    if not before:
        yield "nothing is cached: data.preprocess=zoom_and_patch reads its two pictures when training starts"
    for path, reason in data.skipped:
        yield f"skipped {path}: {reason}"


def open_data(
    config: Config, device: torch.device, ranks: Ranks, quiet: bool = False
) -> UnpairedData | SinglePictureData | OwnData:
    """Open the data set that a configuration names."""
    options, network = config.data, config.network
    if network.in_channels != network.out_channels:
        raise ValueError(
            f"network.in_channels={network.in_channels} and out_channels={network.out_channels} must be equal: both "
            f"domains are read with one number of channels"
        )
    if options.dataset:
        return open_own(
            options.dataset,
            options,
            channels=network.in_channels,
            batch=options.batch,
            seed=config.run.seed,
            rank=ranks.rank,
            world=ranks.world,
            device=device,
        )
    common: dict[str, Any] = {
        "channels": network.in_channels,
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
        return SinglePictureData(options.dir, crop_size=options.crop_size, **common)
    if options.rain:
        rain = RainOptions(**parse_ranges("data.rain_like", options.rain_like))
        common |= {"share": options.rain, "rain": rain}
    return (RainedData if options.rain else UnpairedData)(
        options.dir,
        load_size=sides(options.load_size),
        crop_size=sides(options.crop_size),
        preprocess=options.preprocess,
        cache_dir=options.cache_dir or None,
        skip_bad=options.skip_bad,
        progress=None if quiet else print_line,
        **common,
    )


def check_place(config: Config, out: Path) -> None:
    """ValueError if no run can be in the folder `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file is in the way, a folder is needed")
    if config.data.dir and out.exists() and out.resolve() == Path(config.data.dir).resolve():
        raise ValueError(f"--out {out} is the folder of the pictures: take another one, or a folder in it")


def check_same_run(config: Config, out: Path, processes: int = 1) -> dict[str, Any] | None:
    """Check that `out` is empty or holds a run with this configuration and this batch size of all processes.

    Returns:
        the state of the newest checkpoint; None if there is none.

    Raises:
        ValueError: it holds another run, or all of its checkpoints are damaged.
    """
    found = Checkpoints(out / "checkpoints", log=lambda sentence: None).state()
    if found is None:
        return None
    state, _ = found
    stored = state.get("progress")
    different = config.differences(state.get("config", {}), any_batch=stored is not None)
    if different:
        raise ValueError(
            f"{out} holds a run with another configuration ({'; '.join(different)}): use the same to continue it, or "
            f"another --out"
        )
    if not config.run.change_batch:
        check_batch(stored, config.data.batch * processes, processes, str(out), lambda: plan(config))
    return state
