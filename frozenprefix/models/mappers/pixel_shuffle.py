"""Per-patch MLP after an optional pixel shuffle.

LLaVA-1.5 (Liu et al. 2023, section 3.2), Idefics3 (Laurençon et al. 2024, section 3.1), SmolVLM, nanoVLM.
"""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.options import Count


class PixelShuffleMapper(nn.Module):
    """Maps every image token to one embedding or, with `shuffle` s, every square of s x s neighbouring tokens.

    Nothing is averaged, so `prefix_length` follows from the number of image tokens: N / s².

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        shuffle: side s of the squares of tokens that are joined; 1 in LLaVA, 4 in SmolVLM and nanoVLM.
        num_layers: linear layers, with a GELU between them: 2 in LLaVA-1.5, 1 in Idefics3, SmolVLM and nanoVLM.
        hidden_dim: width between the layers; the LM's width by default, as in LLaVA-1.5.
        input_norm: layer norm on the features, for encoders whose features are not normalized.

    Raises:
        ConfigError: for a grid that cannot be cut into such squares, or a `prefix_length` other than N / s².

    Example:
        >>> mapper = PixelShuffleMapper(encoder_dim=16, num_tokens=16, lm_dim=8, prefix_length=4, shuffle=2)
        >>> mapper(torch.randn(2, 16, 16)).shape
        torch.Size([2, 4, 8])
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        num_tokens: int,
        lm_dim: int,
        prefix_length: int,
        shuffle: Count = 1,
        num_layers: Count = 2,
        hidden_dim: Count | None = None,
        input_norm: bool = False,
    ):
        super().__init__()
        if num_layers == 1 and hidden_dim is not None:
            raise ConfigError("model.mapper.hidden_dim has no effect with num_layers=1; remove it")
        _check_lengths(num_tokens, shuffle, prefix_length)
        self.shuffle = shuffle
        self.input_norm = nn.LayerNorm(encoder_dim) if input_norm else nn.Identity()
        width, hidden_dim = encoder_dim * shuffle**2, hidden_dim or lm_dim
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.Linear(width, hidden_dim), nn.GELU()]
            width = hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(width, lm_dim))

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.layers[-1]

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, P, s² * D_enc]
        tokens = join_squares(self.input_norm(image_features), self.shuffle)
        # -> [B, P, D_lm]
        return self.layers(tokens)


def join_squares(tokens: Tensor, side: int) -> Tensor:
    """Space to depth: concatenate the tokens of each `side` x `side` square into one.

    Args:
        tokens: float[B, N, D], a square grid in raster order whose side is a multiple of `side`.

    Returns:
        float[B, N / side², side² * D], squares in raster order.

    Example:
        >>> join_squares(torch.arange(4.0).view(1, 4, 1), side=2).tolist()
        [[[0.0, 1.0, 2.0, 3.0]]]
    """
    if side == 1:
        return tokens
    squares = isqrt(tokens.shape[1]) // side
    # [B, N, D] -> [B, squares, side, squares, side, D] -> [B, squares, squares, side, side, D]
    grid = tokens.unflatten(1, (squares, side, squares, side)).transpose(2, 3)
    # -> [B, squares², side² * D]
    return grid.flatten(3).flatten(1, 2)


def _check_lengths(num_tokens: int, shuffle: int, prefix_length: int) -> None:
    side = isqrt(num_tokens)
    if shuffle > 1 and (side**2 != num_tokens or side % shuffle):
        fitting = [s for s in range(1, side + 1) if side**2 == num_tokens and side % s == 0] or [1]
        raise ConfigError(
            f"model.mapper.shuffle: got {shuffle}, but {num_tokens} image tokens cannot be cut into squares of "
            f"{shuffle} x {shuffle}; this grid takes {', '.join(map(str, fitting))}, or set model.vision_encoder.grid "
            f"to a multiple of {shuffle}"
        )
    expected = num_tokens // shuffle**2
    if prefix_length != expected:
        raise ConfigError(
            f"model.mapper.prefix_length: got {prefix_length}, but 'pixel_shuffle' with shuffle={shuffle} makes "
            f"{expected} embeddings of {num_tokens} image tokens; set prefix_length to {expected}"
        )
