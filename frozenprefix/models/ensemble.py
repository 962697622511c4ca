"""Several trained models that write one text together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from frozenprefix.errors import ConfigError
from frozenprefix.models.language_model import DecoderOnlyLM
from frozenprefix.models.language_model.search import continue_together
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import PackedBatch


class Ensemble:
    """Models that choose each next word together, by the mean of their log-probabilities.

    Their frozen parts are the same; what was trained differs: by the seed, the data or the recipe. An ensemble takes
    the time of all its models, in training and in use.

    Args:
        models: with the same vision encoder and language model, and as many places for an image in the text.

    Raises:
        ConfigError: for models that do not go together.

    Example:
        >>> Ensemble([model, model]).models[0] is model
        True
    """

    def __init__(self, models: Sequence[FrozenPrefixForConditionalGeneration]):
        self.models = list(models)
        first, *others = map(_shared, self.models)
        problems = [
            f"ensemble: {name} of model {number} is not that of the first model; ensembles share the frozen parts"
            for number, shared in enumerate(others, start=2)
            for name, value in shared.items()
            if value != first[name]
        ]
        problems += [
            f"ensemble: the fusion of model {number} reads the images in every step, which only transformers' search "
            "does; use models with a prefix"
            for number, model in enumerate(self.models, start=1)
            if model.fusion.every_step
        ]
        if problems:
            raise ConfigError(problems)

    @torch.no_grad()
    def generate(self, packed: PackedBatch, image_features: Tensor | None, **options: Any) -> Any:
        """As `FrozenPrefixForConditionalGeneration.generate` of packed prompts, with features float[images, N, D_enc].

        Raises:
            ConfigError: for options that need transformers' search.
        """
        longest, sees_images = int(packed.position_ids.max()) + 1, image_features is not None
        found = [model.search_options(longest, options, sees_images=sees_images) for model in self.models]
        beams = found[0]
        if beams is None or None in found:
            raise ConfigError("ensemble: these options need transformers' search, which reads one model at a time")
        with ExitStack() as stack:
            read = [
                stack.enter_context(model.reading(packed, model.prefix(image_features=image_features)))
                for model in self.models
            ]
            layouts, embeds = zip(*read, strict=True)
            # `search_options` knows that they are decoder-only
            lms = [cast(DecoderOnlyLM, model.lm) for model in self.models]
            return continue_together(lms, layouts[0], embeds, beams)


def _shared(model: FrozenPrefixForConditionalGeneration) -> dict[str, Any]:
    """What the models of an ensemble have in common."""
    encoder, identity = model.config.vision_encoder, model.config.identity or {}
    return {
        "the vision encoder": (encoder and encoder.model_dump(exclude={"peft"}), identity.get("vision_encoder")),
        "the language model": (identity.get("language_model"), model.lm.dtype),
        "the number of places for an image": model.placeholders_per_image,
    }
