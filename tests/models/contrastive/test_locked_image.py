"""Locked-image text models: the text tower, its projection, and open_clip models in and out."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModel

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.inference.embedding import Embedder
from frozenprefix.models.contrastive import LockedImageTextModel, TextTowerConfig
from frozenprefix.models.contrastive.open_clip_io import from_open_clip, open_clip_state, save_open_clip
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.training.setup import build_locked_model
from tests.helpers.contrastive import MINILM, contrastive_recipe


@pytest.fixture(scope="module")
def recipe_of(tiny_bert, shapes):
    return lambda output_dir, *overrides: contrastive_recipe(tiny_bert, shapes, output_dir, *overrides)


# ── the text tower ──


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
def test_pooling_does_not_see_padding(tiny_bert, pooling, side):
    tower = build_text_tower(TextTowerConfig(path=str(tiny_bert), pooling=pooling)).module.eval()
    ids = torch.tensor([[5, 9, 2]])
    whole = AutoModel.from_pretrained(tiny_bert).eval()
    pad = (0, 2) if side == "right" else (2, 0)
    padded, mask = F.pad(ids, pad), F.pad(torch.ones_like(ids), pad)
    positions = None if side == "right" else torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        hidden = whole(input_ids=ids).last_hidden_state[0]
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "eos": hidden[2]}[pooling]
        if positions is not None:
            tower.model.embeddings.register_buffer("position_ids", positions, persistent=False)
        torch.testing.assert_close(tower(padded, mask)[0], wanted, rtol=0, atol=1e-5)


def test_only_the_last_layers_are_trained(tiny_bert):
    def trained(layers) -> set[str]:
        tower = build_text_tower(TextTowerConfig(path=str(tiny_bert), trained_layers=layers)).module
        return {".".join(n.split(".")[1:4]) for n, p in tower.named_parameters() if p.requires_grad}

    assert trained(0) == set()
    assert trained(2) == {"encoder.layer.1", "encoder.layer.2"}
    assert {"encoder.layer.0", "embeddings.word_embeddings.weight"} <= trained("all")
    with pytest.raises(ConfigError, match=r"trained_layers: got 9, but .* has 3 layers"):
        trained(9)


def test_a_tower_that_cannot_be_had(tmp_path):
    with pytest.raises(AssetError, match=r"text_tower.path: .*nowhere"):
        build_text_tower(TextTowerConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValidationError, match=r"weights: got 'random', which has no effect"):
        TextTowerConfig(path="x", weights="random")


@pytest.mark.slow
@pytest.mark.network
def test_minilm_knows_what_is_alike():
    built = build_text_tower(TextTowerConfig(path=MINILM))
    texts = ["a dog runs on grass", "a puppy is running over a lawn", "the stock market fell today"]
    inputs = built.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        embeds = F.normalize(built.module.eval()(inputs["input_ids"], inputs["attention_mask"]), dim=-1)
    similar = embeds @ embeds.t()
    assert similar[0, 1] > 0.6 > 0.2 > similar[0, 2]


# ── the model ──


def test_a_tower_trained_as_a_whole_needs_no_original(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path, "model.text_tower.trained_layers=all")
    model, processor = build_locked_model(recipe)
    model.config.text_tower.path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "saved")
    inputs = processor.prepare_texts(["a red circle"])
    again = LockedImageTextModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_text(**inputs), model.eval().encode_text(**inputs))
    parts = {"vision_encoder": model.vision_encoder, "text_tower": model.text_tower}
    given = LockedImageTextModel.from_pretrained(tmp_path / "saved", **parts)
    assert (given.vision_encoder, given.text_tower) == (model.vision_encoder, model.text_tower)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ("{type: none}", "type 'none' needs projection_dim 32"),
        (
            "{type: none, input_norm: true}",
            "text_projection.input_norm: got True, which has no effect",
        ),
        (
            "{type: linear, hidden_dim: 8}",
            "text_projection.hidden_dim: got 8, which has no effect",
        ),
    ],
)
def test_projections_without_sense(recipe_of, tmp_path, projection, message):
    with pytest.raises(ConfigError, match=message):
        build_locked_model(recipe_of(tmp_path, f"model.text_projection={projection}"))


# ── open_clip ──


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}


@pytest.mark.parity
@pytest.mark.parametrize("build", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("bias", [None, -8.0])
def test_open_clip_in_and_out(build, bias, tmp_path):
    config = {**OPEN_CLIP, "init_logit_bias": bias} if bias else OPEN_CLIP
    extra = {"custom_text": True} if build is CustomTextCLIP else {}
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    theirs = build(**config).eval()
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, **extra}}))
    save_file(theirs.state_dict(), source / "open_clip_model.safetensors")
    ours, processor = from_open_clip(f"local-dir:{source}", None)
    assert ours.config.objective == ("sigmoid" if bias else "infonce")
    pixels, inputs = torch.randn(2, 3, 32, 32), processor.prepare_texts(["a dog", "two cats run"])
    with torch.no_grad():
        for vectors, wanted in (
            (ours.encode_image(pixels), theirs.encode_image(pixels, normalize=True)),
            (ours.encode_text(**inputs), theirs.encode_text(inputs["input_ids"], normalize=True)),
        ):
            torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-6)
        logits = ours.logit_scale(ours.encode_image(pixels), ours.encode_text(**inputs))
        torch.testing.assert_close(logits, theirs.get_logits(pixels, inputs["input_ids"])[0])
    save_open_clip(ours, copy, processor)
    again = open_clip.create_model(f"local-dir:{copy}", require_pretrained=True)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_an_open_clip_model_is_saved_as_a_checkpoint(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    save_file(CLIP(**OPEN_CLIP).state_dict(), tmp_path / "source" / "open_clip_model.safetensors")
    model, processor = from_open_clip(f"local-dir:{tmp_path / 'source'}", None, trained_layers=1)
    trained = {name.split("text_tower.model.")[-1] for name in model.trainable_state()}
    assert {"text_projection", "ln_final.weight", "logit_scale.log_scale"} <= trained
    assert not any("resblocks.0." in name or "embedding" in name for name in trained)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    embedder = Embedder.from_pretrained(tmp_path / "saved")
    inputs = processor.prepare_texts(["a dog"])
    with torch.no_grad():
        wanted = model.encode_text(**inputs).numpy()
    assert embedder.embed_texts(["a dog"]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parity
def test_library_towers_as_an_open_clip_model(recipe_of, tmp_path):
    model, processor = build_locked_model(recipe_of(tmp_path, "model.vision_encoder.image_size=null"))
    model.eval()
    side = model.vision_encoder.image_size
    save_open_clip(model, tmp_path / "exported", processor)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}", require_pretrained=True).eval()
    pixels, inputs = torch.randn(2, 3, side, side), processor.prepare_texts(["a dog", "the red cat runs"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), theirs.encode_image(pixels, normalize=True))
        texts = theirs.encode_text(inputs["input_ids"], normalize=True)
        torch.testing.assert_close(model.encode_text(**inputs), texts)


def test_what_open_clip_has_no_place_for_is_named(recipe_of, tmp_path):
    recipe = recipe_of(
        tmp_path,
        "model.image_projection={type: linear, input_norm: true}",
        "model.text_tower.pooling=eos",
        "model.vision_encoder.output=patch",
    )
    with pytest.raises(ConfigError) as caught:
        open_clip_state(build_locked_model(recipe)[0])
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "vision_encoder",
        "text_tower",
        "image_projection",
    ]
