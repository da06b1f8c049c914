"""hDCE with SRC: Jung et al., Exploring Patch-wise Semantic Relation for Contrastive Learning (CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..common.options import option
from ..nce.api import patch_nce, project_patches
from ..nce.relations import relation_loss, unit_rows
from ..nce.selection import dense_patch_ids
from ..nce.weights import Weights, hdce_pair_weight
from .base import TEMPERATURE, WEIGHT, Batch, Draws, Losses, NetworkOptions, Outputs
from .checks import refuse_changed
from .cut import CUT, CUTOptions


@dataclass
class HnegSRCOptions(CUTOptions):
    """The terms of hDCE with SRC; the defaults are those of the released option files."""

    lambda_nce: float = option(1.0, "weight of hDCE (published lambda_HDCE)", **WEIGHT)
    lambda_src: float = option(1.0, "weight of the relation loss SRC between x and G(x)", **WEIGHT)
    nce_idt: bool = option(
        False, "also hDCE between y and G(y) (published dce_idt): keeps colours, costs a second image per step"
    )
    gamma: float = option(
        1.0, "temperature of hDCE's weights: small values leave only the nearest negatives", **TEMPERATURE
    )
    curriculum: bool = option(False, "move gamma to gamma_min in equal parts per epoch (published use_curriculum)")
    gamma_min: float = option(1.0, "gamma of the last epoch, with curriculum", **TEMPERATURE)
    step_gamma_epoch: int = option(
        0, "with curriculum, gamma is 1 after this epoch; 0: never (published step_gamma and step_gamma_epoch)", low=0
    )


class HnegSRC(CUT):
    """CUT with hDCE's weighted, decoupled loss in place of PatchNCE, and SRC between the codes of x and G(x).

    One set of locations serves both directions, as in the released code.
    """

    Options = HnegSRCOptions

    options: HnegSRCOptions
    gamma: Tensor

    def __init__(self, options: HnegSRCOptions, network: NetworkOptions):
        super().__init__(options, network)
        refuse_changed(
            options, HnegSRCOptions(), ("weighting", "symmetric", "selection", "gather_negatives"), "hneg-src"
        )
        if options.lambda_src > 0 and options.lambda_nce == 0:
            raise ValueError(
                f"loss.lambda_src={options.lambda_src} compares codes that only hDCE trains: set loss.lambda_nce above "
                f"0, or loss.lambda_src=0"
            )
        self.register_buffer("gamma", torch.tensor(float(options.gamma)), persistent=False)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set gamma for this epoch. It is on the device, so that recorded steps follow it."""
        self.gamma.fill_(gamma_at(self.options, epoch, epochs))

    def identity_losses(self) -> tuple[str, ...]:
        return ("HDCE_Y",)

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        total, losses = super().g_loss(batch, outputs, draws)
        for name in ("NCE", "NCE_Y"):
            if name in losses:
                losses[name.replace("NCE", "HDCE")] = losses.pop(name)
        if "relation" in outputs:
            losses["SRC"] = self.options.lambda_src * outputs["relation"]
            losses["G"] = total = total + losses["SRC"]
        return total, losses

    def _contrast(self, outputs: Outputs, draws: Draws) -> Tensor:
        query_maps, key_maps, directions = self.maps(outputs, draws)
        mlps = self.head.mlps(len(self.layers))
        drawn = draws.patch_ids is None
        ids = self._shared_ids(key_maps, draws)
        with torch.no_grad():
            keys = project_patches(key_maps, ids, mlps, distinct_ids=drawn)
        queries = project_patches(query_maps, ids, mlps, distinct_ids=drawn)
        images = outputs["fake"].shape[0]
        groups = images if self.options.negatives == "image" else directions
        losses, relations = [], []
        for q, k, temperature in zip(queries, keys, self.head.current_temperatures(), strict=True):
            unit = unit_rows(k)
            weights = Weights(pair_weight=hdce_pair_weight(unit, groups, gamma=self.gamma), decoupled=True)
            loss = patch_nce(q, k, images=groups, temperature=temperature, weights=weights, reduction="none")
            # The released code shows the cross-entropy and differentiates the decoupled loss.
            shown = loss + (softplus(loss) - loss).detach()
            losses.append(shown.unflatten(0, (directions, -1)).mean(1))
            if self.options.lambda_src > 0:
                rows = len(q) // directions  # those of x and G(x)
                relations.append(relation_loss(unit_rows(q[:rows]), unit[:rows], groups // directions))
        if relations:
            outputs["relation"] = torch.stack(relations).mean()
        return torch.stack(losses).mean(0)

    def _shared_ids(self, maps: list[Tensor], draws: Draws) -> list[Tensor]:
        """The locations of every layer, (patches,): the same for all images and both directions."""
        if draws.patch_ids is not None:
            return draws.patch_ids[0]
        every = self.options.patches == 0 or self.options.projector == "reshape"
        return dense_patch_ids(maps) if every else self.head.draw_ids(maps)


def gamma_at(options: HnegSRCOptions, epoch: int, epochs: int) -> float:
    """Return gamma in an epoch, counted from 1, of so many."""
    if not options.curriculum:
        return options.gamma
    if 0 < options.step_gamma_epoch < epoch:
        return 1.0
    return options.gamma + (options.gamma_min - options.gamma) * epoch / epochs
