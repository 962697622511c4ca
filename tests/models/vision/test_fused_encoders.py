"""Fused encoders: two networks that see the same images, their features side by side."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from frozenprefix.config import Recipe, recipe_from_dict
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.fused_encoder import FusedEncoder, PixelScale
from frozenprefix.models.vision.training import train_encoder
from frozenprefix.training.trainer import train
from tests.helpers.drawings import draw_shape
from tests.helpers.recipes import tiny_recipe_dict

VIT = {"source": "timm", "name": "test_vit", "weights": "random"}  # pixels scaled by mean 0.5
CNN = {"source": "timm", "name": "test_resnet", "weights": "random"}
LITE = {"source": "timm", "name": "test_efficientnet", "weights": "random"}


def build(*parts, **options):
    return build_vision_encoder(vision_encoder_config(source="fused", encoders=list(parts), **options))


def alone(part, **options):
    return build_vision_encoder(vision_encoder_config(**part, **options))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_tokens_of_both_encoders_lie_side_by_side_at_the_same_place():
    options = {"image_size": 64, "grid": 2, "resize": "squash"}
    both, one, other = build(VIT, CNN, **options), alone(VIT, **options), alone(CNN, **options)
    assert (both.module.num_tokens, both.module.encoder_dim) == (4, one.module.encoder_dim + other.module.encoder_dim)
    image = draw_shape("red", "cross").resize((64, 64))  # of the size wanted: they do not resize in the same way
    features = both.module(both.image_processor(image, return_tensors="pt")["pixel_values"])
    dim = one.module.encoder_dim
    for built, found in ((one, features[..., :dim]), (other, features[..., dim:])):
        expected = built.module(built.image_processor(image, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_part_sees_pixels_of_its_own_scale():
    both = build(VIT, CNN, image_size=64, grid=2)
    processors = [alone(part, image_size=64).image_processor for part in (VIT, CNN)]
    processors[1].image_mean, processors[1].image_std = [0.2, 0.3, 0.4], [0.1, 0.5, 0.9]
    processors[1].rescale_factor = 1 / 100
    encoder = FusedEncoder(both.module.parts(), [PixelScale.from_processor(p) for p in processors], grid=2)
    image = Image.new("RGB", (64, 64), (10, 120, 250))
    first, second = (p(image, return_tensors="pt")["pixel_values"] for p in processors)
    assert second[0, :, 0, 0].tolist() == pytest.approx([(0.1 - 0.2) / 0.1, (1.2 - 0.3) / 0.5, (2.5 - 0.4) / 0.9])
    unchanged, rescaled = encoder.rescale(first)
    assert torch.equal(unchanged, first)
    torch.testing.assert_close(rescaled, second, rtol=1e-5, atol=1e-5)


def test_pooled_features_are_joined():
    both = build(VIT, LITE, output="pooled", image_size=64).module
    pixels = noise(2, 3, 64, 64)
    assert both(pixels).shape == (2, 1, 64 + 256)
    torch.testing.assert_close(both(pixels)[:, 0, :64], alone(VIT, output="pooled", image_size=64).module(pixels)[:, 0])


def test_inner_layers_of_a_part():
    both = build({**VIT, "layer": [0, -1]}, VIT, image_size=32).module
    features = both(noise(1, 3, 32, 32))
    assert features.shape == (1, 4, 3 * 64)
    assert torch.equal(features[..., 64:128], features[..., 128:])
    assert not torch.equal(features[..., :64], features[..., 128:])


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (
            [VIT, CNN],
            {"image_size": 64},
            r"'test_vit \+ test_resnet' have grids of different sizes \(4×4, 2×2\); set gr",
        ),
        (
            [VIT, {**CNN, "name": "resnet18"}],
            {"grid": 2},
            r"different sizes \(160, 224 pixels\); set image_size beside",
        ),
    ],
)
def test_wrong_parts_are_named(parts, options, message):
    with pytest.raises(ConfigError, match=message):
        build(*parts, **options)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"encoders": [VIT]}, "encoders: got 1, expected at least two encoders"),
        ({"layer": -2}, "layer: got -2, which has no effect with source 'fused'; give it to the part it belongs to"),
        ({"weights": "random"}, "weights: got 'random', which has no effect with source 'fused'; give it to the part"),
        (
            {"encoders": [VIT, {**VIT, "layer": 1}], "output": "pooled", "grid": None},
            r"encoders\.1\.layer: got 1, which has no effect with output 'pooled'",
        ),
        ({"encoders": [VIT, {**CNN, "revision": "main"}]}, r"encoders\.1\.revision: got 'main', which has no effect"),
        (
            {**VIT, "encoders": [CNN, CNN]},
            r"encoders: got \[.*, which has no effect with source 'timm'; remove it",
        ),
    ],
)
def test_wrong_options_are_named_in_a_recipe(tiny_recipe, tmp_path, encoder, message):
    section = {"source": "fused", "image_size": 64, "grid": 2, "encoders": [VIT, CNN], **encoder}
    with pytest.raises(ConfigError, match=rf"model\.vision_encoder\.{message}"):
        tiny_recipe(tmp_path, f"model.vision_encoder={json.dumps(section)}")


def test_last_blocks_of_every_part_are_trained():
    encoder = train_encoder(build(VIT, CNN, image_size=64, grid=2, trainable=1).module, 1, torch.float32)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    expected = ("encoders.0.model.blocks.5.", "encoders.0.model.norm.", "encoders.1.model.layer4.")
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith(expected)}


# ── in a recipe ──


@pytest.fixture
def fused_recipe(tiny_lm, shapes, tmp_path):
    def make(output_dir, **parts) -> Recipe:
        data = tiny_recipe_dict(tiny_lm("llama"), shapes, output_dir)
        encoders = [parts.get("first", VIT), parts.get("second", CNN)]
        data["model"]["vision_encoder"] = {"source": "fused", "image_size": 64, "grid": 2, "encoders": encoders}
        data["data"]["feature_cache"] = str(tmp_path / "features")
        return recipe_from_dict(data)

    return make


def test_a_run_with_fused_encoders_is_cached_saved_and_loaded(fused_recipe, tmp_path):
    recipe = fused_recipe(tmp_path / "run")
    train(recipe)
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    named = manifest["fingerprint"]
    assert (named["weights.0.name"], named["weights.1.name"]) == ("test_vit", "test_resnet")
    assert named["weights.0.sha256"] != named["weights.1.sha256"]
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "run" / "best")
    assert model.vision_encoder.name == "test_vit + test_resnet"
    assert model.config.identity["vision_encoder"]["1.name"] == "test_resnet"
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    config["identity"]["vision_encoder"]["1.sha256"] = "0"
    (tmp_path / "run" / "best" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "best" / "sums.json").unlink()
    with pytest.raises(CheckpointError, match=r"vision_encoder: .* 1\.sha256='0'"):
        FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "run" / "best")


def test_fingerprints_name_every_part(fused_recipe, tmp_path):
    def fingerprint(**parts):
        return ImageEncoder.from_config(fused_recipe(tmp_path, **parts).model.vision_encoder).fingerprint

    first = fingerprint()
    assert first == fingerprint()
    assert first != fingerprint(second={**CNN, "layer": -2})
    assert first != fingerprint(second=LITE)
    assert "encoder.encoders" not in ImageEncoder.from_config(vision_encoder_config(**VIT, image_size=32)).fingerprint


def test_a_recipe_names_the_wrong_key_of_a_part(fused_recipe, tmp_path):
    with pytest.raises(ConfigError) as caught:
        fused_recipe(tmp_path, second={**CNN, "grid": 2, "source": "tim"})
    assert sorted(line.split(":")[0] for line in caught.value.problems) == [
        "model.vision_encoder.encoders.1.grid",
        "model.vision_encoder.encoders.1.source",
    ]
