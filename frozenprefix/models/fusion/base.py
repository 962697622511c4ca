"""What fusions share: which image each token is shown, and the way into the layers of a frozen LM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError

Update = Callable[[int, Tensor], Tensor]


@dataclass
class Shown:
    """The images of one pass, or of one generation with all its steps.

    Attributes:
        prefix_embeds: float[images, P, D_lm].
        prefix_index: int64[B, T], index of each placeholder among all placeholders, -1 for text.
        image: int64[B, T], the image that each token is shown (the latest one before it), -1 for none.
    """

    prefix_embeds: Tensor
    prefix_index: Tensor
    image: Tensor
    _met: set[int] = field(default_factory=set)

    def is_first(self, layer: int) -> bool:
        """True for the first pass of `layer`: what comes later continues the texts, and holds no placeholders."""
        first = layer not in self._met
        self._met.add(layer)
        return first

    def image_of(self, hidden: Tensor) -> Tensor:
        """int64[B', T'] for hidden states of any pass: beams stand side by side, new tokens see what the last saw."""
        copies = len(hidden) // len(self.image)
        image = self.image.repeat_interleave(copies, dim=0)
        return image if image.shape[1] == hidden.shape[1] else image[:, -1:].expand(-1, hidden.shape[1])


class Fusion(nn.Module):
    """How images enter the language model.

    Subclasses train their own parameters and reach into the LM by hooks, which do nothing outside `showing`.

    Attributes:
        is_prefix: an image takes `prefix_length` places in the text, where the prefix embeddings stand; otherwise one
            place marks where it is shown, and holds the LM's own start token.
        every_step: images are looked at again for every new token (by cross-attention, say), so that generation has
            to go through transformers' search.
        changes_text: the LM computes other things than the bare one also without an image.
    """

    is_prefix: ClassVar[bool] = True
    every_step: ClassVar[bool] = False
    changes_text: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.shown: Shown | None = None
        self.enabled = True

    @classmethod
    def placeholders(cls, prefix_length: int) -> int:
        """Places that an image takes in the text."""
        return prefix_length if cls.is_prefix else 1

    def attach(self, layers: nn.ModuleList) -> None:
        """Put hooks into the LM's layers."""

    @contextmanager
    def showing(self, shown: Shown | None) -> Iterator[None]:
        """Let the hooks see these images inside the block."""
        before, self.shown = self.shown, shown
        try:
            yield
        finally:
            self.shown = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the LM compute inside the block what it computes without this fusion."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def hook_inputs(self, layers: nn.ModuleList, numbers: Sequence[int], update: Update) -> None:
        """Add `update(layer, hidden)` to the hidden states that enter the layers `numbers`, while images are shown.

        The update is computed in the LM's dtype from float32 parameters, through autocast.
        """

        def hook(number: int) -> Callable[..., Any]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if self.shown is None or not self.enabled:
                    return None
                hidden = args[0] if args else kwargs["hidden_states"]
                with compute_in(hidden):
                    changed = hidden + update(number, hidden).to(hidden.dtype)
                return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

            return before

        for number in numbers:
            layers[number].register_forward_pre_hook(hook(number), with_kwargs=True)


def compute_in(hidden: Tensor) -> torch.autocast:
    """Autocast to the dtype of the hidden states; off in float32."""
    half = hidden.dtype != torch.float32
    return torch.autocast(hidden.device.type, dtype=hidden.dtype if half else None, enabled=half)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The LM's transformer layers, in order; the encoder's where it has one.

    Raises:
        ConfigError: when none of its module lists has as many entries as its config has layers.
    """
    count = language_model.config.get_text_config().num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"model.language_model: {type(language_model).__name__} has no list of its {count} layers for a fusion"
    )
