"""What is wrong with captions during training, and by what was measured which key of the recipe to change."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from frozenprefix.training.sampling import CaptionSamples

logger = logging.getLogger(__name__)
MIN_CAPTIONS = 3  # fewer captions may be the same by chance
MAX_PREFIX_SCALE = 5.0  # the prefix starts as large as the word embeddings
MIN_PREFIX_SCALE = 0.2
MIN_SPREAD = 0.02  # of prefix embeddings; smaller differences between images are noise
MIN_FEATURE_SPREAD = 0.2  # eight photos: 0.77 of EfficientNet-Lite0's mean-pooled features, 0.08 with random weights
LEARNED, RISEN = 0.9, 1.02  # of the first validation loss: above these, hardly anything was learned; training diverges
BLIND_MARGIN = 0.01  # nats per token
MIN_FITTING = 0.5  # share of the references that end within the limit of tokens


@dataclass(frozen=True)
class Measured:
    """What a diagnosis looks at.

    Attributes:
        losses: `loss` with the right images, and `shuffled_loss` with those of other images.
        first_loss: `loss` before the first step; None if that is not known, or the run goes on from a checkpoint.
        gradient_norm: of a typical step, before it is cut to `training.max_grad_norm`; None before the first one.

    Example:
        >>> samples = CaptionSamples(["1.jpg"] * 3, ["a dog"] * 3, 1.0, 1.0, 1.2, 0.1, 0.7)
        >>> Measured(samples, {"loss": 3.0, "shuffled_loss": 3.2}, learning_rate=2e-3).blind
        False
    """

    samples: CaptionSamples
    losses: Mapping[str, float]
    learning_rate: float
    first_loss: float | None = None
    gradient_norm: float | None = None

    @property
    def blind(self) -> bool:
        """Whether the loss with wrong images is as low as with the right ones."""
        return looks_blind(self.losses["loss"], self.losses["shuffled_loss"])


def looks_blind(validation_loss: float, shuffled_loss: float, *, margin: float = BLIND_MARGIN) -> bool:
    """Whether the loss with wrong images is as low as with the right ones.

    Example:
        >>> looks_blind(3.0, shuffled_loss=3.005), looks_blind(3.0, shuffled_loss=3.2)
        (True, False)
    """
    return shuffled_loss - validation_loss < margin


def symptoms(measured: Measured) -> list[str]:
    """What is wrong, one sentence each; empty if nothing is.

    Example:
        >>> samples = CaptionSamples(["1.jpg"] * 3, ["a dog"] * 3, 1.0, 1.0, 1.2, 0.1, 0.7)
        >>> symptoms(Measured(samples, {"loss": 3.0, "shuffled_loss": 3.2}, learning_rate=2e-3))
        ["3 of 3 images get the caption 'a dog'"]
    """
    samples, losses = measured.samples, measured.losses
    found = []
    if len(samples.captions) >= MIN_CAPTIONS:
        caption, count = Counter(samples.captions).most_common(1)[0]
        if count >= len(samples.captions) - 1:
            found.append(f"{count} of {len(samples.captions)} images get the caption {caption!r}")
    if samples.ended == 0 and samples.fits >= MIN_FITTING:
        found.append(f"none of {len(samples.captions)} captions ends by itself")
    if measured.blind:
        found.append(
            f"the model does not look at the image: the validation loss is {losses['loss']:.3f} with the right image "
            f"and {losses['shuffled_loss']:.3f} with a wrong one"
        )
    return found


def advice(measured: Measured) -> str:
    """What to change, by the first figure that is out of its range: scale, layer, learning rate or data.

    Example:
        >>> samples = CaptionSamples(["1.jpg"] * 3, ["a dog"] * 3, 1.0, 1.0, 12.0, 0.1, 0.7)
        >>> print(advice(Measured(samples, {"loss": 3.0, "shuffled_loss": 3.2}, learning_rate=2e-3)))
        learning rate: the prefix embeddings are 12.0 times as large as word embeddings; lower ... (now 2.0e-03) ...
    """
    samples, rate = measured.samples, f"training.learning_rate (now {measured.learning_rate:.1e})"
    if samples.prefix_scale > MAX_PREFIX_SCALE:
        size = f"the prefix embeddings are {samples.prefix_scale:.1f} times as large as word embeddings"
        return f"learning rate: {size}; lower {rate} and start again"
    if samples.prefix_scale < MIN_PREFIX_SCALE:
        size = f"the prefix embeddings are {samples.prefix_scale:.2f} times as large as word embeddings"
        return f"scale: {size}; set model.mapper.output_norm=layer, or raise {rate}"
    if samples.feature_spread < MIN_FEATURE_SPREAD:
        spread = f"the features of different images differ by only {samples.feature_spread:.0%}"
        return (
            f"layer: {spread}; choose another model.vision_encoder.layer, check its weights, or set "
            "model.mapper.input_norm=true"
        )
    if samples.prefix_spread < MIN_SPREAD:
        spread = f"the mapper makes features that differ by {samples.feature_spread:.0%} into prefix embeddings"
        return (
            f"learning rate: {spread} that differ by {samples.prefix_spread:.1%}; lower {rate} and start again, or "
            "begin with model.mapper.type=mlp"
        )
    return _advice_by_loss(measured, rate)


def _advice_by_loss(measured: Measured, rate: str) -> str:
    """The prefix embeddings are as they should be: what the losses say."""
    loss, shuffled, first = measured.losses["loss"], measured.losses["shuffled_loss"], measured.first_loss
    norm = "" if measured.gradient_norm is None else f", with a gradient norm of {measured.gradient_norm:.3g}"
    if first is not None and loss > RISEN * first:
        return f"learning rate: the loss has risen from {first:.3f} to {loss:.3f}{norm}; lower {rate}"
    if first is not None and loss > LEARNED * first:
        return f"learning rate: the loss has hardly fallen ({first:.3f} at first, now {loss:.3f}{norm}); raise {rate}"
    if not measured.blind:
        return (
            f"length of the run: the loss is lower with the right images ({loss:.3f}) than with wrong ones "
            f"({shuffled:.3f}), so the images are used; train longer, or raise {rate}"
        )
    fallen = "" if first is None else f"the loss has fallen from {first:.3f}, but "
    return (
        f"data: {fallen}a wrong image does as well ({loss:.3f} and {shuffled:.3f}), although the prefix embeddings of "
        f"different images differ by {measured.samples.prefix_spread:.0%}; check that captions belong to their images "
        "(`frozenprefix data show`), and train longer"
    )


def warn_of_symptoms(step: int, measured: Measured) -> None:
    """Warn of captions that are all the same, never end or ignore the image, and say what to change."""
    found = symptoms(measured)
    if found:
        logger.warning("step %d: %s. Change the %s", step, "; ".join(found), advice(measured))


def show_captions(step: int, samples: CaptionSamples, count: int = 3) -> None:
    """Log the captions of the first `count` images, with what is known of all of them."""
    for image, caption in list(zip(samples.images, samples.captions, strict=True))[:count]:
        logger.info("step %d: %s: %s", step, Path(image).name, " ".join(caption.split()))
    total = len(samples.captions)
    logger.info(
        "step %d: %d of %d captions are distinct, %.0f %% end by themselves",
        step,
        samples.distinct,
        total,
        100 * samples.ended,
    )
