"""Bottleneck adapters inside the frozen LM, with a prefix: MAGMA (Eichenberg et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.precision import autocast_to
from frozenprefix.models.fusion.base import Fusion
from frozenprefix.models.options import Count

# names of these parts of a layer in the LM families
FEED_FORWARD = ("mlp", "feed_forward", "fc2")
ATTENTION = ("self_attn", "attn", "attention")


class Bottleneck(nn.Module):
    """`x + up(relu(down(x)))`, which starts as `x`: float[..., dim] -> float[..., dim].

    Example:
        >>> hidden = torch.randn(1, 2, 8)
        >>> torch.equal(Bottleneck(8, hidden_dim=2)(hidden), hidden)
        True
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.down = nn.Linear(dim, hidden_dim)
        self.up = nn.Linear(hidden_dim, dim)
        self.activation = nn.ReLU()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with autocast_to(hidden.dtype, hidden.device):
            # [B, T, D] -> [B, T, hidden_dim] -> [B, T, D]
            return hidden + self.up(self.activation(self.down(hidden))).to(hidden.dtype)


class AdapterFusion(Fusion):
    """A prefix, and a bottleneck after the feed-forward part of every layer, or after its attention as well.

    Args:
        lm_dim, num_layers: width and number of the LM's layers.
        reduction: the LM's width divided by the bottleneck's; in MAGMA 4 with adapters after the feed-forward part
            only, 8 with both.
        placement: after which parts the adapters are.

    Example:
        >>> fusion = AdapterFusion(lm_dim=8, num_layers=2, placement="feed_forward_and_attention")
        >>> len(fusion.adapters), len(fusion.adapters[0])
        (2, 2)
    """

    changes_text = True

    def __init__(
        self,
        *,
        lm_dim: int,
        num_layers: int,
        reduction: Count = 4,
        placement: Literal["feed_forward", "feed_forward_and_attention"] = "feed_forward",
    ):
        super().__init__()
        self.places = [FEED_FORWARD] if placement == "feed_forward" else [FEED_FORWARD, ATTENTION]
        hidden_dim = max(1, lm_dim // reduction)
        self.adapters = nn.ModuleList(
            nn.ModuleList(Bottleneck(lm_dim, hidden_dim) for _ in self.places) for _ in range(num_layers)
        )

    def attach(self, layers: nn.ModuleList) -> None:
        for number, layer in enumerate(layers):
            for place, names in enumerate(self.places):
                adapter = self.adapters.get_submodule(f"{number}.{place}")
                _part_of(layer, names).register_forward_hook(self._hook_of(adapter))

    def _hook_of(self, adapter: nn.Module) -> Callable[..., Any]:
        """A hook that passes a module's output, or the first of its outputs, through `adapter`."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.enabled:
                return output
            return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

        return hook


def _part_of(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The part of a transformer layer that has one of `names`."""
    for name in names:
        if isinstance(getattr(layer, name, None), nn.Module):
            return getattr(layer, name)
    raise ConfigError(
        f"model.fusion: adapters need a layer with one of {', '.join(names)}, got {type(layer).__name__} with "
        f"{', '.join(name for name, _ in layer.named_children())}"
    )
