"""Base class of fusions: which image each token may see, and hooks in the layers of a frozen LM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.precision import autocast_to

Update = Callable[[int, Tensor], Tensor]


@dataclass
class ImageContext:
    """The images of one forward pass, or of one generation with all its steps.

    Attributes:
        prefix_embeds: float[images, P, D_lm].
        prefix_index: int64[B, T], index of each placeholder among all placeholders, -1 for text.
        image: int64[B, T], the image that each token sees (the latest one before it), -1 for none.

    Example:
        >>> image = torch.tensor([[-1, 0, 0]])
        >>> context = ImageContext(torch.zeros(1, 1, 8), torch.tensor([[-1, 0, -1]]), image)
        >>> context.image_of(torch.zeros(1, 1, 8)).tolist()  # a further token sees what the last one saw
        [[0]]
    """

    prefix_embeds: Tensor
    prefix_index: Tensor
    image: Tensor
    _visited: set[int] = field(default_factory=set)

    def is_first(self, layer: int) -> bool:
        """Whether this is the first pass of `layer`; later passes continue the texts and hold no placeholders."""
        first = layer not in self._visited
        self._visited.add(layer)
        return first

    def image_of(self, hidden: Tensor) -> Tensor:
        """int64[B', T'] for the hidden states of any pass.

        Beams are adjacent rows, and new tokens see what the last token saw.
        """
        copies = len(hidden) // len(self.image)
        image = self.image.repeat_interleave(copies, dim=0)
        return image if image.shape[1] == hidden.shape[1] else image[:, -1:].expand(-1, hidden.shape[1])


class Fusion(nn.Module):
    """How images enter the language model.

    Subclasses hold the parameters that are trained. They change the LM by hooks, which do nothing outside of `seeing`.

    Attributes:
        is_prefix: an image takes `prefix_length` places in the text, which hold the prefix embeddings. Otherwise one
            place marks where the image is, and holds the LM's start token.
        every_step: every new token reads the images again, as in cross-attention, so that generation has to use
            transformers' search.
        changes_text: the fusion changes the LM's output even without an image.

    Example:
        >>> Fusion.placeholders(prefix_length=10)
        10
    """

    is_prefix: ClassVar[bool] = True
    every_step: ClassVar[bool] = False
    changes_text: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.context: ImageContext | None = None
        self.enabled = True

    @classmethod
    def placeholders(cls, prefix_length: int) -> int:
        """Number of places that an image takes in the text."""
        return prefix_length if cls.is_prefix else 1

    def attach(self, layers: nn.ModuleList) -> None:
        """Register hooks in the LM's layers."""

    @contextmanager
    def seeing(self, context: ImageContext | None) -> Iterator[None]:
        """Let the hooks read these images inside the block."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the fusion off inside the block: the LM computes the same as without it."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def hook_inputs(self, layers: nn.ModuleList, numbers: Sequence[int], update: Update) -> None:
        """Add `update(layer, hidden)` to the hidden states that enter the layers `numbers`, while images are seen.

        The update is computed in the LM's dtype from float32 parameters, by autocast.
        """

        # The hook holds no image: it reads the context that `seeing` sets, and does nothing in passes without one.
        def hook_of(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if self.context is None or not self.enabled:
                    return None
                hidden = args[0] if args else kwargs["hidden_states"]
                with autocast_to(hidden.dtype, hidden.device):
                    changed = hidden + update(number, hidden).to(hidden.dtype)
                return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

            return hook

        for number in numbers:
            layers[number].register_forward_pre_hook(hook_of(number), with_kwargs=True)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """Return the LM's transformer layers in order; for an encoder-decoder LM those of the encoder.

    Raises:
        ConfigError: if no module list has as many entries as the config has layers.

    Example:
        >>> len(decoder_layers(model.language_model))
        2
    """
    count = language_model.config.get_text_config().num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"model.language_model: {type(language_model).__name__} has no list of its {count} layers for a fusion"
    )
