"""Captions that fit other images better than their own, by the evidence of the whole caption."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.evidence import target_of
from frozenprefix.inference.likelihood import log_likelihoods

_IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class AuditedCaption:
    """A caption of the data, and how well it fits its image.

    Attributes:
        image: its file; caption: the text.
        evidence: log p(caption | its image) − mean log p(caption | other images), in nats; negative for a caption that
            fits other images better.
        better: share of the other images that it fits better than its own, 0 to 1.

    Example:
        >>> AuditedCaption(image_path, "a dog", -2.0, 1.0).evidence
        -2.0
    """

    image: Path
    caption: str
    evidence: float
    better: float


def audit_captions(
    captioner: Captioner,
    samples: Sequence[Sample],
    features: Callable[[Sequence[Path]], Tensor],
    *,
    others: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[AuditedCaption]:
    """Compare every caption with its image and with other images of the data, the lowest evidence first.

    All captions of an image share one row with each image. A model that was trained on the same captions may have
    learned wrong ones by heart; one trained on other data, or for few epochs, is a better judge.

    Args:
        samples: of task "caption" with one image each; those that share an image are best one after the other.
        features: float[n, N, D_enc] of image files, such as `ImageFeatures`.
        others: images to compare with; each image is compared with others of its own.
        progress: called with (images done, images in total).

    Raises:
        DataError: for fewer than two images.
        ConfigError: for a model that was trained with retrieved captions.

    Example:
        >>> files = sorted(images_folder.iterdir())[:3]
        >>> samples = [Sample(file.name, (file,), ("a red circle", "a cross")) for file in files]
        >>> audited = audit_captions(captioner, samples, captioner.encoder, others=2)
        >>> len(audited), audited[0].evidence <= audited[-1].evidence
        (6, True)
    """
    if captioner.retriever is not None:
        raise ConfigError("audit: a model that reads captions of similar images cannot judge one by its image alone")
    captions: dict[Path, dict[tuple[str, str], None]] = {}
    for sample in samples:
        if sample.task == "caption" and len(sample.images) == 1:
            prompt = prompt_of(sample, captioner.processor)
            captions.setdefault(sample.images[0], {}).update(
                {(prompt, target): None for target in sample.targets if target.strip()}
            )
    files = [file for file, texts in captions.items() if texts]
    if len(files) < 2:
        raise DataError(f"audit: got {len(files)} images with captions, expected at least two to compare")
    offsets = random.Random(seed).sample(range(1, len(files)), min(others, len(files) - 1))
    order = random.Random(seed).sample(range(len(files)), len(files))
    audited: list[AuditedCaption] = []
    for start in range(0, len(files), _IMAGES_AT_ONCE):
        places = range(start, min(start + _IMAGES_AT_ONCE, len(files)))
        shown = [[order[(place + offset) % len(files)] for offset in (0, *offsets)] for place in places]
        texts = [list(captions[files[numbers[0]]]) for numbers in shown]
        scored = _compare(captioner, texts, features([files[number] for numbers in shown for number in numbers]))
        for numbers, each, values in zip(shown, texts, scored, strict=True):
            for (_, text), evidence, better in zip(each, *values, strict=True):
                audited.append(AuditedCaption(files[numbers[0]], text, evidence, better))
        if progress is not None:
            progress(places.stop, len(files))
    return sorted(audited, key=lambda caption: caption.evidence)


@torch.inference_mode()
def _compare(
    captioner: Captioner, texts: Sequence[Sequence[tuple[str, str]]], features: Tensor
) -> list[tuple[list[float], list[float]]]:
    """For each image the evidence of its texts, and their share of images that they fit better.

    `features`: float[images * (1 + M), N, D_enc], each image followed by its M others.
    """
    copies = len(features) // len(texts)
    groups = []
    for each in texts:
        groups += [[target_of(captioner, prompt, text) for prompt, text in each]] * copies
    embeds = captioner.model.map_features(features.to(captioner.model.device))
    scored = log_likelihoods(captioner.model, groups, embeds)
    results = []
    for number in range(len(texts)):
        # [1 + M, texts]
        values = torch.stack(scored[number * copies : (number + 1) * copies])
        evidence = values[0] - values[1:].mean(dim=0)
        results.append((evidence.tolist(), (values[1:] > values[0]).float().mean(dim=0).tolist()))
    return results
