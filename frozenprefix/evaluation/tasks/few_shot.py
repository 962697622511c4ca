"""Score a model on few-shot episodes, against chance, the blind LM and shuffled supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample, check_unique_ids
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.journal import Journal, digest, header_of
from frozenprefix.evaluation.metrics.vqa import by_group, comparable_answer
from frozenprefix.evaluation.result import Predictions, ScoredTask, evaluate_runs, predict_missing
from frozenprefix.evaluation.scoring import Scores, mean
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.evaluation.tasks.few_shot_episodes import MADE_UP_NAMES, binding_episodes
from frozenprefix.evaluation.tasks.runs import lm_settings
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.few_shot import Episode, choose_answers, write_answers

Answering = Literal["choose", "generate"]
OPTIONS = ("ways", "shots", "repeats", "induction", "names", "episodes", "seed", "answering")


def evaluate_fewshot(
    captioner: Captioner,
    episodes: Sequence[Episode],
    options: EvaluationOptions,
    *,
    answering: Answering = "choose",
) -> dict[str, Any]:
    """Answer every episode and compare with the right answer.

    Baselines: "chance", one over the number of choices; "blind", the LM with the same text and no image;
    "shuffled_support", with the support images of the episode half the list away, whose accuracy does not come from the
    binding.

    Args:
        answering: "choose" takes the likeliest of an episode's choices (the sum over its tokens); "generate" lets the
            LM write `options.max_new_tokens` (10 when None), and counts an answer as right when it starts with the
            right words, compared as VQA answers are.

    Returns:
        As `EvaluationTask.run` says, with the accuracy by right answer as groups.

    Raises:
        ConfigError: for another way of answering.
        DataError: for fewer than two episodes, supports of different sizes, an answer outside the choices, or a prompt
            that is longer than the LM can read.

    Example:
        >>> first, second = sorted(images_folder.iterdir())[:2]
        >>> episodes = [Episode(file.name, (), file, "This is a", "dog", ("dog", "cat")) for file in (first, second)]
        >>> result = evaluate_fewshot(captioner, episodes, EvaluationOptions(tmp_path / "predictions.jsonl"))
        >>> result["baselines"]["chance"]
        {'accuracy': 0.5}
    """
    if answering not in ("choose", "generate"):
        raise ConfigError(f"answering: got {answering!r}, expected 'choose' or 'generate'")
    max_new_tokens = options.max_new_tokens or 10
    _check(captioner, episodes, max_new_tokens)
    samples = [_as_sample(episode) for episode in episodes]
    images = options.open_features(captioner, samples)
    episodes = _readable(episodes, images.bad)
    samples = [_as_sample(episode) for episode in episodes]
    own = lm_settings(captioner) if answering == "generate" else {}
    settings = {**own, "answering": answering, "max_new_tokens": max_new_tokens, "shots": len(episodes[0].support)}
    choices = digest([episode.choices for episode in episodes])
    header = header_of(captioner, samples, {"task": "fewshot", **settings, "choices": choices})
    scored = ScoredTask(
        "fewshot",
        samples,
        lambda answers: _scores(episodes, answers, answering),
        settings,
        images.bad,
        clusters={episode.id: episode.query for episode in episodes},
        chance={"accuracy": mean(1 / len(episode.choices) for episode in episodes)},
    )

    def predict(journal: Journal) -> Predictions:
        return _answer_runs(captioner, episodes, images, answering, max_new_tokens, journal, options)

    return evaluate_runs(scored, predict, header, options)


def _run(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Frozen's open-ended classification, built from labelled samples by the options of `binding_episodes`."""
    check_options("fewshot", options.extra, OPTIONS)
    extra = dict(options.extra)
    answering = extra.pop("answering", "choose")
    episodes = binding_episodes(samples, **{"names": MADE_UP_NAMES, **extra})
    result = evaluate_fewshot(captioner, episodes, options, answering=answering)
    return {**result, "settings": {**result["settings"], **extra}}


FEW_SHOT = EvaluationTask(_run, sample_task="classification")


def _as_sample(episode: Episode) -> Sample:
    return Sample(
        episode.id, episode.images, (episode.answer,), question=episode.prompt, prompt="{question}", task="fewshot"
    )


def _answer_runs(
    captioner: Captioner,
    episodes: Sequence[Episode],
    images: ImageFeatures,
    answering: Answering,
    max_new_tokens: int,
    journal: Journal,
    options: EvaluationOptions,
) -> Predictions:
    """Run → episode id → answer: of the model, of the blind LM, and of the model with other supports."""
    far = len(episodes) // 2
    others = [*episodes[far:], *episodes[:far]]
    swapped = [episode.with_support_of(other) for episode, other in zip(episodes, others, strict=True)]
    runs = {"model": (episodes, False), "blind": (episodes, True), "shuffled_support": (swapped, False)}

    def answer(name: str, batch: list[Episode]) -> dict[str, str]:
        blind = runs[name][1]
        if answering == "choose":
            texts = choose_answers(captioner, batch, features=images, blind=blind)
        else:
            texts = write_answers(captioner, batch, features=images, blind=blind, max_new_tokens=max_new_tokens)
        return {episode.id: text for episode, text in zip(batch, texts, strict=True)}

    todo = {name: asked for name, (asked, _) in runs.items()}
    answers = predict_missing(
        journal, todo, answer, options, key=lambda episode: episode.id, batch_size=captioner.batch_size
    )
    return {name: {episode.id: answers[name][episode.id] for episode in episodes} for name in runs}


def _readable(episodes: Sequence[Episode], bad: BadImages) -> list[Episode]:
    """The episodes without bad images, of which there must be two."""
    readable = [episode for episode in episodes if not any(path in bad for path in episode.images)]
    if len(readable) < 2:
        raise DataError(f"got {len(readable)} episodes, expected at least 2, for the baseline with supports shuffled")
    return readable


def _check(captioner: Captioner, episodes: Sequence[Episode], max_new_tokens: int) -> None:
    check_unique_ids([_as_sample(episode) for episode in episodes])
    sizes = {len(episode.support) for episode in episodes}
    if len(sizes) > 1:
        raise DataError(
            f"episodes: got supports of {min(sizes)} to {max(sizes)} shots, expected one size, for the baseline with "
            "supports shuffled"
        )
    for episode in episodes:
        if episode.answer not in episode.choices:
            raise DataError(f"episode {episode.id}: the answer {episode.answer!r} is none of its choices")
    most = captioner.model.lm.max_positions
    prompts = (captioner.processor.encode_prompt(episode.prompt) for episode in episodes)
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if most is not None and longest > most:
        raise DataError(
            f"episodes: the longest prompt and its answer take {longest} tokens, the language model reads {most}; take "
            "fewer ways, shots or repeats, or a mapper with a shorter prefix"
        )


def _scores(episodes: Sequence[Episode], answers: Mapping[str, str], answering: Answering) -> Scores:
    right = {episode.id: is_right(episode, answers[episode.id], answering) for episode in episodes}
    return Scores(
        metrics={"accuracy": mean(right.values())},
        groups={"accuracy": by_group(right, {episode.id: episode.answer for episode in episodes})},
        per_sample={key: {"accuracy": value} for key, value in right.items()},
    )


def is_right(episode: Episode, text: str, answering: Answering) -> float:
    if answering == "choose":
        return float(text == episode.answer)
    wanted = comparable_answer(episode.answer).split()
    return float(comparable_answer(text).split()[: len(wanted)] == wanted)
