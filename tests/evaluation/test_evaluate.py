"""Evaluation of a tiny checkpoint: predictions first, honest baselines, bad images counted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from frozenprefix import __version__
from frozenprefix.cli.main import app
from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.errors import AssetError, ConfigError, DataError
from frozenprefix.evaluation import TASKS, evaluate_checkpoint, evaluate_samples, scoring
from frozenprefix.evaluation.evaluate import encode_samples
from frozenprefix.evaluation.metrics.captions import bleu_of_sums
from frozenprefix.evaluation.scoring import Scores, caption_scorer, intervals, vqa_scorer
from frozenprefix.evaluation.tasks import captioning, runs, vqa
from frozenprefix.inference import Captioner
from tests.helpers.answers import saying
from tests.helpers.data import rows_of
from tests.helpers.drawings import write_shapes

KEYS = {
    "task",
    "metrics",
    "intervals",
    "baselines",
    "n",
    "groups",
    "bad_images",
    "settings",
    "predictions",
    "predictions_sha256",
}


def samples_of(folder: Path, kind: str, **options) -> list[Sample]:
    return load_source({"type": kind, "path": str(folder), **options})


@pytest.fixture(scope="module")
def captions(shapes):
    return samples_of(shapes, "captions", split="val")


def test_captions(captioner, captions, tmp_path):
    path = tmp_path / "made" / "predictions.jsonl"
    steps = []
    progress = lambda done, total: steps.append((done, total))  # noqa: E731
    result = evaluate_samples(captioner, captions, predictions=path, num_beams=2, max_new_tokens=5, progress=progress)
    assert result.keys() == KEYS
    assert json.loads(json.dumps(result)) == result, "plain JSON"
    assert (result["task"], result["n"], result["bad_images"]) == ("caption", 4, {})
    assert result["settings"] == {"num_beams": 2, "max_new_tokens": 5}
    assert result["baselines"].keys() == {"blind", "shuffled"}
    assert result["baselines"]["blind"].keys() == result["baselines"]["shuffled"].keys() == result["metrics"].keys()
    assert steps[-1] == (12, 12)
    rows = rows_of(path)
    assert [row["id"] for row in rows] == [sample.id for sample in captions]
    assert all(row["references"] == list(s.targets) for row, s in zip(rows, captions, strict=True))
    by_hand = captioner.caption([s.images[0] for s in captions], num_beams=2, max_new_tokens=5)
    assert [row["model"] for row in rows] == [caption.text for caption in by_hand]
    assert len({row["blind"] for row in rows}) == 1, "without an image every caption is the same"
    assert not list(path.parent.glob("*.part-*")), "nothing is left when it is done"


def test_questions(captioner, questions, tmp_path):
    result = evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl", max_new_tokens=3)
    assert (result["task"], result["n"]) == ("vqa", 8)
    assert result["settings"] == {"answering": "generate", "num_beams": 1, "max_new_tokens": 3}
    assert result["groups"]["model"]["accuracy"].keys() == {"color", "shape"}
    assert result["groups"]["model"]["accuracy_by_answer_type"].keys() == {"other"}
    rows = rows_of(tmp_path / "p.jsonl")
    assert [row["question"] for row in rows] == [sample.question for sample in questions]
    answers = [captioner.answer(s.images[0], s.question, max_new_tokens=3) for s in questions]
    assert [row["model"] for row in rows] == answers
    blind = {(row["question"], row["blind"]) for row in rows}
    assert len(blind) == 2, "one blind answer to each of the two questions"
    for question, text in blind:
        prompt = f"Question: {question} Answer:"
        assert captioner.generate([prompt], max_new_tokens=3)[0].text == text


def test_scores_are_of_the_predictions(captioner, questions, tmp_path, monkeypatch):
    """A model that always says "red", whatever it is shown."""
    monkeypatch.setattr(runs, "predict", saying("Red."))
    result = evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl")
    answers = [sample.targets[0] for sample in questions]
    share = answers.count("red") / len(answers)
    assert result["metrics"]["accuracy"] == result["baselines"]["blind"]["accuracy"] == pytest.approx(share)


def test_wups_is_scored_where_wordnet_is(monkeypatch, caplog):
    class Half:
        def similarity(self, first: str, second: str) -> float:
            return 0.5

    samples = [Sample(name, (), ("dog",), task="vqa", question="what is it?") for name in ("1", "2")]
    monkeypatch.setattr(scoring, "WordNet", Half)
    found = vqa_scorer(samples)({"1": "dog", "2": "cat"})
    assert found.metrics["wups_0.0"] == 0.75
    assert found.metrics["wups_0.9"] == pytest.approx((1 + 0.05) / 2)
    assert found.per_sample["2"]["wups_0.0"] == 0.5

    def missing() -> None:
        raise AssetError("WUPS needs WordNet: nltk is not installed; pip install nltk")

    monkeypatch.setattr(scoring, "WordNet", missing)
    with caplog.at_level("INFO", logger="frozenprefix"):
        assert set(vqa_scorer(samples)({"1": "dog", "2": "cat"}).metrics) == {"accuracy", "exact_match"}
    assert caplog.messages == ["WUPS is not computed: WUPS needs WordNet: nltk is not installed; pip install nltk"]


def test_vqa_scorer_by_hand():
    def sample(name, answers, kind):
        return Sample(name, (), answers[:1], task="vqa", metadata={"answers": answers, "question_type": kind})

    score = vqa_scorer(
        [sample("1", ("red",), "color"), sample("2", ("two",), "number"), sample("3", ("blue",), "color")]
    )
    scores = score({"1": "red", "2": "3", "3": "green"})
    assert scores.metrics["accuracy"] == pytest.approx(1 / 3)
    assert scores.groups["accuracy"] == {"color": 0.5, "number": 0.0}
    assert scores.groups["accuracy_by_answer_type"] == {"number": 0.0, "other": 0.5}
    assert scores.per_sample["1"] == {"accuracy": 1.0, "exact_match": 1.0}


def test_questions_without_types_get_those_of_vqa_v2():
    def sample(name, question, answer):
        return Sample(name, (), (answer,), question=question, task="vqa")

    score = vqa_scorer([sample("1", "What color is the cat?", "red"), sample("2", "Is this a dog?", "yes")])
    groups = score({"1": "red", "2": "no"}).groups
    assert groups["accuracy"] == {"is this a": 0.0, "what color is the": 1.0}
    assert groups["accuracy_by_answer_type"] == {"other": 1.0, "yes/no": 0.0}


# ── scores of single samples, and intervals ──


def test_every_sample_has_its_scores(captioner, captions, tmp_path):
    result = evaluate_samples(captioner, captions, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=4)
    rows = rows_of(tmp_path / "p.jsonl")
    assert all(row["scores"].keys() == {"model", "blind", "shuffled"} for row in rows)
    rouge = [row["scores"]["model"]["rouge_l"] for row in rows]
    assert sum(rouge) / 4 == pytest.approx(result["metrics"]["rouge_l"])
    sums = np.sum([row["statistics"]["bleu"] for row in rows], axis=0, dtype=float)
    assert float(bleu_of_sums(sums)["bleu_1"]) == pytest.approx(result["metrics"]["bleu_1"])
    data = (tmp_path / "p.jsonl").read_bytes()
    assert result["predictions_sha256"] == hashlib.sha256(data).hexdigest()


def test_intervals_draw_whole_images(captioner, questions, tmp_path, monkeypatch):
    """One of the two questions of each image is answered rightly: half of the samples, half of every image."""
    right = {s.images: s.targets[0] for s in questions if s.question == "what color is this?"}
    answer = saying(lambda asked, prompt: right[asked.images] if asked.images and "color" in prompt else "no")
    monkeypatch.setattr(runs, "predict", answer)
    result = evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl")
    assert result["metrics"]["accuracy"] == 0.5
    assert result["intervals"]["accuracy"] == [0.5, 0.5]


def test_metrics_that_are_no_mean_have_an_interval_from_counts_or_none():
    samples = [Sample(str(i), (Path(f"{i}.png"),), (f"a dog runs on grass {i}",)) for i in range(20)]
    scores = caption_scorer(samples)({s.id: s.targets[0] if int(s.id) % 2 else "a cat" for s in samples})
    found = intervals(scores)
    assert found.keys() == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"}
    for name, (low, high) in found.items():
        assert low < scores.metrics[name] < high, name


def test_predictions_are_written_before_they_are_scored(captioner, captions, tmp_path, monkeypatch):
    def broken(samples):
        def score(texts):
            raise RuntimeError("the scorer fell over")

        return score

    monkeypatch.setattr(captioning, "caption_scorer", broken)
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(RuntimeError, match="the scorer fell over"):
        evaluate_samples(captioner, captions, predictions=path, num_beams=1, max_new_tokens=2)
    assert [row.keys() for row in rows_of(path)] == [
        {"id", "images", "question", "references", "model", "blind", "shuffled"}
    ] * 4


# ── baselines ──


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_shuffled_never_gives_the_own_image(count):
    """Some images have several samples, and samples of one image do not stand together."""
    samples = [Sample(str(i), (Path(f"{i % count}.png"),), ()) for i in range(3 * count)]
    others = runs.shuffled(samples)
    assert len(others) == len(samples)
    assert all(sample.images != other.images for sample, other in zip(samples, others, strict=True))
    assert {other.images for other in others} == {sample.images for sample in samples}, "every image is shown"


def test_shuffled_gives_as_many_images_as_a_sample_has():
    def others(*shown: str) -> list[str]:
        samples = [Sample(str(i), tuple(Path(name) for name in names), ()) for i, names in enumerate(shown)]
        return ["".join(str(path) for path in sample.images) for sample in runs.shuffled(samples)]

    assert others("a", "ab", "c", "cd", "ab", "efg") == ["c", "cd", "a", "ab", "cd", "abc"]
    assert others("x", "xy", "xyz", "a", "ab") == ["a", "ab", "aba", "x", "xy"]
    assert others("ab", "bc", "cd") == ["cd", "ad", "ab"]
    with pytest.raises(DataError, match="at least 2 different images"):
        others("a", "ab")


def test_chats_with_several_images_are_evaluated(captioner, captions, tmp_path):
    """Samples with one image and with two, in one evaluation."""
    drawn = [sample.images[0] for sample in captions[:4]]
    chats = [
        Sample(
            f"{number}.{turn}",
            images,
            ("a dog",),
            question="<image>what is it?",
            history=(("<image>what is it?", "a dog"),) * turn,
            task="vqa",
            metadata={"answers": ("a dog",)},
        )
        for number, pair in enumerate((drawn[:2], drawn[2:]))
        for turn, images in enumerate((tuple(pair[:1]), tuple(pair)))
    ]
    result = evaluate_samples(captioner, chats, predictions=tmp_path / "chats.jsonl")
    assert result["n"] == 4
    assert set(result["baselines"]) == {"blind", "shuffled"}


def test_shuffled_needs_two_images():
    with pytest.raises(DataError, match="at least 2 different images"):
        runs.shuffled([Sample("1", (Path("a"),), ()), Sample("2", (Path("a"),), ())])


def test_what_each_run_is_shown(captioner, captions, tmp_path, monkeypatch):
    features, _ = encode_samples(captioner, captions, FeatureStorage())
    own = {sample.id: features[sample.images[0]] for sample in captions}
    predict, seen = runs.predict, []

    def spy(captioner, batch, images, settings):
        seen.extend(batch)
        return predict(captioner, batch, images, settings)

    given = []
    generate = Captioner.generate_groups
    monkeypatch.setattr(runs, "predict", spy)

    def record(self, groups, images=None, **options):
        given.append((groups, images))
        return generate(self, groups, images, **options)

    monkeypatch.setattr(Captioner, "generate_groups", record)
    evaluate_samples(captioner, captions, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=2)
    assert [images is None for _, images in given] == [False, False, True], "batches with images, and the blind one"
    assert [prompts for groups, _ in given for prompts in groups] == [["<image>"]] * 5, "each image is asked once"
    shown = torch.cat([images for _, images in given if images is not None])
    for asked, image in zip(seen, shown, strict=False):
        runs_of = {run: sample_id for askers in asked.askers.values() for run, sample_id in askers}
        assert runs_of.keys() == {"model", "shuffled"}
        assert torch.equal(image, own[runs_of["model"]])
        assert not torch.equal(image, own[runs_of["shuffled"]])
    assert len(seen[-1].askers["<image>"]) == 4, "without an image, one prompt is asked once"


def test_a_batch_has_few_prompts_even_if_there_are_many_about_an_image(captioner, questions, tmp_path, monkeypatch):
    many = [replace(questions[i % 8], id=str(i), question=f"is it {i // 4}?") for i in range(200)]
    sizes: list[tuple[int, int]] = []

    def count(captioner, batch, *_):
        sizes.append((len(batch), sum(len(asked.prompts) for asked in batch)))
        return saying("no")(captioner, batch)

    monkeypatch.setattr(runs, "predict", count)
    result = evaluate_samples(captioner, many, predictions=tmp_path / "p.jsonl")
    assert result["n"] == 200
    assert max(rows for rows, _ in sizes) <= captioner.batch_size
    assert max(prompts for _, prompts in sizes) <= max(32, 4 * captioner.batch_size)


def test_all_questions_about_an_image_are_asked_together(captioner, questions, tmp_path, monkeypatch):
    asked = []
    predict = runs.predict
    spy = lambda model, batch, *rest: asked.extend(batch) or predict(model, batch, *rest)  # noqa: E731
    monkeypatch.setattr(runs, "predict", spy)
    evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=3)
    images = {sample.images for sample in questions}
    assert [each.images for each in asked if each.images] == list(dict.fromkeys(each.images for each in asked))[:-1]
    assert {each.images for each in asked} == images | {()}
    assert all(len(each.prompts) == 2 for each in asked), "both questions, once for the own and the shuffled samples"
    for row in rows_of(tmp_path / "p.jsonl"):
        (sample,) = [sample for sample in questions if sample.id == row["id"]]
        (other,) = [other for own, other in zip(questions, runs.shuffled(questions), strict=True) if own is sample]
        assert row["model"] == captioner.answer(sample.images[0], sample.question, max_new_tokens=3)
        assert row["shuffled"] == captioner.answer(other.images[0], sample.question, max_new_tokens=3)


def test_a_wrong_image_changes_the_captions(captioner, shapes, tmp_path):
    samples = samples_of(shapes, "captions")
    evaluate_samples(captioner, samples, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=8)
    assert any(row["model"] != row["shuffled"] for row in rows_of(tmp_path / "p.jsonl"))


# ── bad data ──


@pytest.fixture
def spoiled(tmp_path):
    folder = write_shapes(tmp_path / "shapes")
    (folder / "images/red_circle.png").write_bytes(b"no image")
    return folder


def test_bad_images_are_counted_and_left_out(captioner, spoiled, tmp_path):
    samples = samples_of(spoiled, "qa")
    result = evaluate_samples(captioner, samples, predictions=tmp_path / "p.jsonl", max_new_tokens=2, max_bad_share=0.1)
    assert result["bad_images"] == {"not_an_image": 1}
    assert result["n"] == len(samples) - 2 == 22
    assert not any("red_circle" in row["id"] for row in rows_of(tmp_path / "p.jsonl"))


def test_too_many_bad_images_are_an_error(captioner, spoiled, tmp_path):
    with pytest.raises(DataError, match=r"1 of 12 images are bad \(1 not_an_image\)"):
        evaluate_samples(captioner, samples_of(spoiled, "captions"), predictions=tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_samples_of_one_id_are_refused(captioner, captions, tmp_path):
    with pytest.raises(DataError, match="1 ids occur more than once"):
        evaluate_samples(captioner, [*captions, captions[0]], predictions=tmp_path / "p.jsonl")


def test_one_task_at_a_time(captioner, captions, questions, tmp_path):
    with pytest.raises(ConfigError, match=r"one task at a time \(caption, vqa\), got caption, vqa"):
        evaluate_samples(captioner, [*captions, *questions], predictions=tmp_path / "p.jsonl")


# ── from a checkpoint folder ──


@pytest.mark.parametrize(("task", "n"), [("caption", 2), ("vqa", 4)])
def test_a_checkpoint_on_a_folder(tiny_checkpoint, shapes, tmp_path, task, n):
    result = evaluate_checkpoint(
        tiny_checkpoint, task=task, data=shapes, split="val", limit=2, num_beams=1, predictions=tmp_path / "p.jsonl"
    )
    assert (result["task"], result["n"], result["settings"]["num_beams"]) == (task, n, 1)
    assert all(
        row["id"].startswith("captions:" if task == "caption" else "qa:") for row in rows_of(tmp_path / "p.jsonl")
    )


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, ""),
        ({"limit": 4}, "_first4"),
        ({"num_beams": 1}, "_beams1"),
        ({"num_beams": 2, "candidates": None}, "_beams2_options-[0-9a-f]{6}"),
    ],
)
def test_predictions_lie_beside_the_checkpoint(tiny_checkpoint, shapes, tmp_path, monkeypatch, settings, ending):
    """One file for each way of evaluating: a result can be compared after other evaluations."""
    monkeypatch.setattr(runs, "predict", saying("a"))
    monkeypatch.setattr(vqa, "vqa_scorer", lambda samples: lambda texts: Scores({"accuracy": 0.0}))
    if "candidates" in settings:
        monkeypatch.setattr(vqa, "_candidates", lambda options: None)
    result = evaluate_checkpoint(tiny_checkpoint, task="vqa", data=shapes, split="val", **settings)
    path = Path(result["predictions"])
    assert path.parent == tiny_checkpoint
    assert re.fullmatch(rf"predictions_vqa_shapes-[0-9a-f]{{6}}_val{ending}\.jsonl", path.name)
    assert len(rows_of(path)) == 8
    path.unlink()


def test_more_metrics_score_the_same_predictions(tiny_checkpoint, shapes, monkeypatch):
    monkeypatch.setattr(runs, "predict", saying("a"))
    result = evaluate_checkpoint(tiny_checkpoint, task="caption", data=shapes, split="val", metrics=[])
    path = Path(result["predictions"])
    assert re.fullmatch(r"predictions_caption_shapes-[0-9a-f]{6}_val\.jsonl", path.name)
    path.unlink()


def test_a_folder_without_the_task_is_an_error(tiny_checkpoint, tmp_path):
    folder = write_shapes(tmp_path / "shapes")
    (folder / "qa.jsonl").unlink()
    with pytest.raises(DataError, match="holds no vqa samples in split None"):
        evaluate_checkpoint(tiny_checkpoint, task="vqa", data=folder)


def test_a_checkpoint_says_what_was_evaluated(tiny_checkpoint, shapes, tmp_path):
    result = evaluate_checkpoint(
        tiny_checkpoint, task="vqa", data=shapes, split="val", limit=2, predictions=tmp_path / "p.jsonl"
    )
    source = {"checkpoint": str(tiny_checkpoint), "data": str(shapes), "split": "val", "limit": 2}
    assert result["source"] == {**source, "precision": "fp32", "frozenprefix": __version__}


def test_a_language_model_that_has_moved(tiny_checkpoint, sharp_lm, lm_of, shapes, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["language_model"]["path"] = config["language_model_location"] = str(tmp_path / "gone")
    (folder / "config.json").write_text(json.dumps(config))
    command = ["evaluate", folder, "--task", "vqa", "--data", shapes, "--limit", 2]
    missing = CliRunner().invoke(app, list(map(str, command)))
    assert (missing.exit_code, "language_model.path" in missing.output) == (2, True)
    found = CliRunner().invoke(app, [*map(str, command), "--language-model", str(sharp_lm)])
    assert (found.exit_code, "n = 4" in found.output) == (0, True)
    other = CliRunner().invoke(app, [*map(str, command), "--language-model", str(lm_of("qwen2"))])
    assert (other.exit_code, "this checkpoint was trained with" in other.output) == (2, True)


def test_unknown_tasks_and_options_are_refused(tiny_checkpoint, shapes, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown evaluation task 'vqaa' \(did you mean 'vqa'\?\)"):
        evaluate_checkpoint(tiny_checkpoint, task="vqaa", data=shapes)
    with pytest.raises(ConfigError, match="task 'vqa' has no option 'shots'; known: answering, candidates"):
        evaluate_checkpoint(tiny_checkpoint, task="vqa", data=shapes, predictions=tmp_path / "p.jsonl", shots=3)
    with pytest.raises(ConfigError, match="task 'caption' has no option 'answering'; known: metrics, clip_score"):
        evaluate_checkpoint(tiny_checkpoint, task="caption", data=shapes, answering="choose")


@pytest.mark.parametrize("task", ["classification", "fewshot", "retrieval"])
def test_beams_are_refused_where_nothing_is_searched_with_them(tiny_checkpoint, shapes, task):
    with pytest.raises(ConfigError, match=f"--beams: got 3, which has no effect on task '{task}'"):
        evaluate_checkpoint(tiny_checkpoint, task=task, data=shapes, num_beams=3)


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_is_there(name):
    task = TASKS.get(name)
    assert callable(task.run)
    assert callable(task.load)
