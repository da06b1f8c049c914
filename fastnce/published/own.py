"""Converters of options whose meaning depends on the model, on other options, or on the place of files."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

from ..data.folder import is_phase
from ..data.target import SINGLE, named
from .flag import CUT, NotSupported, Published, at_least_one, number, switch, typed, whole, word

UNPAIRED = ("unaligned", "singleimage")
DUAL = ("dcl", "simdcl", "dcd")
"""The models whose loss takes the negatives of the whole batch in any case."""
LONGEST_NAME = 255  # bytes of a folder's name


def phase(text: str, published: Published) -> dict[str, Any]:
    """The folders of the data set; one that leads out of it is refused here, as the command refuses it."""
    if not is_phase(text):
        raise ValueError("the beginning of the names of folders in the data set, such as train")
    return {} if published.test else {"data.phase": text}


def experiment(published: Published) -> str:
    """The name of the run: `name`, and `suffix` with the values that it refers to."""
    name, suffix = published.values["name"], published.values.get("suffix", "")
    if not suffix or published.values.get("isTrain"):  # a printout has the whole name already
        return name
    values = {one: typed(text, published.usual.get(one, "")) for one, text in published.values.items()}
    try:
        found = f"{name}_{suffix.format(**values)}"
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise ValueError("a text with the names of options in braces, such as {netG}") from None
    if len(os.fsencode(found)) > LONGEST_NAME:
        raise ValueError(f"shorter: the name of the run has {len(found):,} characters with it")
    return found


def suffixed(text: str, published: Published) -> dict[str, Any]:
    if text:
        experiment(published)
    return {}


def crop(text: str, published: Published) -> dict[str, Any]:
    """The crop, which is also the resolution of StyleGAN2's networks."""
    found = whole("data.crop_size")(text, published)
    if any("stylegan2" in published.values.get(name, "") for name in ("netG", "netD")):
        found["network.resolution"] = found["data.crop_size"]
    return found


def preprocess(text: str, _: Published) -> dict[str, Any]:
    """The published code looks for words anywhere in the text."""
    try:
        return {"data.preprocess": named(text)}
    except ValueError as error:
        raise NotSupported(str(error).partition(": ")[2]) from None


def most(text: str, _: Published) -> dict[str, Any]:
    """The largest number of images; infinity is 0 here."""
    try:
        return {"data.max_images": 0 if text == "inf" else int(text)}
    except ValueError:
        raise ValueError("a whole number or inf") from None


def batch(text: str, published: Published) -> dict[str, Any]:
    """The batch of one process: the published one is divided among the GPUs."""
    if published.test:  # test.py has batches of 1, whatever is given
        return {}
    total, processes = int(whole("batch")(text, published)["batch"]), max(len(published.devices), 1)
    if total % processes:
        raise ValueError(f"a multiple of {processes}, the GPUs in --gpu_ids: each process takes an equal part")
    return {"data.batch": total // processes}


def devices(text: str, published: Published) -> dict[str, Any]:
    """One GPU as run.device; several are processes, which the command line has."""
    parts = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    if not all(part.isascii() and part.removeprefix("-").isdigit() for part in parts):
        raise ValueError("numbers of GPUs with commas between them, or -1 for the CPU")
    numbers = published.devices
    if not numbers:
        return {"run.device": "cpu"}
    return {} if len(numbers) > 1 or numbers == ["0"] else {"run.device": f"cuda:{numbers[0]}"}


def dataset(text: str, published: Published) -> dict[str, Any]:
    if text in UNPAIRED or (published.test and text == "single"):
        return {}
    raise NotSupported(f"{text} is not unpaired training: fastnce reads trainA and trainB")


def discriminator_norm(text: str, published: Published) -> dict[str, Any]:
    return {"network.discriminator_norm": "" if text == published.values["normG"] else text}


def antialias(text: str, published: Published) -> dict[str, Any]:
    """The code of DCLGAN and DCD-GAN gives CycleGAN's networks the list of GPUs in the place of this switch."""
    if published.model == "cycle_gan" and published.repository != CUT:
        if published.given and "no_antialias" in published.given:
            raise NotSupported("this code's CycleGAN ignores it: it is strided on GPUs and blurred on a CPU")
        return {"network.antialias": not published.devices}
    return {"network.antialias": not switch(text)}


def antialias_up(text: str, published: Published) -> dict[str, Any]:
    if published.model == "cycle_gan" and published.repository != CUT:
        if switch(text):
            raise NotSupported("this code's CycleGAN ignores it and always blurs after doubling")
        return {"network.antialias_up": True}
    return {"network.antialias_up": not switch(text)}


def gan_mode(text: str, published: Published) -> dict[str, Any]:
    """The published WGAN-GP lacks its penalty, and the published hinge of the generators is the discriminators'."""
    more: dict[str, dict[str, Any]] = {"wgangp": {"loss.lambda_gp": 0.0}, "hinge": {"loss.saturating": True}}
    return {"loss.gan_mode": text, **more.get(text, {})}


def start(text: str, published: Published) -> dict[str, Any]:
    """Published code continues with the networks alone, so here a new run begins with them."""
    if not published.on("continue_train"):
        return {}
    values = published.values
    label = values.get("epoch", "latest")
    if values.get("load_iter", "0") not in ("0", ""):
        label = f"iter_{values['load_iter']}"
    named = values.get("pretrained_name", "None")
    folder = PurePath(values["checkpoints_dir"]) / (experiment(published) if named in ("", "None") else named)
    return {"run.start_from": str(folder if label == "latest" else folder / label)}


def pretrained(text: str, published: Published) -> dict[str, Any]:
    if text not in ("", "None") and not published.on("continue_train"):
        raise NotSupported("the published code reads it with --continue_train only")
    return start(text, published)


def nce_idt(text: str, published: Published) -> dict[str, Any]:
    if published.model not in DUAL:
        return {"loss.nce_idt": switch(text)}
    if not switch(text):
        raise NotSupported("without it the published code fails; loss.lambda_idt=0 leaves the identity loss out")
    return {}


def lambda_nce(text: str, published: Published) -> dict[str, Any]:
    if published.model == "simdcl":
        raise NotSupported("SimDCL's code never multiplies with it; loss.lambda_nce does, and is 1")
    try:
        return {"loss.lambda_nce": float(text)}
    except ValueError:
        raise ValueError("a number") from None


def lambda_idt(text: str, published: Published) -> dict[str, Any]:
    if published.model not in ("dcl", "dcd"):
        raise NotSupported(f"the published {published.model} never reads it")
    try:
        return {"loss.lambda_idt": float(text)}
    except ValueError:
        raise ValueError("a number") from None


def lambda_identity(text: str, published: Published) -> dict[str, Any]:
    if published.model == "dcd":
        raise NotSupported("DCD-GAN's code computes this term and never adds it to its loss")
    try:
        return {"loss.lambda_identity": float(text)}
    except ValueError:
        raise ValueError("a number") from None


def negatives(text: str, published: Published) -> dict[str, Any]:
    if published.model in DUAL:
        if "nce_includes_all_negatives_from_minibatch" in published.given:
            raise NotSupported("this code's loss never reads it and always takes the whole batch, as the preset does")
        return {}
    return {"loss.negatives": "batch" if switch(text) else "image"}


def flip_equivariance(text: str, published: Published) -> dict[str, Any]:
    return {"loss.flip_equivariance": switch(text)}


def second_moment(text: str, published: Published) -> dict[str, Any]:
    """CycleGAN's optimisers have 0.999 in every repository."""
    if published.model == "cycle_gan":
        if "beta2" in published.given:
            raise NotSupported("the published CycleGAN never reads it: its Adam has 0.999")
        return {}
    try:
        return {"optim.beta2": float(text)}
    except ValueError:
        raise ValueError("a number") from None


policy = word("optim.schedule", **{"lambda": "linear"})


def evaluation(text: str, published: Published) -> dict[str, Any]:
    """The published code defines it and reads it nowhere, so only a given one has an effect."""
    if "evaluation_freq" not in published.given:
        return {}
    return {"run.validate_every": published.steps(at_least_one(text)), "run.metrics": "fid"}  # there are no pairs


def zoom(text: str, published: Published) -> dict[str, Any]:
    if "random_scale_max" in published.given and published.values["preprocess"] != SINGLE:
        raise NotSupported(f"the published code reads it with --preprocess {SINGLE} only")
    return number("data.random_scale_max")(text, published)


def serial(text: str, published: Published) -> dict[str, Any]:
    if switch(text) and published.values["preprocess"] == SINGLE:
        raise NotSupported(f"the crops of --preprocess {SINGLE} are drawn at random")
    return {"data.shuffle": not switch(text)}


# ---- of test.py ----


def pictures(text: str, _: Published) -> dict[str, Any]:
    at_least_one(text)
    return {}


def model_suffix(text: str, _: Published) -> dict[str, Any]:
    if text not in ("", "_A", "_B"):
        raise ValueError("_A or _B, for the generators G_A and G_B")
    return {}


def wandb(text: str, published: Published) -> dict[str, Any]:
    return {"run.track": "wandb"} if switch(text) else {}


def page(text: str, published: Published) -> dict[str, Any]:
    return {"run.report": not switch(text)}
