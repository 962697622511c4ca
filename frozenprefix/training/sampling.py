"""Captions generated while a model trains: greedy, or sampled from the model's own distribution."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from torch import Tensor

from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.captions import caption_metrics
from frozenprefix.models.freezing import evaluating
from frozenprefix.models.language_model import embedding_rms, end_tokens, padding_token
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.validation import batch_bounds


def generate_ids(
    model: FrozenPrefixForConditionalGeneration,
    processor: FrozenPrefixProcessor,
    prompts: Sequence[list[int]],
    images: dict[str, Tensor],
    *,
    max_new_tokens: int,
    samples: int | None = None,
) -> list[list[int]]:
    """Continue each prompt `samples` times at random, or once greedily for None.

    The LM's own probabilities are used, whatever its generation config says: self-critical training takes their
    gradient.

    Args:
        prompts: token ids with the placeholders of their images.
        images: `pixel_values` or `image_features` of all prompts, in order.

    Returns:
        Token ids of each text with its end token, which is absent from a text that was cut at `max_new_tokens`.

    Example:
        >>> images, prompts = {"pixel_values": torch.zeros(1, 3, 32, 32)}, [processor.encode_prompt("<image>")]
        >>> len(generate_ids(model, processor, prompts, images, max_new_tokens=3, samples=2))
        2
    """
    options: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "do_sample": samples is not None}
    if samples is not None:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    if processor.image_token_id < len(cast(Tensor, model.get_output_embeddings().weight)):
        options["suppress_tokens"] = [processor.image_token_id]
    ends = end_tokens(model, processor.tokenizer)
    padded = processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with evaluating(model):
        generated = model.generate(
            input_ids=padded["input_ids"].to(model.device),
            attention_mask=padded["attention_mask"].to(model.device),
            pixel_values=images.get("pixel_values"),
            image_features=images.get("image_features"),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=padding_token(model, processor.tokenizer),
            **options,
        )
    return [cut_after_end(row, ends) for row in generated.tolist()]


@dataclass(frozen=True)
class CaptionSamples:
    """Greedy captions of a few images, always the same ones, and what was measured with them.

    Attributes:
        images: path of the first image of each; captions: in the same order.
        ended: share of the captions that the model ended itself, before the limit of tokens.
        fits: share of the reference captions that end within this limit.
        prefix_scale: root mean square of the prefix embeddings relative to that of the word embeddings.
        prefix_spread, feature_spread: root mean square of the differences between images relative to that of the
            values: 0 where prefix embeddings, or image features, are the same for all images.

    Example:
        >>> CaptionSamples(["1.jpg", "2.jpg"], ["a dog", "a dog"], 1.0, 1.0, 1.2, 0.1, 0.7).distinct
        1
    """

    images: list[str]
    captions: list[str]
    ended: float
    fits: float
    prefix_scale: float
    prefix_spread: float
    feature_spread: float

    @property
    def distinct(self) -> int:
        """Number of different captions."""
        return len(set(self.captions))

    def values(self) -> dict[str, Any]:
        """What the log of a run keeps."""
        return {
            "captions": self.captions,
            "caption_images": self.images,
            "distinct_captions": self.distinct,
            "ended_share": self.ended,
            "prefix_scale": self.prefix_scale,
            "prefix_spread": self.prefix_spread,
        }


def greedy_captions(
    model: FrozenPrefixForConditionalGeneration,
    processor: FrozenPrefixProcessor,
    collator: Collator,
    groups: Sequence[ImageGroup],
    *,
    count: int = 8,
    max_new_tokens: int = 30,
) -> CaptionSamples | None:
    """Greedy captions of the first `count` groups that have a caption; None if there are none.

    Example:
        >>> from frozenprefix.training import Trainer
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> parts = trainer.model, trainer.processor, trainer.collator, trainer.validation_groups
        >>> len(greedy_captions(*parts, count=2, max_new_tokens=3).captions)
        2
    """
    captioned = ((group, sample) for group in groups for sample in group.samples[:1] if sample.task == "caption")
    pairs = list(islice(captioned, count))
    if not pairs:
        return None
    prompts = [processor.encode_prompt(prompt_of(sample, processor)) for _, sample in pairs]
    inputs = collator.image_inputs([path for group, _ in pairs for path in group.images])
    images = {name: value.to(model.device) for name, value in inputs.items()}
    with evaluating(model):  # each image is encoded once
        features = images["image_features"] if "image_features" in images else model.encode(images["pixel_values"])
        prefix_embeds = cast(Tensor, model.prefix(image_features=features)).float()
    ids = generate_ids(model, processor, prompts, {"image_features": features}, max_new_tokens=max_new_tokens)
    ends = end_tokens(model, processor.tokenizer)
    targets = processor.tokenizer([text for _, sample in pairs for text in sample.targets], add_special_tokens=False)
    return CaptionSamples(
        images=[str(group.images[0]) for group, _ in pairs],
        captions=[processor.decode(text) for text in ids],
        ended=sum(text[-1] in ends for text in ids if text) / len(ids),
        fits=sum(len(text) < max_new_tokens for text in targets["input_ids"]) / len(targets["input_ids"]),
        prefix_scale=float(prefix_embeds.square().mean().sqrt()) / embedding_rms(model.language_model),
        prefix_spread=_spread(prefix_embeds),
        feature_spread=_spread(features.float()),
    )


def _spread(values: Tensor) -> float:
    """Root mean square of the differences from the mean over the first axis, relative to that of the values."""
    size = float(values.square().mean().sqrt())
    return float((values - values.mean(0)).square().mean().sqrt()) / size if size else 0.0


def greedy_cider_d(
    model: FrozenPrefixForConditionalGeneration,
    processor: FrozenPrefixProcessor,
    collator: Collator,
    groups: Sequence[ImageGroup],
    *,
    images_per_batch: int,
    max_new_tokens: int = 30,
) -> float:
    """CIDEr-D of greedy captions of all groups that have captions, with these as references.

    Raises:
        DataError: if no group has captions.

    Example:
        >>> from frozenprefix.training import Trainer
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> parts = trainer.model, trainer.processor, trainer.collator, trainer.validation_groups
        >>> 0 <= greedy_cider_d(*parts, images_per_batch=4, max_new_tokens=3) <= 10
        True
    """
    captioned = {group.key: [s for s in group.samples if s.task == "caption"] for group in groups}
    groups = [group for group in groups if captioned[group.key]]
    if not groups:
        raise DataError("data.validation: no sample is a caption; CIDEr-D needs some")
    generated: dict[str, str] = {}
    for start, end in batch_bounds(len(groups), images_per_batch):
        part = groups[start:end]
        prompts = [processor.encode_prompt(prompt_of(captioned[group.key][0], processor)) for group in part]
        inputs = collator.image_inputs([path for group in part for path in group.images])
        images = {name: value.to(model.device) for name, value in inputs.items()}
        drawn = generate_ids(model, processor, prompts, images, max_new_tokens=max_new_tokens)
        generated |= {group.key: processor.decode(ids) for group, ids in zip(part, drawn, strict=True)}
    references = {group.key: [text for s in captioned[group.key] for text in s.targets] for group in groups}
    return caption_metrics(generated, references).corpus["cider_d"]


def cut_after_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids up to and including the first end token.

    Example:
        >>> cut_after_end([5, 2, 7, 2], {2})
        [5, 2]
    """
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)
