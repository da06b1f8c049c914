"""QS-Attn: Hu et al., Query-Selected Attention for Contrastive Learning in I2I Translation (CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.options import option
from ..nce.selection import Attention, Windows, dense_patch_ids, query_attention, route
from .base import Draws, NetworkOptions, Outputs
from .checks import refuse_changed
from .cut import CUT, CUTOptions


@dataclass
class QSAttnOptions(CUTOptions):
    """QS-Attn's terms; the defaults are those of the released option files."""

    attention: Attention = option(
        "global",
        '"global": over the whole map; "local": over 7x7 windows; "local_global": locations by local, features by '
        "global attention (published QS_mode)",
    )
    attention_from: int = option(
        3, "layers of nce_layers that come before this one take random locations, as in CUT", low=0
    )
    windows: Windows = option(
        "released",
        'how local windows are read: "released": as by the released code, which mixes channels with places; "paper": '
        "the features of the places",
    )


class QSAttn(CUT):
    """CUT whose deep layers contrast features averaged by attention, at the locations of least attention entropy.

    The source image gives locations and attention for both sides. As in the released code, G's gradient also passes
    through the attention to the features of the source image.
    """

    Options = QSAttnOptions

    options: QSAttnOptions
    keys_learn = True
    projects_rows = False

    def __init__(self, options: QSAttnOptions, network: NetworkOptions):
        super().__init__(options, network)
        refuse_changed(options, QSAttnOptions(), ("selection",), "qsattn, which has loss.attention")

    def _contrast(self, outputs: Outputs, draws: Draws) -> Tensor:
        options = self.options
        *sides, directions = self.maps(outputs, draws)
        queries, keys = map(list, sides)  # copies, because layers are replaced
        ids = self._ids(keys, directions, draws)
        for layer in range(options.attention_from, len(keys)):
            source = keys[layer]
            patches = options.patches or source[0, 0].numel()
            chosen, attention = query_attention(source, patches, options.attention, options.windows)
            arguments = chosen, attention, options.attention, options.windows
            queries[layer], keys[layer] = route(queries[layer], *arguments), route(source, *arguments)
            ids[layer] = torch.arange(chosen.shape[1], device=source.device)
        return self.head(queries, keys, directions=directions, patch_ids=ids).reshape(directions)

    def _ids(self, maps: list[Tensor], directions: int, draws: Draws) -> list[Tensor]:
        """Random locations of every layer; given ones may end at the first layer with attention."""
        if draws.patch_ids is not None:
            given = [torch.stack(layer) for layer in zip(*draws.patch_ids[:directions], strict=True)]
            return given + maps[len(given) :]  # places that attention fills
        return dense_patch_ids(maps) if self.options.patches == 0 else self.head.draw_ids(maps, directions)
