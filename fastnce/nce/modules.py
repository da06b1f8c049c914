"""The contrastive operation as modules: the two published classes, drop-in, and the whole chain in one.

criterion = PatchNCELoss(opt)                 # in place of models.patchnce.PatchNCELoss
netF = PatchSampleF(use_mlp=True, nc=256)     # in place of models.networks.PatchSampleF
head = PatchNCEHead([3, 128, 256, 256, 256])  # maps in, scalar out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..initialise import init_weights
from . import api
from .api import Implementation, Negatives, patch_nce, project_patches, sample_patch_ids
from .reference import normalize_rows


class PatchNCELoss(nn.Module):
    """The published loss module, same call, same numbers: `loss(feat_q, feat_k) -> (rows,)`, keys detached.

    Args:
        opt: the published options object (`nce_T`, `batch_size`, `nce_includes_all_negatives_from_minibatch`), or None.
        temperature, negatives: the same without an `opt`; "image" contrasts within a picture, "batch" within all rows.
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
        self.images: int = 1
        if opt is not None:
            temperature = opt.nce_T
            negatives = "batch" if opt.nce_includes_all_negatives_from_minibatch else "image"
            self.images = opt.batch_size
        self.temperature = temperature
        self.negatives: Negatives = negatives
        self.implementation: Implementation = implementation

    def forward(self, feat_q: Tensor, feat_k: Tensor, images: int | None = None) -> Tensor:
        """(rows, dim) twice to (rows,). `images` is the true batch size where it differs from the options'."""
        return patch_nce(
            feat_q,
            feat_k,
            images=images or self.images,
            negatives=self.negatives,
            temperature=self.temperature,
            reduction="none",
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, negatives={self.negatives!r}"


class PatchSampleF(nn.Module):
    """The published patch sampler and projector F: same call, same `state_dict` keys (`mlp_0.0.weight`, ...).

    The MLPs are made at the first call, as published, or at once when `in_channels` is given: an optimiser and a
    compiler want the latter. Loading a `state_dict` makes them too.

    Args:
        use_mlp: project through Linear-ReLU-Linear; otherwise only sample and normalise.
        init_type, init_gain: normal, xavier, kaiming or orthogonal, and its gain.
        nc: width of the projection.
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
        self.init_type = init_type
        self.init_gain = init_gain
        self.nc = nc
        self.mlp_init = False
        self.implementation: Implementation = implementation
        if use_mlp and in_channels is not None:
            self._create(in_channels)

    def _create(self, in_channels: Sequence[int], like: Tensor | None = None) -> None:
        for layer, channels in enumerate(in_channels):
            mlp = nn.Sequential(nn.Linear(channels, self.nc), nn.ReLU(), nn.Linear(self.nc, self.nc))
            init_weights(mlp, self.init_type, self.init_gain)
            if like is not None:
                mlp.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
            self.add_module(f"mlp_{layer}", mlp)
        self.mlp_init = True

    def create_mlp(self, feats: Sequence[Tensor]) -> None:
        """Make the MLPs for these maps (the published name)."""
        self._create([feat.shape[1] for feat in feats], like=feats[0])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if self.use_mlp and not self.mlp_init:
            layers = sum(key.startswith(f"{prefix}mlp_") and key.endswith(".0.weight") for key in state_dict)
            weights = [state_dict[f"{prefix}mlp_{layer}.0.weight"] for layer in range(layers)]
            if weights:
                self.nc = weights[0].shape[0]
                self._create([weight.shape[1] for weight in weights])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        if self.use_mlp and not self.mlp_init:  # children must exist before the recursion lists them
            self._load_from_state_dict(dict(state_dict), "", {}, False, [], [], [])
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def mlps(self, layers: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]] | None:
        """The weights of the first `layers` MLPs in the form that `project_patches` takes; None without MLPs."""
        if not self.use_mlp:
            return None
        found = [self.get_submodule(f"mlp_{layer}") for layer in range(layers)]
        return [(mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias) for mlp in found]  # type: ignore[index]

    def forward(
        self, feats: Sequence[Tensor], num_patches: int = 256, patch_ids: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sample, project and normalise every layer.

        Args:
            feats: one (images, channels, height, width) map a layer.
            num_patches: rows a picture; 0 takes every location and returns maps (see below).
            patch_ids: locations to take, one set a layer, in place of drawing them.

        Returns:
            ([(images * patches, nc)] a layer, [ids] a layer). With `num_patches=0` the first list holds
            (images, nc, height, width) maps, divided by their length *over locations*, as the published code does.
        """
        if self.use_mlp and not self.mlp_init:
            self.create_mlp(feats)
        if num_patches == 0:
            return self._whole_maps(feats), [torch.empty(0, dtype=torch.long) for _ in feats]
        if patch_ids is None:
            ids = [sample_patch_ids(f.shape[2] * f.shape[3], num_patches, device=f.device) for f in feats]
        else:
            ids = [torch.as_tensor(i, dtype=torch.long, device=f.device) for i, f in zip(patch_ids, feats, strict=True)]
        rows = project_patches(
            feats, ids, self.mlps(len(feats)), distinct_ids=patch_ids is None, implementation=self.implementation
        )
        return rows, ids

    def _whole_maps(self, feats: Sequence[Tensor]) -> list[Tensor]:
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
        temperature: T > 0, one for all layers or one a layer.
        negatives: "image" or "batch", see `patch_nce`.
        ids_per_image: draw locations for each picture rather than one set for all (published: one set).
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
        super().__init__(use_mlp, init_type, init_gain, dim, in_channels=in_channels, implementation=implementation)
        self.layers = len(in_channels)
        self.patches = patches
        self.temperatures = [temperature] * self.layers if isinstance(temperature, float | int) else list(temperature)
        if len(self.temperatures) != self.layers:
            raise ValueError(f"temperature must be one number or {self.layers}, not {len(self.temperatures)}")
        self.negatives: Negatives = negatives
        self.ids_per_image = ids_per_image
        self.others: Callable[[Tensor], Tensor] | None = None
        """Several ranks: a constant to those that the others have, (...) -> (ranks - 1, ...); more negatives then."""

    def draw_ids(self, maps: Sequence[Tensor], directions: int = 1) -> list[Tensor]:
        """Fresh locations for each layer of these maps, on their device: a set a direction, or a picture.

        (patches,) for one set, else (sets, patches). The kernels draw for all layers at once and otherwise than
        `sample_patch_ids` does: the same seed gives other locations.
        """
        sets = maps[0].shape[0] if self.ids_per_image else directions
        locations = [m.shape[2] * m.shape[3] for m in maps]
        if self._fused(maps):
            ids = api.fused_maps.draw_ids(locations, self.patches, sets, maps[0].device)
            return [i[0] for i in ids] if sets == 1 else ids
        images = None if sets == 1 else sets
        return [
            sample_patch_ids(n, self.patches, images=images, device=m.device)
            for n, m in zip(locations, maps, strict=True)
        ]

    def _fused(self, maps: Sequence[Tensor]) -> bool:
        mlps = self.mlps(self.layers)
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

        Args:
            patch_ids: locations to take, one set a layer, (patches,) or (images, patches), in place of drawing them.
                With several directions also one such list a direction.
            directions: the images are this many losses of equal size, one after another (CUT: NCE(x, G(x)), then the
                identity NCE(y, G(y))), each with its own locations and, for "batch", its own negatives.
            key_projector: projects the keys with its own weights (DCLGAN: F of the other domain); default this one's.

        Returns:
            a scalar, or (directions,) for more than one: each the mean over rows, then over layers.
        """
        if len(query_maps) != self.layers or len(key_maps) != self.layers:
            raise ValueError(f"{self.layers} maps a side are needed, not {len(query_maps)} and {len(key_maps)}")
        images = query_maps[0].shape[0]
        if directions < 1 or images % directions:
            raise ValueError(f"{images} images cannot be shared equally among directions={directions}")
        if patch_ids is None:
            ids = self.draw_ids(key_maps, directions)
        else:
            ids = self._given_ids(patch_ids, images, directions)
        projector = key_projector or self
        mlps, key_mlps = self.mlps(self.layers), projector.mlps(self.layers)
        groups = images if self.negatives == "image" else directions
        if self.others is None and self._fused(query_maps) and self._fused_keys(key_maps, mlps, key_mlps):
            api._check_patches(query_maps, ids, mlps, False)
            api._check_patches(key_maps, ids, key_mlps, False)
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

    def _given_ids(self, patch_ids, images: int, directions: int) -> list[Tensor]:
        """The caller's locations as one tensor a layer."""
        if all(isinstance(ids, Tensor) for ids in patch_ids):
            return list(patch_ids)
        if len(patch_ids) != directions or any(len(ids) != self.layers for ids in patch_ids):
            raise ValueError(f"patch_ids must hold {directions} lists (one a direction) of {self.layers} tensors")
        share = images // directions
        return [
            torch.stack(layer)  # one set a direction
            if all(ids.dim() == 1 for ids in layer)
            else torch.cat([ids.expand(share, -1) if ids.dim() == 1 else ids for ids in layer])
            for layer in zip(*patch_ids, strict=True)
        ]
