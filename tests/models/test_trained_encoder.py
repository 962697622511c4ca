"""Encoders trained through the frozen language model: which parameters, in which precision, and what stays."""

from __future__ import annotations

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTModel

from frozenprefix.config import load_recipe, recipe_from_dict
from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.open_clip_encoder import OpenClipEncoder
from frozenprefix.models.vision.training import train_encoder
from frozenprefix.models.vision.transformers_encoder import TransformersEncoder
from frozenprefix.planning.plan import plan
from frozenprefix.training.setup import build_model
from frozenprefix.training.trainer import train
from tests.helpers import ROOT

TRAINED = ["model.vision_encoder.trainable=all", "data.feature_cache=off"]
CNN = ["model.vision_encoder.name=test_resnet", "model.vision_encoder.image_size=64"]
RECIPES = ROOT / "recipes"


def build(name: str, trainable, **options):
    config = vision_encoder_config(source="timm", name=name, weights="random", trainable=trainable, **options)
    return train_encoder(build_vision_encoder(config).module, trainable, getattr(torch, config.dtype))


def trained_names(encoder: nn.Module) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def below(encoder: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in encoder.named_parameters() if name.startswith(prefixes)}


# ── training ──


def test_training_moves_the_encoder_and_not_one_bit_of_the_language_model(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", *TRAINED)
    before, _ = build_model(recipe)
    train(recipe)
    after = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "run" / "last")
    assert hash_tensors(after.language_model.state_dict()) == hash_tensors(before.language_model.state_dict())
    moved = {
        name
        for (name, one), other in zip(
            before.vision_encoder.named_parameters(), after.vision_encoder.parameters(), strict=True
        )
        if not torch.equal(one, other)
    }
    assert moved == trained_names(after.vision_encoder)
    assert {"model.patch_embed.proj.weight", "model.blocks.0.attn.qkv.weight", "model.norm.weight"} <= moved
    saved = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert {name for name in saved if name.startswith("vision_encoder.")} == {f"vision_encoder.{n}" for n in moved}
    assert not any(name.startswith("language_model.") for name in saved)


def test_the_gradient_of_the_first_layer_comes_through_the_language_model(tiny_recipe, tmp_path):
    model, _ = build_model(tiny_recipe(tmp_path, *TRAINED))
    model.train()
    image = model.config.image_token_id
    ids = torch.tensor([[image, image, 5, 6]])
    pixels = torch.randn(1, 3, 32, 32)
    model(input_ids=ids, pixel_values=pixels, labels=ids.where(ids != image, -100)).loss.backward()
    first = model.vision_encoder.model.patch_embed.proj.weight
    assert first.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.language_model.parameters())
    # against a difference quotient
    place = tuple(int(i) for i in torch.unravel_index(first.grad.abs().argmax(), first.shape))
    expected, losses = float(first.grad[place]), []
    with torch.no_grad():
        for change in (0.01, -0.02):
            first[place] += change
            losses.append(float(model(input_ids=ids, pixel_values=pixels, labels=ids.where(ids != image, -100)).loss))
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(expected, rel=0.05)


def test_features_have_a_gradient_only_when_something_is_trained(tiny_recipe, tmp_path):
    pixels = torch.randn(1, 3, 32, 32)
    frozen, _ = build_model(tiny_recipe(tmp_path))
    assert not frozen.encode(pixels).requires_grad
    trained, _ = build_model(tiny_recipe(tmp_path, *TRAINED))
    assert trained.encode(pixels).requires_grad
    with torch.no_grad():
        assert not trained.encode(pixels).requires_grad


def test_batch_norms_are_trained_without_their_statistics(tiny_recipe, tmp_path):
    model, _ = build_model(tiny_recipe(tmp_path, *TRAINED, *CNN))
    norms = [m for m in model.vision_encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms, "a network that is trained keeps its batch norms"
    statistics = [buffer.clone() for norm in norms for buffer in norm.buffers()]
    scale = norms[0].weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    image = model.config.image_token_id
    ids = torch.tensor([[image, image, 5, 6]])
    model.train()
    assert not any(m.training for m in model.vision_encoder.modules())
    model(
        input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64) * 5, labels=ids.where(ids != image, -100)
    ).loss.backward()
    optimizer.step()
    assert not torch.equal(norms[0].weight, scale)
    after = [buffer for norm in norms for buffer in norm.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(statistics, after, strict=True))


def test_weights_stay_in_float32_while_it_computes_in_bfloat16(tiny_recipe, tmp_path):
    model, _ = build_model(tiny_recipe(tmp_path, *TRAINED, "training.precision=bf16"))
    assert model.language_model.dtype == torch.bfloat16
    assert {p.dtype for p in model.vision_encoder.parameters()} == {torch.float32}
    computed = []
    model.vision_encoder.model.blocks[0].attn.qkv.register_forward_hook(lambda *given: computed.append(given[-1].dtype))
    model.encode(torch.randn(1, 3, 32, 32)).float().sum().backward()
    assert computed == [torch.bfloat16]
    assert model.vision_encoder.model.patch_embed.proj.weight.grad.dtype == torch.float32
    exact, _ = build_model(tiny_recipe(tmp_path))
    for one, other in zip(model.vision_encoder.parameters(), exact.vision_encoder.parameters(), strict=True):
        assert torch.equal(one, other), "weights went through bfloat16 on their way"


# ── which parameters ──


def test_last_blocks_of_a_timm_transformer():
    encoder = build("test_vit", 2, image_size=32)
    assert trained_names(encoder) == below(encoder, "model.blocks.4.", "model.blocks.5.", "model.norm.")
    everything = build("test_vit", "all", image_size=32)
    assert trained_names(everything) == below(everything, "model.")
    assert trained_names(build("test_vit", "none", image_size=32)) == set()


def test_last_stages_of_timm_convolutional_networks():
    encoder = build("test_resnet", 1, image_size=64)
    assert trained_names(encoder) == below(encoder, "model.layer4.")
    encoder = build("test_efficientnet", 1, image_size=64)
    assert trained_names(encoder) == below(encoder, "model.blocks.4.", "model.conv_head.", "model.bn2.")


def test_blocks_that_the_features_do_not_depend_on_are_not_counted():
    encoder = build("test_vit", 1, image_size=32, layer=-3)
    assert trained_names(encoder) == below(encoder, "model.blocks.3.")
    everything = build("test_vit", "all", image_size=32, layer=0)
    assert trained_names(everything) == below(
        everything, "model.cls_token", "model.pos_embed", "model.patch_embed.", "model.blocks.0."
    )


def test_last_blocks_of_open_clip_with_the_projection_behind_them():
    tower = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_ratio=2, output_dim=12
    )
    encoder = OpenClipEncoder(tower, name="tiny", layers=[-1], image_size=32, pooled=True)
    train_encoder(encoder, 1, torch.float32)
    assert trained_names(encoder) == {"visual.proj"} | below(
        encoder, "visual.transformer.resblocks.2.", "visual.ln_post."
    )
    patches = OpenClipEncoder(tower, name="tiny", layers=[-1], image_size=32)
    train_encoder(patches, 1, torch.float32)
    assert "visual.proj" not in trained_names(patches), "patch features are not projected"


def test_last_blocks_of_transformers():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    encoder = train_encoder(TransformersEncoder(model, name="tiny", layers=[-1], image_size=32), 2, torch.float32)
    last = [name for name, _ in encoder.named_parameters() if ".1." in name or ".2." in name]
    assert len(last) == 2 * len(list(encoder.blocks()[0].parameters()))
    assert trained_names(encoder) == {*last, "model.layernorm.weight", "model.layernorm.bias"}, "not the pooler"


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"trainable: got 7, but the features of 'test_vit' depend on 6 blocks; exp"):
        build("test_vit", 7, image_size=32)
    with pytest.raises(ConfigError, match="depend on 2 blocks"):
        build("test_vit", 3, image_size=32, layer=1)
    with pytest.raises(ConfigError, match="the blocks of 'vgg11' are not known; use 'all'"):
        build("vgg11", 1, image_size=32)


# ── recipes ──


def test_a_cache_of_features_that_change_is_refused_when_the_recipe_is_read(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(tmp_path, "model.vision_encoder.trainable=2")
    assert caught.value.problems == [
        "data.feature_cache: got 'auto', expected 'off' with model.vision_encoder.trainable 2: the features change "
        "with every step"
    ]
    with pytest.raises(ConfigError, match=r"trainable: got 0, expected 'none' or 'all' or at least 1"):
        tiny_recipe(tmp_path, "model.vision_encoder.trainable=0", "data.feature_cache=off")


def test_a_plan_of_a_trained_encoder_counts_it(tiny_recipe, tmp_path):
    frozen, trained = (plan(tiny_recipe(tmp_path, *more), ["cpu"], calibrate=0) for more in ((), TRAINED))
    more = trained.parameters["trainable"] - frozen.parameters["trainable"]
    assert more == pytest.approx(frozen.parameters["vision encoder"], rel=0.1)
    assert trained.machines["cpu"].seconds_to_encode == 0


def test_the_recipe_of_frozen(tmp_path):
    recipe = load_recipe(RECIPES / "frozen.yaml")
    assert (recipe.model.vision_encoder.trainable, recipe.model.mapper.prefix_length) == ("all", 2)
    assert recipe.model.mapper.type == "linear"
    assert recipe_from_dict(recipe.model_dump(mode="json")) == recipe
