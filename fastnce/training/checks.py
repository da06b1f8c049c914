"""Refuse what cannot be trained, before memory is allocated or anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.imports import may_be_same_path
from ..common.messages import counted
from ..config.build import plan
from ..config.config import Change, Config
from ..config.options import batch_sizes, sides
from ..data.own import check_class
from ..engine.accumulate import check_parts
from ..engine.checkpoint import Checkpoints
from ..engine.checks import check_trackers
from ..engine.progress import check_batch
from ..evaluate.metrics import AUTO, Measures, find_measures
from ..methods import Method
from ..methods.checks import Sizes
from ..methods.pool import ImagePool
from .continuing import as_overrides, check_fit, is_fixed


def check_plan(config: Config) -> Method:
    """Refuse a configuration that cannot be trained with any images or device, before allocating memory.

    Returns:
        the method as `plan` builds it.

    Raises:
        ValueError: options are out of range or contradict each other, or crops do not fit the networks.
    """
    planned = plan(config)
    network = config.network
    if network.spectral_norm and (network.discriminator_norm or network.norm) == "instance":
        warnings.warn(
            "network.spectral_norm=true has little effect before instance norm, which removes the scale of a "
            "convolution: set network.discriminator_norm=none",
            stacklevel=2,
        )
    check_parts(planned, config.optim.accumulate)
    planned.check_options(config.data.batch)
    sizes = [] if config.data.dataset else batch_sizes(config.data, decays(config))
    if sizes == [sides(config.data.crop_size)]:
        planned.check(config.data.batch, *sizes[0])
    elif sizes:
        images = [{(height, width): f"images of {width}x{height}"} for height, width in sizes]
        check_images(config, planned, [(size, size) for size in images])
    return planned


def decays(config: Config) -> bool:
    """Whether the learning rate falls at the end of a run, where images are resized to `data.crop_size`."""
    return config.optim.n_epochs_decay > 0


def check_images(config: Config, planned: Method, halves: Sequence[tuple[Sizes, Sizes]]) -> None:
    """Refuse sizes of images that a method cannot be trained on.

    Args:
        halves: the sizes of A and of B, at first and while the learning rate falls.

    Raises:
        ValueError: a size does not fit, or a pool of fakes would hold several.
    """
    remedy = "resize the pictures or set data.preprocess=resize_and_crop"
    for a, b in halves:
        planned.check_sizes(config.data.batch, a, b, remedy)
    pools = [pool for pool in planned.extra_state_modules().values() if isinstance(pool, ImagePool) and pool.size]
    for sizes in zip(*halves, strict=True):
        several = list({size: name for half in sizes for size, name in half.items()}.values())
        if pools and len(several) > 1:
            raise ValueError(
                f"loss.pool_size={pools[0].size} remembers fakes of one size, and while the learning rate falls there "
                f"are {several[1]} beside {several[0]}: set data.load_size and data.crop_size to one value, or "
                f"loss.pool_size=0"
            )


def check_code(config: Config, device: torch.device | str = "cpu") -> Measures:
    """Check own code, the weights of measures, and that trackers are installed, without images.

    Args:
        device: where the networks of measures will compute.

    Returns:
        the measures.

    Raises:
        ValueError: they cannot be used, an option has no effect with them, or a tracker is not installed.
    """
    check_trackers(config.run.track)
    if config.data.dataset:
        check_class(config.data.dataset)
        if config.data.rain:
            raise ValueError(
                f"data.rain={config.data.rain:g} has no effect with data.dataset={config.data.dataset}: leave it at 0, "
                f"and let the data set render rain (fastnce.data.rain.render_rain)"
            )
    run = config.run
    measures = find_measures(run.best, run.metrics, config.network.out_channels, device, run.feature_weights)
    if not run.validate_every and (run.metrics or run.best != AUTO):
        key = f"run.metrics={run.metrics}" if run.metrics else f"run.best={run.best}"
        raise ValueError(f"{key} measures nothing, because run.validate_every=0: set it to 1000, for example")
    return measures


def check_place(config: Config, out: Path) -> None:
    """ValueError if no run can be in the folder `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file is in the way, a folder is needed")
    if config.data.dir and out.exists() and out.resolve() == Path(config.data.dir).resolve():
        raise ValueError(f"--out {out} is the folder of the pictures: take another one, or a folder in it")


def check_same_run(
    config: Config, out: Path, processes: int = 1, changes: Collection[str] = ()
) -> dict[str, Any] | None:
    """Check that `out` is empty or holds a run with this configuration and this batch size of all processes.

    Args:
        changes: keys that may differ. With "data.batch", the number of processes may differ too.

    Returns:
        the state of the newest checkpoint; None if there is none.

    Raises:
        ValueError: it holds another run, the run cannot continue with these changes, or all of its checkpoints are
            damaged.
    """
    found = Checkpoints(out / "checkpoints", log=lambda sentence: None).state()
    if found is None:
        return None
    state, folder = found
    stored = state.get("progress")
    different = [
        change
        for change in config.changes(state.get("config", {}))
        if not (change.free or change.key in changes or (change.key == "data.batch" and stored is not None))
    ]
    if different:
        raise ValueError(f"{out} holds a run with another configuration ({_listed(different)}): {_ways(different)}")
    source, before = config.run.start_from, state.get("config", {}).get("run", {}).get("start_from", "")
    if source and not (before and may_be_same_path(source, before)):
        steps = counted(state["step"], "step")
        raise ValueError(
            f"run.start_from={source} begins a new run, and {out} holds one of {steps}: leave it out "
            f"to continue that one, or take another --out"
        )
    if not (config.run.change_batch or "data.batch" in changes):
        check_batch(stored, config.data.batch * processes, processes, str(out), lambda: plan(config))
    check_fit(config, state, folder, out, changes)
    return state


def _listed(changes: Sequence[Change]) -> str:
    return "; ".join(map(str, changes))


def _ways(different: Sequence[Change]) -> str:
    """Return what continues a run whose configuration differs, or what to do instead."""
    if any(is_fixed(change.key) for change in different):
        return "use the same to continue it, or another --out"
    return (
        f"add {as_overrides(different, stored=True)} to continue it as it was, or --change {as_overrides(different)} "
        f"to change it from here on, or take another --out"
    )
