"""Corrections are a data source of `train`, and a training on them starts from the checkpoint."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest

from frozenprefix.config import load_checkpoint_recipe
from frozenprefix.data.sources import load_source
from frozenprefix.demo import Corrections, Retraining, correction_recipe
from frozenprefix.demo.retraining import replays
from frozenprefix.errors import BadImageError, ConfigError, DataError, TrainingError


@pytest.fixture
def corrections(tmp_path, photo) -> Corrections:
    made = Corrections(tmp_path / "corrections")
    made.add(photo, "a blue cross", "a red circle")
    return made


def test_train_reads_them(corrections, photo):
    (sample,) = load_source({"type": "captions", "path": str(corrections.folder), "split": "train"})
    assert sample.targets == ("a red circle",)
    assert sample.images[0].read_bytes() == photo.read_bytes()
    assert [(one.wrong, one.right) for one in Corrections(corrections.folder)] == [("a blue cross", "a red circle")]


def test_a_later_correction_of_a_photo_replaces_the_first(corrections, photo, shapes):
    corrections.add(shapes / "images" / "blue_cross.png", "a dog", "a blue cross")
    corrections.add(photo, "a red circle", " a  round\nthing ")
    assert [one.right for one in corrections] == ["a blue cross", "a round thing"]
    assert len(list((corrections.folder / "images").iterdir())) == 2


@pytest.mark.parametrize(
    ("right", "message"),
    [
        (" ", "got 0 letters"),
        ("x" * 501, "got 501 letters"),
        ("a blue  cross", "got the caption that is there already"),
    ],
)
def test_texts_that_are_none(corrections, photo, right, message):
    with pytest.raises(ConfigError, match=f"correction: {message}"):
        corrections.add(photo, "a blue cross", right)
    assert len(corrections) == 1


def test_nothing_is_kept_of_a_photo_that_is_gone(tmp_path):
    made = Corrections(tmp_path / "corrections")
    with pytest.raises(BadImageError, match=r"gone\.jpg"):
        made.add(tmp_path / "gone.jpg", "a", "b")
    assert not made.folder.exists()


def test_the_captions_of_someone_else_are_not_touched(shapes, tmp_path):
    with pytest.raises(DataError, match=r"--corrections: .* was not written by this command"):
        Corrections(shapes)


def test_many_users_at_once(tmp_path, shapes):
    folder, photos = tmp_path / "corrections", sorted((shapes / "images").iterdir())
    threads = [
        threading.Thread(target=lambda photo=photo: Corrections(folder).add(photo, "wrong", f"a {photo.stem}"))
        for photo in photos
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.right for one in Corrections(folder)) == sorted(f"a {photo.stem}" for photo in photos)


# ── training ──


def test_a_recipe_mixes_corrections_with_what_was_learned(run_checkpoint, corrections, tmp_path):
    first = load_checkpoint_recipe(run_checkpoint)
    recipe = correction_recipe(run_checkpoint, corrections, tmp_path / "out", steps=10)
    assert [round(source["weight"], 3) for source in recipe.data.train] == [0.3, 0.3, 0.4]
    assert recipe.model == first.model
    assert recipe.training.learning_rate == pytest.approx(0.3 * first.training.learning_rate)
    assert recipe.training.init_from == str(run_checkpoint)
    assert replays(recipe)


def test_without_the_first_images_only_corrections_are_left(run_checkpoint, corrections, tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    text = (run_checkpoint / "recipe.yaml").read_text()
    values = json.dumps(load_checkpoint_recipe(run_checkpoint).model_dump(mode="json"))
    path = load_checkpoint_recipe(run_checkpoint).data.train[0]["path"]
    assert path in text
    (folder / "recipe.yaml").write_text(values.replace(path, "/nowhere"))
    recipe = correction_recipe(folder, corrections, tmp_path / "out", steps=10)
    assert [source["path"] for source in recipe.data.train] == [str(corrections.folder)]
    assert not replays(recipe)
    assert recipe.data.validation == []


def test_what_cannot_be_gone_on_with(tiny_checkpoint, run_checkpoint, corrections, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        correction_recipe(tiny_checkpoint, corrections, tmp_path / "out", steps=10)
    with pytest.raises(ConfigError, match="corrections: got none"):
        correction_recipe(run_checkpoint, Corrections(tmp_path / "none"), tmp_path / "out", steps=10)


def test_a_training_that_is_stopped_or_fails_says_so(run_checkpoint, corrections, tmp_path):
    recipe = correction_recipe(run_checkpoint, corrections, tmp_path / "out", steps=100_000)
    training = Retraining(recipe)
    lines = training.run()
    assert next(lines)
    training.stop()
    with pytest.raises(TrainingError, match="was stopped; the mapper is as it was"):
        list(lines)
    (corrections.folder / "captions.jsonl").write_text("no JSON\n")
    with pytest.raises(TrainingError, match=r"the training failed: .*captions\.jsonl"):
        list(Retraining(recipe.model_copy(update={"output_dir": str(tmp_path / "again")})).run())


def test_a_closed_page_ends_its_training(run_checkpoint, corrections, tmp_path):
    training = Retraining(correction_recipe(run_checkpoint, corrections, tmp_path / "out", steps=100_000))
    lines = training.run()
    next(lines)
    process = training._process
    lines.close()
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)
