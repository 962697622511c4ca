"""Views of training images: which one is due, its features in the cache, and runs with it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from frozenprefix.data.augmentation import Augmentation, AugmentationOptions, View
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.training.caching import fill_cache
from frozenprefix.training.trainer import train
from tests.helpers.training import losses_of, started

ON = "data.augmentation={crops: 2, crop_size: 0.5}"


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides: tiny_recipe(folder, *overrides, lm=sharp_lm)


# ── views ──


def test_views_by_hand():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = Image.fromarray(pixels)
    whole, mirrored, first, second = AugmentationOptions(crop_size=0.5).views
    for view, expected in [
        (whole, pixels),
        (mirrored, pixels[:, ::-1]),
        (first, pixels[:2, :2]),
        (second, pixels[2:, 2:][:, ::-1]),
    ]:
        np.testing.assert_array_equal(np.asarray(view(image)), expected)


def test_a_crop_has_at_least_one_pixel():
    assert View("corner", (0.9, 0.9, 1.0, 1.0))(Image.new("RGB", (3, 2))).size == (1, 1)


def group_of(*texts: str) -> ImageGroup:
    return ImageGroup((), (Sample("1", (), texts),))


def test_over_the_epochs_all_views_come_equally_often():
    augmentation = Augmentation(AugmentationOptions(crop_size=0.8).views, None, None, seed=0)
    drawn = [augmentation.choose(group_of("a dog"), image=3, epoch=epoch) for epoch in range(8)]
    assert Counter(drawn) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert drawn[:4] != drawn[4:], "else each text of the image would always come with the same view"
    orders = {tuple(augmentation.choose(group_of("a dog"), image=i, epoch=e) for e in range(4)) for i in range(20)}
    assert len(orders) > 5


@pytest.mark.parametrize(
    ("text", "mirrored"), [("a dog on the left", False), ("the leftovers", True), ("RIGHT", False)]
)
def test_an_image_whose_texts_name_sides_is_not_mirrored(text, mirrored):
    augmentation = Augmentation(AugmentationOptions(crop_size=0.8).views, None, None, seed=0)
    drawn = {augmentation.choose(group_of("a dog", text), image=0, epoch=epoch) for epoch in range(12)}
    assert any(augmentation.views[number].mirrored for number in drawn) == mirrored
    assert 0 in drawn


# ── runs ──


def test_cached_features_are_those_of_the_view(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path, ON))
    augmentation, encoder = trainer.augmentation, trainer.model.vision_encoder
    live = Augmentation(augmentation.views, None, augmentation.image_processor, augmentation.seed)
    turns = [(epoch, number, group) for epoch in range(4) for number, group in enumerate(trainer.train_groups[:3])]
    with torch.no_grad():
        expected = encoder(live.inputs(turns)["pixel_values"]).float()
    torch.testing.assert_close(augmentation.inputs(turns)["image_features"], expected, rtol=2e-3, atol=2e-3)
    whole = trainer.collator.image_inputs([path for _, _, group in turns for path in group.images])
    assert (whole["image_features"] - expected).abs().max() > 0.01


def test_the_second_run_encodes_nothing(recipe_of, tmp_path, monkeypatch):
    cache = f"data.feature_cache={tmp_path / 'cache'}"
    train(recipe_of(tmp_path / "one", ON, cache, "training.max_steps=2"))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == [
        "crop-1-of-0.5",
        "crop-2-of-0.5-mirrored",
        "mirrored",
    ]
    monkeypatch.setattr("frozenprefix.data.image_encoder.ImageEncoder.encode", None)
    assert train(recipe_of(tmp_path / "two", ON, cache, "training.max_steps=2")).steps == 2


def test_the_cache_of_a_recipe_has_all_views_and_is_repaired_as_a_whole(recipe_of, tmp_path):
    filled, whole = (
        fill_cache(recipe_of(tmp_path, *on, f"data.feature_cache={tmp_path / name}"))
        for name, on in [("views", [ON]), ("plain", [])]
    )
    assert filled.encoded == whole.encoded + 3 * 8
    assert filled.bytes > 2 * whole.bytes
    shard = next((filled.folder / "mirrored").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 4])
    again = fill_cache(recipe_of(tmp_path, ON, f"data.feature_cache={tmp_path / 'views'}"), repair=True)
    assert 0 < again.encoded <= 8


def test_cached_and_decoded_views_train_alike(recipe_of, tmp_path):
    options = (ON, "training.max_steps=4")
    train(recipe_of(tmp_path / "cached", *options))
    train(recipe_of(tmp_path / "decoded", *options, "data.feature_cache=off", "data.workers=0"))
    train(recipe_of(tmp_path / "whole", "training.max_steps=4"))
    cached, decoded, whole = (losses_of(tmp_path / name) for name in ("cached", "decoded", "whole"))
    # float16 in the cache: the difference grows with the steps
    assert cached[:2] == pytest.approx(decoded[:2], rel=2e-3)
    assert cached == pytest.approx(decoded, rel=1e-2)
    assert cached != whole


def test_a_resumed_run_sees_the_views_that_were_due(recipe_of, tmp_path):
    options = (ON, "training.schedule=constant", "training.warmup_steps=0")
    train(recipe_of(tmp_path / "whole", *options, "training.max_steps=6"))
    train(recipe_of(tmp_path / "halves", *options, "training.max_steps=3"))
    train(recipe_of(tmp_path / "halves", *options, "training.max_steps=6"))
    assert losses_of(tmp_path / "halves") == losses_of(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"data\.augmentation"):
        train(recipe_of(tmp_path / "halves", *options[1:], "training.max_steps=7"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.augmentation={flip: false, crops: 0}"], r"data\.augmentation\.crops: got no flip and 0 crops"),
        (["data.augmentation={crops: 9}"], r"data\.augmentation\.crops: got 9"),
        ([ON, "data.train.0.weight=1"], r"data\.augmentation.*needs all samples in one list"),
    ],
)
def test_wrong_sections(recipe_of, tmp_path, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        recipe_of(tmp_path, *overrides)


def test_plan_counts_the_views(recipe_of, tmp_path):
    from frozenprefix.planning import plan

    cache = f"data.feature_cache={tmp_path / 'cache'}"
    plain, augmented = (plan(recipe_of(tmp_path, *on, cache), [], calibrate=0) for on in ([], [ON]))
    assert augmented.images["all"] == plain.images["all"] + 3 * plain.images["train"]
    assert augmented.images["cached"] == 0
    assert augmented.cache_bytes > 2 * plain.cache_bytes
    assert len(AugmentationOptions().views) == 4
