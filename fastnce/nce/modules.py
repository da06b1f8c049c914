"""The contrastive operation as modules: the two published classes, drop-in, and the whole chain in one.

criterion = PatchNCELoss(opt)                 # in place of models.patchnce.PatchNCELoss
netF = PatchSampleF(use_mlp=True, nc=256)     # in place of models.networks.PatchSampleF
head = PatchNCEHead([3, 128, 256, 256, 256])  # maps in, scalar out
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..initialise import INIT_TYPES, init_weights
from . import api, checks
from .api import Implementation, Negatives, patch_nce, project_patches, sample_patch_ids
from .reference import normalize_rows

MLPs = list[tuple[Tensor, Tensor, Tensor, Tensor]] | None
"""What `project_patches` takes as `mlps`."""


class PatchNCELoss(nn.Module):
    """The published loss module, same call, same numbers: `loss(feat_q, feat_k) -> (rows,)`, keys detached.

    Args:
        opt: the published options object (`nce_T`, `batch_size`, `nce_includes_all_negatives_from_minibatch`), or None.
            They are read here, once. A number is taken for the temperature.
        temperature, negatives: the same without an `opt`; "image" contrasts within a picture, "batch" within all rows.

    Raises:
        ValueError: an option that `opt` lacks, or a value that makes no sense.
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
                raise ValueError("temperature and negatives come from opt: give either an opt or them, not both")
            if isinstance(opt, numbers.Real | Tensor) and not isinstance(opt, bool):
                temperature, self.opt = opt, None  # type: ignore[assignment]
            else:
                temperature = _option(opt, "nce_T")
                negatives = "batch" if _option(opt, "nce_includes_all_negatives_from_minibatch") else "image"
                images = 1 if negatives == "batch" else checks.count("opt.batch_size", _option(opt, "batch_size"))
        self.images: int = images
        self.temperature = checks.temperature(temperature)
        checks.choice("negatives", negatives, api.NEGATIVES)
        self.negatives: Negatives = negatives
        checks.choice("implementation", implementation, api.IMPLEMENTATIONS)
        self.implementation: Implementation = implementation

    def forward(self, feat_q: Tensor, feat_k: Tensor, images: int | None = None) -> Tensor:
        """(rows, dim) twice to (rows,). `images` is the true batch size where it differs from the options'."""
        return patch_nce(
            feat_q,
            feat_k,
            images=self.images if images is None else images,
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
            f"opt has no {name}: it must be the published options, or leave it out and give temperature= and negatives="
        )
    return getattr(opt, name)


class PatchSampleF(nn.Module):
    """The published patch sampler and projector F: same call, same `state_dict` keys (`mlp_0.0.weight`, ...).

    The MLPs are made at the first call, as published, or at once when `in_channels` is given: an optimiser and a
    compiler want the latter. Loading a `state_dict` makes them too; it takes all of it or, with an error, nothing.

    Args:
        use_mlp: project through Linear-ReLU-Linear; otherwise only sample and normalise.
        init_type, init_gain: normal, xavier, kaiming or orthogonal, and its gain.
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
        checks.choice("implementation", implementation, api.IMPLEMENTATIONS)
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
        """Make the MLPs for these maps (the published name)."""
        checks.maps("feats", feats)
        self._create([feat.shape[1] for feat in feats], like=feats[0])

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.use_mlp and not self.mlp_init:
            own = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(f"{prefix}mlp_")}
            if own and not self._create_for(own):
                found = ", ".join(f"{key} {tuple(t.shape)}" for key, t in sorted(own.items()))
                errors.append(f"the sampler needs weight and bias of mlp_0.0, mlp_0.2, ... of one width, not {found}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _create_for(self, state: dict[str, Tensor]) -> bool:
        """Make the MLPs that these tensors belong to; False, and nothing is made, where they belong to none."""
        firsts = [state.get(f"mlp_{layer}.0.weight", torch.empty(0)).shape for layer in range(len(state) // 4)]
        if not firsts or any(len(first) != 2 or first[0] != firsts[0][0] for first in firsts):
            return False
        nc = firsts[0][0]
        wanted: dict[str, tuple[int, ...]] = {}
        for layer, first in enumerate(firsts):
            wanted |= {f"mlp_{layer}.0.weight": first, f"mlp_{layer}.0.bias": (nc,)}
            wanted |= {f"mlp_{layer}.2.weight": (nc, nc), f"mlp_{layer}.2.bias": (nc,)}
        if {name: tensor.shape for name, tensor in state.items()} != wanted:
            return False
        self.nc = nc
        self._create([channels for _, channels in firsts])
        return True

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As `nn.Module.load_state_dict`, but where that raises after having loaded a part, this loads nothing."""
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
        """The weights of the first `layers` MLPs in the form that `project_patches` takes; None without MLPs."""
        if not self.use_mlp:
            return None
        if not hasattr(self, f"mlp_{layers - 1}"):
            have = sum(name.startswith("mlp_") for name in self._modules)
            raise ValueError(f"{layers} layers were given, but the projector has MLPs for {have}")
        found = [self.get_submodule(f"mlp_{layer}") for layer in range(layers)]
        return [(mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias) for mlp in found]  # type: ignore[index]

    def forward(
        self, feats: Sequence[Tensor], num_patches: int = 256, patch_ids: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sample, project and normalise every layer.

        Args:
            feats: one (images, channels, height, width) map a layer, of a floating dtype.
            num_patches: rows a picture; 0 takes every location and returns maps (see below).
            patch_ids: locations to take, one set a layer, in place of drawing them: tensors, arrays or lists of whole
                numbers of any width.

        Returns:
            ([(images * patches, nc)] a layer, [ids] a layer). With `num_patches=0` the first list holds
            (images, nc, height, width) maps, divided by their length *over locations*, as the published code does.

        Raises:
            ValueError: maps or ids that do not fit; a sampler that had no MLPs yet has none then.
        """
        checks.maps("feats", feats)
        num_patches = checks.count("num_patches", num_patches, least=0)
        if num_patches == 0:
            if self.use_mlp and not self.mlp_init:
                self.create_mlp(feats)
            return self._whole_maps(feats), [torch.empty(0, dtype=torch.long) for _ in feats]
        if patch_ids is None:
            ids = [sample_patch_ids(f.shape[2] * f.shape[3], num_patches, device=f.device) for f in feats]
        else:
            ids = checks.whole_ids(patch_ids, feats)
        if self.use_mlp and not self.mlp_init:
            checks.ids(ids, feats)  # what is refused leaves no MLPs
            self.create_mlp(feats)
        rows = project_patches(
            feats, ids, self.mlps(len(feats)), distinct_ids=patch_ids is None, implementation=self.implementation
        )
        return rows, ids

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


class PatchNCEHead(PatchSampleF):
    """The whole chain: feature maps in, one scalar out, for all layers (and both directions) at once.

    Sampling, projection, normalisation and InfoNCE, averaged over patches, then over layers (CUT, eq. 4). It is a
    `PatchSampleF`, so a published F loads into it. Float32 products are exact unless the library's may use TF32, see
    `fastnce.nce.api.products`.

    Args:
        in_channels: channels of each layer's map.
        dim: width of the projection.
        patches: locations drawn a picture and layer; all of them where a map has fewer.
        temperature: T, from 1e-30 to 1e30, one for all layers or one a layer.
        negatives: "image" or "batch", see `patch_nce`.
        ids_per_image: draw locations for each picture rather than one set for all (published: one set).

    Raises:
        ValueError: a value that makes no sense, here and not at the first call.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        patches: int = 256,
        temperature: float | Sequence[float] = 0.07,
        *,
        negatives: Negatives = "image",
        use_mlp: bool = True,
        ids_per_image: bool = False,
        init_type: str = "xavier",
        init_gain: float = 0.02,
        implementation: Implementation = None,
    ):
        checks.listed("in_channels", in_channels, "channels, one number per layer")
        dim = checks.count("dim", dim)
        super().__init__(use_mlp, init_type, init_gain, dim, in_channels=in_channels, implementation=implementation)
        self.layers = len(in_channels)
        self.patches = checks.count("patches", patches)
        self.temperatures = checks.temperatures(temperature, self.layers)
        checks.choice("negatives", negatives, api.NEGATIVES)
        self.negatives: Negatives = negatives
        self.ids_per_image = ids_per_image
        self.others: Callable[[Tensor], Tensor] | None = None
        """Several ranks: a constant to those that the others have, (...) -> (ranks - 1, ...); more negatives then."""

    def draw_ids(self, maps: Sequence[Tensor], directions: int = 1) -> list[Tensor]:
        """Fresh locations for each layer of these maps, on their device: a set a direction, or a picture.

        (patches,) for one set, else (sets, patches). The kernels draw for all layers at once and otherwise than
        `sample_patch_ids` does: the same seed gives other locations.
        """
        checks.maps("maps", maps, self.layers)
        return self._draw_ids(maps, checks.directions(directions, maps[0].shape[0]), self.mlps(self.layers))

    def _draw_ids(self, maps: Sequence[Tensor], directions: int, mlps: MLPs) -> list[Tensor]:
        sets = maps[0].shape[0] if self.ids_per_image else directions
        locations = [m.shape[2] * m.shape[3] for m in maps]
        if self._fused(maps, mlps):
            ids = api.fused_maps.draw_ids(locations, self.patches, sets, maps[0].device)
            return [i[0] for i in ids] if sets == 1 else ids
        images = None if sets == 1 else sets
        return [
            sample_patch_ids(n, self.patches, images=images, device=m.device)
            for n, m in zip(locations, maps, strict=True)
        ]

    def _fused(self, maps: Sequence[Tensor], mlps: MLPs) -> bool:
        dtypes = [api._autocast_dtype(m if mlps is None else mlps[0][0]) for m in maps]
        return api._use_triton_for_maps(self.implementation, maps, mlps, dtypes, self.patches)

    def forward(  # type: ignore[override]
        self,
        query_maps: Sequence[Tensor],
        key_maps: Sequence[Tensor],
        *,
        patch_ids: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
        directions: int = 1,
        key_projector: PatchSampleF | None = None,
    ) -> Tensor:
        """One (images, channels, height, width) map a layer and side; returns the scalar loss, or one a direction.

        A query's positive is the key at its own location: the maps of a layer have the same images, height and width on
        both sides. Their channels are those of the MLPs; without MLPs both sides share channels and dtype.

        Args:
            patch_ids: locations to take, one set a layer, (patches,) or (images, patches), in place of drawing them.
                With several directions also one such list a direction.
            directions: the images are this many losses of equal size, one after another (CUT: NCE(x, G(x)), then the
                identity NCE(y, G(y))), each with its own locations and, for "batch", its own negatives.
            key_projector: projects the keys with its own weights (DCLGAN: F of the other domain); default this one's.

        Returns:
            a scalar, or (directions,) for more than one: each the mean over rows, then over layers.

        Raises:
            ValueError: sides that do not correspond, ids that do not fit, and what `patch_nce` refuses.
        """
        if key_projector is not None and not isinstance(key_projector, PatchSampleF):
            raise ValueError(f"key_projector must be a PatchSampleF or None, not {checks.shown(key_projector)}")
        projector = self if key_projector is None else key_projector
        mlps, key_mlps = self.mlps(self.layers), projector.mlps(self.layers)
        images = self.images_of(query_maps, key_maps, projected=mlps is not None and key_mlps is not None)
        directions = checks.directions(directions, images)
        if patch_ids is None:
            ids = self._draw_ids(key_maps, directions, mlps)
        else:
            ids = self.given_ids(patch_ids, images, directions)
        groups = images if self.negatives == "image" else directions
        if self.others is None and self._fused(query_maps, mlps) and self._fused_keys(key_maps, mlps, key_mlps):
            checks.ids(ids, query_maps)
            for given, maps in ((mlps, query_maps), (key_mlps, key_maps)):
                if given is not None:
                    checks.mlps(given, maps)
            means = api.fused_maps.head_loss(
                query_maps,
                key_maps,
                [i[None] if i.dim() == 1 else i for i in ids],
                mlps,
                key_mlps,
                temperatures=self.temperatures,
                groups=groups,
                directions=directions,
                dtype=api._autocast_dtype(query_maps[0] if mlps is None else mlps[0][0]),
                distinct=patch_ids is None,
            )
            return means if directions > 1 else means.view(())
        own = patch_ids is None
        with torch.no_grad():
            keys = project_patches(key_maps, ids, key_mlps, distinct_ids=own, implementation=self.implementation)
        queries = project_patches(query_maps, ids, mlps, distinct_ids=own, implementation=self.implementation)
        external = [None] * self.layers if self.others is None else self._others_keys(keys, groups)
        losses = [
            patch_nce(
                q,
                k,
                images=groups,
                temperature=temperature,
                extra_keys=extra,
                reduction="none",
                unit_rows=True,
                implementation=self.implementation,
            )
            .unflatten(0, (directions, -1))
            .mean(dim=1)
            for q, k, extra, temperature in zip(queries, keys, external, self.temperatures, strict=True)
        ]
        means = torch.stack(losses).mean(dim=0)
        return means if directions > 1 else means[0]

    def _others_keys(self, keys: Sequence[Tensor], groups: int) -> list[Tensor]:
        """The other ranks' keys of each layer, (groups, count, dim), from one exchange for all layers."""
        assert self.others is not None
        sizes = [len(rows) for rows in keys]
        every = self.others(torch.cat(list(keys))).split(sizes, dim=1)  # (ranks - 1, rows, dim) a layer
        return [rows.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2) for rows in every]

    def _fused_keys(self, maps: Sequence[Tensor], mlps, key_mlps) -> bool:
        """Whether the key side fits into the same launch as the query side."""
        if mlps is None or key_mlps is None:
            return mlps is None and key_mlps is None
        return all(
            k.shape == w.shape and k.dtype == w.dtype
            for four, other in zip(mlps, key_mlps, strict=True)
            for w, k in zip(four, other, strict=True)
        )

    def images_of(self, query_maps: Sequence[Tensor], key_maps: Sequence[Tensor], projected: bool) -> int:
        """How many images the sides have; a ValueError where they do not correspond."""
        images = checks.sides(query_maps, key_maps, self.layers, channels=not projected)
        for layer, (q, k) in enumerate(zip(query_maps, key_maps, strict=True)):
            if not projected and q.dtype != k.dtype and api._autocast_dtype(q) != api._autocast_dtype(k):
                raise ValueError(f"query and key map {layer} must have one dtype, not {q.dtype} and {k.dtype}")
        return images

    def given_ids(self, patch_ids, images: int, directions: int) -> list[Tensor]:
        """The caller's locations as one tensor a layer: (patches,), or (sets, patches) of which images share each."""
        checks.listed("patch_ids", patch_ids, "tensors, one per layer, or of such lists, one per direction")
        if all(isinstance(ids, Tensor) for ids in patch_ids):
            return list(patch_ids)
        share = images // directions
        checks.ids_by_direction(patch_ids, directions, self.layers, share)
        return [
            torch.stack(layer)  # one set a direction
            if all(ids.dim() == 1 for ids in layer)
            else torch.cat([ids.expand(share, -1) if ids.dim() == 1 else ids for ids in layer])
            for layer in zip(*patch_ids, strict=True)
        ]
