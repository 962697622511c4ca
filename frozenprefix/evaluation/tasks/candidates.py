"""The candidate answers of a task, and the likeliest of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.tasks.runs import Asked, features_of
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.likelihood import likeliest_of_groups

CANDIDATES = 100


def candidate_answers(asked: Any, train_samples: Sequence[Sample]) -> list[str]:
    """The answers that can be chosen.

    Args:
        asked: how many of the most common targets of the training samples to take (the first of equally common ones;
            all when there are fewer); or the answers themselves.

    Raises:
        ConfigError: for anything else, or an answer that is not a text or occurs twice.
        DataError: for a number, and training samples with fewer than two different answers.
    """
    if isinstance(asked, list | tuple):
        return _checked(list(asked))
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 2:
        raise ConfigError(f"candidates: got {asked!r}, expected a number of answers from 2, or a list of them")
    texts = (text.strip() for sample in train_samples for text in sample.targets)
    counts = Counter(text for text in texts if text)
    if len(counts) < 2:
        raise DataError(
            f"candidates: the {len(train_samples)} training samples have {len(counts)} different answers, expected at "
            "least 2; evaluate another split than train of data that have one, or name the answers: "
            "candidates=['red', 'blue']"
        )
    return [text for text, _ in counts.most_common(asked)]


def _checked(answers: list[Any]) -> list[str]:
    wrong = [answer for answer in answers if not isinstance(answer, str) or not answer.strip()]
    if wrong:
        raise ConfigError(
            f"candidates: got {wrong[0]!r} in the list, expected texts; in YAML yes, no and numbers are texts "
            "only in quotes: candidates=['yes', 'no', '2']"
        )
    repeated = [text for text, count in Counter(answer.strip() for answer in answers).items() if count > 1]
    if repeated or len(answers) < 2:
        got = f"{repeated[0]!r} more than once" if repeated else f"{answers!r}"
        raise ConfigError(f"candidates: got {got}, expected at least 2 different answers")
    return [answer.strip() for answer in answers]


@torch.inference_mode()
def choose(
    captioner: Captioner,
    batch: Sequence[Asked],
    images: ImageFeatures,
    candidates: Sequence[str],
) -> list[list[str]]:
    """The likeliest candidate for each prompt of a batch."""
    features = features_of(batch, images)
    model = captioner.model
    prefix_embeds = None if features is None else model.map_features(features.to(model.device))
    groups = [[(prompt, candidates) for prompt in asked.prompts] for asked in batch]
    # training closes answers: without their end "black" is always likelier than "black, white"
    return likeliest_of_groups(captioner, groups, prefix_embeds, end_token=True)
