"""Training of locked-image text models: what it leaves, resuming, the gradient cache, recipes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frozenprefix.config import load_recipe
from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.config.yaml import write_yaml
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.tasks.retrieval import evaluate_retrieval
from frozenprefix.inference.embedding import Embedder
from frozenprefix.models.contrastive import LockedImageTextModel, load_processor
from frozenprefix.training.contrastive import ContrastiveTrainer, train_contrastive
from frozenprefix.training.registry import TRAINERS
from frozenprefix.training.setup import load_samples
from frozenprefix.training.tracking import read_log
from tests.helpers import ROOT
from tests.helpers.contrastive import MINILM, contrastive_recipe
from tests.helpers.training import assert_same_tensors, run_with_hashes


@pytest.fixture(scope="module")
def recipe_of(tiny_bert, shapes):
    return lambda output_dir, *overrides: contrastive_recipe(tiny_bert, shapes, output_dir, *overrides)


@pytest.fixture(scope="module")
def trained(recipe_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = ContrastiveTrainer(recipe_of(folder))
    result, hashes = run_with_hashes(trainer)
    return result, trainer, hashes


# ── the trained model ──


def test_frozen_parts_keep_every_bit_and_stay_in_evaluation_mode(trained):
    _, trainer, (before, after) = trained
    assert before == after
    model = trainer.model.train()
    assert not model.vision_encoder.training
    layers = model.text_tower.model.encoder.layer
    assert [layer.training for layer in layers] == [False, True, True]
    assert not model.text_tower.model.embeddings.dropout.training
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_checkpoint_holds_what_is_trained_and_gives_the_same_vectors(trained, recipe_of):
    result, trainer, _ = trained
    names = set(load_file(result.best / "model.safetensors"))
    assert not any("vision_encoder" in name or "layer.0" in name or "embeddings" in name for name in names)
    assert {"logit_scale.log_scale", "image_projection.0.weight"} <= names
    last = result.output_dir / "last"
    model = LockedImageTextModel.from_pretrained(last)
    processor = load_processor(str(last), model.config)
    texts = processor.prepare_texts(["a red circle", "the blue square is blue"])
    pixels = torch.randn(2, 3, 32, 32)
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(**texts), trainer.model.encode_text(**texts))
        features = model.encode(pixels)
        torch.testing.assert_close(model.encode_image(pixels), trainer.model.encode_image(image_features=features))
        assert model.encode_image(pixels).norm(dim=-1) == pytest.approx(torch.ones(2))
    assert len(processor.prepare_texts(["dog " * 200])["input_ids"][0]) == 40


def test_another_frozen_part_is_refused(trained, tmp_path):
    result, _, _ = trained
    config = json.loads((result.best / "config.json").read_text())
    config["identity"]["text_tower"]["sha256"] = "0" * 64
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((result.best / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_tower: this checkpoint was trained with sha256='000"):
        LockedImageTextModel.from_pretrained(tmp_path)


def test_forward_wants_to_know_which_text_is_whose(trained):
    _, trainer, _ = trained
    texts = trainer.processor.prepare_texts(["a red circle", "a blue square", "red"])
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(ConfigError, match="got none for 2 images and 3 texts"):
        trainer.model(**texts, pixel_values=pixels)
    out = trainer.model(**texts, pixel_values=pixels, text_image=torch.tensor([0, 1, 0]))
    assert out.loss.ndim == 0
    with pytest.raises(ConfigError, match=r"image_features: got shape \(2, 3\)"):
        trainer.model.encode_image(image_features=torch.randn(2, 3))


# ── training ──


def test_a_run_leaves_its_log_and_checkpoints(trained):
    result, _, _ = trained
    assert (result.steps, result.targets_seen) == (6, 6 * 4 * 2)
    rows = read_log(result.output_dir)
    validations = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert result.best_value == max(row["validation/recall@10"] for row in validations[1:])
    assert {"validation/text_to_image_recall@5", "validation/image_to_text_median_rank"} <= validations[0].keys()
    files = {path.name for path in result.best.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "processor_config.json", "tokenizer.json"} <= files
    assert load_recipe(result.best / "recipe.yaml").kind == "contrastive"


def test_the_loss_falls(recipe_of, tmp_path):
    result = train_contrastive(recipe_of(tmp_path, "training.max_steps=60", "training.validate_every=60"))
    losses = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    samples = load_samples(result_recipe(result).data.train, "train")
    scores = evaluate_retrieval(
        Embedder.from_pretrained(result.best), samples, EvaluationOptions(predictions=tmp_path / "found.jsonl")
    )
    assert scores["n"] == 8
    best, chance = scores["metrics"], scores["baselines"]["chance"]
    assert best["text_to_image_recall@1"] > 2 * chance["text_to_image_recall@1"]


def result_recipe(result) -> ContrastiveRecipe:
    return load_recipe(result.best / "recipe.yaml")


def test_a_resumed_run_is_the_undisturbed_one(trained, recipe_of, tmp_path, monkeypatch):
    whole, _, _ = trained
    take = ContrastiveTrainer.step

    def stop_at_three(self, batches):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return take(self, batches)

    monkeypatch.setattr(ContrastiveTrainer, "step", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_contrastive(recipe_of(tmp_path))
    monkeypatch.undo()
    torch.rand(7)  # the random state must come from the checkpoint
    train_contrastive(recipe_of(tmp_path))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(whole.output_dir / "last" / name, tmp_path / "last" / name)


def test_another_recipe_is_not_resumed(trained, recipe_of):
    result, _, _ = trained
    with pytest.raises(CheckpointError, match=r"training.tower_learning_rate was 0.003, now 0.1"):
        train_contrastive(recipe_of(result.output_dir, "training.tower_learning_rate=0.1"))


def test_the_gradient_cache_changes_nothing(recipe_of, tmp_path):
    """Without dropout, whose numbers fall differently over a step."""
    paths = []
    for cached in ("false", "true"):
        folder = tmp_path / cached
        trainer = ContrastiveTrainer(recipe_of(folder, f"training.gradient_cache={cached}", "training.max_steps=2"))
        build = trainer.build_model

        def build_without_dropout(build=build, trainer=trainer):
            build()
            for module in trainer.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            trainer.model.text_tower.model.config.attention_probs_dropout_prob = 0.0

        trainer.build_model = build_without_dropout
        trainer.run("never")
        paths.append([row["loss"] for row in read_log(folder) if "loss" in row])
    assert paths[0] == pytest.approx(paths[1], abs=1e-5)


def test_images_without_a_cache(recipe_of, tmp_path, trained):
    whole, _, _ = trained
    train_contrastive(recipe_of(tmp_path, "data.feature_cache=off"))
    cached, direct = ([r["loss"] for r in read_log(f) if "loss" in r] for f in (whole.output_dir, tmp_path))
    assert direct == pytest.approx(cached, abs=0.02)  # features are cached in float16


def test_too_few_images(recipe_of, tmp_path):
    with pytest.raises(DataError, match="got 8 images that can be read, expected at least"):
        train_contrastive(recipe_of(tmp_path, "training.images_per_step=9"))


# ── recipes ──


def test_the_kind_picks_the_recipe(recipe_of, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(recipe_of(tmp_path).to_yaml())
    recipe = load_recipe(file, ["training.max_steps=9"])
    assert isinstance(recipe, ContrastiveRecipe)
    assert recipe.training.max_steps == 9
    assert TRAINERS.get(recipe.kind) is train_contrastive
    file.write_text(write_yaml({"kind": "contrastiv"}))
    with pytest.raises(ConfigError, match=r"kind: got 'contrastiv', .*did you mean 'contrastive'"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=2", "training.epochs: got 2 with max_steps 6"),
        ("training.images_per_step=1", "training.images_per_step: got 1, expected at least 2"),
        ("training.packing=trie", "training.packing: unknown key"),
        ("model.objective=clip", "model.objective: got 'clip', expected 'infonce' or 'sigmoid'"),
        ("model.vision_encoder.trainable=all", "expected 'none': the image encoder is locked"),
        ("model.vision_encoder.peft={type: lora}", "got 'lora', expected null: the image encoder is locked"),
        ("data.prompts={caption: 'A photo of '}", "data.prompts: has no effect in a contrastive recipe"),
    ],
)
def test_wrong_recipes(recipe_of, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(tmp_path, override)


def test_the_shipped_recipe_is_right():
    path = ROOT / "recipes" / "lit_flickr8k.yaml"
    recipe = load_recipe(path)
    assert recipe.model.text_tower.path == MINILM


# ── real photos ──


@pytest.mark.slow
@pytest.mark.network
def test_towers_of_real_weights_meet(data_root, tmp_path):
    """Half a minute of training on 400 photos is enough to be far above chance on photos that were seen."""
    recipe = load_recipe(
        ROOT / "recipes" / "lit_flickr8k.yaml",
        [
            f"output_dir={tmp_path}",
            f"data.train=[{{type: captions, path: {data_root / 'flickr8k'}, split: train, limit: 400}}]",
            "data.validation=[]",
            "training.epochs=null",
            "training.max_steps=12",
            "training.warmup_steps=0",
            "training.images_per_step=64",
        ],
    )
    result = train_contrastive(recipe)
    samples = load_samples(recipe.data.train, "train")
    scores = evaluate_retrieval(
        Embedder.from_pretrained(result.best), samples, EvaluationOptions(predictions=tmp_path / "found.jsonl")
    )
    for name in ("text_to_image_recall@10", "image_to_text_recall@10"):
        assert scores["metrics"][name] > 4 * scores["baselines"]["chance"][name]
        assert scores["baselines"]["shuffled"][name] < 3 * scores["baselines"]["chance"][name]
    assert np.isfinite(scores["metrics"]["text_to_image_median_rank"])


def test_texts_that_the_tower_cuts_are_counted(tiny_bert, shapes, tmp_path, caplog):
    rows = [json.loads(line) for line in (shapes / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(shapes / row["image"])
    rows[0]["captions"] = ["a red circle " * 40, "a red circle"]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_contrastive(contrastive_recipe(tiny_bert, tmp_path, tmp_path / "run", "training.max_steps=1"))
    (line,) = [message for message in caplog.messages if "are cut" in message]
    assert re.fullmatch(
        r"data\.\w+: 1 of \d+ targets are cut: longer than model\.text_tower\.max_tokens = \d+ 1 \(a red circle .*\)",
        line,
    )
