"""Heads that embed images and texts into one space, from outputs of mapper and LM: FROMAGe (Koh et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozenprefix.models.contrastive.losses import LogitScale


class ContrastiveHeads(nn.Module):
    """One linear map for images and one for texts into a shared space, and the scale of its cosines.

    Args:
        lm_dim: width of both inputs; dim: width of the space.
        loss: "infonce" or "sigmoid", which start with different scales.

    Example:
        >>> heads = ContrastiveHeads(lm_dim=32, dim=8, loss="infonce")
        >>> heads.embed_prefix(torch.randn(2, 10, 32)).shape
        torch.Size([2, 8])
    """

    def __init__(self, lm_dim: int, dim: int, loss: Any):
        super().__init__()
        self.image = nn.Linear(lm_dim, dim, bias=False)
        self.text = nn.Linear(lm_dim, dim, bias=False)
        self.logit_scale = LogitScale(loss)

    def embed_prefix(self, prefix_embeds: Tensor) -> Tensor:
        """Prefix embeddings float[B, P, D_lm] -> unit vectors float32[B, dim], from their mean."""
        return F.normalize(self.image(prefix_embeds.float().mean(dim=1)).float(), dim=-1)

    def embed_text(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states float[B, T, D_lm] -> unit vectors float32[B, dim], from the state at the last token.

        Args:
            attention_mask: int64[B, T], 0 on padding, which is on the right.
        """
        last = attention_mask.sum(dim=1) - 1
        ends = states[torch.arange(len(states), device=states.device), last]
        return F.normalize(self.text(ends.float()).float(), dim=-1)
