"""`frozenprefix cache`: every image once, resumable, by several processes, and read by training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.config import write_yaml
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.features import feature_folder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.errors import CacheError, ConfigError, DataError
from frozenprefix.training.caching import fill_cache, folder_bytes
from frozenprefix.training.setup import load_parts, prepare_images
from tests.helpers.contrastive import contrastive_recipe
from tests.helpers.drawings import write_shapes
from tests.helpers.processes import fake_process, replace_gathering
from tests.helpers.recipes import tiny_recipe_dict


@pytest.fixture(scope="module")
def encoder(tiny_recipe, tmp_path_factory) -> ImageEncoder:
    return ImageEncoder.from_config(tiny_recipe(tmp_path_factory.mktemp("run")).model.vision_encoder)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_shapes(tmp_path / "shapes")


def test_the_command_says_what_it_did_and_does_it_once(tiny_lm, data, tmp_path):
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "features"
    recipe.write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), data, tmp_path / "run")))
    command = ["cache", str(recipe), f"data.feature_cache={folder}"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert f"folder: {folder}\n" in first.stdout
    assert "images: 12, 12 encoded now in " in first.stdout
    assert "features: 12 x 4 x 64 float16, " in first.stdout
    assert "bad images: none\n" in first.stdout
    second = CliRunner().invoke(app, command)
    assert "images: 12, 0 encoded now\n" in second.stdout
    assert not (tmp_path / "run").exists()


def test_repair_encodes_again_what_is_damaged(tiny_lm, data, tmp_path):
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "features"
    recipe.write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), data, tmp_path / "run")))
    command = ["cache", str(recipe), f"data.feature_cache={folder}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (shard,) = folder.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:4000])
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "frozenprefix cache RECIPE --repair" in refused.output
    repaired = CliRunner().invoke(app, [*command, "--repair"])
    assert repaired.exit_code == 0, repaired.output
    assert "images: 12, 12 encoded now" in repaired.stdout
    FeatureCache.open(folder).verify()


def test_training_reads_what_the_command_wrote(tiny_recipe, data, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={tmp_path / 'features'}", data=data)
    filled = fill_cache(recipe)
    assert (filled.encoded, filled.features, filled.shape) == (12, 12, (4, 64))
    assert filled.bytes == folder_bytes(filled.folder) > 12 * 4 * 64 * 2
    from frozenprefix.training.trainer import Trainer

    trainer = Trainer(recipe)
    trainer.build_model()
    monkeypatch.setattr(ImageEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    trainer.prepare_data()
    assert trainer.collator.features is not None
    assert trainer.collator.features.folder == filled.folder
    assert len(trainer.train_groups) == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_features_are_stored_as_the_recipe_says(tiny_recipe, data, tmp_path, dtype):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_dtype={dtype}", data=data)
    filled = fill_cache(recipe)
    assert filled.dtype == dtype
    assert filled.folder.name.endswith(f"-{dtype}")
    assert FeatureCache.open(filled.folder).manifest.dtype == dtype


def test_another_dtype_in_the_folder_is_refused(tiny_recipe, data, tmp_path):
    here = f"data.feature_cache={tmp_path / 'features'}"
    fill_cache(tiny_recipe(tmp_path / "run", here, data=data))
    with pytest.raises(CacheError, match="storage dtype differs: the cache has float16, expected int8"):
        fill_cache(tiny_recipe(tmp_path / "run", here, "data.feature_dtype=int8", data=data))


def test_another_encoder_in_the_folder_is_refused(tiny_recipe, data, tmp_path):
    here = f"data.feature_cache={tmp_path / 'features'}"
    fill_cache(tiny_recipe(tmp_path / "run", here, data=data))
    with pytest.raises(CacheError, match=r"fingerprint field 'encoder.output' differs"):
        fill_cache(
            tiny_recipe(
                tmp_path / "run", here, "model.vision_encoder.output=pooled", "model.mapper.tokens=per_token", data=data
            )
        )


def test_no_cache_is_an_error(tiny_recipe, data, tmp_path):
    with pytest.raises(ConfigError, match=r"data.feature_cache: got 'off', expected 'auto' or a folder"):
        fill_cache(tiny_recipe(tmp_path, "data.feature_cache=off", data=data))


def test_a_dtype_without_a_cache_is_refused(tiny_recipe, data, tmp_path):
    with pytest.raises(ConfigError, match=r"data.feature_dtype: got 'int8', which has no effect"):
        tiny_recipe(tmp_path, "data.feature_cache=off", "data.feature_dtype=int8", data=data)


def test_bad_images_are_listed(tiny_recipe, data, tmp_path):
    (data / "images" / "red_circle.png").write_bytes(b"no image")
    here = f"data.feature_cache={tmp_path / 'features'}"
    with pytest.raises(DataError, match=r"1 of 12 images are bad \(1 not_an_image\)"):
        fill_cache(tiny_recipe(tmp_path / "run", here, data=data))
    filled = fill_cache(tiny_recipe(tmp_path / "run", here, "data.max_bad_share=0.2", data=data))
    assert (filled.images, filled.features, len(filled.bad)) == (12, 11, 1)
    assert json.loads(filled.bad_list.read_text())["reason"] == "not_an_image"


@pytest.mark.parametrize("cache", ["features", "off"])
def test_processes_share_the_images_and_agree_on_the_bad_ones(encoder, tiny_recipe, data, tmp_path, cache, monkeypatch):
    bad_path = data / "images" / "red_circle.png"
    bad_path.write_bytes(b"no image")
    folder = cache if cache == "off" else tmp_path / cache
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={folder}", "data.max_bad_share=0.5", data=data)
    samples = load_parts(recipe.data)
    told: dict[int, list[list]] = {0: [], 1: []}

    def run(rank: int, others: list[list]):
        """Gathering gives what the other process gave in its own run."""

        def gather(mine: list) -> list:
            told[rank].append(mine)
            return [*mine, *(others[len(told[rank]) - 1] if others else [])]

        replace_gathering(monkeypatch, gather)
        return prepare_images(encoder, samples, recipe.data, processes=fake_process(rank, 2))

    run(1, [])  # fills its share, so that the other one finds the cache complete
    first = list(told[1])
    prepared = run(0, first)
    kept = [path for groups in prepared.groups.values() for group in groups for path in group.images]
    assert len(kept) == 11
    assert bad_path in prepared.bad
    assert bad_path not in kept
    if cache != "off":
        assert prepared.encoded == 11
        assert [len(told[0][1]), told[0][1][0] + first[1][0]] == [1, 11]
        assert min(told[0][1][0], first[1][0]) >= 5
        assert {path.name[:12] for path in (tmp_path / cache).glob("*.tar")} == {"features-r00", "features-r01"}
    told[1].clear()
    assert bad_path in run(1, list(told[0])).bad


def test_auto_folders_differ_by_encoder_and_dtype(encoder, tiny_recipe, tmp_path):
    def folder(*overrides: str) -> Path:
        recipe = tiny_recipe(tmp_path, *overrides)
        built = ImageEncoder.from_config(recipe.model.vision_encoder)
        return feature_folder(recipe.data.feature_storage, built.fingerprint)

    folders = [folder(), folder("data.feature_dtype=int8"), folder("model.vision_encoder.grid=1")]
    assert len(set(folders)) == 3
    assert folder() == folders[0] == feature_folder(tiny_recipe(tmp_path).data.feature_storage, encoder.fingerprint)
    assert folder(f"data.feature_cache={tmp_path}") == tmp_path


def test_a_contrastive_recipe_is_encoded_too(tiny_bert, data, tmp_path):
    file = tmp_path / "lit.yaml"
    file.write_text(contrastive_recipe(tiny_bert, data, tmp_path / "run").to_yaml())
    done = CliRunner().invoke(app, ["cache", str(file), f"data.feature_cache={tmp_path / 'features'}"])
    assert done.exit_code == 0, done.output
    assert "images: 12, 12 encoded now" in done.stdout
    assert "features: 12 x 1 x 64 float16, " in done.stdout
