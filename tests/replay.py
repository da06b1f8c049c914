"""Replay recordings of the published implementations and compare.

    python -m tests.replay DIR [--require NAME ...]

One line a file with its largest error as a part of its tolerance, then `N passed, N failed`; exit 1 if any failed.
Everything is computed in float64. Results stored as float64 must agree to 1e-9, as float32 to 1e-6 (both relative to
the largest value of the tensor), changes of weights to 1e-5 of the learning rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, CUTOptions, Draws, NetworkOptions
from fastnce.methods.losses import GAN_MODES, gan_loss
from fastnce.methods.presets import PRESETS
from fastnce.nce import PatchSampleF, patch_nce
from fastnce.networks.published import network_from_weights

FLOAT64, FLOAT32, WEIGHTS = 1e-9, 1e-6, 1e-5


class Unknown(Exception):
    """A recording of something that is not implemented."""


class Recording:
    """A file's arrays as float64 tensors, its meta, and the errors found so far."""

    def __init__(self, path: Path):
        self.name = path.stem
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        meta = self.arrays.pop("meta", None)
        self.meta = {} if meta is None else json.loads(meta.tobytes().decode())
        self.worst = 0.0
        self.where = ""
        self.checks = 0

    def tensor(self, key: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[key].copy())
        return tensor.double() if tensor.is_floating_point() else tensor

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self.tensor(key) for key in self.arrays if key.startswith(prefix)}

    def check(self, what: str, value: Tensor, key: str) -> None:
        """Compare with a stored array, to the tolerance of its precision."""
        stored = self.tensor(key)
        if value.shape != stored.shape:
            self._note(what, float("inf"))
            return
        scale = stored.abs().max().clamp_min(1e-300) if stored.numel() else torch.tensor(1.0)
        tolerance = FLOAT64 if self.arrays[key].dtype == np.float64 else FLOAT32
        self._note(what, float((value.detach() - stored).abs().max() / scale) / tolerance)

    def check_number(self, what: str, value: float, stored: float) -> None:
        self._note(what, abs(value - stored) / max(abs(stored), 1e-300) / FLOAT64)

    def check_change(self, what: str, value: Tensor, key: str, lr: float) -> None:
        self._note(what, float((value - self.tensor(key)).abs().max()) / lr / WEIGHTS)

    def _note(self, what: str, ratio: float) -> None:
        self.checks += 1
        if not ratio <= self.worst:  # also for NaN
            self.worst, self.where = ratio, what


def replay_patchnce(r: Recording) -> None:
    queries, keys = r.tensor("q").requires_grad_(), r.tensor("k")
    q, k = queries, keys
    if r.name.startswith("patchnce_dcl_PatchNCELoss_"):  # cosine similarity: renormalises its rows
        q, k = (x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-8) for x in (q, k))
    loss = patch_nce(
        q,
        k,
        images=r.meta["batch"],
        negatives="image" if r.meta["negatives"] == "image" else "batch",
        temperature=r.meta["temperature"],
        reduction="none",
    )
    loss.mean().backward()
    r.check("loss", loss, "loss")
    r.check("dq", queries.grad, "dq")


def replay_patch_sample(r: Recording) -> None:
    layers = sum(key.startswith("feat") for key in r.arrays)
    feats = [r.tensor(f"feat{i}").requires_grad_() for i in range(layers)]
    weights = r.under("netF/")
    sampler = PatchSampleF(use_mlp=bool(weights)).double()
    if weights:
        sampler.load_state_dict(weights)
        sampler.double().load_state_dict(weights)
    ids = [r.tensor(f"ids{i}") for i in range(layers)]
    rows, _ = sampler(feats, len(ids[0]), ids)
    torch.stack([(row * r.tensor(f"cotangent{i}")).sum() for i, row in enumerate(rows)]).sum().backward()
    for i in range(layers):
        r.check(f"out{i}", rows[i], f"out{i}")
        r.check(f"grad_feat{i}", feats[i].grad, f"grad_feat{i}")
    for name, parameter in sampler.named_parameters():
        r.check(f"grad/{name}", parameter.grad, f"grad/{name}")


def replay_gan_loss(r: Recording) -> None:
    prediction = r.tensor("pred")
    for key in [key for key in r.arrays if "/" in key]:
        mode, target = key.split("/")
        if mode not in GAN_MODES:
            raise Unknown(f"GAN objective {mode}")
        if r.arrays[key].ndim:  # published: one value a picture
            value = torch.stack([gan_loss(p, target == "real", mode) for p in prediction])
        else:
            value = gan_loss(prediction, target == "real", mode)
        r.check(key, value, key)


def replay_network(r: Recording) -> None:
    state = r.under("net/")
    network = network_from_weights({k: v.float() for k, v in state.items()}).train().double()
    network.load_state_dict(state)
    x = r.tensor("x").requires_grad_()
    layers = r.meta.get("layers")
    if layers:
        y, features = network(x, layers)
        for layer, feature in zip(layers, features, strict=True):
            r.check(f"feat{layer}", feature, f"feat{layer}")
    else:
        y = network(x)
    (y * r.tensor("cotangent")).sum().backward()
    r.check("y", y, "y")
    r.check("dx", x.grad, "dx")


def parse_argv(argv: list[str]) -> dict[str, str]:
    """The published command line as a dict; a flag without a value is "True"."""
    options: dict[str, str] = {}
    i = 0
    while i < len(argv):
        key = argv[i].removeprefix("--")
        value = "True"
        if i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            i += 1
            value = argv[i]
        options[key] = value
        i += 1
    return options


NETWORK_NAMES = {
    "netG": "generator",
    "netD": "discriminator",
    "ngf": "width",
    "ndf": "discriminator_width",
    "n_layers_D": "discriminator_layers",
    "crop_size": "resolution",
    "normG": "norm",
    "init_type": "init_type",
    "init_gain": "init_gain",
}


def take_network(argv: dict[str, str], preset: str) -> NetworkOptions:
    """The published options that describe networks."""
    options = NetworkOptions(**PRESETS[preset].sections.get("network", {}))
    # The recorded CycleGAN, run on a CPU, has antialiased networks: its code passes its list of GPUs in that place.
    options.antialias = argv.pop("no_antialias", "False") != "True"
    options.antialias_up = argv.pop("no_antialias_up", "False") != "True"
    return take(argv, options, NETWORK_NAMES)


def take(argv: dict[str, str], options, names: dict[str, str]):
    """Set options' fields from published names: {published: ours}."""
    for published, ours in names.items():
        if published in argv:
            text, old = argv.pop(published), getattr(options, ours)
            if isinstance(old, bool):
                value: object = text.lower() in ("true", "1", "yes")
            elif isinstance(old, list):
                value = [int(part) for part in text.split(",")]
            else:
                value = type(old)(text)
            setattr(options, ours, value)
    return options


LOSS_NAMES = {
    "lambda_GAN": "lambda_gan",
    "lambda_NCE": "lambda_nce",
    "lambda_IDT": "lambda_idt",
    "lambda_SIM": "lambda_sim",
    "lambda_A": "lambda_a",
    "lambda_B": "lambda_b",
    "lambda_identity": "lambda_identity",
    "lambda_R1": "lambda_r1",
    "pool_size": "pool_size",
    "nce_idt": "nce_idt",
    "nce_layers": "nce_layers",
    "nce_T": "temperature",
    "num_patches": "patches",
    "netF_nc": "projection",
    "gan_mode": "gan_mode",
    "flip_equivariance": "flip_equivariance",
}
MODELS = {
    "cut": "cut",
    "sincut": "sincut",
    "cycle_gan": "cyclegan",
    "dcl": "dclgan",
    "simdcl": "simdcl",
    "dcd": "dcdgan-released",
}
"""Published `--model` -> our preset, whose defaults the recordings confirm."""


def build_method(model: str, argv: dict[str, str]):
    """The method, float64, with the published options; takes from `argv` what it knows."""
    preset = PRESETS[MODELS[model]]
    options = preset.options()
    if argv.pop("CUT_mode", "CUT").lower() == "fastcut":
        options = CUTOptions.fastcut()
    known = {published: ours for published, ours in LOSS_NAMES.items() if hasattr(options, ours)}
    options = take(argv, options, known)
    if argv.pop("nce_includes_all_negatives_from_minibatch", "False").lower() == "true":
        options.negatives = "batch"
    method = preset.method(options, take_network(argv, MODELS[model])).double()
    if model == "sincut":
        method.generator.eval()  # recorded without the noise that training injects
    return method


def replay_step(r: Recording) -> None:
    argv = parse_argv(r.meta["argv"])
    model = argv.pop("model")
    if model not in MODELS:
        raise Unknown(f"method {model}")
    optim = OptimOptions(**PRESETS[MODELS[model]].sections.get("optim", {}))
    optim = take(argv, optim, {"beta1": "beta1", "beta2": "beta2", "lr": "lr"})
    argv.pop("batch_size", None)
    method = build_method(model, argv)
    if argv:
        raise Unknown(f"options {sorted(argv)} of {model}")
    for name, network in method.networks().items():
        network.load_state_dict(r.under(f"init/net{name}/"))
    step = Step(method, optim)
    recorded = [(options["lr"], list(options["betas"])) for _, options in r.meta["optimizers"]]
    ours = [(group.base_lr, list(group.adam.defaults["betas"])) for group in step.groups.values()]
    if ours != recorded:
        raise AssertionError(f"optimisers are {ours}, recorded {recorded}")
    for i, losses in enumerate(r.meta["losses"]):
        batch = Batch(r.tensor(f"step{i}/A"), r.tensor(f"step{i}/B"))
        draws = Draws(bool(losses.get("flipped", False)), recorded_ids(r, i))
        for name in ("fake_B", "idt_B", "fake_A", "idt_A", "rec_A", "rec_B") if i == 0 else ():
            if f"step0/{name}" in r.arrays:
                r.check(name, method.generate(batch, draws)[name], f"step0/{name}")
        found = step.run(batch, draws)
        for name, value in losses.items():
            if name != "flipped":
                r.check_number(f"step {i} {name}", float(found[name]), value)
    rates = {id(p): group.base_lr for group in step.groups.values() for p in group.parameters}
    for name, network in method.networks().items():
        for key, parameter in network.named_parameters():
            prefix = f"net{name}/{key}"
            if f"final_delta/{prefix}" in r.arrays:
                change = parameter.detach() - r.tensor(f"init/{prefix}")
                r.check_change(prefix, change, f"final_delta/{prefix}", rates[id(parameter)])


def recorded_ids(r: Recording, step: int) -> list[list[Tensor]] | None:
    calls: dict[int, dict[int, Tensor]] = {}
    for key in r.arrays:
        if key.startswith(f"step{step}/ids/"):
            _, _, call, layer = key.split("/")
            calls.setdefault(int(call.removeprefix("call")), {})[int(layer.removeprefix("layer"))] = r.tensor(key)
    return [[layers[i] for i in sorted(layers)] for _, layers in sorted(calls.items())] or None


def replay(path: Path) -> Recording:
    """Replay one file; its `worst` is the largest error as a multiple of its tolerance."""
    r = Recording(path)
    if {"q", "k", "loss", "dq"} <= r.arrays.keys():
        replay_patchnce(r)
    elif {"feat0", "out0", "cotangent0"} <= r.arrays.keys():
        replay_patch_sample(r)
    elif "pred" in r.arrays:
        replay_gan_loss(r)
    elif "argv" in r.meta:
        replay_step(r)
    elif {"x", "y", "cotangent"} <= r.arrays.keys():
        replay_network(r)
    else:
        raise Unknown("a recording of this form")
    if not r.checks:
        raise AssertionError("nothing was compared")
    return r


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--require", nargs="*", default=[], metavar="NAME", help="files that may not be skipped")
    args = parser.parse_args(arguments)
    files = sorted(args.folder.glob("*.npz")) if args.folder.is_dir() else []
    if not files:
        print(f"{args.folder}: no recordings (*.npz) here", file=sys.stderr)
        return 2
    passed = failed = skipped = 0
    for path in files:
        try:
            r = replay(path)
        except Unknown as unknown:
            required = path.stem in args.require or path.name in args.require
            print(f"{'FAILED ' if required else 'skipped'} {path.stem}: not implemented: {unknown}")
            failed, skipped = failed + required, skipped + (not required)
            continue
        except Exception as error:  # one broken file must not hide the others
            print(f"FAILED  {path.stem}: {type(error).__name__}: {error}")
            failed += 1
            continue
        good = r.worst <= 1.0
        print(
            f"{'passed ' if good else 'FAILED '} {r.name}: {r.checks} comparisons, largest error {r.worst:.2g} of its "
            f"tolerance ({r.where})"
        )
        passed, failed = passed + good, failed + (not good)
    missing = [name for name in args.require if not any(name in (p.stem, p.name) for p in files)]
    for name in missing:
        print(f"FAILED  {name}: no such recording in {args.folder}")
    print(f"{passed} passed, {failed + len(missing)} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or missing else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other, long on a busy machine
    sys.exit(main())
