"""Q-Former, pixel shuffle, MAPL, attention pooling: parity with other implementations, sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers import build_mapper, validate_mapper
from frozenprefix.models.mappers.attention_pool import AttentionPoolMapper
from frozenprefix.models.mappers.blocks import Attention
from frozenprefix.models.mappers.mapl import MAPLMapper
from frozenprefix.models.mappers.pixel_shuffle import PixelShuffleMapper, join_squares
from frozenprefix.models.mappers.q_former import QFormerMapper


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def copy_linear(target: nn.Linear, *sources: nn.Linear) -> None:
    """Put the weights of `sources`, one above the other, into `target`."""
    target.weight.data.copy_(torch.cat([source.weight for source in sources]))
    target.bias.data.copy_(torch.cat([source.bias for source in sources]))


# Q-Former


def blip2_q_former(**options):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return Blip2QFormerModel(Blip2QFormerConfig(**options)).eval()


def test_q_former_has_the_parameters_of_blip2():
    """BERT-base with queries: as transformers counts it, and 188M with what the text side adds (section 3.1)."""
    with torch.device("meta"):
        ours = QFormerMapper(encoder_dim=1408, num_tokens=257, lm_dim=2560, prefix_length=32)
        theirs = blip2_q_former()
    outside = size_of(ours.project_out) + ours.queries.numel()
    assert size_of(ours) - outside == size_of(theirs) == 105_137_664

    text_feed_forward = 12 * (768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768)
    embeddings = (30_522 + 512) * 768
    assert size_of(theirs) + text_feed_forward + embeddings == pytest.approx(188e6, rel=0.02)


def test_q_former_gives_the_outputs_of_transformers():
    torch.manual_seed(0)
    ours = QFormerMapper(
        encoder_dim=24, num_tokens=9, lm_dim=16, prefix_length=4, hidden_dim=32, num_layers=3, num_heads=4
    ).eval()
    theirs = blip2_q_former(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        encoder_hidden_size=24,
        layer_norm_eps=1e-5,
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms and biases too
    copy_q_former(ours, theirs)
    features = torch.randn(2, 9, 24)
    expected = theirs(ours.queries[None].expand(2, -1, -1), encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(ours(features), ours.project_out(expected), atol=1e-5, rtol=1e-5)


def copy_q_former(ours: QFormerMapper, theirs: nn.Module) -> None:
    ours.norm_queries.load_state_dict(theirs.layernorm.state_dict())
    for mine, layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        pairs = [(mine.attention, mine.norm_attention, layer.attention)]
        assert (mine.cross_attention is not None) == layer.has_cross_attention
        if mine.cross_attention is not None:
            pairs.append((mine.cross_attention, mine.norm_cross_attention, layer.crossattention))
        for attention, norm, source in pairs:
            copy_linear(attention.to_q, source.attention.query)
            copy_linear(attention.to_kv, source.attention.key, source.attention.value)
            copy_linear(attention.to_out, source.output.dense)
            norm.load_state_dict(source.output.LayerNorm.state_dict())
        copy_linear(mine.feed_forward[0], layer.intermediate_query.dense)
        copy_linear(mine.feed_forward[3], layer.output_query.dense)
        mine.norm_feed_forward.load_state_dict(layer.output_query.LayerNorm.state_dict())


@pytest.mark.parametrize(
    ("every", "looking"), [(1, [True] * 4), (2, [True, False] * 2), (3, [True, False, False, True])]
)
def test_q_former_looks_in_every_kth_layer(every, looking):
    mapper = QFormerMapper(
        encoder_dim=8,
        num_tokens=4,
        lm_dim=8,
        prefix_length=2,
        hidden_dim=8,
        num_layers=4,
        num_heads=2,
        cross_attention_every=every,
    )
    assert [layer.cross_attention is not None for layer in mapper.layers] == looking


# Pixel shuffle


def test_join_squares_by_hand():
    grid = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]])
    joined = join_squares(grid.flatten()[None, :, None], 2)
    assert joined.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    two_wide = join_squares(torch.arange(8).view(1, 4, 2), 2)
    assert two_wide.tolist() == [[[0, 1, 2, 3, 4, 5, 6, 7]]]


@pytest.mark.parametrize("side", [1, 2, 3])
def test_pixel_shuffle_is_idefics3s_connector(side):
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config = Idefics3Config(vision_config={"hidden_size": 5}, text_config={"hidden_size": 32}, scale_factor=side)
    theirs = Idefics3Connector(config)
    ours = PixelShuffleMapper(
        encoder_dim=5, num_tokens=36, lm_dim=32, prefix_length=36 // side**2, shuffle=side, num_layers=1
    )
    assert size_of(ours) == size_of(theirs) + 32  # Idefics3's layer has no bias
    ours.layers[0].weight.data.copy_(theirs.modality_projection.proj.weight)
    ours.layers[0].bias.data.zero_()
    features = torch.randn(2, 36, 5)
    torch.testing.assert_close(ours(features), theirs(features))


def test_without_shuffle_it_is_llavas_projector():
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config={"hidden_size": 12}, text_config={"hidden_size": 32}, projector_hidden_act="gelu"
    )
    theirs = LlavaMultiModalProjector(config)
    ours = PixelShuffleMapper(encoder_dim=12, num_tokens=12, lm_dim=32, prefix_length=12)
    assert size_of(ours) == size_of(theirs)
    copy_linear(ours.layers[0], theirs.linear_1)
    copy_linear(ours.layers[2], theirs.linear_2)
    features = torch.randn(2, 12, 12)
    torch.testing.assert_close(ours(features), theirs(features))


@pytest.mark.parametrize(
    ("num_tokens", "prefix_length", "options", "message"),
    [
        (36, 10, {"shuffle": 2}, r"prefix_length: got 10, .* 9 embeddings of 36 image tokens; set prefix_length to 9$"),
        (49, 10, {}, r"prefix_length: got 10, .*; set prefix_length to 49$"),
        (1, 4, {}, r"prefix_length: got 4, .*; set prefix_length to 1$"),
        (36, 9, {"shuffle": 5}, r"shuffle: got 5, but 36 image .* takes 1, 2, 3, 6, or set model.vision_encoder.grid"),
        (12, 3, {"shuffle": 2}, r"shuffle: got 2, but 12 image tokens cannot .* takes 1, or set"),
        (4, 4, {"num_layers": 1, "hidden_dim": 8}, r"hidden_dim has no effect with num_layers=1"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(num_tokens, prefix_length, options, message):
    config = MapperConfig(type="pixel_shuffle", prefix_length=prefix_length, **options)
    with pytest.raises(ConfigError, match=message) as caught:
        build_mapper(config, encoder_dim=8, num_tokens=num_tokens, lm_dim=8, embedding_rms=0.1)
    assert len(caught.value.problems) == 1


# MAPL


def mapl_of_torch(encoder_dim: int, lm_dim: int, length: int, dim: int, heads: int, layers: int) -> nn.ModuleDict:
    """MAPL as its authors describe it, of torch's own transformer layers."""
    layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
    return nn.ModuleDict(
        {
            "down": nn.Linear(encoder_dim, dim),
            "queries": nn.ParameterList([torch.randn(length, dim)]),
            "transformer": nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            "up": nn.Linear(dim, lm_dim),
        }
    )


def test_mapl_has_the_papers_size():
    """3.4M parameters from CLIP ViT-L/14 (1024) to GPT-J (4096) with 32 queries."""
    with torch.device("meta"):
        ours = MAPLMapper(encoder_dim=1024, num_tokens=257, lm_dim=4096, prefix_length=32)
        reference = mapl_of_torch(1024, 4096, 32, dim=256, heads=8, layers=4)
    assert size_of(ours) == pytest.approx(3.4e6, rel=0.02)
    assert size_of(reference) - size_of(ours) == 4 * 3 * 256  # biases of query, key and value


def test_mapl_gives_the_outputs_of_torchs_layers():
    torch.manual_seed(0)
    ours = MAPLMapper(
        encoder_dim=24, num_tokens=9, lm_dim=16, prefix_length=4, hidden_dim=32, num_layers=2, num_heads=4
    )
    theirs = mapl_of_torch(24, 16, 4, dim=32, heads=4, layers=2)
    ours.project_in.load_state_dict(theirs["down"].state_dict())
    ours.project_out.load_state_dict(theirs["up"].state_dict())
    ours.queries.data.copy_(theirs["queries"][0])
    for mine, layer in zip(ours.layers, theirs["transformer"].layers, strict=True):
        query, key_and_value = layer.self_attn.in_proj_weight.data.split([32, 64])
        mine.attention.to_q.weight.data.copy_(query)
        mine.attention.to_kv.weight.data.copy_(key_and_value)
        layer.self_attn.in_proj_bias.data.zero_()
        mine.attention.to_out.load_state_dict(layer.self_attn.out_proj.state_dict())
        copy_linear(mine.feed_forward[0], layer.linear1)
        copy_linear(mine.feed_forward[3], layer.linear2)
    features = torch.randn(2, 9, 24)
    tokens = torch.cat([theirs["down"](features), theirs["queries"][0].expand(2, -1, -1)], dim=1)
    expected = theirs["up"](theirs["transformer"](tokens)[:, 9:])
    torch.testing.assert_close(ours(features), expected, atol=1e-5, rtol=1e-5)


# Attention pooling


def test_attention_pool_is_open_clips():
    from open_clip.transformer import AttentionalPooler

    torch.manual_seed(0)
    theirs = AttentionalPooler(16, 24, n_head=4, n_queries=5).eval()
    ours = AttentionPoolMapper(encoder_dim=24, num_tokens=9, lm_dim=12, prefix_length=5, hidden_dim=16, num_heads=4)
    assert size_of(ours) - size_of(ours.project_out) == size_of(theirs)
    ours.queries.data.copy_(theirs.query)
    ours.norm_queries.load_state_dict(theirs.ln_q.state_dict())
    ours.norm_visual.load_state_dict(theirs.ln_k.state_dict())
    copy_attention(ours.attention, theirs.attn)
    features = torch.randn(2, 9, 24) * 3 + 1
    torch.testing.assert_close(ours(features), ours.project_out(theirs(features)), atol=1e-5, rtol=1e-5)


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_bias.data.normal_()
    query, key_and_value = theirs.in_proj_bias.data.split([16, 32])
    ours.to_q.weight.data.copy_(theirs.q_proj_weight)
    ours.to_q.bias.data.copy_(query)
    ours.to_kv.weight.data.copy_(torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]))
    ours.to_kv.bias.data.copy_(key_and_value)
    ours.to_out.load_state_dict(theirs.out_proj.state_dict())


def test_attention_pool_refuses_a_pooled_feature():
    with pytest.raises(ConfigError, match=r"'attention_pool' has nothing to choose from .*output=patch, or use"):
        AttentionPoolMapper(encoder_dim=8, num_tokens=1, lm_dim=8, prefix_length=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "qformer"}, "did you mean 'q_former'?"),
        ({"type": "q_former", "cross_attention_every": 0}, "model.mapper.cross_attention_every: "),
        ({"type": "pixel_shuffle", "shuffle": 0}, "model.mapper.shuffle: "),
        ({"type": "mapl", "num_layer": 2}, "did you mean 'num_layers'?"),
        ({"type": "attention_pool", "ratio": 2.0}, "mapper 'attention_pool' has no such option"),
    ],
)
def test_wrong_options_are_named(config, message):
    assert message in validate_mapper(MapperConfig(**config))[0]
