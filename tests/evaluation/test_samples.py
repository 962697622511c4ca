"""What a checkpoint is evaluated on when no folder is named: the validation data of its own recipe."""

from __future__ import annotations

import json
import shutil

import pytest

from frozenprefix.data.sources import load_source
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.evaluation.samples import recipe_samples


@pytest.fixture
def checkpoint(tiny_checkpoint, tiny_recipe, shapes, tmp_path):
    """A checkpoint whose recipe holds out images of one file, which no folder and split name."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "best")
    questions = {"type": "qa", "path": str(shapes), "split": "train"}
    held_out = {"fraction": 0.3, "seed": 0}
    data = {
        "train": [
            {**questions, "holdout": {"part": "train", **held_out}},
            {"type": "captions", "path": str(shapes), "split": "train"},
        ],
        "validation": [
            {**questions, "holdout": {"part": "val", **held_out}},
            {"type": "captions", "path": str(shapes), "split": "val"},
        ],
    }
    overrides = [f"data.{part}={json.dumps(sources)}" for part, sources in data.items()]
    (folder / "recipe.yaml").write_text(tiny_recipe(folder, *overrides).to_yaml())
    return folder


def test_the_recipes_validation_data_are_evaluated(checkpoint, shapes):
    result = evaluate_checkpoint(checkpoint, task="vqa")
    source = {"type": "qa", "path": str(shapes), "split": "train"}
    wanted = load_source({**source, "holdout": {"part": "val", "fraction": 0.3, "seed": 0}})
    everything = load_source(source)
    file = checkpoint / "predictions_vqa_recipe_validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert 0 < len(wanted) < len(everything)
    assert [row["id"] for row in rows] == [sample.id for sample in wanted]
    assert (result["source"]["data"], result["predictions"]) == (None, str(file))


def test_the_recipes_training_data_serve_the_consensus(checkpoint):
    result = evaluate_checkpoint(checkpoint, task="caption", limit=2, num_beams=1)
    assert result["n"] == 2
    assert set(result["baselines"]) == {"blind", "shuffled", "consensus", "ridge"}


def test_the_limit_counts_images_of_all_sources(checkpoint):
    some = recipe_samples(checkpoint, "vqa", "validation", limit=2)
    everything = recipe_samples(checkpoint, "vqa", "validation")
    assert len({sample.images for sample in some}) == 2
    assert some == everything[: len(some)]


def test_a_split_without_a_folder_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="--split: got 'val' without --data"):
        evaluate_checkpoint(checkpoint, task="vqa", split="val")


def test_a_checkpoint_without_validation_data_needs_a_folder(checkpoint, tiny_recipe):
    (checkpoint / "recipe.yaml").write_text(tiny_recipe(checkpoint, "data.validation=[]").to_yaml())
    with pytest.raises(ConfigError, match=r"has a recipe without data\.validation; give a folder of data"):
        evaluate_checkpoint(checkpoint, task="vqa")
    (checkpoint / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match=r"--data: missing, and .* holds no recipe\.yaml"):
        evaluate_checkpoint(checkpoint, task="vqa")


def test_a_recipe_without_the_task_is_an_error(checkpoint):
    with pytest.raises(DataError, match=r"the recipe of .* names no classification samples for validation"):
        evaluate_checkpoint(checkpoint, task="classification")


def test_a_data_section_that_is_no_block_is_refused(checkpoint):
    (checkpoint / "recipe.yaml").write_text("data: [1]\n")
    with pytest.raises(ConfigError, match=r"data: got \[1\], expected a block of keys"):
        evaluate_checkpoint(checkpoint, task="vqa")


def test_the_recipe_holds_the_defaults(checkpoint, tiny_recipe):
    changes = ("evaluation.num_beams=2", "evaluation.max_new_tokens=3", "evaluation.limit=2")
    recipe = tiny_recipe(checkpoint, *changes)
    (checkpoint / "recipe.yaml").write_text(recipe.to_yaml())
    result = evaluate_checkpoint(checkpoint, task="caption")
    assert result["settings"].items() >= {"num_beams": 2, "max_new_tokens": 3}.items()
    assert (result["n"], result["source"]["limit"]) == (2, 2)
    result = evaluate_checkpoint(checkpoint, task="caption", num_beams=1, restart=True)
    assert result["settings"]["num_beams"] == 1
