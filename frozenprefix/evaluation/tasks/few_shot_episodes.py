"""Building few-shot episodes: made-up names to bind, questions that use them, and similar examples.

The tasks are those of Frozen (Tsimpoukelli et al. 2021, "Multimodal Few-Shot Learning with Frozen Language Models",
sections 4.1 to 4.3); the choice of similar examples is RICES (Yang et al. 2022, "An Empirical Study of GPT-3 for
Few-Shot Knowledge-Based VQA").
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.samples import Sample, with_targets
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference.few_shot import Episode, ImagesToFeatures, Shot
from frozenprefix.models.processing import FrozenPrefixProcessor, glued
from frozenprefix.utils import file_sha256

#: Nonsense words, as word-learning studies use them; "dax" and "blicket" are the first two in the Frozen paper.
MADE_UP_NAMES = ("dax", "blicket", "wug", "toma", "fep", "modi", "zup", "gazzer", "koba", "tulver")
BINDING = "This is a {name}."
QUESTION = "Question: What is this? Answer: This is a"
INDUCTION = "Answer with {names}."


def binding_episodes(
    samples: Sequence[Sample],
    *,
    ways: int = 2,
    shots: int = 1,
    repeats: int = 0,
    induction: bool = True,
    names: Sequence[str] | None = MADE_UP_NAMES,
    episodes: int = 100,
    seed: int = 0,
) -> list[Episode]:
    """Open-ended n-way k-shot classification (Frozen, section 4.2): bind names to classes, then name a new image.

    Classes, their names and images are drawn for each episode, from the seed and the episode's number alone. The query
    is neither an image of the support nor a copy of one.

    Args:
        samples: with one image and its class as target each.
        ways: classes of an episode. shots: different images of each ("inner shots").
        repeats: how often the shots are repeated after the first time.
        induction: begin the prompt with the names that can be chosen.
        names: at least `ways` names, drawn from for each episode; None takes the names of the classes.

    Raises:
        ConfigError: for numbers that are too small, or too few names.
        DataError: for too few classes with `shots` + 1 different images.

    Example:
        >>> files = sorted(images_folder.iterdir())
        >>> samples = [Sample(file.name, (file,), (file.stem.split("_")[1],)) for file in files]
        >>> binding_episodes(samples, episodes=1, repeats=1)[0].prompt.count("<image>")
        5
    """
    _check_numbers(ways=ways, shots=shots, episodes=episodes)
    if repeats < 0:
        raise ConfigError(f"repeats: got {repeats}, expected 0 or more")
    if names is not None and len(set(names)) < ways:
        raise ConfigError(f"names: got {len(set(names))} different ones, expected at least {ways}, one for each way")
    classes = _images_by_class(samples, shots + 1)
    if len(classes) < ways:
        raise DataError(
            f"{ways}-way {shots}-shot episodes need {ways} classes with {shots + 1} different images each, got "
            f"{len(classes)}; take fewer ways or shots"
        )
    drawn_episodes = []
    for number in range(episodes):
        draw = random.Random(f"{seed}:{number}")
        drawn = draw.sample(sorted(classes), ways)
        bound = dict(zip(drawn, drawn if names is None else draw.sample(list(names), ways), strict=True))
        asked = draw.choice(drawn)
        query = draw.choice(list(classes[asked].values()))
        support = _support(classes, bound, query, shots, draw)
        choices = tuple(bound.values())
        task = INDUCTION.format(names=_listed(draw.sample(choices, ways))) if induction else ""
        support *= 1 + repeats
        drawn_episodes.append(Episode(str(number), support, query, QUESTION, bound[asked], choices, task))
    return drawn_episodes


def fast_vqa_episodes(
    samples: Sequence[Sample],
    questions: Sequence[Sample],
    *,
    ways: int = 2,
    shots: int = 1,
    repeats: int = 0,
    names: Sequence[str] | None = MADE_UP_NAMES,
    prompt: str = "Question: {question} Answer:",
    seed: int = 0,
) -> list[Episode]:
    """Fast VQA (Frozen, section 4.3): bind names to classes, then ask a question that uses one of the names.

    Args:
        samples: images with their class as target, for the support.
        questions: samples of task "vqa"; those whose question names exactly one class become an episode each, in which
            the name stands for the class. The choices are all first targets of these.
        names: None takes the classes' own ("Real-Fast-VQA").

    Raises:
        ConfigError, DataError: as `binding_episodes`; and when no question names exactly one class.

    Example:
        >>> files = sorted(images_folder.iterdir())
        >>> samples = [Sample(file.name, (file,), (file.stem.split("_")[1],)) for file in files]
        >>> question = Sample("q", (files[0],), ("red",), question="which color has the circle?", task="vqa")
        >>> fast_vqa_episodes(samples, [question], names=["dax", "wug"])[0].question[:30]
        'Question: which color has the '
    """
    _check_numbers(ways=ways, shots=shots)
    if names is not None and len(set(names)) < ways:
        raise ConfigError(f"names: got {len(set(names))} different ones, expected at least {ways}, one for each way")
    classes = _images_by_class(samples, shots + 1)
    asked = [(sample, named) for sample in questions if (named := _named_class(sample, classes))]
    if len(classes) < ways or not asked:
        raise DataError(
            f"fast VQA: got {len(classes)} classes with {shots + 1} images and {len(asked)} questions that name "
            f"exactly one of them, expected {ways} classes or more, and a question"
        )
    choices = tuple(dict.fromkeys(sample.targets[0] for sample, _ in asked))
    episodes = []
    for sample, named in asked:
        draw = random.Random(f"{seed}:{sample.id}")
        drawn = [named, *draw.sample(sorted(classes.keys() - {named}), ways - 1)]
        bound = dict(zip(drawn, drawn if names is None else draw.sample(list(names), ways), strict=True))
        support = _support(classes, bound, sample.images[0], shots, draw) * (1 + repeats)
        question = _word(named).sub(bound[named], sample.question or "")
        text = prompt.replace("{question}", question)
        episodes.append(Episode(sample.id, support, sample.images[0], text, sample.targets[0], choices))
    return episodes


class SimilarExamples:
    """RICES: the examples whose images are most similar to a query, and never the query itself.

    Args:
        pool: samples with one image and a target each. Of several with the same image the first counts.
        features: image files → their features float[n, N, D_enc], for the pool and the queries.

    Example:
        >>> pool = [Sample(file.name, (file,), (file.stem,)) for file in sorted(images_folder.iterdir())]
        >>> len(SimilarExamples(pool, captioner.encoder).nearest(image_path, 3))
        3
    """

    def __init__(self, pool: Sequence[Sample], features: ImagesToFeatures):
        self.features = features
        distinct: dict[str, Sample] = {}
        for sample in pool:
            if sample.targets:
                distinct.setdefault(file_sha256(sample.images[0]), sample)
        self.hashes, self.samples = list(distinct), list(distinct.values())
        if not self.samples:
            raise DataError("the pool of examples is empty, expected samples with an image and a target")
        self.vectors = self._vectors([sample.images[0] for sample in self.samples])

    def nearest(self, query: Path, count: int) -> list[Sample]:
        """The `count` most similar examples (all of a smaller pool), the most similar one last, next to the query.

        Examples whose image has the same bytes as the query are left out, whatever the file name.
        """
        similarity = self.vectors @ self._vectors([query])[0]
        own = file_sha256(query)
        order = similarity.argsort(descending=True, stable=True).tolist()
        return [self.samples[i] for i in order if self.hashes[i] != own][:count][::-1]

    def _vectors(self, images: Sequence[Path]) -> Tensor:
        """Unit vectors float[n, D_enc]: the mean over each image's tokens."""
        parts = [self.features(images[i : i + 256]).float().mean(dim=1) for i in range(0, len(images), 256)]
        return F.normalize(torch.cat(parts), dim=1)


def similar_episodes(
    queries: Sequence[Sample],
    examples: SimilarExamples,
    processor: FrozenPrefixProcessor,
    *,
    shots: int = 4,
    choices: Sequence[str] | None = None,
) -> list[Episode]:
    """One episode per query, whose support are the most similar examples with their own prompts and first targets.

    Args:
        queries: samples with one image and a target each, of any task.
        choices: all answers; by default the first targets that occur in queries and examples.

    Example:
        >>> pool = [Sample(file.name, (file,), (file.stem,)) for file in sorted(images_folder.iterdir())]
        >>> examples = SimilarExamples(pool, captioner.encoder)
        >>> len(similar_episodes(pool[:1], examples, processor, shots=2)[0].support)
        2
    """
    _check_numbers(shots=shots)
    for sample in (*queries, *examples.samples):
        if len(sample.images) != 1 or sample.history is not None:
            raise DataError(
                f"similar examples: sample '{sample.id}' is a chat or has {len(sample.images)} images, expected one "
                "image and one question or caption"
            )
    known = dict.fromkeys(sample.targets[0] for sample in (*queries, *examples.samples))
    episodes = []
    for sample in queries:
        support = tuple(_shot(example, processor) for example in examples.nearest(sample.images[0], shots))
        question = prompt_of(sample, processor)
        answers = tuple(choices or known)
        episodes.append(Episode(sample.id, support, sample.images[0], question, sample.targets[0], answers))
    return episodes


def _shot(example: Sample, processor: FrozenPrefixProcessor) -> Shot:
    prompt = prompt_of(example, processor)
    return Shot(example.images[0], f"{prompt}{glued(prompt, example.targets[0])}.")


def _support(
    classes: Mapping[str, Mapping[str, Path]],
    bound: Mapping[str, str],
    query: Path,
    shots: int,
    draw: random.Random,
) -> tuple[Shot, ...]:
    """`shots` rounds through the classes, in an order drawn for each round."""
    own = file_sha256(query)
    images = {
        name: draw.sample([path for digest, path in classes[name].items() if digest != own], shots) for name in bound
    }
    support = []
    for turn in range(shots):
        for name in draw.sample(list(bound), len(bound)):
            support.append(Shot(images[name][turn], BINDING.format(name=bound[name])))
    return tuple(support)


def _images_by_class(samples: Sequence[Sample], at_least: int) -> dict[str, dict[str, Path]]:
    """Images with different bytes, by their hash, of each class that has enough of them."""
    classes: dict[str, dict[str, Path]] = {}
    for sample in with_targets(samples, where="few-shot classes"):
        if len(sample.images) != 1 or len(sample.targets) != 1:
            raise DataError(
                f"sample {sample.id}: got {len(sample.images)} images and {len(sample.targets)} targets, expected "
                "one image and its class"
            )
        classes.setdefault(sample.targets[0], {}).setdefault(file_sha256(sample.images[0]), sample.images[0])
    return {name: paths for name, paths in classes.items() if len(paths) >= at_least}


def _named_class(sample: Sample, classes: Iterable[str]) -> str | None:
    named = [name for name in classes if _word(name).search(sample.question or "")]
    return named[0] if len(named) == 1 and len(sample.images) == 1 and sample.targets else None


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 2 if name == "ways" else 1
        if value < least:
            raise ConfigError(f"{name}: got {value}, expected {least} or more")
