"""A prefix in every layer: keys and values that depend on the image in all layers.

Prefix tuning (Li & Liang 2021) and P-Tuning v2 (Liu et al. 2022) give every layer free vectors to attend to, VPT-deep
(Jia et al. 2022) puts them into the layers' inputs. Here they are computed from the image's prefix embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozenprefix.models.fusion.base import Fusion
from frozenprefix.models.options import Count


class DeepPrefixFusion(Fusion):
    """Prefix embeddings in place of words; before every later layer a learned function of them is added there.

    The layer's own frozen projections turn it into keys and values. The added parts start at zero, so the first step is
    that of the plain prefix.

    Args:
        lm_dim, num_layers: width and number of the LM's layers.
        rank: width of the bottleneck between the prefix embeddings and the update.

    Example:
        >>> fusion = DeepPrefixFusion(lm_dim=8, num_layers=3, rank=2)
        >>> len(fusion.up)  # the first layer reads the prefix embeddings themselves
        2
    """

    def __init__(self, *, lm_dim: int, num_layers: int, rank: Count = 128):
        super().__init__()
        self.norm = nn.LayerNorm(lm_dim)
        self.down = nn.Linear(lm_dim, rank)
        up = [nn.Linear(rank, lm_dim, bias=False) for _ in range(num_layers - 1)]
        for layer in up:
            nn.init.zeros_(layer.weight)
        self.up = nn.ModuleList(up)

    def attach(self, layers: nn.ModuleList) -> None:
        self.hook_inputs(layers, range(1, len(layers)), self.update)

    def update(self, layer: int, hidden: Tensor) -> Tensor:
        """float[B, T, D]: the update at the placeholders before `layer`, 0 elsewhere."""
        assert self.context is not None
        added = torch.zeros_like(hidden)
        if not self.context.is_first(layer):
            return added
        copies = len(hidden) // len(self.context.prefix_index)
        index = self.context.prefix_index.repeat_interleave(copies, dim=0)
        # [images, P, D] -> [images, P, rank]
        bottleneck = torch.tanh(self.down(self.norm(self.context.prefix_embeds.float())))
        # -> [images * P, D]
        deep = self.up[layer - 1](bottleneck).flatten(0, 1)
        is_image = index >= 0
        return added.index_put((is_image,), deep[index[is_image]].to(hidden.dtype))
