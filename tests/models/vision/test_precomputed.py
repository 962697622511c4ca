"""Features from a file in the place of an encoder: keys, shapes, and the way through a whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frozenprefix.config import recipe_from_dict
from frozenprefix.data.features import FeatureStorage, ImageFeatures
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision.precomputed import FeatureTable
from frozenprefix.planning.plan import plan
from frozenprefix.training.caching import fill_cache
from frozenprefix.training.trainer import train
from tests.helpers.recipes import tiny_recipe_dict


def region(value: float, tokens: int = 2, dim: int = 3) -> torch.Tensor:
    return torch.arange(tokens * dim).view(tokens, dim).float() + value


def write_npy(folder, features, keys):
    np.save(folder / "table.npy", features)
    (folder / "table.json").write_text(json.dumps(keys))
    return folder / "table.npy"


# ── the table ──


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_both_kinds_of_file_give_the_arrays_by_image(tmp_path, kind):
    features = {"a.jpg": region(0), "b": region(100)}
    if kind == "npy":
        path = write_npy(tmp_path, torch.stack(list(features.values())).half().numpy(), list(features))
    else:
        path = tmp_path / "table.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in features.items()}, path)
    table = FeatureTable(path)
    assert (len(table), table.tokens, table.dim) == (2, 2, 3)
    keys = table.keys_of(["/images/b.png", "/images/a.jpg"])
    assert keys == ["b", "a.jpg"]
    found = table.get(keys)
    assert found.dtype == np.float32
    assert found[:, 0].tolist() == [[100, 101, 102], [0, 1, 2]]
    assert torch.equal(table.features(["/images/a.jpg"]), region(0)[None])


def test_the_longest_end_of_the_path_is_the_key(tmp_path):
    names = ["cat", "cat.v2", "img/cat", "train/img/cat.png"]
    path = tmp_path / "t.safetensors"
    save_file({name: region(i) for i, name in enumerate(names)}, path)
    table = FeatureTable(path)
    wanted = {
        "/x/cat.jpg": "cat",
        "/x/cat.v2.jpg": "cat.v2",
        "/x/img/cat.png": "img/cat",
        "/x/train/img/cat.png": "train/img/cat.png",
    }
    assert {name: table.key_of(name) for name in wanted} == wanted


def test_missing_images_are_listed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({f"{i}.jpg": region(i) for i in range(9)}, path)
    with pytest.raises(DataError) as caught:
        FeatureTable(path).keys_of(["/p/1.jpg", "/p/a.jpg", "/p/b.jpg", "/p/c.jpg", "/p/d.jpg"])
    assert str(caught.value) == (
        "model.vision_encoder.path: t.safetensors has no features for 4 of 5 images (/p/a.jpg, /p/b.jpg, /p/c.jpg); "
        "expected the end of a path as its key, but the keys are '0.jpg', '1.jpg', '2.jpg', …"
    )


def test_a_key_that_stands_for_two_images_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": region(0)}, path)
    table = FeatureTable(path)
    assert table.keys_of(["/p/a.jpg", "/p/a.jpg"]) == ["a", "a"]
    with pytest.raises(DataError, match=r"the key 'a' stands for /p/a.jpg and /q/a.jpg; put folders into the keys"):
        table.key_of("/q/a.jpg")


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_file({"a": region(0), "b": region(0, tokens=5)}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=r"shape \(2, 3\), \(5, 3\), expected one shape \(N, D\) for all"):
        FeatureTable(tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=r"arrays of shape \(3,\), expected one shape"):
        FeatureTable(write_npy(tmp_path, np.zeros((4, 3)), list("abcd")))
    with pytest.raises(ConfigError, match=r"table.json holds 3 entries, expected a list of 4 different keys"):
        FeatureTable(write_npy(tmp_path, np.zeros((4, 2, 3)), list("abc")))
    with pytest.raises(ConfigError, match=r"keys: '.*none.json' cannot be read as a JSON list"):
        FeatureTable(tmp_path / "table.npy", tmp_path / "none.json")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"objects.npy' cannot be read"):
        FeatureTable(tmp_path / "objects.npy")
    with pytest.raises(ConfigError, match=r"got 'table.json', expected a .safetensors or .npy file"):
        FeatureTable(tmp_path / "table.json")


def test_options_of_networks_have_no_effect(tiny_recipe, tmp_path):
    encoder = "{source: features, grid: 2, trainable: all}"
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(tmp_path, f"model.vision_encoder={encoder}")
    assert caught.value.problems == [
        "model.vision_encoder.path: missing, expected .safetensors or .npy file of float[N, D] per image",
        "model.vision_encoder.grid: got 2, which has no effect with source 'features'; remove it",
        "model.vision_encoder.trainable: got 'all', which has no effect with source 'features'; remove it",
    ]


# ── a run ──


@pytest.fixture
def given(tiny_lm, shapes, tmp_path):
    """A recipe over regions of the drawings, by their names without suffix."""
    draw = torch.Generator().manual_seed(0)
    stems = [image.stem for image in sorted((shapes / "images").iterdir())]
    save_file({stem: torch.randn(4, 6, generator=draw) for stem in stems}, tmp_path / "regions.safetensors")
    data = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")
    data["model"]["vision_encoder"] = {"source": "features", "path": str(tmp_path / "regions.safetensors")}
    return recipe_from_dict(data)


def test_a_run_reads_features_by_image(given, shapes, tmp_path):
    train(given)
    folder = tmp_path / "run" / "best"
    assert json.loads((folder / "config.json").read_text())["identity"]["vision_encoder"] == {
        "source": "features",
        "num_tokens": "4",
        "encoder_dim": "6",
    }
    captioner = Captioner.from_pretrained(folder)
    path = shapes / "images" / "red_circle.png"
    caption = next(captioner.caption([path], num_beams=1, max_new_tokens=5))
    features = FeatureTable(tmp_path / "regions.safetensors").features([path])
    prompt = captioner.processor.prompt_for("caption")
    expected = captioner.generate([prompt], features, num_beams=1, max_new_tokens=5)[0]
    assert (caption.text, caption.score) == (expected.text, pytest.approx(expected.score))
    captioner.answer(path, "what color is this?")
    with pytest.raises(ConfigError, match=r"source 'features' has no network for pixel_values; give image_features"):
        captioner.model(input_ids=torch.tensor([[5]]), pixel_values=torch.zeros(1, 3, 8, 8))
    found = ImageFeatures.from_encoder(captioner.encoder, [path], FeatureStorage())
    assert torch.equal(found([path]), features)


def test_features_of_other_images_may_lie_in_another_file(given, tmp_path):
    train(given)
    folder = tmp_path / "run" / "best"
    config = json.loads((folder / "config.json").read_text())
    config["vision_encoder"]["path"] = str(tmp_path / "new.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"if you changed the file yourself, remove sums\.json"):
        FrozenPrefixForConditionalGeneration.from_pretrained(folder)
    (folder / "sums.json").unlink()
    save_file({"new": torch.randn(4, 6)}, tmp_path / "new.safetensors")
    captioner = Captioner(
        FrozenPrefixForConditionalGeneration.from_pretrained(folder), FrozenPrefixProcessor.from_pretrained(folder)
    )
    assert len(list(captioner.caption(["/p/new.jpg"], num_beams=1, max_new_tokens=3))) == 1
    save_file({"new": torch.randn(5, 6)}, tmp_path / "new.safetensors")
    with pytest.raises(CheckpointError, match="num_tokens='4', but got num_tokens='5'"):
        FrozenPrefixForConditionalGeneration.from_pretrained(folder)


def test_images_without_features_stop_the_run(given, tmp_path):
    save_file({"red_circle": torch.randn(4, 6)}, tmp_path / "regions.safetensors")
    with pytest.raises(DataError, match=r"regions.safetensors has no features for 11 of 12 images"):
        train(given)


def test_there_is_nothing_to_encode_ahead(given):
    made = plan(given, ["cpu"], calibrate=0)
    assert (made.encoder_flops, made.machines["cpu"].seconds_to_encode < 1) == (0, True)
    with pytest.raises(ConfigError, match="got 'features': precomputed features need no encoding"):
        fill_cache(given)
