"""Principal components of the image features, for mappers that learn from few images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import DataError


class PrincipalComponents(nn.Module):
    """The first principal components of standardised features, each with variance 1 over the training images.

    From thousands of features a mapper can learn a few hundred images by heart. Components are found without the
    texts, so a few of them leave it only what images differ in most.

    Args:
        dim: width of the features; count: components that are kept.

    Example:
        >>> components = PrincipalComponents(8, count=2)
        >>> components.fit(torch.randn(50, 1, 8))
        >>> components(torch.randn(3, 1, 8)).shape
        torch.Size([3, 1, 2])
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.eye(count, dim))  # until `fit`, the first features

    @torch.no_grad()
    def fit(self, image_features: Tensor) -> None:
        """Find the components.

        Args:
            image_features: float[n, N, D] of the training images.

        Raises:
            DataError: for fewer image tokens than components.
        """
        rows = image_features.flatten(0, 1).to(self.mean)
        count = len(self.basis)
        if len(rows) <= count:
            raise DataError(
                f"model.mapper.components: got {count}, expected fewer than the {len(rows)} image tokens of the "
                "training images"
            )
        mean, deviation = rows.mean(0), rows.std(0)
        # a feature that hardly varies would be blown up to the size of the others
        scale = 1 / (deviation + 1e-3 * deviation.square().mean().sqrt()).clamp(min=1e-12)
        with torch.random.fork_rng(devices=[]):  # the decomposition draws random numbers
            torch.manual_seed(0)
            # [rows, D] -> [D, count + 8], best first
            _, values, vectors = torch.pca_lowrank((rows - mean) * scale, min(count + 8, *rows.shape), niter=4)
        spread = values[:count] / len(rows) ** 0.5
        known = spread > 1e-6 * spread[0].clamp(min=1e-12)  # equal images have no components
        self.mean.copy_(mean)
        self.basis.zero_()
        self.basis[: len(spread)][known] = (vectors[:, :count].T * scale)[known] / spread[known, None]

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D] -> [B, N, count], in float32
        with torch.autocast(image_features.device.type, enabled=False):
            return F.linear(image_features.float() - self.mean, self.basis)
