"""Every mapper on pooled and patch features: shapes, first size, parameter counts, refused options."""

from __future__ import annotations

import pytest
import torch

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers import MAPPERS, build_mapper, validate_mapper
from frozenprefix.models.mappers.blocks import pool_tokens

D_ENC, D_LM = 24, 16
SMALL = {
    "transformer": {"num_layers": 2, "num_heads": 4},
    "perceiver": {"num_layers": 2, "num_heads": 4},
    "q_former": {"hidden_dim": 16, "num_layers": 2, "num_heads": 4},
    "mapl": {"hidden_dim": 16, "num_layers": 2, "num_heads": 4},
    "attention_pool": {"num_heads": 4},
}
# those that take any number of image tokens, and any prefix length
FREE = ["linear", "mapl", "mlp", "perceiver", "q_former", "transformer"]


def build(kind: str, num_tokens: int = 1, prefix_length: int = 4, rms: float = 0.05, **options):
    config = MapperConfig(type=kind, prefix_length=prefix_length, **{**SMALL.get(kind, {}), **options})
    torch.manual_seed(0)
    return build_mapper(config, encoder_dim=D_ENC, num_tokens=num_tokens, lm_dim=D_LM, embedding_rms=rms)


def size_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_these_are_all_mappers():
    assert MAPPERS.names() == sorted([*FREE, "attention_pool", "pixel_shuffle"])


@pytest.mark.parametrize(
    ("kind", "num_tokens", "prefix_length", "options"),
    [(kind, num_tokens, length, {}) for kind in FREE for num_tokens in (1, 9) for length in (1, 4)]
    + [("attention_pool", 9, 1, {}), ("attention_pool", 9, 4, {})]
    + [("pixel_shuffle", 1, 1, {}), ("pixel_shuffle", 6, 6, {}), ("pixel_shuffle", 16, 4, {"shuffle": 2})]
    + [("q_former", 9, 4, {"input_norm": True}), ("pixel_shuffle", 4, 4, {"input_norm": True})],
)
def test_shape_size_and_gradient(kind, num_tokens, prefix_length, options):
    mapper = build(kind, num_tokens, prefix_length, rms=0.037, **options)
    features = torch.randn(3, num_tokens, D_ENC) * 2 + 1
    prefix_embeds = mapper(features)
    assert prefix_embeds.shape == (3, prefix_length, D_LM)
    assert prefix_embeds.pow(2).mean().sqrt().item() == pytest.approx(0.037, rel=0.05)
    assert not torch.allclose(prefix_embeds[0], prefix_embeds[1], atol=1e-4), "two images give one prefix"
    if prefix_length > 1:
        assert not torch.allclose(prefix_embeds[:, 0], prefix_embeds[:, 1], atol=1e-4), "all positions are equal"
    prefix_embeds.square().sum().mul(0.5).add((prefix_embeds * torch.randn(D_LM)).sum()).backward()
    dead = [name for name, p in mapper.named_parameters() if p.grad is None]
    assert not dead, f"parameters without any effect: {dead}"


@pytest.mark.parametrize("kind", [*FREE, "attention_pool", "pixel_shuffle"])
def test_without_output_norm_the_last_layer_sets_the_size(kind):
    options = {"hidden_dim": 32} if kind == "transformer" else {}
    mapper = build(kind, 9, 9, rms=0.037, output_norm="none", **options)
    assert not [name for name in mapper.state_dict() if name.startswith("scale.")]
    prefix_embeds = mapper(torch.randn(64, 9, D_ENC))
    assert prefix_embeds.pow(2).mean().sqrt().item() == pytest.approx(0.037, rel=0.2)
    with_norm = build(kind, 9, 9, rms=0.037, **options)
    assert size_of(mapper) == size_of(with_norm) - scale_parameters()


def test_building_without_output_norm_draws_no_random_numbers():
    build("mlp", 9, 9)
    expected = torch.rand(1)
    build("mlp", 9, 9, output_norm="none")
    assert torch.equal(torch.rand(1), expected)


def test_a_transformer_of_the_lms_width_without_output_norm_keeps_its_size():
    assert build("transformer", 1, 4, output_norm="none").body.output_layer is None


def scale_parameters() -> int:
    return 2 * D_LM


def test_linear_parameters_by_formula():
    pooled = build("linear", num_tokens=1, prefix_length=4)
    assert size_of(pooled) == D_ENC * 4 * D_LM + 4 * D_LM + scale_parameters()
    patch = build("linear", num_tokens=9, prefix_length=4)
    assert size_of(patch) == D_ENC * D_LM + D_LM + scale_parameters()
    normed = build("linear", num_tokens=9, prefix_length=4, input_norm=True)
    assert size_of(normed) == size_of(patch) + 2 * D_ENC


def test_mlp_parameters_are_clipcaps():
    """Linear(D, P·d/2), tanh, Linear(P·d/2, P·d), both with bias."""
    hidden = 10 * D_LM // 2
    expected = (D_ENC * hidden + hidden) + (hidden * 10 * D_LM + 10 * D_LM)
    mapper = build("mlp", num_tokens=1, prefix_length=10)
    assert size_of(mapper) == expected + scale_parameters()
    assert [type(layer).__name__ for layer in mapper.body.layers] == ["Linear", "Tanh", "Dropout", "Linear"]


def test_transformer_parameters_by_formula():
    mapper = build("transformer", num_tokens=1, prefix_length=4, num_layers=3, num_heads=4, ratio=2.0)
    attention = D_LM * D_LM + D_LM * 2 * D_LM + D_LM * D_LM + D_LM
    feed_forward = (D_LM * 2 * D_LM + 2 * D_LM) + (2 * D_LM * D_LM + D_LM)
    layer = attention + feed_forward + 2 * 2 * D_LM
    project = D_ENC * 4 * D_LM + 4 * D_LM
    assert size_of(mapper) == project + 4 * D_LM + 3 * layer + scale_parameters()


def test_mlp_flatten_sees_every_token_and_per_token_one():
    features = torch.randn(1, 4, D_ENC)
    changed = features.clone()
    changed[0, 3] += 1
    together = build("mlp", num_tokens=4, prefix_length=4, tokens="flatten")
    moved = (together(features) - together(changed)).abs().amax(-1)[0]
    assert (moved > 1e-6).all()
    apart = build("mlp", num_tokens=4, prefix_length=4)
    moved = (apart(features) - apart(changed)).abs().amax(-1)[0]
    assert (moved > 1e-6).tolist() == [False, False, False, True]


def test_pool_tokens_averages_in_raster_order():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert pool_tokens(tokens, 3).flatten().tolist() == [0.5, 2.5, 4.5]
    assert pool_tokens(tokens, 6) is tokens


def test_dropout_only_while_training():
    mapper = build("mlp", num_tokens=1, dropout=0.5)
    features = torch.randn(2, 1, D_ENC)
    mapper.eval()
    assert torch.equal(mapper(features), mapper(features))
    mapper.train()
    assert not torch.equal(mapper(features), mapper(features))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "trasformer"}, r"unknown mapper 'trasformer' \(did you mean 'transformer'\?\)"),
        (
            {"type": "mlp", "hiden_dim": 8},
            r"hiden_dim: mapper 'mlp' has no such option \(did you mean 'hidden_dim'\?\)",
        ),
        ({"type": "linear", "num_layers": 2}, r"num_layers: mapper 'linear' has no such option; it has: input_norm"),
        (
            {"type": "mlp", "activation": "swish"},
            r"model.mapper.activation: .*'tanh', 'gelu', 'gelu_tanh' or 'relu', got 'swish'",
        ),
        ({"type": "mlp", "num_layers": 0}, r"model.mapper.num_layers: .*greater than or equal to 1, got 0"),
        ({"type": "mlp", "hidden_dim": 0}, r"model.mapper.hidden_dim: .*greater than or equal to 1, got 0"),
        ({"type": "transformer", "dropout": 1.5}, r"model.mapper.dropout: .*less than 1, got 1.5"),
        ({"type": "perceiver", "num_layers": "2"}, r"model.mapper.num_layers: .*valid integer, got '2'"),
    ],
)
def test_wrong_options_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        build_mapper(MapperConfig(**config), encoder_dim=8, num_tokens=1, lm_dim=8, embedding_rms=0.1)


def test_all_problems_at_once():
    problems = validate_mapper(MapperConfig(type="mlp", num_layers=0, hiden_dim=3, dropout=2))
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("kind", "num_tokens", "options", "message"),
    [
        ("mlp", 1, {"tokens": "flatten"}, "'flatten' has no effect on a pooled feature"),
        ("mlp", 1, {"num_layers": 1, "hidden_dim": 8}, "no hidden layer"),
        ("mlp", 1, {"num_layers": 1, "activation": "gelu"}, "no hidden layer"),
        ("transformer", 9, {"visual_length": 3}, "visual_length has no effect on a grid of 9 tokens"),
        ("transformer", 1, {"num_heads": 3}, "width 16 must be a multiple of num_heads, got num_heads=3"),
    ],
)
def test_an_option_without_effect_is_refused(kind, num_tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, num_tokens, **options)


def test_recipe_and_checkpoint_keep_the_missing_norm(tiny_recipe, tmp_path):
    from frozenprefix import FrozenPrefixForConditionalGeneration
    from frozenprefix.config import load_recipe
    from frozenprefix.training.setup import build_model

    recipe = tiny_recipe(tmp_path, "model.mapper.output_norm=none")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml").model.mapper.output_norm == "none"
    model, _ = build_model(recipe)
    model.save_pretrained(tmp_path / "saved")
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.mapper.scale, torch.nn.Identity)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.prefix(pixels), model.eval().prefix(pixels))
    with pytest.raises(ConfigError, match=r"model.mapper.output_norm: .*'layer' or 'none'"):
        tiny_recipe(tmp_path, "model.mapper.output_norm=batch")


def test_the_closed_form_needs_the_norm():
    from frozenprefix.models.mappers.closed_form import NamedVectors, fit_last_layer

    mapper = build("linear", output_norm="none")
    with pytest.raises(ConfigError, match="output_norm: got 'none', expected 'layer'"):
        fit_last_layer(mapper, NamedVectors(torch.randn(3, D_ENC), ["a", "b", "c"]), torch.randn(3, 4, D_LM))


def test_a_norm_in_front_of_each_activation():
    mapper = build("mlp", 9, 9, hidden_norm=True, num_layers=3, activation="gelu")
    kinds = [type(layer).__name__ for layer in mapper.body.layers]
    assert kinds == [*["Linear", "LayerNorm", "GELU", "Dropout"] * 2, "Linear"]
    features = torch.randn(2, 9, D_ENC)
    first, norm = mapper.body.layers[:2]
    with torch.no_grad():
        hidden = norm(first(features))
        assert hidden.mean(-1).abs().max() < 1e-5
        expected = mapper.scale(mapper.body.layers[2:](hidden))
        assert torch.allclose(mapper(features), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="num_layers: with 1 there is no hidden layer, so hidden_dim, hidden_norm"):
        build("mlp", 9, 9, hidden_norm=True, num_layers=1)
