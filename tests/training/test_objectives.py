"""What is learned beside the next token: contrastive heads, distillation to the bare LM, and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frozenprefix.config.objectives import ObjectivesSection, is_used, weight_at
from frozenprefix.data.samplers import ImageStream
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives import Distillation
from frozenprefix.training.setup import build_model
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.training import PLAIN_DESCENT, assert_same_tensors, free_port, losses_of, run_python, started

CONTRASTIVE = "objectives.contrastive={dim: 8}"
ADAPTERS = "model.fusion={type: adapters}"


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm, shapes):
    """Six steps on captions alone."""
    captions = f"data.train=[{{type: captions, path: {shapes}, split: train}}]"
    return lambda folder, *overrides: tiny_recipe(folder, captions, *overrides, lm=sharp_lm)


def first_batch(trainer: Trainer):
    return trainer.objectives.prepare(next(trainer.batches()), 0)


def wake(module: torch.nn.Module) -> None:
    """Move adapters away from the identity that they start as."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


# ── the section ──


@pytest.mark.parametrize(
    ("weight", "done", "expected"), [(0.5, 0.7, 0.5), ((1.0, 0.0), 0.25, 0.75), ((0.0, 2.0), 1.5, 2.0)]
)
def test_weights_by_hand(weight, done, expected):
    assert weight_at(weight, done) == pytest.approx(expected)


def test_a_weight_that_grows_from_0_is_used():
    assert is_used((0.0, 1.0))
    assert not is_used((0.0, 0.0))
    assert ObjectivesSection().lm == 1.0


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["objectives.lm=0"], r"objectives\.lm: got 0 with nothing else that learns from images"),
        (["objectives.contrastive={loss: triplet}"], r"objectives\.contrastive\.loss: got 'triplet'"),
        (["objectives.contrastive={dims: 8}"], r"did you mean 'dim'"),
        (["objectives.lm=-1"], r"objectives\.lm: got -1"),
        (["objectives.self_critical={samples: 1, baseline: leave_one_out}"], r"samples: got 1, expected at least 2"),
        (["data.text_only={}"], r"data\.text_only: needs an encoder .* got 'test_vit' of source 'timm'"),
    ],
)
def test_wrong_sections(recipe_of, tmp_path, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        recipe_of(tmp_path, *overrides)


def test_objectives_belong_to_what_a_resumed_run_shares(recipe_of, tmp_path):
    train(recipe_of(tmp_path, CONTRASTIVE, "training.max_steps=2"))
    with pytest.raises(CheckpointError, match="another recipe: objectives was"):
        train(recipe_of(tmp_path, "objectives.contrastive={dim: 8, weight: 0.5}", "training.max_steps=2"))


# ── contrastive ──


@pytest.mark.parametrize("fusion", ["prefix", "adapters"])
def test_vectors_by_hand(recipe_of, tmp_path, fusion):
    model, processor = build_model(recipe_of(tmp_path, CONTRASTIVE, f"model.fusion={{type: {fusion}}}"))
    model.eval()
    texts = processor.prepare_texts(["a red circle", "the cross is blue in the street"])
    assert texts["attention_mask"][0].sum() < texts["attention_mask"][1].sum()
    assert texts["input_ids"][1, -1] == processor.tokenizer.eos_token_id
    vectors = model.encode_text(**texts)
    for row, vector in enumerate(vectors):  # alone, without padding, through the whole LM
        ids = texts["input_ids"][row][texts["attention_mask"][row].bool()]
        hidden = model.language_model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(vector, F.normalize(model.contrastive.text(hidden), dim=0))
    images = torch.randn(2, 3, 32, 32)
    mean = model.prefix(images).mean(dim=1)
    torch.testing.assert_close(model.encode_image(images), F.normalize(model.contrastive.image(mean), dim=-1))
    vectors.sum().backward()
    assert model.contrastive.text.weight.grad is not None
    trained = [p.grad is not None for p in model.fusion.parameters()]
    assert all(trained), "the gradient passes through the LM where something in it is trained"
    assert all(p.grad is None for p in model.language_model.parameters())


def test_a_model_without_heads_says_so(recipe_of, tmp_path):
    model, processor = build_model(recipe_of(tmp_path))
    assert not any(name.startswith("contrastive") for name in model.trainable_state())
    with pytest.raises(ConfigError, match=r"trained without a contrastive objective; train it with objectives\."):
        model.encode_text(**processor.prepare_texts(["a dog"]))


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_training_brings_images_and_texts_together(recipe_of, tmp_path, loss):
    section = f"objectives={{lm: [1.0, 0.5], contrastive: {{dim: 8, loss: {loss}, weight: 0.7}}}}"
    steps = ("training.max_steps=40", "training.validate_every=40", "training.images_per_step=8")
    result = train(recipe_of(tmp_path, section, *steps))
    rows = [row for row in read_log(tmp_path) if "loss/contrastive" in row]
    for row in (rows[0], rows[19], rows[-1]):
        weight = weight_at((1.0, 0.5), (row["step"] - 1) / 40)
        assert row["loss"] == pytest.approx(weight * row["loss/lm"] + 0.7 * row["loss/contrastive"], rel=1e-5)
    assert rows[-1]["loss/contrastive"] < 0.6 * rows[0]["loss/contrastive"]
    assert all(0 <= row["validation/recall@1"] <= 1 for row in read_log(tmp_path) if "validation/loss" in row)
    # the heads are in the checkpoint
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    assert "contrastive.logit_scale.log_scale" in load_file(result.best / "model.safetensors")


def test_two_captions_of_one_image_are_no_negatives(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path, CONTRASTIVE))
    batch = first_batch(trainer)
    assert batch["image_ids"].tolist() == batch["text_ids"].view(4, 2)[:, 0].tolist()
    assert batch["text_ids"].view(4, 2).diff(dim=1).eq(0).all()
    assert len(set(batch["image_ids"].tolist())) == 4


def test_recall_of_a_perfect_model_is_1(recipe_of, tmp_path, monkeypatch):
    trainer = started(recipe_of(tmp_path, CONTRASTIVE))
    groups = trainer.validation_groups
    places = {text: i for i, g in enumerate(groups) for s in g.samples for text in s.targets}
    vectors = iter(torch.eye(8)[:4].split(2))
    monkeypatch.setattr(trainer.model, "encode_image", lambda **_: next(vectors))
    monkeypatch.setattr(
        trainer.processor, "prepare_texts", lambda texts: {"ids": torch.tensor([places[t] for t in texts])}
    )
    monkeypatch.setattr(trainer.model, "encode_text", lambda ids: torch.eye(8)[ids])
    assert trainer.objectives.validate(trainer.collator, groups, 2) == {"recall@1": 1.0}


def test_without_the_lm_the_best_is_chosen_by_recall(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "objectives={lm: 0, contrastive: {dim: 8}}"))
    recalls = [row["validation/recall@1"] for row in read_log(tmp_path) if "validation/recall@1" in row]
    assert result.best_value == -max(recalls[1:])
    assert "loss/lm" not in read_log(tmp_path)[1]


def test_questions_are_refused(tiny_recipe, sharp_lm, tmp_path):
    with pytest.raises(ConfigError, match=r"objectives\.contrastive: learns from captions .* of task 'vqa'"):
        train(tiny_recipe(tmp_path, CONTRASTIVE, lm=sharp_lm))


def test_killed_and_resumed_is_the_undisturbed_run(recipe_of, tmp_path, monkeypatch):
    section = "objectives={lm: 1.0, contrastive: {dim: 8}, distillation: {}}"
    recipes = [recipe_of(tmp_path / name, section, ADAPTERS) for name in "ab"]
    train(recipes[0])
    take = Trainer.step

    def step_or_die(self, batches):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(recipes[1])
    torch.manual_seed(99)
    train(recipes[1])
    whole, resumed = (load_file(tmp_path / name / "last/model.safetensors") for name in "ab")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "overrides",
    [
        ("objectives={lm: 0.5, contrastive: {dim: 8}}",),
        ("objectives={lm: 0, contrastive: {dim: 8, loss: sigmoid}}", ADAPTERS),
    ],
)
def test_accumulation_compares_all_images_of_the_step(plain_descent, recipe_of, tmp_path, overrides):
    """The loss of a step, and its gradient, do not depend on the micro-batches that it is cut into."""
    for parts in (1, 2):
        settings = ("training.learning_rate=1", "training.max_steps=3", f"training.gradient_accumulation_steps={parts}")
        train(recipe_of(tmp_path / str(parts), *overrides, *settings))
    one, two = (tmp_path / name for name in "12")
    assert losses_of(two, "loss/contrastive") == pytest.approx(losses_of(one, "loss/contrastive"), rel=1e-5)
    assert_same_tensors(one / "last/model.safetensors", two / "last/model.safetensors", atol=1e-5)


def test_accumulation_encodes_twice_with_the_same_dropout(recipe_of, tmp_path):
    """The embeddings whose gradient was taken are those that carry it on."""
    settings = ("model.mapper.dropout=0.5", "training.gradient_accumulation_steps=2")
    trainer = started(recipe_of(tmp_path, CONTRASTIVE, *settings))
    parts = [trainer.objectives.prepare(batch, n) for n, batch in zip(range(2), trainer.batches(), strict=False)]
    embeds: list[torch.Tensor] = []
    embed = trainer.model.heads.embed_prefix
    trainer.model.heads.embed_prefix = lambda prefix: embeds.append(embed(prefix)) or embeds[-1]
    trainer.objectives.prepare_step(parts)
    for part in parts:
        trainer.objectives(part, {"contrastive": 1.0, "lm": 1.0})
    assert len(embeds) == 4
    assert not torch.equal(embeds[0], embeds[1])
    assert all(torch.equal(embeds[n], embeds[n + 2].detach()) for n in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(plain_descent, recipe_of, tmp_path, accumulation):
    """Images of both are told apart from each other, and the gradient is that of one process with all of them."""
    section = "objectives={lm: 0.5, contrastive: {dim: 8}, distillation: {}}"
    settings = (section, ADAPTERS, "training.learning_rate=1", "training.max_steps=3")
    train(recipe_of(tmp_path / "one", *settings))
    cut = f"training.gradient_accumulation_steps={accumulation}"
    (tmp_path / "recipe.yaml").write_text(recipe_of(tmp_path / "two", *settings, cut).to_yaml())
    (tmp_path / "train.py").write_text(PLAIN_DESCENT)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    done = run_python(*launcher, str(tmp_path / "train.py"), str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "last/model.safetensors" for name in ("one", "two"))
    assert_same_tensors(one, two, atol=1e-5)
    for name in ("loss", "loss/lm", "loss/contrastive", "loss/distillation"):
        assert losses_of(tmp_path / "two", name) == pytest.approx(losses_of(tmp_path / "one", name), rel=1e-4, abs=1e-6)


# ── distillation ──


def test_a_frozen_lm_is_not_distilled(recipe_of, tmp_path):
    with pytest.raises(ConfigError, match=r"objectives\.distillation: the language model has no trained parameters"):
        train(recipe_of(tmp_path, "objectives.distillation={}"))


def test_divergence_by_hand(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path, "objectives.distillation={}", ADAPTERS))
    batch = first_batch(trainer)
    model, processor = trainer.model.eval(), trainer.processor
    kept = {"lm": 1.0, "distillation": 1.0}
    assert float(trainer.objectives(batch, kept)["distillation"].detach()) == pytest.approx(0.0, abs=1e-6), (
        "adapters start as none"
    )
    wake(model.fusion)
    found = trainer.objectives(batch, kept)["distillation"]
    texts = [text for _, pairs in batch["samples"] for _, text in pairs]
    bare = build_model(recipe_of(tmp_path))[0].language_model
    total, count = torch.zeros(()), 0
    for text in texts:  # one by one, against an LM that never had adapters
        ids = processor.prepare_texts([text])["input_ids"]
        adapted, plain = (lm(input_ids=ids).logits[0, :-1].log_softmax(-1) for lm in (model.language_model, bare))
        total = total + (plain.exp() * (plain - adapted)).sum()
        count += len(adapted)
    assert trainer.objectives.counts(batch)["distillation"] == count
    torch.testing.assert_close(found, total / count)
    assert float(found.detach()) > 0.001
    parameters = list(model.fusion.parameters())
    for one, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(total / count, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_peft_adapters_are_distilled_too(recipe_of, tmp_path):
    section = ("objectives.distillation={}", "model.language_model.peft={type: lora}")
    trainer = started(recipe_of(tmp_path, *section))
    batch = first_batch(trainer)
    nothing = trainer.objectives(batch, {"distillation": 1.0})["distillation"]
    assert trainer.model.trains_text
    for name, parameter in trainer.model.language_model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    loss = trainer.objectives(batch, {"distillation": 1.0})["distillation"]
    assert float(loss.detach()) > 1e-4 > abs(float(nothing.detach()))


def test_a_text_file_is_read_in_turn(recipe_of, tmp_path):
    words = "the dog runs in the grass and the cat sits on the street . " * 30
    (tmp_path / "text.txt").write_text(words)
    section = f"objectives.distillation={{texts: {tmp_path / 'text.txt'}}}"
    trainer = started(recipe_of(tmp_path / "run", section, ADAPTERS))
    _, distillation = trainer.objectives.terms
    assert isinstance(distillation, Distillation)
    decoded = trainer.processor.tokenizer.decode([token for piece in distillation.pieces for token in piece])
    assert decoded == words
    stream = ImageStream(len(distillation.pieces), 4, 0)
    batch = first_batch(trainer)
    pieces = [distillation.pieces[piece] for _, piece in stream.step(0)]
    assert batch["plain_text"]["attention_mask"].sum(dim=1).tolist() == [len(piece) for piece in pieces]
    assert batch["plain_text"]["input_ids"][0, : len(pieces[0])].tolist() == pieces[0]
    with pytest.raises(DataError, match=r"objectives\.distillation\.texts: got '/nowhere', expected a text file"):
        started(recipe_of(tmp_path / "run", "objectives.distillation={texts: /nowhere}", ADAPTERS))


def test_distillation_keeps_the_lm_near_itself(recipe_of, tmp_path):
    """Two runs with adapters: the distilled one drifts less."""
    drifts = []
    for name, section in (("free", "objectives.lm=1.0"), ("kept", "objectives.distillation={weight: 20.0}")):
        result = train(recipe_of(tmp_path / name, section, ADAPTERS, "training.max_steps=20"))
        drifts.append(drift(result.output_dir / "last"))
    assert drifts[1] < 0.5 * drifts[0]


def drift(checkpoint: Path) -> float:
    """Mean difference of the adapted LM's log-probabilities to the bare LM's on a caption."""
    model = FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)
    processor = FrozenPrefixProcessor.from_pretrained(checkpoint)
    ids = processor.prepare_texts(["a circle in red"])["input_ids"]
    with torch.no_grad():
        adapted = model.language_model(input_ids=ids).logits.log_softmax(-1)
        with model.bare_language_model():
            bare = model.language_model(input_ids=ids).logits.log_softmax(-1)
    return float((adapted - bare).abs().mean())


# ── starting from a checkpoint ──


def test_init_from(recipe_of, tmp_path):
    first = train(recipe_of(tmp_path / "first", "training.max_steps=2"))
    trainer = Trainer(recipe_of(tmp_path / "second", f"training.init_from={first.best}", "seed=5", CONTRASTIVE))
    trainer.build_model()
    state, saved = trainer.model.trainable_state(), load_file(first.best / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert {name.split(".")[0] for name in state.keys() - saved.keys()} == {"contrastive"}, "heads start anew"
    lora = "model.language_model.peft={type: lora, r: 2}"
    trainer = Trainer(recipe_of(tmp_path / "fourth", f"training.init_from={first.best}", lora))
    trainer.build_model()
    assert all(torch.equal(trainer.model.trainable_state()[name], tensor) for name, tensor in saved.items())
    adapted = trainer.model.adapters["language_model"].named_parameters()
    assert all(not p.any() for name, p in adapted.items() if "lora_B" in name), "adapters start anew"
    adapted_first = train(recipe_of(tmp_path / "adapted", lora, "training.max_steps=2"))
    with pytest.raises(CheckpointError, match=r"language_adapter/, and the recipe has no model\.language_model\.peft"):
        Trainer(recipe_of(tmp_path / "third", f"training.init_from={adapted_first.best}")).build_model()
    with pytest.raises(CheckpointError, match=r"training\.init_from: .*does not fit.*fusion"):
        Trainer(recipe_of(tmp_path / "third", f"training.init_from={first.best}", ADAPTERS)).build_model()
    with pytest.raises(CheckpointError, match=r"training\.init_from: got '/nowhere', expected a checkpoint folder"):
        Trainer(recipe_of(tmp_path / "third", "training.init_from=/nowhere")).build_model()
    other = "model.vision_encoder.name=test_vit2"
    with pytest.raises(CheckpointError, match="vision_encoder: this checkpoint was trained with"):
        Trainer(recipe_of(tmp_path / "third", f"training.init_from={first.best}", other)).build_model()
