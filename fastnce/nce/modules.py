"""Drop-in replacements of the two published classes. (`head` has the whole loss in one module.)

criterion = PatchNCELoss(opt)                 # in place of models.patchnce.PatchNCELoss
netF = PatchSampleF(use_mlp=True, nc=256)     # in place of models.networks.PatchSampleF
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.dispatch import IMPLEMENTATIONS, KERNELS, Implementation
from ..common.first_use import settled, trusted
from ..common.initialise import INIT_TYPES, init_weights
from ..common.messages import shown
from ..common.taps import Untapped, dense
from . import checks
from .api import NEGATIVES, Negatives, patch_nce, project_patches, sample_patch_ids
from .impl.dispatch import choose_maps, planned_calls, triton_rows
from .impl.rows import normalize_rows
from .impl.uses import IdsUse, maps_use

MLPs = list[tuple[Tensor, Tensor, Tensor, Tensor]] | None
"""The weights of all layers, as `project_patches` takes them."""


class PatchNCELoss(nn.Module):
    """The published loss module, with the same call and results: `loss(feat_q, feat_k) -> (rows,)`, keys detached.

    Args:
        opt: the published options object (`nce_T`, `batch_size`, `nce_includes_all_negatives_from_minibatch`), or None.
            It is read once, here. A number is used as the temperature.
        temperature, negatives: used without `opt`; "image" contrasts within each image, "batch" within all rows.

    Raises:
        ValueError: an option that `opt` lacks, or an invalid value.
    """

    def __init__(
        self,
        opt=None,
        *,
        temperature: float = 0.07,
        negatives: Negatives = "image",
        implementation: Implementation = None,
    ):
        super().__init__()
        self.opt = opt
        images: Any = 1
        if opt is not None:
            if (temperature, negatives) != (0.07, "image"):
                raise ValueError("temperature and negatives come from opt: pass either opt or these two, not both")
            if isinstance(opt, numbers.Real | Tensor) and not isinstance(opt, bool):
                temperature, self.opt = opt, None  # type: ignore[assignment]
            else:
                temperature = _option(opt, "nce_T")
                every = _option(opt, "nce_includes_all_negatives_from_minibatch")
                if every not in (True, False):  # the text "False" would count as true
                    name = "opt.nce_includes_all_negatives_from_minibatch"
                    raise ValueError(f"{name} must be True or False, not {shown(every)}")
                negatives = "batch" if every else "image"
                images = 1 if negatives == "batch" else checks.count("opt.batch_size", _option(opt, "batch_size"))
        self.images: int = images
        self.temperature = checks.temperature(temperature)
        checks.choice("negatives", negatives, NEGATIVES)
        self.negatives: Negatives = negatives
        checks.choice("implementation", implementation, IMPLEMENTATIONS)
        self.implementation: Implementation = implementation

    def forward(self, feat_q: Tensor, feat_k: Tensor, images: int | None = None) -> Tensor:
        """Return the losses (rows,) of two (rows, dim). `images`: the batch size, if it differs from the options'."""
        images = self.images if images is None else images
        if triton_rows is not None and type(images) is int:  # most calls are like an earlier one
            settings = images, self.negatives, self.temperature, False, self.implementation
            if (found := triton_rows.repeated(feat_q, feat_k, *settings)) is not None:
                return found
        return patch_nce(
            feat_q,
            feat_k,
            images=images,
            negatives=self.negatives,
            temperature=self.temperature,
            reduction="none",
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, negatives={self.negatives!r}"


def _option(opt: Any, name: str) -> Any:
    if not hasattr(opt, name):
        raise ValueError(
            f"opt has no {name}: pass the options of CUT's parser, or pass temperature= and negatives= without opt"
        )
    return getattr(opt, name)


class PatchSampleF(nn.Module):
    """The published patch sampler and projector F: same call, same `state_dict` keys (`mlp_0.0.weight`, ...).

    The MLPs are created at the first call, as published, or immediately if `in_channels` is given, as an optimiser and
    a compiler require. Loading a `state_dict` creates them too; it loads everything or, after an error, nothing.

    Args:
        use_mlp: project through Linear-ReLU-Linear; otherwise only sample and normalise.
        init_type, init_gain: initialisation (normal, xavier, kaiming or orthogonal) and its gain.
        nc: width of the projection, at least 1.
        gpu_ids: accepted for the published signature; the MLPs follow the device of the maps.
        in_channels: channels of each layer's map.
    """

    def __init__(
        self,
        use_mlp: bool = True,
        init_type: str = "xavier",
        init_gain: float = 0.02,
        nc: int = 256,
        gpu_ids: Sequence[int] = (),
        *,
        in_channels: Sequence[int] | None = None,
        implementation: Implementation = None,
    ):
        super().__init__()
        self.use_mlp = use_mlp
        checks.choice("init_type", init_type, INIT_TYPES)
        self.init_type = init_type
        self.init_gain = checks.number("init_gain", init_gain, 0.0, 1e30)
        self.nc = checks.count("nc", nc)
        self.mlp_init = False
        checks.choice("implementation", implementation, IMPLEMENTATIONS)
        self.implementation: Implementation = implementation
        if in_channels is not None:
            checks.listed("in_channels", in_channels, "channels, one number per layer")
            for layer, channels in enumerate(in_channels):
                checks.count(f"in_channels[{layer}]", channels)
            if use_mlp:
                self._create(in_channels)

    def _create(self, in_channels: Sequence[int], like: Tensor | None = None) -> None:
        mlps = []
        for channels in in_channels:
            mlp = nn.Sequential(nn.Linear(channels, self.nc), nn.ReLU(), nn.Linear(self.nc, self.nc))
            init_weights(mlp, self.init_type, self.init_gain)
            if like is not None:
                mlp.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
            mlps.append(mlp)
        for layer, mlp in enumerate(mlps):  # all or none
            self.add_module(f"mlp_{layer}", mlp)
        self.mlp_init = True

    def create_mlp(self, feats: Sequence[Tensor]) -> None:
        """Create the MLPs for these maps (the published name)."""
        checks.maps("feats", feats)
        self._create([feat.shape[1] for feat in feats], like=feats[0])

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.use_mlp and not self.mlp_init:
            own = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(f"{prefix}mlp_")}
            if own and not self._create_for(own):
                found = ", ".join(f"{key} {tuple(getattr(t, 'shape', ()))}" for key, t in sorted(own.items()))
                errors.append(f"the sampler needs weight and bias of mlp_0.0, mlp_0.2, ... of one width, not {found}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _create_for(self, state: dict[str, Tensor]) -> bool:
        """Create the MLPs that these tensors belong to; if there are none, return False and create nothing."""
        shapes = {name: tuple(t.shape) if isinstance(t, Tensor) else () for name, t in state.items()}
        firsts = [shapes.get(f"mlp_{layer}.0.weight", ()) for layer in range(len(shapes) // 4)]
        if not firsts or any(len(first) != 2 or first[0] != firsts[0][0] for first in firsts):
            return False
        nc = firsts[0][0]
        wanted: dict[str, tuple[int, ...]] = {}
        for layer, first in enumerate(firsts):
            wanted |= {f"mlp_{layer}.0.weight": first, f"mlp_{layer}.0.bias": (nc,)}
            wanted |= {f"mlp_{layer}.2.weight": (nc, nc), f"mlp_{layer}.2.bias": (nc,)}
        if shapes != wanted:
            return False
        self.nc = nc
        self._create([channels for _, channels in firsts])
        return True

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Like `nn.Module.load_state_dict`, but if it fails, nothing is loaded."""
        if self.mlp_init or not self.use_mlp:
            checks.state(self, state_dict, strict)
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        nc = self.nc
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except Exception:
            self.nc, self.mlp_init = nc, False
            for name in [name for name in self._modules if name.startswith("mlp_")]:
                delattr(self, name)
            raise

    def mlps(self, layers: int) -> MLPs:
        """Return the weights of the first `layers` MLPs in the form that `project_patches` takes; None without MLPs."""
        if not self.use_mlp:
            return None
        modules = self._modules
        if f"mlp_{layers - 1}" not in modules:
            have = sum(name.startswith("mlp_") for name in modules)
            raise ValueError(f"{layers} layers were given, but the projector has MLPs for {have}")
        found: list[Any] = []
        for layer in range(layers):
            first, _, second, *_ = modules[f"mlp_{layer}"]._modules.values()  # type: ignore[union-attr]
            try:  # parameters themselves are found faster than attributes
                a, b = first._parameters, second._parameters  # type: ignore[union-attr]
                found.append((a["weight"], a["bias"], b["weight"], b["bias"]))
            except KeyError:  # a parametrised weight is computed
                found.append((first.weight, first.bias, second.weight, second.bias))  # type: ignore[union-attr]
        return found

    def forward(
        self, feats: Sequence[Tensor], num_patches: int = 256, patch_ids: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sample, project and normalise every layer.

        Args:
            feats: one (images, channels, height, width) map per layer, of a floating dtype.
            num_patches: rows per image; 0 takes every location and returns maps (see below).
            patch_ids: locations to use instead of drawing them, one set per layer: tensors, arrays or lists of whole
                numbers, of any integer type.

        Returns:
            two lists with one entry per layer: rows (images * patches, nc), and ids. With `num_patches=0` the first
            list holds (images, nc, height, width) maps, divided by their length *over locations*, as published.

        Raises:
            ValueError: maps or ids that do not fit; no MLPs are created then.
        """
        feats = dense(feats)
        call = self._rows_call(feats, num_patches, patch_ids)
        if call is not None and (found := call.repeat()) is not None:
            return found[0], found[1] or list(patch_ids or ())
        checks.maps("feats", feats)
        num_patches = checks.count("num_patches", num_patches, least=0)
        given = None if patch_ids is None or num_patches == 0 else checks.whole_ids(patch_ids, feats)
        if self.use_mlp and not self.mlp_init:
            if given is not None:
                checks.ids(given, feats)  # before MLPs are created
            self.create_mlp(feats)
        if num_patches == 0:
            return self._whole_maps(feats), [torch.empty(0, dtype=torch.long) for _ in feats]
        # Draw after creating the MLPs, as published, so that a seed gives the published weights.
        call = call or self._rows_call(feats, num_patches, patch_ids)
        if call is not None and (found := self._plan_rows(call, feats, num_patches, given)) is not None:
            return found[0], found[1] or list(given or ())
        ids = given or [sample_patch_ids(f.shape[2] * f.shape[3], num_patches, device=f.device) for f in feats]
        rows = project_patches(
            feats, ids, self.mlps(len(feats)), distinct_ids=given is None, implementation=self.implementation
        )
        return rows, ids

    def _rows_call(self, feats: Any, num_patches: Any, patch_ids: Any) -> Any:
        """The call as `planned_calls` takes it; None if it is traced, or if rows or MLPs do not exist yet."""
        if planned_calls is None or torch.compiler.is_compiling() or not planned_calls.usable(feats):
            return None
        if type(num_patches) is not int or num_patches < 1 or (self.use_mlp and not self.mlp_init):
            return None
        if (ids := planned_calls.given_ids(patch_ids)) is None:
            return None
        weights = [w for mlp in self.mlps(len(feats)) or () for w in mlp]
        return planned_calls.RowsCall(Untapped(feats, ()), weights, ids, ("sampler", num_patches, self.implementation))

    def _plan_rows(self, call: Any, feats: Sequence[Tensor], num_patches: int, given: list[Tensor] | None) -> Any:
        """Plan the call if the kernels compute it; else return None."""
        mlps = self.mlps(len(feats))
        if given is not None:
            checks.ids(given, feats)
        if mlps is not None:
            checks.mlps(mlps, feats)
        patches = num_patches if given is None else max(i.shape[-1] for i in given)
        choice, dtypes = choose_maps(self.implementation, feats, mlps, patches)
        uses: list[Any] = [maps_use("project_patches", feats, mlps, patches, distinct=given is None)]
        if given is None:
            uses.append(IdsUse(tuple(f.shape[2] * f.shape[3] for f in feats), num_patches, 1))
        choices = [trusted(use, feats[0].device, dtypes[0]) for use in uses] if choice is KERNELS else [choice]
        if not all(one.triton for one in choices):
            return None
        keep = all(map(settled, choices))
        return call.plan(dtype=dtypes[0], distinct=given is None, patches=num_patches, keep=keep)

    def _whole_maps(self, feats: Sequence[Tensor]) -> list[Tensor]:
        mlps = self.mlps(len(feats))
        if mlps is not None:
            checks.mlps(mlps, feats)
        maps = []
        for layer, feat in enumerate(feats):
            rows = feat.permute(0, 2, 3, 1).flatten(1, 2)
            if self.use_mlp:
                rows = self.get_submodule(f"mlp_{layer}")(rows)
            maps.append(normalize_rows(rows.transpose(1, 2)).unflatten(2, feat.shape[2:]))
        return maps

    def extra_repr(self) -> str:
        return f"use_mlp={self.use_mlp}, nc={self.nc}"
