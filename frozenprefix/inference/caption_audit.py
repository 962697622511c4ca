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
_ROUNDS = 200  # until two averages in turn agree


@dataclass(frozen=True)
class AuditedCaption:
    """A caption of the data, and how well it fits its image.

    Attributes:
        image: its file; caption: the text.
        evidence: log p(caption | its image) − mean log p(caption | other images), in nats, without what each image does
            to all captions; negative for a caption that fits other images better.
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
    keys: list[tuple[int, str]] = []  # image and text of each caption
    shown: list[Tensor] = []  # the images that it is scored with, its own first
    values: list[Tensor] = []  # its log-probability with each of them
    for start in range(0, len(files), _IMAGES_AT_ONCE):
        places = range(start, min(start + _IMAGES_AT_ONCE, len(files)))
        numbers = [[order[(place + offset) % len(files)] for offset in (0, *offsets)] for place in places]
        texts = [list(captions[files[each[0]]]) for each in numbers]
        scored = _scores(captioner, texts, features([files[number] for each in numbers for number in each]))
        for each, own_texts, table in zip(numbers, texts, scored, strict=True):
            keys += [(each[0], text) for _, text in own_texts]
            shown += [torch.tensor(each)] * len(own_texts)
            values += list(table.T)
        if progress is not None:
            progress(places.stop, len(files))
    # [captions, 1 + M]
    corrected = without_image_effect(torch.stack(values), torch.stack(shown), len(files))
    evidence = corrected[:, 0] - corrected[:, 1:].mean(dim=1)
    better = (corrected[:, 1:] > corrected[:, :1]).float().mean(dim=1)
    audited = [
        AuditedCaption(files[number], text, *found)
        for (number, text), found in zip(keys, zip(evidence.tolist(), better.tolist(), strict=True), strict=True)
    ]
    return sorted(audited, key=lambda caption: caption.evidence)


def without_image_effect(values: Tensor, shown: Tensor, images: int) -> Tensor:
    """Log-probabilities without what an image does to all captions: some make every text unlikely.

    Least squares: with other images, a value is about the sum of a number for the caption and one for the image.

    Args:
        values: float[captions, 1 + M], log p(caption | image) with its own image and with M others.
        shown: int64[captions, 1 + M], the numbers of these images.
        images: how many there are.

    Example:
        >>> values, shown = torch.tensor([[0.0, -10.0, 1.0], [-8.0, 1.0, 1.0], [0.0, 2.0, -9.0]]), torch.tensor(
        ...     [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
        ... )
        >>> without_image_effect(values, shown, 3).round().tolist()  # image 1 makes texts less likely by 11
        [[-4.0, -3.0, -3.0], [-1.0, -3.0, -3.0], [-4.0, -2.0, -2.0]]
    """
    others, numbers = values[:, 1:].double(), shown[:, 1:]
    if others.shape[1] < 2:
        return values
    effect, count = torch.zeros(images, dtype=torch.double), numbers.flatten().bincount(minlength=images).clamp(min=1)
    for _ in range(_ROUNDS):
        rest = others - (others - effect[numbers]).mean(dim=1, keepdim=True)
        effect = torch.zeros_like(effect).index_add_(0, numbers.flatten(), rest.flatten()) / count
        effect -= effect.mean()
    return values - effect[shown].float()


@torch.inference_mode()
def _scores(captioner: Captioner, texts: Sequence[Sequence[tuple[str, str]]], features: Tensor) -> list[Tensor]:
    """For each image the log-probabilities of its texts with it and with each of its others: float[1 + M, texts].

    `features`: float[images * (1 + M), N, D_enc], each image followed by its M others.
    """
    copies = len(features) // len(texts)
    groups = []
    for each in texts:
        groups += [[target_of(captioner, prompt, text) for prompt, text in each]] * copies
    embeds = captioner.model.map_features(features.to(captioner.model.device))
    scored = log_likelihoods(captioner.model, groups, embeds)
    return [torch.stack(scored[number * copies : (number + 1) * copies]) for number in range(len(texts))]
