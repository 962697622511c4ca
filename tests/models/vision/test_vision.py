"""Vision encoders: options, layers, weights, identities and image processors, on tiny random networks."""

from __future__ import annotations

import json
import pickle

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTModel
from transformers import CLIPImageProcessorPil as ClipProcessor

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.models.encoder_configuration import TimmEncoderConfig, vision_encoder_config
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.base import tokens_to_map
from frozenprefix.models.vision.efficientnet_lite import convert_lite_checkpoint
from frozenprefix.models.vision.timm_encoder import TimmEncoder

CNN, VIT = "test_resnet", "test_vit"
TINY_VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def build(name=CNN, source="timm", weights: str | None = "random", **options):
    return build_vision_encoder(vision_encoder_config(source=source, name=name, weights=weights, **options))


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_transformers(folder, model, size=32):
    model.save_pretrained(folder)
    ClipProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    """An open_clip ViT of two layers, 16 patches of 8 × 8 pixels, registered under a name of its own."""
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    (folder / "tiny-vit.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    return "tiny-vit"


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dim", "tokens"), [(CNN, 96, 25), (VIT, 64, 100), ("test_efficientnet", 256, 25)])
def test_patch_features_have_the_measured_shape(name, dim, tokens):
    built = build(name)
    encoder = built.module
    assert (encoder.encoder_dim, encoder.num_tokens, encoder.image_size) == (dim, tokens, 160)
    assert encoder(images(160)).shape == (2, tokens, dim)


def test_pooled_features_are_one_token():
    encoder = build(VIT, output="pooled").module
    assert encoder.num_tokens == 1
    assert encoder(images(160)).shape == (2, 1, 64)


def test_module_is_frozen_in_eval_mode_and_of_the_wanted_dtype():
    encoder = build(CNN, dtype="bfloat16").module
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder(images(160)).dtype == torch.bfloat16  # from float32 pixels


def test_convolutional_networks_use_channels_last():
    convolutions = [m for m in build(CNN).module.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size > (1, 1)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert build(VIT).module.memory_format == torch.contiguous_format


def test_build_ignores_a_surrounding_meta_device():
    with torch.device("meta"):
        encoder = build(VIT).module
    assert {parameter.device.type for parameter in encoder.parameters()} == {"cpu"}


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_without_effect_are_refused_all_at_once():
    with pytest.raises(ValidationError) as caught:
        build(output="pooled", grid=2, layer=-2)
    assert "grid: got 2, which has no effect with output 'pooled'" in str(caught.value)
    assert "layer: got -2, which has no effect with output 'pooled'" in str(caught.value)


def test_options_of_another_source_are_refused():
    with pytest.raises(ValidationError, match=r"timm\.revision\s+Extra inputs are not permitted"):
        build(revision="main")


def test_defaults_of_another_source_are_dropped():
    """config.json of earlier checkpoints holds the options of all sources."""
    unused = {"revision": None, "encoders": None, "path": None, "keys": None, "layer": -1}
    config = vision_encoder_config(source="timm", name=CNN, weights="random", **unused)
    assert config == TimmEncoderConfig(name=CNN, weights="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 5}, "layer must be from -5 to 4 for 'test_resnet', got 5"),
        ({"layer": [-1, -2]}, r"different sizes \(5×5, 10×10\); set grid \(at most 5\)"),
        ({"grid": 6}, "grid must be at most 5"),
        ({"name": "test_resnett"}, r"no model 'test_resnett' \(did you mean 'test_resnet'"),
        ({"weights": None}, "weights must be 'random', 'pretrained'"),
        ({"weights": "pretraind"}, "got 'pretraind'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_an_empty_list_of_layers_is_refused():
    with pytest.raises(ValidationError, match="at least one layer"):
        build(layer=[])


def test_grid_averages_neighbouring_patches():
    patches, pooled = build(VIT).module, build(VIT, grid=2).module
    features = patches(images(160)).unflatten(1, (10, 10))
    expected = torch.stack([features[:, r : r + 5, c : c + 5].mean((1, 2)) for r in (0, 5) for c in (0, 5)], dim=1)
    assert pooled.num_tokens == 4
    torch.testing.assert_close(pooled(images(160)), expected)


def test_several_layers_are_concatenated_in_the_order_given():
    both = build(VIT, layer=[-1, 0]).module
    features = both(images(160))
    assert both.encoder_dim == 128
    torch.testing.assert_close(features[..., :64], build(VIT).module(images(160)))
    torch.testing.assert_close(features[..., 64:], build(VIT, layer=0).module(images(160)))


def test_grid_brings_stages_of_different_sizes_together():
    encoder = build(CNN, layer=[-1, -2], grid=5).module
    assert (encoder.num_tokens, encoder.encoder_dim) == (25, 96 + 192)


def test_image_size_changes_the_grid_and_the_processor():
    built = build(VIT, image_size=64)
    assert built.module.num_tokens == 16
    pixels = built.image_processor(images=Image.new("RGB", (50, 90)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert built.module(pixels).shape == (1, 16, 64)


def test_tokens_that_form_no_square_are_refused():
    with pytest.raises(ConfigError, match="the 5 tokens of 'x' form no square grid"):
        tokens_to_map(torch.zeros(1, 5, 2), "x")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_random_weights_are_reproducible_and_leave_the_callers_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build(VIT)
    assert torch.equal(torch.rand(3), expected)
    second = build(VIT)
    assert torch.equal(first.module(images(160)), second.module(images(160)))
    assert first.identity == second.identity
    assert first.identity["weights"] == "random:0"


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return timm.create_model(VIT).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_file_are_loaded_and_named_without_its_folder(tmp_path, trained, suffix):
    path = tmp_path / f"vit{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained.state_dict(), path)
    built = build(VIT, weights=str(path))
    assert set(built.identity) == {"source", "name", "weights", "sha256"}
    assert built.identity["weights"] == path.name
    assert str(tmp_path) not in str(built.identity)
    with torch.no_grad():
        expected = trained.forward_features(images(160))[:, 1:]
    torch.testing.assert_close(built.module(images(160)), expected)


def test_building_does_not_move_batch_norm_statistics():
    model = timm.create_model("test_byobnet", num_classes=0).train()  # of a family whose norms are not fused
    encoder = TimmEncoder(model, name="test_byobnet", layers=[-1, 0], image_size=32, grid=1)
    means = [module.running_mean for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(means) > 3
    assert not any(mean.any() for mean in means)


def test_identity_differs_with_the_weights(tmp_path, trained):
    state = trained.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, tmp_path / "b.safetensors")
    first, second = (build(VIT, weights=str(tmp_path / f"{name}.safetensors")).identity for name in "ab")
    assert first["sha256"] != second["sha256"]
    assert build(VIT).identity["sha256"] != build(CNN).identity["sha256"]


def test_loading_is_strict(tmp_path, trained):
    state = trained.state_dict()
    del state["norm.bias"]
    state["extra.bias"] = torch.zeros(1)
    state["norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "x.safetensors")
    expected = r"missing norm.bias, norm.weight has shape \(3,\), expected \(64,\), unexpected extra.bias"
    with pytest.raises(AssetError, match=expected):
        build(VIT, weights=str(tmp_path / "x.safetensors"))


def test_pickled_objects_are_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"norm.bias": print}))
    with pytest.raises(AssetError, match=r"evil.pth is not a file of plain tensors"):
        build(VIT, weights=str(tmp_path / "evil.pth"))


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(AssetError, match="no mapping from names to tensors"):
        build(VIT, weights=str(tmp_path / "list.pth"))


def test_pretrained_weights_without_network_are_a_clear_error(offline):
    with pytest.raises(AssetError, match="Without access to the Hub, give weights as a local file"):
        build(CNN, weights="pretrained")


def test_lite_names_are_converted():
    names = ["_conv_stem.weight", "_bn0.bias", "_blocks.0._project_conv.weight", "_blocks.1._expand_conv.weight"]
    names += ["_blocks.2._bn2.running_mean", "_bn1.bias", "_fc.weight"]
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    converted = convert_lite_checkpoint(state, stage_depths=[1, 2])
    assert list(converted) == [
        "conv_stem.weight",
        "bn1.bias",
        "blocks.0.0.conv_pw.weight",
        "blocks.1.0.conv_pw.weight",
        "blocks.1.1.bn3.running_mean",
        "bn2.bias",
        "classifier.weight",
    ]
    assert [int(value) for value in converted.values()] == list(range(7))


@pytest.mark.parametrize("name", ["_blocks.3._bn1.bias", "_blocks.1._se_reduce.weight", "_other.weight", "_blocks"])
def test_names_without_a_place_in_lite_are_refused(name):
    with pytest.raises(AssetError, match=f"'{name}' has no place"):
        convert_lite_checkpoint({name: torch.zeros(1)}, stage_depths=[1, 2])


def test_lite_weights_are_refused_for_networks_that_pad_differently(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "lite.pth")
    with pytest.raises(ConfigError, match="name must be one of tf_efficientnet_lite0 to 4"):
        build("efficientnet_lite0", weights=str(tmp_path / "lite.pth"))


# --- image processors -------------------------------------------------------------------------------------------------


def test_a_saved_image_processor_is_reloaded_as_it_was(tmp_path):
    processor = build(VIT).image_processor
    processor.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(reloaded) is type(processor)
    assert reloaded.to_dict() == processor.to_dict()
    noise = torch.randint(0, 255, (201, 133, 3), dtype=torch.uint8).numpy()
    one, other = (each(images=noise, return_tensors="pt")["pixel_values"] for each in (processor, reloaded))
    assert torch.equal(one, other)


def test_a_resizing_mode_without_an_equal_is_refused(tiny_clip, monkeypatch):
    create = open_clip.create_model

    def longest(*args, **kwargs):
        model = create(*args, **kwargs)
        model.visual.preprocess_cfg["resize_mode"] = "longest"
        return model

    monkeypatch.setattr(open_clip, "create_model", longest)
    with pytest.raises(ConfigError, match="but the encoder's own is 'longest'"):
        build(tiny_clip, source="open_clip")


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_open_clip_keeps_the_visual_tower_only(tiny_clip):
    built = build(tiny_clip, source="open_clip")
    assert {name.split(".")[0] for name, _ in built.module.named_parameters()} == {"visual"}
    assert (built.module.num_tokens, built.module.encoder_dim) == (16, 16)
    assert build(tiny_clip, source="open_clip", output="pooled").module.encoder_dim == 12
    assert built.identity == build(tiny_clip, source="open_clip").identity


def test_open_clip_reads_a_file_strictly(tiny_clip, tmp_path):
    torch.manual_seed(5)
    model = open_clip.create_model(tiny_clip).eval()
    state = model.state_dict()
    torch.save(state, tmp_path / "clip.pt")
    built = build(tiny_clip, source="open_clip", weights=str(tmp_path / "clip.pt"), output="pooled")
    with torch.no_grad():
        torch.testing.assert_close(built.module(images(32))[:, 0], model.encode_image(images(32)))
    assert built.identity["weights"] == "clip.pt"
    del state["visual.ln_post.bias"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(AssetError, match=r"(?s)do not fit open_clip's 'tiny-vit'.*visual\.ln_post\.bias"):
        build(tiny_clip, source="open_clip", weights=str(tmp_path / "less.pt"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-B-31", "random", r"no model 'ViT-B-31' \(did you mean 'ViT-B-32'"),
        ("RN50", "opena", r"got 'opena' \(did you mean 'openai'\?\)"),
        ("RN50", None, "one of its tags .openai, yfcc15m, cc12m., a file"),
        ("hf-hub:a/b", "openai", "weights 'openai' has no effect with 'hf-hub:a/b'"),
    ],
)
def test_open_clip_names_and_tags_are_checked(name, weights, message):
    with pytest.raises(ConfigError, match=message):
        build(name, source="open_clip", weights=weights)


def test_open_clip_tag_without_network_is_a_clear_error(offline):
    with pytest.raises(AssetError, match=r"open_clip could not load 'RN50'.*Without access to the Hub"):
        build("RN50", source="open_clip", weights="cc12m")


# --- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_refuses_separate_weights(tmp_path):
    with pytest.raises(ValidationError, match=r"transformers\.weights\s+Extra inputs are not permitted"):
        build(str(tmp_path), source="transformers")


def test_transformers_folder_without_model_or_processor(tmp_path):
    with pytest.raises(AssetError, match="is an empty folder; expected"):
        build(str(tmp_path), source="transformers", weights=None)
    ViTModel(ViTConfig(**TINY_VIT, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(AssetError, match=r"Save one into the model's folder \(preprocessor_config.json\)"):
        build(str(tmp_path), source="transformers", weights=None)


def test_only_the_vision_side_of_a_composite_is_kept(tmp_path):
    vision = {**TINY_VIT, "image_size": 32, "patch_size": 8}
    text = {**TINY_VIT, "vocab_size": 9}
    name = save_transformers(tmp_path / "clip", CLIPModel(CLIPConfig(vision_config=vision, text_config=text)))
    built = build(name, source="transformers", weights=None)
    assert not any("text" in key for key in built.module.state_dict())
    assert (built.module.num_tokens, built.module.encoder_dim) == (16, 16)
    assert built.identity["name"] == "clip"
    assert str(tmp_path) not in str(built.identity)


def test_a_pooler_that_the_checkpoint_lacks_gives_way_to_the_class_token(tmp_path):
    model = ViTForImageClassification(ViTConfig(**TINY_VIT, image_size=32, patch_size=8)).eval()
    name = save_transformers(tmp_path, model)
    encoder = build(name, source="transformers", weights=None, output="pooled").module
    with torch.no_grad():
        expected = model.vit(images(32)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images(32))[:, 0], expected)


def test_missing_encoder_weights_are_refused(tmp_path):
    model = ViTModel(ViTConfig(**TINY_VIT, image_size=32, patch_size=8))
    name = save_transformers(tmp_path, model)
    state = model.state_dict()
    del state["layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"lacks 1 weights of its model \(layernorm\.bias\)"):
        build(name, source="transformers", weights=None)


def test_transformers_images_of_another_size(tmp_path):
    name = save_transformers(tmp_path, ViTModel(ViTConfig(**TINY_VIT, image_size=32, patch_size=8)))
    built = build(name, source="transformers", weights=None, image_size=48)
    assert built.module.num_tokens == 36
    pixels = built.image_processor(images=Image.new("RGB", (99, 70)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    assert built.module(pixels).shape == (1, 36, 16)


def test_transformers_layers_are_checked(tmp_path):
    name = save_transformers(tmp_path, ViTModel(ViTConfig(**TINY_VIT, image_size=32, patch_size=8)))
    with pytest.raises(ConfigError, match="layer must be from -4 to 3"):
        build(name, source="transformers", weights=None, layer=4)
