"""Refuse configurations whose values contradict each other."""

from __future__ import annotations

from ..common.options import check as check_options
from ..data.folder import check_phase
from ..data.rain import parse_kinds
from ..data.target import SINGLE
from ..engine.checks import check_schedule, track_names
from ..methods.presets import find_preset
from .config import Config, from_preset
from .options import DataOptions, sides


def check(config: Config) -> None:
    """Refuse a configuration with a value outside its range, or with values that contradict each other.

    Only the configuration is checked, not whether networks, images and this machine fit it.

    Raises:
        ValueError: names the first wrong key, its value, and what is accepted.
    """
    preset = from_preset(config.method, find_preset(config.method))
    for section in Config.SECTIONS:
        options, wanted = getattr(config, section), type(getattr(preset, section))
        if not isinstance(options, wanted):
            raise ValueError(f"{section} must be {wanted.__name__} for {config.method}, not {type(options).__name__}")
        check_options(options, section)
    track_names(config.run.track)
    data, optim = config.data, config.optim
    check_schedule(optim)
    if data.batch % optim.accumulate:
        raise ValueError(
            f"data.batch={data.batch} cannot be computed in optim.accumulate={optim.accumulate} equal parts"
        )
    for name, text in (
        ("data.rain_like", data.rain_like),
        ("loss.rendered_rain", getattr(config.loss, "rendered_rain", "")),
    ):
        try:
            parse_kinds(name, text)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
    _check_places(data)
    _check_sides(data)


def _check_places(data: DataOptions) -> None:
    """Check where images come from and in which order, as far as options contradict each other."""
    check_phase(data.phase, f"data.phase={data.phase}")
    single = data.preprocess == SINGLE
    if not data.shuffle and (single or data.rain):
        drawn = f"data.preprocess={SINGLE} draws its crops" if single else "data.rain draws the images it renders on"
        raise ValueError(f"data.shuffle=false has no meaning here, because {drawn}: leave it true")
    if data.random_scale_max != DataOptions().random_scale_max and not single:
        raise ValueError(
            f"data.random_scale_max={data.random_scale_max:g} has no effect with data.preprocess={data.preprocess}: it "
            f"belongs to {SINGLE}"
        )


def _check_sides(data: DataOptions) -> None:
    """Check the sizes of crops. `fastnce.data` checks whole images and the crops of SinCUT."""
    if data.preprocess == SINGLE or not any(word in data.preprocess for word in ("crop", "trim")):
        return
    (load_height, load_width), (height, width) = (sides(size) for size in (data.load_size, data.crop_size))
    if height % 4 or width % 4:
        raise ValueError(f"data.crop_size={data.crop_size} must have sides that are multiples of 4")
    if data.preprocess in ("crop", "trim"):  # load_size is not used
        return
    if load_width < width or (load_height < height and "scale_width" not in data.preprocess):
        raise ValueError(
            f"data.load_size={data.load_size} is too small for data.crop_size={data.crop_size}: it must be at least as "
            f"large"
        )
