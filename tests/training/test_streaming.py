"""Training from shards: the same steps however a run is cut up, and what is left out is counted."""

from __future__ import annotations

import json
import logging

import pytest

from frozenprefix.config import recipe_from_dict
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.planning import plan
from frozenprefix.training import Trainer, fill_cache, train
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.shards import streamed, tiny_png, write_shards, write_tar
from tests.helpers.training import assert_same_tensors, losses_of, run_python


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 3, 7, 1, 9])


@pytest.fixture
def recipe_of(tiny_lm, shapes, shards):
    def make(folder, *overrides, train=None, **data):
        raw = tiny_recipe_dict(tiny_lm("llama"), shapes, folder)
        raw["data"] |= {"train": train or [streamed(shards, shuffle_images=8)], "feature_cache": "off", **data}
        return recipe_from_dict(raw, ["model.mapper.dropout=0.2", "training.save_every=1", *overrides])

    return make


def ids_of(trainer, steps: int) -> list[list[str]]:
    """Ids of the samples of each step, over all parts."""
    trainer.batches()
    return [sorted(trainer.steps.ids_of(step)) for step in range(steps)]


def test_a_streamed_run_is_the_same_when_it_is_cut_up_and_with_workers(recipe_of, tmp_path):
    whole = train(recipe_of(tmp_path / "whole"))
    assert whole.targets_seen == 6 * 4 * 2
    for number, workers in ((2, 0), (4, 2), (6, 1)):
        overrides = ["training.schedule=constant"] if number == 0 else []
        trainer = Trainer(recipe_of(tmp_path / "cut", *overrides, workers=workers))
        trainer.setup()
        take = trainer.step

        def step(batches, trainer=trainer, take=take, last=number):
            if trainer.progress.step == last:
                raise KeyboardInterrupt
            return take(batches)

        trainer.step = step
        if number < 6:
            with pytest.raises(KeyboardInterrupt):
                trainer.run("auto")
        else:
            trainer.run("auto")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(whole.output_dir / "last" / name, tmp_path / "cut" / "last" / name)


def test_every_image_is_seen_once_an_epoch(recipe_of, tmp_path):
    trainer = Trainer(recipe_of(tmp_path, "training.max_steps=null", "training.epochs=2", "training.images_per_step=5"))
    trainer.setup()
    assert trainer.total_steps == 10
    steps = ids_of(trainer, 10)
    for epoch in (steps[:5], steps[5:]):
        names = [name for ids in epoch for name in ids]
        assert len(names) == len(set(names)) == 25


@pytest.mark.slow
def test_two_processes_take_the_samples_of_one(recipe_of, tmp_path):
    train(recipe_of(tmp_path / "one", "model.mapper.dropout=0"))
    recipe = recipe_of(tmp_path / "two", "model.mapper.dropout=0")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_python(*launcher, "recipes/train.py", str(tmp_path / "recipe.yaml"))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)


def test_other_shards_are_not_resumed(recipe_of, shards, tmp_path):
    folder = tmp_path / "shards"
    for tar in shards.glob("*.tar"):
        (folder / tar.name).parent.mkdir(exist_ok=True)
        (folder / tar.name).write_bytes(tar.read_bytes())
    train(recipe_of(tmp_path / "run", train=[streamed(folder)]))
    write_tar(folder / "00003.tar", {"a.png": tiny_png(1), "a.json": b'{"captions": ["a dog"]}'})
    with pytest.raises(CheckpointError, match="other data"):
        train(recipe_of(tmp_path / "run", "training.max_steps=7", train=[streamed(folder)]))


def test_bad_samples_are_left_out_counted_and_listed(recipe_of, tmp_path, caplog):
    members = {}
    for number in range(8):
        members[f"{number}.png"] = tiny_png(number) if number not in (2, 5) else b"no image"
        members[f"{number}.json"] = json.dumps({"captions": [f"a dog {number}" if number != 3 else " "]}).encode()
    write_tar(tmp_path / "shards" / "0.tar", members)
    source = streamed(tmp_path / "shards")
    with caplog.at_level(logging.WARNING):
        result = train(recipe_of(tmp_path / "run", "training.max_steps=2", train=[source]))
    assert result.steps == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in rows) == ["no target", "not_an_image", "not_an_image"]
    assert result.targets_seen == 5
    assert caplog.text.count("images are left out") == 2
    assert "no known image format" in caplog.text
    with pytest.raises(DataError, match="max_bad_share"):
        train(recipe_of(tmp_path / "strict", train=[source], max_bad_share=0.0))
    one = write_tar(tmp_path / "none" / "0.tar", {"a.png": b"x", "a.json": b'{"captions": ["a"]}'}).parent
    with pytest.raises(DataError, match="not one image of a micro-batch"):
        train(recipe_of(tmp_path / "none_run", train=[streamed(one)]))


def test_sources_are_mixed_by_weight(recipe_of, shapes, shards, tmp_path):
    listed = {"type": "captions", "path": str(shapes), "split": "train", "weight": 0.75}
    trainer = Trainer(recipe_of(tmp_path, train=[listed, streamed(shards, weight=0.25)]))
    trainer.setup()
    names = [name for ids in ids_of(trainer, 6) for name in ids]
    assert len(names) == 24
    assert sum("/images/" in name or name.startswith("images/") for name in names) > 12
    assert trainer.step(trainer.batches())["targets"] == 8


def test_lists_are_mixed_by_weight_with_their_features_cached(recipe_of, shapes, tmp_path):
    sources = [
        {"type": kind, "path": str(shapes), "split": "train", "name": kind, "weight": weight}
        for kind, weight in (("captions", 9.0), ("qa", 1.0))
    ]
    trainer = Trainer(recipe_of(tmp_path / "run", train=sources, feature_cache=str(tmp_path / "features")))
    trainer.setup()
    drawn = [trainer.stream.order.at(place)[1] for place in range(1000)]
    assert sum(image < 8 for image in drawn) == 900
    assert trainer.step(trainer.batches())["loss"] > 0


def test_a_streamed_run_is_planned_from_its_first_images(recipe_of, shards, tmp_path):
    made = plan(recipe_of(tmp_path, "training.max_steps=null", "training.epochs=2"), ["h100"], calibrate=0)
    assert made.images["train"] == 25
    assert made.machines["h100"].steps == 13
    with pytest.raises(ConfigError, match="data build"):
        fill_cache(recipe_of(tmp_path, feature_cache="auto"))


def test_what_does_not_fit_is_said_before_anything_is_read(recipe_of, shapes, shards, tmp_path):
    listed = {"type": "captions", "path": str(shapes)}
    with pytest.raises(ConfigError, match=r"data\.train\.0\.weight: missing"):
        recipe_of(tmp_path, train=[listed, streamed(shards, weight=1.0)])
    with pytest.raises(ConfigError, match=r"data\.validation\.0\.stream"):
        recipe_of(tmp_path, validation=[streamed(shards)])
    with pytest.raises(ConfigError, match="self_critical"):
        recipe_of(tmp_path, "objectives.self_critical.weight=1.0")
    with pytest.raises(ConfigError, match=r"data\.feature_cache"):
        train(recipe_of(tmp_path, feature_cache=str(tmp_path / "cache")))
