"""MLP mapper: ClipCap (Mokady et al. 2021, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.mappers.blocks import pool_tokens
from frozenprefix.models.mappers.components import PrincipalComponents
from frozenprefix.models.options import Count, Dropout

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


class MLPMapper(nn.Module):
    """Linear layers with activations between them; from a pooled feature it computes all P embeddings at once.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim: width of the hidden layers; by default ClipCap's `lm_dim * prefix_length / 2`, at least `lm_dim`.
        num_layers: number of linear layers.
        activation: "tanh", "gelu", "gelu_tanh" (GELU's approximation by tanh, as llama.cpp computes it) or "relu".
        tokens: how a patch grid is read. "per_token" maps each token to one embedding; a grid with more tokens than the
            prefix is averaged first, in raster order. "flatten" maps all tokens together.
        input_norm: layer norm on the features, for encoders whose features are not normalized.
        components: read this many principal components of the training images' features in place of the features, so
            that a few hundred images are not learned by heart; see `PrincipalComponents`.
        hidden_norm: layer norm in front of each activation, as in Yi's LLaVA; together with the one behind the mapper
            llama.cpp holds such a mapper exactly.
        dropout: on the hidden layers, in training mode.

    Raises:
        ConfigError: for options without effect.

    Example:
        >>> mapper = MLPMapper(encoder_dim=16, num_tokens=1, lm_dim=8, prefix_length=3)
        >>> mapper(torch.randn(2, 1, 16)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        num_tokens: int,
        lm_dim: int,
        prefix_length: int,
        hidden_dim: Count | None = None,
        num_layers: Count = 2,
        activation: Literal["tanh", "gelu", "gelu_tanh", "relu"] = "tanh",
        tokens: Literal["per_token", "flatten"] = "per_token",
        input_norm: bool = False,
        components: Count | None = None,
        hidden_norm: bool = False,
        dropout: Dropout = 0.0,
    ):
        super().__init__()
        if tokens == "flatten" and num_tokens == 1:
            raise ConfigError("model.mapper.tokens: 'flatten' has no effect on a pooled feature; remove it")
        if num_layers == 1 and (hidden_dim is not None or activation != "tanh" or dropout or hidden_norm):
            raise ConfigError(
                "model.mapper.num_layers: with 1 there is no hidden layer, so hidden_dim, hidden_norm, activation and "
                "dropout have no effect; remove them, or set num_layers to 2"
            )
        if components is not None:
            if input_norm or components > encoder_dim:
                raise ConfigError(
                    f"model.mapper.components: got {components} with input_norm {str(input_norm).lower()}, expected at "
                    f"most the {encoder_dim} features of the encoder, and no input_norm: components have a norm of "
                    "their own"
                )
            self.input_norm: nn.Module = PrincipalComponents(encoder_dim, components)
            encoder_dim = components
        else:
            self.input_norm = nn.LayerNorm(encoder_dim) if input_norm else nn.Identity()
        self.prefix_length = prefix_length
        self.together = num_tokens == 1 or tokens == "flatten"
        width_in = encoder_dim * num_tokens if self.together else encoder_dim
        width_out = lm_dim * prefix_length if self.together else lm_dim
        hidden_dim = hidden_dim or max(lm_dim, width_out // 2)
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            norm = [nn.LayerNorm(hidden_dim)] if hidden_norm else []
            layers += [nn.Linear(width_in, hidden_dim), *norm, ACTIVATIONS[activation](), nn.Dropout(dropout)]
            width_in = hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(width_in, width_out))

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.layers[-1]

    @property
    def fit_inputs(self) -> Callable[[Tensor], None] | None:
        """Finds the `components` of the training images' features, float[n, N, D_enc]; None without components."""
        return getattr(self.input_norm, "fit", None)

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, N, D_in]
        tokens = self.input_norm(image_features)
        # -> [B, N * D_in] or [B, P, D_in]
        tokens = tokens.flatten(1) if self.together else pool_tokens(tokens, self.prefix_length)
        # -> [B, P, D_lm]
        return self.layers(tokens).flatten(1).unflatten(1, (self.prefix_length, -1))
