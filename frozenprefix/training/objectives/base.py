"""The contract of an objective: one term of the training loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from frozenprefix.config.objectives import Weight
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import ConfigError
from frozenprefix.utils import content_hash

Batch = dict[str, Any]
IMAGE_INPUTS = ("pixel_values", "image_features")


class Objective(ABC):
    """One term of the loss. A subclass sets `name` and implements `count` and `loss`; the other methods are optional.

    Args:
        weight: factor of this term, or (start, end) for a factor that changes linearly over the run.

    Attributes:
        name: key of the term in the recipe and in the log.
        figures: further numbers to log for the latest batch.

    Example:
        >>> class PrefixNorm(Objective):
        ...     name = "prefix_norm"
        ...     def count(self, batch):
        ...         return 1
        ...     def loss(self, batch, prefix_embeds):
        ...         return prefix_embeds.square().mean()
        >>> PrefixNorm(weight=0.1).loss({}, torch.ones(2, 4, 8))
        tensor(1.)
    """

    name: ClassVar[str]

    def __init__(self, weight: Weight = 1.0):
        self.weight = weight
        self.figures: dict[str, float] = {}

    def prepare(self, batch: Batch, number: int) -> None:  # noqa: B027 - optional
        """Add the inputs of `loss` to a batch, without gradient.

        Args:
            number: index of the micro-batch in the run, counted over all processes.
        """

    def prepare_step(self, batches: Sequence[Batch]) -> None:  # noqa: B027 - optional
        """Add what depends on all micro-batches that this process contributes to a step, after `prepare`."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Number of items that the loss of this batch is a mean over."""

    @abstractmethod
    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        """Mean loss of a batch: a scalar with gradient.

        Args:
            prefix_embeds: float[images, P, D_lm]; None for a batch of text alone.
        """

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """Metrics on validation images, `size` images at a time."""
        return {}


def image_inputs(batch: Batch) -> dict[str, Tensor]:
    """The images of a batch: `pixel_values` or `image_features`."""
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def check_captions(samples: Sequence[Sample], key: str) -> None:
    """Check that the training data holds captions of single images only.

    Raises:
        ConfigError: for any other sample; `key` names the objective in the message.
    """
    for sample in samples:
        if sample.task != "caption" or len(sample.images) != 1:
            raise ConfigError(
                f"{key}: learns from captions of one image each; data.train holds sample '{sample.id}' of task "
                f"'{sample.task}' with {len(sample.images)} images"
            )


def image_id(group: ImageGroup) -> int:
    """An id of the group's images, the same on every process."""
    return int(content_hash(group.key)[:14], 16)
