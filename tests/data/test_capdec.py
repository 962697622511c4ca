"""Training on texts alone, with an encoder that shares its space with texts."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from frozenprefix.data import images
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.data.text_only import TextOnlyCollator, TextVectors
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.setup import build_model
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.drawings import write_shapes

TEXT_ONLY = "data.text_only={noise: 0.01}"
TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Section of a tiny random open_clip model with both towers."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-capdec.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-capdec.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-capdec").state_dict(), folder / "tiny.pt")
    return {"source": "open_clip", "name": "tiny-capdec", "weights": str(folder / "tiny.pt"), "output": "pooled"}


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm, shapes, clip):
    def make(folder, *overrides, data=shapes):
        captions = f"data.train=[{{type: captions, path: {data}, split: train}}]"
        encoder = f"model.vision_encoder={json.dumps(clip)}"
        mapper = "model.mapper={type: mlp, prefix_length: 2, hidden_dim: 32}"
        return tiny_recipe(folder, captions, encoder, mapper, TEXT_ONLY, *overrides, lm=sharp_lm, data=data)

    return make


def test_vectors_are_those_of_the_librarys_text_tower(clip):
    texts = ["a red circle", "a blue cross", "a red circle"]
    vectors = TextVectors.from_texts(vision_encoder_config(**clip), texts)
    model = open_clip.create_model("tiny-capdec", pretrained=clip["weights"]).eval()
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("tiny-capdec")(texts), normalize=True)
    found = vectors(texts)
    assert found.shape == (3, 1, 24)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 1))


def test_no_image_is_read_in_training(recipe_of, tmp_path, monkeypatch):
    """The training images are not even there; those of the validation are, and they are read."""
    data = write_shapes(tmp_path / "shapes")
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "train":
            (data / row["image"]).unlink()
    read = []
    load = images.load_image
    for module in ("frozenprefix.data.collation", "frozenprefix.training.setup"):
        monkeypatch.setattr(f"{module}.load_image", lambda path: read.append(path.name) or load(path))
    result = train(recipe_of(tmp_path / "run", "data.feature_cache=off", "training.max_steps=3", data=data))
    assert {name.split("_")[0] for name in read} == {"blue"}, "the validation images"
    assert result.targets_seen == 3 * 4 * 2
    assert not (tmp_path / "run/bad_images.jsonl").exists()


@pytest.mark.parametrize("packing", ["trie", "none"])
def test_a_step_by_hand(recipe_of, tmp_path, packing):
    """Without noise: every target is learned behind the prefix of its own text."""
    trainer = Trainer(recipe_of(tmp_path, "data.text_only={noise: 0}", f"training.packing={packing}"))
    trainer.setup()
    batch = next(trainer.batches())
    (loss,) = trainer.objectives(trainer.objectives.prepare(dict(batch), 0), {"lm": 1.0}).values()
    trainer.train_collator.keep_samples = True
    samples = next(trainer.batches())["samples"]
    texts = [text for _, pairs in samples for _, text in pairs]
    assert len(texts) == 8
    model, processor = trainer.model, trainer.processor
    vectors = TextVectors.from_texts(trainer.recipe.model.vision_encoder, texts)
    prompt = processor.encode_prompt("<image>")
    total, count = 0.0, 0
    for text in texts:
        ids = processor.encode_target("<image>", text)
        labels = torch.tensor([[*[-100] * len(prompt), *ids]])
        output = model(input_ids=torch.tensor([[*prompt, *ids]]), image_features=vectors([text]), labels=labels)
        total, count = total + output.loss.item() * len(ids), count + len(ids)
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)


def test_noise_is_drawn_anew_and_keeps_vectors_on_the_sphere(recipe_of, tmp_path):
    trainer = Trainer(recipe_of(tmp_path))
    trainer.setup()
    clean = next(trainer.batches())["image_features"]
    noisy = [trainer.objectives.prepare(next(trainer.batches()), 0)["image_features"] for _ in range(2)]
    assert not torch.equal(*noisy)
    for features in noisy:
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(8, 1))
        # variance 0.01 in each of 24 directions: the cosine is about 1 / sqrt(1 + 0.24)
        cosine = (features * clean).sum(dim=-1).mean()
        assert float(cosine) == pytest.approx(1 / 1.24**0.5, abs=0.06)


def test_images_are_scaled_like_texts(recipe_of, tmp_path):
    """At validation and inference features are unit vectors too; the checkpoint knows it."""
    result = train(recipe_of(tmp_path, "training.max_steps=2"))
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert model.config.unit_features
    features = torch.randn(2, 1, 24)
    torch.testing.assert_close(model.map_features(features), model.map_features(7 * features))
    losses = [row for row in read_log(tmp_path) if "validation/loss" in row]
    assert all(row["validation/loss"] != row["validation/shuffled_loss"] for row in losses)


def test_killed_and_resumed_draws_the_same_noise(recipe_of, tmp_path, monkeypatch):
    train(recipe_of(tmp_path / "whole"))
    take = Trainer.step

    def step_or_die(self, batches):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of(tmp_path / "cut"))
    torch.manual_seed(99)
    train(recipe_of(tmp_path / "cut"))
    whole, cut = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_without_validation(recipe_of, tmp_path):
    assert train(recipe_of(tmp_path, "data.validation=[]", "training.max_steps=2")).steps == 2


def test_what_does_not_fit_is_refused(recipe_of, tmp_path, clip):
    with pytest.raises(ConfigError, match=r"data\.text_only: needs an encoder .* output 'pooled'; got 'tiny-capdec'"):
        recipe_of(tmp_path, "model.vision_encoder.output=patch")
    with pytest.raises(ConfigError, match=r"objectives\.contrastive: needs images to train on"):
        recipe_of(tmp_path, "objectives.contrastive={}")
    with pytest.raises(ConfigError, match=r"'resnet18' of source 'timm' .* has no text tower"):
        TextVectors.from_texts(vision_encoder_config(source="timm", name="resnet18"), ["a dog"])
    two = Sample("two", (tmp_path / "a.png", tmp_path / "b.png"), ("a red circle",))
    collator = TextOnlyCollator(build_model(recipe_of(tmp_path))[1], TextVectors(["a red circle"], torch.ones(1, 24)))
    with pytest.raises(DataError, match=r"data\.text_only: sample 'two' has 2 images, expected 1"):
        collator([ImageGroup(two.images, (two,))], [[(two, "a red circle")]])
