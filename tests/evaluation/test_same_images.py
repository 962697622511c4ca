"""Rows that share an image are one image: the same captions give the same scores however the rows are cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import load_source
from frozenprefix.errors import DataError
from frozenprefix.evaluation import EvaluationOptions, evaluate_samples
from frozenprefix.evaluation.samples import join_captions
from frozenprefix.evaluation.tasks import evaluate_classification, evaluate_retrieval, evaluate_video, runs
from frozenprefix.training.objectives.self_critical import reward_references
from tests.helpers.answers import saying
from tests.helpers.data import rows_of
from tests.helpers.video import write_clip

SETTINGS = {"num_beams": 1, "max_new_tokens": 4}


def one_caption_a_row(samples):
    """The same data with a row for each caption."""
    return [
        replace(sample, id=f"{sample.id}#{number}", targets=(text,))
        for sample in samples
        for number, text in enumerate(sample.targets)
    ]


@pytest.fixture
def captions(shapes):
    samples = load_source({"type": "captions", "path": str(shapes), "split": "val"})
    assert all(len(sample.targets) > 1 for sample in samples)
    return samples


@pytest.fixture
def train(shapes):
    return load_source({"type": "captions", "path": str(shapes), "split": "train"})


def test_rows_of_one_image_are_scored_as_one(captioner, captions, train, tmp_path):
    whole = evaluate_samples(captioner, captions, predictions=tmp_path / "a.jsonl", train_samples=train, **SETTINGS)
    rows, train_rows = one_caption_a_row(captions), one_caption_a_row(train)
    cut = evaluate_samples(captioner, rows, predictions=tmp_path / "b.jsonl", train_samples=train_rows, **SETTINGS)
    assert (cut["n"], cut["metrics"], cut["baselines"]) == (whole["n"], whole["metrics"], whole["baselines"])
    assert [row["references"] for row in rows_of(tmp_path / "b.jsonl")] == [list(s.targets) for s in captions]


def test_rows_that_do_not_stand_together_and_own_prompts(captions):
    rows = one_caption_a_row(captions)
    joined = join_captions(rows[::2] + rows[1::2])
    assert {sample.images: set(sample.targets) for sample in joined} == {s.images: set(s.targets) for s in captions}
    own = [replace(rows[0], prompt="A photo of"), *rows[1:]]
    first, second = (sample for sample in join_captions(own) if sample.images == rows[0].images)
    assert (first.prompt, second.prompt) == ("A photo of", None)
    assert first.targets == second.targets == captions[0].targets, "references are the image's"


def test_clips(captioner, tmp_path, shapes):
    from frozenprefix.data.images import load_image
    from frozenprefix.data.samples import Sample

    drawn = [load_image(path) for path in sorted((shapes / "images").iterdir())[:2]]
    clips = [write_clip(tmp_path / f"{number}.mkv", [image], each=4) for number, image in enumerate(drawn)]
    samples = [Sample(str(i), (clip,), ("a red dog", "a dog sits")) for i, clip in enumerate(clips)]
    options = {"num_beams": 1, "max_new_tokens": 3, "extra": {"frames": 2}}
    whole = evaluate_video(captioner, samples, EvaluationOptions(tmp_path / "a.jsonl", **options))
    cut = evaluate_video(captioner, one_caption_a_row(samples), EvaluationOptions(tmp_path / "b.jsonl", **options))
    assert (cut["n"], cut["metrics"]) == (whole["n"], whole["metrics"]) == (2, whole["metrics"])


def test_rewards_have_all_references_of_an_image(captions):
    whole = reward_references(group_by_images(captions))
    cut = reward_references(group_by_images(one_caption_a_row(captions)))
    assert {key: [c.words for c in texts] for key, texts in cut.captions.items()} == {
        key: [c.words for c in texts] for key, texts in whole.captions.items()
    }


# ── samples without a target ──


def test_samples_without_a_target_are_left_out_and_counted(captioner, captions, tmp_path, caplog):
    spoiled = [
        replace(captions[0], targets=()),
        replace(captions[1], targets=("", captions[1].targets[0])),
        *captions[2:],
    ]
    result = evaluate_samples(captioner, spoiled, predictions=tmp_path / "p.jsonl", **SETTINGS)
    assert result["n"] == len(captions) - 1
    assert rows_of(tmp_path / "p.jsonl")[0]["references"] == [captions[1].targets[0]]
    assert any("1 of 4 samples are left out: no target 1" in message for message in caplog.messages)
    blank = [replace(sample, targets=(" ",)) for sample in captions[:2]]
    with pytest.raises(DataError, match="all of its 2 samples are left out"):
        evaluate_samples(captioner, blank, predictions=tmp_path / "q.jsonl", **SETTINGS)


def test_so_it_is_for_labels_and_retrieval(captioner, captions, colour_embedder, colour_images, tmp_path):
    labelled = [replace(s, task="classification", targets=(s.images[0].stem.split("_")[1],)) for s in captions]
    options = EvaluationOptions(tmp_path / "labels.jsonl")
    result = evaluate_classification(captioner, [*labelled[:-1], replace(labelled[-1], targets=())], options)
    assert result["n"] == len(labelled) - 1
    from frozenprefix.data.samples import Sample

    files = [colour_images / f"{colour}.png" for colour in ("red", "green", "blue")]
    rows = [Sample(file.stem, (file,), (file.stem if file.stem != "blue" else " ",)) for file in files]
    found = evaluate_retrieval(colour_embedder, rows, EvaluationOptions(tmp_path / "found.jsonl"))
    assert found["n"] == 2


# ── settings and names ──


def test_the_lms_own_generation_settings_are_named(captioner, captions, tmp_path):
    config = captioner.model.generation_config
    config.repetition_penalty = 1.7
    try:
        result = evaluate_samples(captioner, captions, predictions=tmp_path / "p.jsonl", **SETTINGS)
    finally:
        config.repetition_penalty = None
    assert result["settings"]["generation_config"] == {"repetition_penalty": 1.7}
    plain = evaluate_samples(captioner, captions, predictions=tmp_path / "q.jsonl", **SETTINGS)
    assert "generation_config" not in plain["settings"]


def test_two_data_sets_have_two_predictions_files(tiny_checkpoint, shapes, tmp_path, monkeypatch):
    import shutil

    from frozenprefix.evaluation import evaluate_checkpoint

    monkeypatch.setattr(runs, "predict", saying("a"))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    files = set()
    for name in ("one/shapes", "two/shapes", "other"):
        shutil.copytree(shapes, tmp_path / name)
        result = evaluate_checkpoint(checkpoint, task="vqa", data=tmp_path / name, split="val")
        files.add(result["predictions"])
    assert len(files) == 3
    assert sum("shapes" in file.rsplit("/", 1)[1] for file in files) == 2


def test_predictions_never_replace_data(captioner, questions, shapes, tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text((shapes / "qa.jsonl").read_text())
    with pytest.raises(DataError, match=r"--predictions: '.*qa.jsonl' exists and was not written by this command"):
        evaluate_samples(captioner, questions, predictions=file, **SETTINGS)
    assert file.read_text() == (shapes / "qa.jsonl").read_text()
    evaluate_samples(captioner, questions, predictions=file, force=True, **SETTINGS)
    assert "model" in json.loads(file.read_text().split("\n")[0])
    evaluate_samples(captioner, questions, predictions=file, **SETTINGS)  # its own


def test_texts_with_unicode_line_ends_can_be_compared(captioner, questions, tmp_path, monkeypatch):
    from frozenprefix.evaluation import Evaluation, compare

    monkeypatch.setattr(runs, "predict", saying("a\u2028b\x85c\x1ed"))
    results = []
    for name in ("a", "b"):
        result = evaluate_samples(captioner, questions, predictions=tmp_path / f"{name}.jsonl", **SETTINGS)
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        results.append(Evaluation.load(tmp_path / f"{name}.json"))
    assert compare(*results)["metrics"]["accuracy"]["difference"] == 0
    assert len(results[0].rows) == len(questions)
