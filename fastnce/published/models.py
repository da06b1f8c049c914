"""The models of the published repositories: our presets for them, and the defaults that they replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .flag import CUT, CYCLEGAN, DCDGAN, DCLGAN


@dataclass(frozen=True)
class Model:
    """A published model.

    Args:
        method: our preset.
        defaults: the defaults that its `modify_commandline_options` replaces (`set_defaults`), for training.
        test: those that it replaces for a test alone.
    """

    method: str
    defaults: Mapping[str, str] = field(default_factory=dict)
    test: Mapping[str, str] = field(default_factory=dict)


CUT_DEFAULTS = {"pool_size": "0", "nce_idt": "True", "lambda_NCE": "1.0"}
FASTCUT_DEFAULTS = {
    "pool_size": "0",
    "nce_idt": "False",
    "lambda_NCE": "10.0",
    "flip_equivariance": "True",
    "n_epochs": "150",
    "n_epochs_decay": "50",
}
DUAL_DEFAULTS = {"pool_size": "0", "nce_idt": "True", "lambda_NCE": "2.0", "nce_layers": "4,8,12,16"}
SINCUT_DEFAULTS = {
    "nce_includes_all_negatives_from_minibatch": "True",
    "dataset_mode": "singleimage",
    "netG": "stylegan2",
    "netD": "stylegan2",
    "gan_mode": "nonsaturating",
    "num_patches": "1",
    "nce_layers": "0,2,4",
    "ngf": "10",
    "ndf": "8",
    "lr": "0.002",
    "beta1": "0.0",
    "beta2": "0.99",
    "load_size": "1024",
    "crop_size": "64",
    "preprocess": "zoom_and_patch",
    "batch_size": "16",
    "save_epoch_freq": "1",
    "save_latest_freq": "20000",
    "n_epochs": "8",
    "n_epochs_decay": "8",
    "lambda_identity": "1.0",
}
SINCUT_TEST = {"preprocess": "none", "batch_size": "1", "num_test": "1"}

MODELS = {
    CUT: {
        "cut": Model("cut", CUT_DEFAULTS),
        # Its method is CUT's in the mode that CUT_mode names, so FastCUT's defaults may come before its own.
        "sincut": Model("sincut", {**CUT_DEFAULTS, **SINCUT_DEFAULTS, "lambda_NCE": "4.0"}, SINCUT_TEST),
        "cycle_gan": Model("cyclegan"),
    },
    DCLGAN: {
        "dcl": Model("dclgan", DUAL_DEFAULTS),
        "simdcl": Model("simdcl", {**DUAL_DEFAULTS, "DCL_mode": "SIM"}),
        "cut": Model("cut", {**CUT_DEFAULTS, "lambda_IDT": "10.0"}),
        "fastcut": Model("fastcut", {**FASTCUT_DEFAULTS, "lambda_IDT": "10.0"}),
        "cycle_gan": Model("cyclegan", {"no_dropout": "True"}),
    },
    DCDGAN: {
        "dcd": Model("dcdgan-released", {**DUAL_DEFAULTS, "lambda_identity": "1.0"}),
        "cycle_gan": Model("cyclegan", {"no_dropout": "True"}),
    },
    CYCLEGAN: {
        "cycle_gan": Model("cyclegan", {"no_dropout": "True"}),
        "test": Model("cyclegan", {"dataset_mode": "single"}),
    },
}
"""The published models that have a preset here, by repository and by their published name."""

DEFAULTS = {
    CUT: {"model": "cut"},
    DCLGAN: {"model": "dcl", "save_epoch_freq": "50", "gan_mode": "hinge", "num_test": "5000"},
    DCDGAN: {
        "model": "dcd",
        "dataroot": "datasets",
        "name": "experiment_rain800",
        "easy_label": "experiment_rain800",
        "load_size": "512",
        "save_epoch_freq": "10",
        "gan_mode": "hinge",
        "num_test": "5000",
        "n_epochs": "300",
        "n_epochs_decay": "300",
        "lr": "0.0001",
    },
    CYCLEGAN: {
        "model": "cycle_gan",
        "init_type": "normal",
        "n_epochs": "100",
        "n_epochs_decay": "100",
        "no_dropout": "False",
        "display_id": "1",
    },
}
"""The defaults of a repository's own option files that differ from those in the table of flags."""

NOT_HERE = {
    "pix2pix": "it trains on pairs, and fastnce trains unpaired",
    "colorization": "it trains on pairs that it makes of one picture, and fastnce trains unpaired",
    "template": "it is an example to copy from",
}
"""Published models without a preset, with the reason."""

WORDS = {"cut": CUT, "dclgan": DCLGAN, "dcdgan": DCDGAN, "cyclegan": CYCLEGAN}
"""The words of --from."""
