"""Few-shot prompts: images and texts in turn, then an image to be named or asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.likelihood import likeliest
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor

#: Image files → image_features float[n, N, D_enc], such as `data.features.ImageFeatures`.
ImagesToFeatures = Callable[[Sequence[Path]], Tensor]


@dataclass(frozen=True)
class Shot:
    """An image of the context, and the text that goes with it. `<image>` marks the place of the image.

    Example:
        >>> Shot(image_path, "This is a dax.").text
        'This is a dax.'
    """

    image: Path
    text: str


@dataclass(frozen=True)
class Episode:
    """One few-shot task.

    Args:
        id: unique within a list of episodes.
        support: the shots in the order of the prompt, repeats included.
        query: the image that is asked about; question: the text around it, up to the answer.
        answer: what is right; choices: what can be chosen, `answer` among them.
        induction: text in front of everything.

    Example:
        >>> shot = Shot(image_path, "This is a dax.")
        >>> Episode("1", (shot,), image_path, "This is a", "dax", ("dax", "wug")).prompt
        '<image>This is a dax.<image>This is a'
    """

    id: str
    support: tuple[Shot, ...]
    query: Path
    question: str
    answer: str
    choices: tuple[str, ...]
    induction: str = ""

    @property
    def images(self) -> tuple[Path, ...]:
        """Images in reading order."""
        return (*(shot.image for shot in self.support), self.query)

    @property
    def prompt(self) -> str:
        """The whole text, with an `<image>` for every image."""
        texts = [*(shot.text for shot in self.support), self.question]
        return self.induction + "".join(FrozenPrefixProcessor.with_image(text) for text in texts)

    @property
    def blind_prompt(self) -> str:
        """The text without any image."""
        texts = [self.induction, *(shot.text for shot in self.support), self.question]
        words = (text.replace(IMAGE_TOKEN, "").strip() for text in texts)
        return " ".join(word for word in words if word)

    def with_support_of(self, other: Episode) -> Episode:
        """The same texts and query, with the support images of another episode."""
        shots = [replace(shot, image=theirs.image) for shot, theirs in zip(self.support, other.support, strict=True)]
        return replace(self, support=tuple(shots))


@torch.inference_mode()
def choose_answers(
    captioner: Captioner,
    episodes: Sequence[Episode],
    *,
    features: ImagesToFeatures | None = None,
    blind: bool = False,
) -> list[str]:
    """The likeliest of each episode's choices, by the sum over its tokens. What precedes them is read once.

    Args:
        features: image files → their features float[n, N, D_enc]; by default they are read and encoded.
        blind: leave the images out.

    Example:
        >>> episode = Episode("1", (), image_path, "This is a", "dog", ("dog", "cat"))
        >>> choose_answers(captioner, [episode])[0] in episode.choices
        True
    """
    prefix_embeds = None
    if not blind:
        distinct, order = _features(captioner, episodes, features)
        prefix_embeds = captioner.model.map_features(distinct.to(captioner.model.device))[order]
    prompts = [episode.blind_prompt if blind else episode.prompt for episode in episodes]
    return likeliest(captioner, prompts, [episode.choices for episode in episodes], prefix_embeds)


def write_answers(
    captioner: Captioner,
    episodes: Sequence[Episode],
    *,
    features: ImagesToFeatures | None = None,
    blind: bool = False,
    max_new_tokens: int = 10,
) -> list[str]:
    """The text that the model generates greedily for each episode; see `choose_answers`.

    Example:
        >>> episode = Episode("1", (), image_path, "This is a", "dog", ("dog", "cat"))
        >>> len(write_answers(captioner, [episode], max_new_tokens=2))
        1
    """
    prompts = [episode.blind_prompt if blind else episode.prompt for episode in episodes]
    features_of_all = None
    if not blind:
        distinct, order = _features(captioner, episodes, features)
        features_of_all = distinct[order]
    texts = captioner.generate(prompts, features_of_all, num_beams=1, max_new_tokens=max_new_tokens)
    return [generation.text for generation in texts]


def _features(
    captioner: Captioner, episodes: Sequence[Episode], known: ImagesToFeatures | None
) -> tuple[Tensor, list[int]]:
    """Features of the different images float[n, N, D_enc], and which of them belongs to each place in all prompts."""
    place: dict[Path, int] = {}
    order = [place.setdefault(path, len(place)) for episode in episodes for path in episode.images]
    return (captioner.encoder if known is None else known)(list(place)), order
