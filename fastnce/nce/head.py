"""The contrastive operation as one module: maps in, scalar out.

head = PatchNCEHead([3, 128, 256, 256, 256])
loss = head(query_maps, key_maps)
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import KERNELS, Choice, Implementation
from ..common.first_use import settled, trusted
from ..common.messages import shown
from ..common.precision import autocast_dtype
from ..common.taps import Tap, Untapped, untapped, without_biases
from . import checks
from .api import NEGATIVES, Negatives, patch_nce, project_patches, sample_patch_ids
from .impl.dispatch import choose_maps, planned_calls, triton_maps
from .impl.uses import IdsUse, maps_use
from .modules import MLPs, PatchSampleF
from .multilayer import patch_nce_layers
from .temperature import LearnedTemperature, Temperature
from .weights import Weighting, Weights


class PatchNCEHead(PatchSampleF):
    """PatchNCE as one module: feature maps in, one scalar out, for all layers (and directions) at once.

    It samples, projects, normalises and computes InfoNCE, averaged over patches, then over layers (CUT, eq. 4). It is a
    `PatchSampleF`, so a published F loads into it. Float32 products are exact unless PyTorch may use TF32, see
    `fastnce.nce.api.products`.

    Args:
        in_channels: channels of each layer's map.
        dim: width of the projection.
        patches: locations drawn per image and layer; all of them if a map has fewer.
        temperature: T, from 1e-30 to 1e30, one for all layers or one per layer.
        negatives: "image" or "batch", see `patch_nce`.
        weighting: a function (queries, keys, groups) to `Weights`, such as `fastnce.nce.monce`. It is called once per
            layer, without gradient.
        symmetric: average both directions, see `patch_nce`.
        ids_per_image: draw locations for each image; otherwise one set serves all images (published).
        learn_temperature: train T with the projector, from `temperature` on: one T if that is one number, else one per
            layer. It is a parameter, see `LearnedTemperature`, and part of the `state_dict`.

    Raises:
        ValueError: an invalid value; it is raised here, not at the first call.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int = 256,
        patches: int = 256,
        temperature: float | Sequence[float] = 0.07,
        *,
        negatives: Negatives = "image",
        weighting: Weighting | None = None,
        symmetric: bool = False,
        use_mlp: bool = True,
        ids_per_image: bool = False,
        learn_temperature: bool = False,
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
        checks.choice("negatives", negatives, NEGATIVES)
        self.negatives: Negatives = negatives
        if weighting is not None and not callable(weighting):
            raise ValueError(f"weighting must be a function or None, not {shown(weighting)}")
        self.weighting, self.symmetric = weighting, symmetric
        self.ids_per_image = ids_per_image
        self.learned_temperature: LearnedTemperature | None = None
        if learn_temperature:
            shared = isinstance(temperature, numbers.Real)
            self.learned_temperature = LearnedTemperature(self.temperatures, shared)
        self.others: Callable[[Tensor], Tensor] | None = None
        """Gathers a constant of the other ranks, (...) -> (ranks - 1, ...), to be used as more negatives."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in `PatchSampleF`. A learned T that is missing, as in a published F, keeps its value."""
        if self.learned_temperature is not None and hasattr(state_dict, "items"):
            own = {f"learned_temperature.{name}": t for name, t in self.learned_temperature.state_dict().items()}
            state_dict = {**own, **state_dict}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def current_temperatures(self) -> list[Temperature]:
        """Return T of each layer: numbers, or tensors () with a gradient if T is learned."""
        return [*(self.temperatures if self.learned_temperature is None else self.learned_temperature())]

    def draw_ids(self, maps: Sequence[Tensor | Tap], directions: int = 1) -> list[Tensor]:
        """Draw locations for each layer of these maps, on their device: one set per direction, or per image.

        Returns (patches,) per layer for one set, else (sets, patches). The kernels draw for all layers at once, so a
        seed gives other locations than with `sample_patch_ids`.
        """
        plain = without_biases(maps)
        checks.maps("maps", plain, self.layers)
        return self._draw_ids(plain, checks.directions(directions, plain[0].shape[0]), self.mlps(self.layers))

    def _draw_ids(self, maps: Sequence[Tensor], directions: int, mlps: MLPs) -> list[Tensor]:
        sets = self._sets(maps[0].shape[0], directions)
        locations = [m.shape[2] * m.shape[3] for m in maps]
        if self._draw_choice(maps, directions, mlps).triton:
            ids = triton_maps.draw_ids(locations, int(self.patches), sets, maps[0].device)
            return [i[0] for i in ids] if sets == 1 else ids
        images = None if sets == 1 else sets
        return [
            sample_patch_ids(n, self.patches, images=images, device=m.device)
            for n, m in zip(locations, maps, strict=True)
        ]

    def _draw_choice(self, maps: Sequence[Tensor], directions: int, mlps: MLPs) -> Choice:
        choice, dtypes = choose_maps(self.implementation, maps, mlps, self.patches)
        if choice is not KERNELS:
            return choice
        locations = tuple(m.shape[2] * m.shape[3] for m in maps)
        use = IdsUse(locations, self.patches, self._sets(maps[0].shape[0], directions))
        return trusted(use, maps[0].device, dtypes[0])

    def _sets(self, images: int, directions: int) -> int:
        return images if self.ids_per_image else directions

    def _loss_call(self, queries: Untapped, keys: Untapped, mlps: MLPs, key_mlps: MLPs, patch_ids, directions) -> Any:
        """The call as `planned_calls` takes it; None if it is traced, or if there are no kernels."""
        if planned_calls is None or torch.compiler.is_compiling():
            return None
        if type(directions) is not int or type(self.patches) is not int or self.patches < 1:
            return None
        if not all(type(t) is float for t in self.temperatures):
            return None
        if (ids := planned_calls.given_ids(patch_ids)) is None:
            return None
        query_mlp = [w for four in mlps or () for w in four]
        key_mlp = query_mlp if key_mlps is mlps else [w for four in key_mlps or () for w in four]
        settings = (
            directions, self.patches, *self.temperatures, self.negatives, self.ids_per_image, self.implementation,
            patch_ids is None,
        )  # fmt: skip
        return planned_calls.LossCall(queries, keys, query_mlp, key_mlp, ids, settings)

    def _choice(
        self, maps: Sequence[Tensor], mlps: MLPs, directions: int, distinct: bool, kinds: tuple[int, ...]
    ) -> Choice:
        choice, dtypes = choose_maps(self.implementation, maps, mlps, self.patches)
        if choice is not KERNELS:
            return choice
        use = maps_use(
            "PatchNCEHead",
            maps,
            mlps,
            self.patches,
            negatives_of_batch=self.negatives == "batch",
            directions=directions,
            temperature=min(self.temperatures),
            distinct=distinct,
            taps=kinds,
        )
        return trusted(use, maps[0].device, dtypes[0])

    def forward(  # type: ignore[override]
        self,
        query_maps: Sequence[Tensor | Tap],
        key_maps: Sequence[Tensor | Tap],
        *,
        patch_ids: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
        directions: int = 1,
        key_projector: PatchSampleF | None = None,
    ) -> Tensor:
        """Compute the loss of one (images, channels, height, width) map per layer and side.

        A query's positive is the key at its own location, so both maps of a layer must have the same images, height and
        width. Their channels are those of the MLPs; without MLPs, both sides must have the same channels and dtype.

        Args:
            patch_ids: locations to use instead of drawing them, per layer (patches,) or (images, patches). With several
                directions, one such list per direction is accepted too.
            directions: the batch consists of this many parts of equal size, one after another (CUT: NCE(x, G(x)), then
                the identity NCE(y, G(y))), each with its own loss, locations and, for "batch", negatives.
            key_projector: projects the keys with its own weights (DCLGAN: F of the other domain); default: this module.

        Returns:
            a scalar, or (directions,) for more than one: each the mean over rows, then over layers.

        Raises:
            ValueError: maps of the two sides that do not match, ids that do not fit, weights of another shape, and
                everything that `patch_nce` refuses.
        """
        if key_projector is not None and not isinstance(key_projector, PatchSampleF):
            raise ValueError(f"key_projector must be a PatchSampleF or None, not {shown(key_projector)}")
        mlps = self.mlps(self.layers)
        key_mlps = mlps if key_projector is None else key_projector.mlps(self.layers)
        plain = self.weighting is None and not self.symmetric
        call = None
        fusable = plain and self.others is None and self.learned_temperature is None
        drawn = patch_ids is None
        sides = query_maps, key_maps  # taps among them
        of_queries, of_keys = untapped(query_maps, drawn, self.patches), untapped(key_maps, drawn)
        query_maps, key_maps = of_queries.maps, of_keys.maps
        kinds = of_queries.kinds() or of_keys.kinds()
        if fusable:
            call = self._loss_call(of_queries, of_keys, mlps, key_mlps, patch_ids, directions)
            if call is not None and (means := call.repeat()) is not None:
                return means if directions > 1 else means.view(())
        images = self.images_of(query_maps, key_maps, projected=mlps is not None and key_mlps is not None)
        directions = checks.directions(directions, images)
        groups = images if self.negatives == "image" else directions
        if not plain and self.others is not None:
            raise ValueError("keys of other ranks cannot be combined with a weighting or symmetric=True")
        ids = [] if patch_ids is None else self.given_ids(patch_ids, images, directions)
        choice = self._choice(query_maps, mlps, directions, drawn, kinds) if fusable else None
        if choice is not None and choice.triton and self._one_launch(mlps, key_mlps):
            if ids:
                checks.ids(ids, query_maps)
            for weights, maps in ((mlps, query_maps), (key_mlps, key_maps)):
                if weights is not None:
                    checks.mlps(weights, maps)
            options: Any = {
                "temperatures": [float(t) for t in self.temperatures],  # an attribute may have been replaced
                "groups": groups,
                "directions": directions,
                "dtype": autocast_dtype(query_maps[0] if mlps is None else mlps[0][0]),
            }
            means = None
            draws = choice if ids else self._draw_choice(key_maps, directions, mlps)
            if call is not None and draws.triton:
                keep = settled(choice) and settled(draws)
                means = call.plan(sets=self._sets(images, directions), patches=self.patches, keep=keep, **options)
            if means is None:
                ids = [i[None] if i.dim() == 1 else i for i in ids or self._draw_ids(key_maps, directions, mlps)]
                maps_of = of_queries.dense(), of_keys.dense()
                means = triton_maps.head_loss(*maps_of, ids, mlps, key_mlps, distinct=drawn, **options)
            return means if directions > 1 else means.view(())
        ids = ids or self._draw_ids(key_maps, directions, mlps)
        with torch.no_grad():
            keys = project_patches(sides[1], ids, key_mlps, distinct_ids=drawn, implementation=self.implementation)
        queries = project_patches(sides[0], ids, mlps, distinct_ids=drawn, implementation=self.implementation)
        temperatures = self.current_temperatures()
        if plain and self.others is None and self.learned_temperature is not None:
            means = patch_nce_layers(
                _by_direction(queries, directions),
                _by_direction(keys, directions),
                images=groups // directions,
                temperature=temperatures,
                unit_rows=True,
                implementation=self.implementation,
            )
            return means if directions > 1 else means.view(())
        external = [None] * self.layers if self.others is None else self._others_keys(keys, groups)
        losses = [
            patch_nce(
                q,
                k,
                images=groups,
                temperature=temperature,
                extra_keys=extra,
                weights=self._weights(q, k, groups),
                symmetric=self.symmetric,
                reduction="none",
                unit_rows=plain,
                implementation=self.implementation,
            )
            .unflatten(0, (directions, -1))
            .mean(dim=1)
            for q, k, extra, temperature in zip(queries, keys, external, temperatures, strict=True)
        ]
        means = torch.stack(losses).mean(dim=0)
        return means if directions > 1 else means[0]

    @torch.no_grad()
    def _weights(self, queries: Tensor, keys: Tensor, groups: int) -> Weights | None:
        if self.weighting is None:
            return None
        # copies: a weighting that works in place must not change the rows
        return Weights(*checks.weights(self.weighting(queries.detach().clone(), keys.clone(), groups), Weights, True))

    def _others_keys(self, keys: Sequence[Tensor], groups: int) -> list[Tensor]:
        """Return the other ranks' keys of each layer, (groups, count, dim), gathered for all layers at once."""
        assert self.others is not None
        sizes = [rows.numel() for rows in keys]  # layers may differ in width
        every = self.others(torch.cat([rows.flatten() for rows in keys])).split(sizes, dim=1)
        return [
            flat.unflatten(1, (groups, -1, rows.shape[1])).transpose(0, 1).flatten(1, 2)
            for flat, rows in zip(every, keys, strict=True)
        ]

    @staticmethod
    def _one_launch(mlps: MLPs, key_mlps: MLPs) -> bool:
        """Whether one launch can project both sides: their MLPs have the same shapes and dtypes."""
        if mlps is None or key_mlps is None:
            return mlps is None and key_mlps is None
        return all(
            k.shape == w.shape and k.dtype == w.dtype
            for four, other in zip(mlps, key_mlps, strict=True)
            for w, k in zip(four, other, strict=True)
        )

    def images_of(self, query_maps: Sequence[Tensor], key_maps: Sequence[Tensor], projected: bool) -> int:
        """Check that the maps of both sides match, and return their number of images."""
        images = checks.sides(query_maps, key_maps, self.layers, channels=not projected)
        for layer, (q, k) in enumerate(zip(query_maps, key_maps, strict=True)):
            if not projected and q.dtype != k.dtype and autocast_dtype(q) != autocast_dtype(k):
                raise ValueError(f"query and key map {layer} must have one dtype, not {q.dtype} and {k.dtype}")
        return images

    def given_ids(self, patch_ids, images: int, directions: int) -> list[Tensor]:
        """Return given locations as one tensor per layer: (patches,), or (sets, patches) that images share equally."""
        checks.listed("patch_ids", patch_ids, "tensors, one per layer, or of such lists, one per direction")
        if all(isinstance(ids, Tensor) for ids in patch_ids):
            return list(patch_ids)
        share = images // directions
        checks.ids_by_direction(patch_ids, directions, self.layers, share)
        return [
            torch.stack(layer)  # one set per direction
            if all(ids.dim() == 1 for ids in layer)
            else torch.cat([ids.expand(share, -1) if ids.dim() == 1 else ids for ids in layer])
            for layer in zip(*patch_ids, strict=True)
        ]


def _by_direction(rows: Sequence[Tensor], directions: int) -> list[list[Tensor]]:
    """Split the rows of each layer: one list per direction, of one tensor per layer."""
    return [list(layers) for layers in zip(*(one.chunk(directions) for one in rows), strict=True)]
