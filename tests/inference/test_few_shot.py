"""Few-shot episodes: who is in the support, what the prompt says, and accuracy beside its baselines."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.tasks import few_shot
from frozenprefix.evaluation.tasks.few_shot import FEW_SHOT, evaluate_fewshot
from frozenprefix.evaluation.tasks.few_shot_episodes import (
    MADE_UP_NAMES,
    SimilarExamples,
    binding_episodes,
    fast_vqa_episodes,
    similar_episodes,
)
from frozenprefix.inference.few_shot import Episode, Shot, choose_answers, write_answers
from frozenprefix.utils import file_sha256
from tests.helpers.drawings import COLOURS, SHAPES, write_shapes


def labelled(folder: Path, by: str = "shape") -> list[Sample]:
    """Every drawing with its shape or colour as label."""
    pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    return [
        Sample(f"{c}_{s}", (folder / f"images/{c}_{s}.png",), (s if by == "shape" else c,), task="classification")
        for c, s in pairs
    ]


@pytest.fixture(scope="module")
def samples(shapes):
    return labelled(shapes)


def class_of(path: Path) -> str:
    return path.stem.split("_")[1]


# ── Frozen's open-ended classification ──


def test_the_prompt_by_hand():
    shots = (Shot(Path("a"), "This is a dax."), Shot(Path("b"), "This is a <image>: blicket."))
    episode = Episode("1", shots, Path("c"), "What is this? This is a", "dax", ("dax", "blicket"), "Answer with dax.")
    assert episode.prompt == (
        "Answer with dax.<image>This is a dax.This is a <image>: blicket.<image>What is this? This is a"
    )
    assert episode.images == (Path("a"), Path("b"), Path("c"))
    assert episode.blind_prompt == "Answer with dax. This is a dax. This is a : blicket. What is this? This is a"


@pytest.mark.parametrize(("ways", "shots", "repeats"), [(2, 1, 0), (2, 2, 0), (3, 1, 1), (4, 2, 3)])
def test_binding(samples, ways, shots, repeats):
    episodes = binding_episodes(samples, ways=ways, shots=shots, repeats=repeats, episodes=30)
    assert [episode.id for episode in episodes] == [str(number) for number in range(30)]
    for episode in episodes:
        assert len(episode.support) == ways * shots * (1 + repeats)
        once = episode.support[: ways * shots]
        assert episode.support == once * (1 + repeats), "repeats show the same shots again"
        assert len({shot.image for shot in once}) == ways * shots, "inner shots are different images"
        bound = {class_of(shot.image): shot.text for shot in once}
        assert len(bound) == len(set(bound.values())) == ways
        assert Counter(shot.text for shot in once) == dict.fromkeys(bound.values(), shots)
        assert all(shot.text == bound[class_of(shot.image)] for shot in once)
        for start in range(0, len(once), ways):
            assert len({shot.text for shot in once[start : start + ways]}) == ways, "each round shows every class"
        assert episode.query not in {shot.image for shot in episode.support}
        assert bound[class_of(episode.query)] == f"This is a {episode.answer}."
        assert set(bound.values()) == {f"This is a {name}." for name in episode.choices}
        assert set(episode.choices) <= set(MADE_UP_NAMES)
    assert len({episode.choices for episode in episodes}) > 1, "names are drawn for each episode"


def test_induction_and_real_names(samples):
    said = binding_episodes(samples, ways=3, episodes=5)[0]
    first, _, _ = said.prompt.partition("<image>")
    names = first.removeprefix("Answer with ").removesuffix(".").replace(" or ", ", ").split(", ")
    assert sorted(names) == sorted(said.choices)
    real = binding_episodes(samples, ways=3, names=None, induction=False, episodes=20)
    assert all(episode.prompt.startswith("<image>This is a ") for episode in real)
    assert all(episode.answer == class_of(episode.query) for episode in real)


def test_an_episode_depends_on_its_number_and_the_seed_alone(samples):
    few, many = binding_episodes(samples, episodes=3), binding_episodes(samples, episodes=9)
    assert many[:3] == few
    assert binding_episodes(samples, episodes=3, seed=1) != few


def test_right_answers_do_not_depend_on_the_place_in_the_support(samples):
    episodes = binding_episodes(samples, ways=2, episodes=200)
    last = sum(episode.support[-1].text == f"This is a {episode.answer}." for episode in episodes)
    assert 70 < last < 130


def test_copies_of_the_query_are_never_in_the_support(tmp_path):
    folder = write_shapes(tmp_path / "shapes")
    shutil.copy(folder / "images/red_circle.png", folder / "images/copy_circle.png")
    # the same bytes under another class, too
    shutil.copy(folder / "images/red_circle.png", folder / "images/copy_square.png")
    extra = [
        Sample(f"copy_{s}", (folder / f"images/copy_{s}.png",), (s,), task="classification")
        for s in ("circle", "square")
    ]
    episodes = binding_episodes([*labelled(folder), *extra], ways=2, shots=2, episodes=200)
    asked = 0
    for episode in episodes:
        hashes = [file_sha256(shot.image) for shot in episode.support]
        assert file_sha256(episode.query) not in hashes
        asked += file_sha256(episode.query) == file_sha256(folder / "images/red_circle.png")
    assert asked > 5, "the copied image was hardly asked about: this test proves nothing"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 1}, ConfigError, "ways: got 1, expected 2 or more"),
        ({"shots": 0}, ConfigError, "shots: got 0"),
        ({"repeats": -1}, ConfigError, "repeats: got -1"),
        ({"ways": 3, "names": ["dax", "dax", "wug"]}, ConfigError, "names: got 2 different ones, expected at least 3"),
        ({"ways": 5}, DataError, "5 classes with 2 different images each, got 4"),
        ({"shots": 3}, DataError, "2-way 3-shot episodes need 2 classes with 4 different images each, got 0"),
    ],
)
def test_episodes_that_cannot_be_made(samples, options, error, message):
    with pytest.raises(error, match=message):
        binding_episodes(samples, **options)


def test_too_few_images_that_are_no_copies_of_the_query(tmp_path):
    """Two classes that share an image: taking it as query leaves one of them an image short."""
    for name, colour in (("a1", "red"), ("a2", "blue"), ("b1", "red"), ("b2", "green")):
        shutil.copy(write_once(tmp_path) / f"images/{colour}_circle.png", tmp_path / f"{name}.png")
    pool = [Sample(n, (tmp_path / f"{n}.png",), (n[0],), task="classification") for n in ("a1", "a2", "b1", "b2")]
    for episode in binding_episodes(pool, ways=2, shots=1, episodes=40):
        assert file_sha256(episode.query) not in {file_sha256(shot.image) for shot in episode.support}


def write_once(folder: Path) -> Path:
    return folder / "shapes" if (folder / "shapes").exists() else write_shapes(folder / "shapes")


# ── fast VQA ──


def test_fast_vqa(shapes):
    questions = [
        Sample("1", (shapes / "images/red_circle.png",), ("red",), question="What color is the Circle?", task="vqa"),
        Sample("2", (shapes / "images/blue_cross.png",), ("blue",), question="circle or cross?", task="vqa"),
        Sample("3", (shapes / "images/blue_cross.png",), ("yes",), question="is it crossed?", task="vqa"),
        Sample("4", (shapes / "images/blue_cross.png",), ("yes",), question="is the cross blue?", task="vqa"),
    ]
    episodes = fast_vqa_episodes(labelled(shapes), questions, ways=2, shots=1, repeats=1)
    assert [episode.id for episode in episodes] == ["1", "4"], "exactly one class, as a whole word"
    for episode, name in zip(episodes, ("circle", "cross"), strict=True):
        bound = {class_of(shot.image): shot.text for shot in episode.support}
        made_up = bound[name].removeprefix("This is a ").removesuffix(".")
        assert made_up in MADE_UP_NAMES
        assert made_up in episode.question
        assert name not in episode.question.lower()
        assert len(episode.support) == 4
        assert episode.query not in {shot.image for shot in episode.support}
        assert episode.choices == ("red", "yes")
    real = fast_vqa_episodes(labelled(shapes), questions, names=None)[1]
    assert real.question == "Question: is the cross blue? Answer:"
    with pytest.raises(DataError, match="got 4 classes with 2 images and 0 questions that name exactly one"):
        fast_vqa_episodes(labelled(shapes), questions[1:3])


# ── RICES ──


def features_of(vectors: dict[Path, list[float]]):
    """Two equal tokens per image."""
    return lambda paths: torch.tensor([[vectors[path]] * 2 for path in paths])


def test_similar_examples_by_hand(tmp_path):
    vectors = {}
    for name, vector in (("q", [1, 0]), ("near", [9, 1]), ("far", [0, 1]), ("middle", [1, 1]), ("copy", [1, 0])):
        path = tmp_path / f"{name}.png"
        path.write_bytes(b"query" if name in ("q", "copy") else name.encode())
        vectors[path] = [float(value) for value in vector]
    pool = [Sample(path.stem, (path,), (path.stem,)) for path in vectors if path.stem != "q"]
    examples = SimilarExamples(pool, features_of(vectors))
    query = tmp_path / "q.png"
    assert [sample.id for sample in examples.nearest(query, 2)] == ["middle", "near"], "the nearest stands last"
    assert [sample.id for sample in examples.nearest(query, 9)] == ["far", "middle", "near"], "never its own copy"
    assert [sample.id for sample in examples.nearest(tmp_path / "far.png", 3)] == ["copy", "near", "middle"]
    with pytest.raises(DataError, match="the pool of examples is empty"):
        SimilarExamples([], features_of(vectors))


def test_similar_episodes(captioner, shapes):
    questions = load_source({"type": "qa", "path": str(shapes)})
    train = [sample for sample in questions if sample.split == "train"]
    asked = [sample for sample in questions if sample.split == "val"]
    vectors = {s.images[0]: [float(class_of(s.images[0]) == name) for name in SHAPES] for s in questions}
    episodes = similar_episodes(asked, SimilarExamples(train, features_of(vectors)), captioner.processor, shots=2)
    assert [episode.id for episode in episodes] == [sample.id for sample in asked]
    for episode, sample in zip(episodes, asked, strict=True):
        assert all(class_of(shot.image) == class_of(episode.query) for shot in episode.support)
        assert len({shot.image for shot in episode.support}) == 2, "two questions about one image are one example"
        assert episode.prompt.endswith(f".<image>Question: {sample.question} Answer:")
        assert episode.prompt.count("<image>") == 3
        assert episode.answer in episode.choices
    assert episodes[0].support[0].text == "<image>Question: what color is this? Answer: green."


# ── answers ──


def test_choices_are_scored_as_each_alone(captioner, samples):
    model, processor = captioner.model, captioner.processor
    episodes = binding_episodes(samples, ways=3, episodes=4)
    for blind in (False, True):
        for episode, made in zip(episodes, choose_answers(captioner, episodes, blind=blind), strict=True):
            prompt = episode.blind_prompt if blind else episode.prompt
            images = [] if blind else [load_image(path) for path in episode.images]
            scores = []
            for choice in episode.choices:
                context, ids = processor.encode_prompt(prompt), processor.encode_target(prompt, choice)[:-1]
                inputs = processor.image_processor(images, return_tensors="pt") if images else {}
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*context, *ids]]), **inputs).logits
                steps = logits[0, len(context) - 1 : -1].log_softmax(-1)
                scores.append(steps.gather(1, torch.tensor(ids)[:, None]).sum().item())
            assert made == episode.choices[scores.index(max(scores))]


def test_written_answers(captioner, samples):
    episodes = binding_episodes(samples, ways=2, episodes=3)
    for blind in (False, True):
        made = write_answers(captioner, episodes, blind=blind, max_new_tokens=4)
        for episode, text in zip(episodes, made, strict=True):
            prompt = episode.blind_prompt if blind else episode.prompt
            images = None if blind else [load_image(path) for path in episode.images]
            assert text == captioner.generate([prompt], images, max_new_tokens=4, num_beams=1)[0].text


# ── evaluation ──


def options_for(path: Path, **more) -> EvaluationOptions:
    return EvaluationOptions(predictions=path, features=FeatureStorage("off"), **more)


def test_evaluation(captioner, samples, tmp_path):
    path, episodes = tmp_path / "made" / "p.jsonl", binding_episodes(samples, ways=2, episodes=8)
    done = []
    result = evaluate_fewshot(captioner, episodes, options_for(path, progress=lambda *counts: done.append(counts)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == choose_answers(captioner, episodes)
    assert [row["blind"] for row in rows] == choose_answers(captioner, episodes, blind=True)
    swapped = [episode.with_support_of(episodes[(i + 4) % 8]) for i, episode in enumerate(episodes)]
    assert [row["shuffled_support"] for row in rows] == choose_answers(captioner, swapped)
    assert all(new.query == old.query and new.prompt == old.prompt for new, old in zip(swapped, episodes, strict=True))
    hits = [row["model"] == row["references"][0] for row in rows]
    assert result["metrics"] == {"accuracy": sum(hits) / 8}
    assert result["baselines"]["chance"] == {"accuracy": 0.5}
    assert result["baselines"].keys() == {"blind", "shuffled_support", "chance"}
    assert result["groups"]["model"]["accuracy"].keys() == {episode.answer for episode in episodes}
    assert (result["task"], result["n"], result["settings"]["shots"]) == ("fewshot", 8, 2)
    assert done[-1] == (24, 24)
    json.dumps(result)


def test_a_model_that_binds_is_right_and_shuffling_takes_that_away(captioner, samples, tmp_path, monkeypatch):
    """Answers that look the query's class up in the support, as a model would that binds names to images."""

    def bind(captioner, episodes, *, features=None, blind=False):
        made = []
        for episode in episodes:
            bound = {} if blind else {class_of(shot.image): shot.text for shot in episode.support}
            text = bound.get(class_of(episode.query), f"This is a {episode.choices[0]}.")
            made.append(text.removeprefix("This is a ").removesuffix("."))
        return made

    monkeypatch.setattr(few_shot, "choose_answers", bind)
    episodes = binding_episodes(samples, ways=2, episodes=60)
    result = evaluate_fewshot(captioner, episodes, options_for(tmp_path / "p.jsonl"))
    assert result["metrics"]["accuracy"] == 1
    assert 0.3 < result["baselines"]["shuffled_support"]["accuracy"] < 0.7
    assert 0.3 < result["baselines"]["blind"]["accuracy"] < 0.7


@pytest.mark.parametrize(
    ("text", "right"), [("dax", 1), ("Dax. And more", 1), ("a dax", 1), ("daxes", 0), ("blicket dax", 0), ("", 0)]
)
def test_written_answers_are_right_when_they_start_right(captioner, samples, tmp_path, monkeypatch, text, right):
    episodes = [
        Episode(str(i), (Shot(sample.images[0], "This is a dax."),), sample.images[0], "This is a", "dax", ("dax", "x"))
        for i, sample in enumerate(samples[:2])
    ]
    monkeypatch.setattr(few_shot, "write_answers", lambda captioner, batch, **options: [text] * len(batch))
    result = evaluate_fewshot(captioner, episodes, options_for(tmp_path / "p.jsonl"), answering="generate")
    assert result["metrics"]["accuracy"] == right


def test_the_task_builds_its_episodes(captioner, samples, tmp_path):
    extra = {"ways": 3, "episodes": 4, "names": None}
    result = FEW_SHOT.run(captioner, samples, options_for(tmp_path / "p.jsonl", extra=extra))
    assert (result["n"], result["settings"]["ways"]) == (4, 3)
    assert result["baselines"]["chance"]["accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"no option 'way' \(did you mean 'ways'\?\)"):
        FEW_SHOT.run(captioner, samples, options_for(tmp_path / "p.jsonl", extra={"way": 3}))


def test_bad_images_drop_their_episodes(captioner, tmp_path):
    folder = write_shapes(tmp_path / "shapes")
    (folder / "images/red_circle.png").write_bytes(b"no image")
    episodes = binding_episodes(labelled(folder), episodes=20)
    spoiled = sum(any(path.stem == "red_circle" for path in episode.images) for episode in episodes)
    result = evaluate_fewshot(captioner, episodes, options_for(tmp_path / "p.jsonl", max_bad_share=0.2))
    assert (result["n"], result["bad_images"]) == (20 - spoiled, {"not_an_image": 1})
    assert spoiled > 0


def test_episodes_that_cannot_be_evaluated(captioner, samples, tmp_path):
    options = options_for(tmp_path / "p.jsonl")
    two, four = (binding_episodes(samples, ways=ways, episodes=2) for ways in (2, 4))
    with pytest.raises(DataError, match="got supports of 2 to 4 shots"):
        evaluate_fewshot(captioner, [two[0], four[1]], options)
    with pytest.raises(DataError, match=r"the longest prompt .* tokens, the language model reads 128"):
        evaluate_fewshot(captioner, binding_episodes(samples, ways=4, repeats=5, episodes=2), options)
    with pytest.raises(DataError, match="got 1 episodes, expected at least 2"):
        evaluate_fewshot(captioner, two[:1], options)
    with pytest.raises(ConfigError, match="answering: got 'guess'"):
        evaluate_fewshot(captioner, two, options, answering="guess")
    wrong = Episode("x", two[0].support, two[0].query, "?", "cat", ("dax",))
    with pytest.raises(DataError, match="the answer 'cat' is none of its choices"):
        evaluate_fewshot(captioner, [wrong, two[1]], options)
