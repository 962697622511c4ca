"""Warnings of captions that have collapsed name the key to change by what was measured."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from frozenprefix.training.diagnosis import Measured, advice, symptoms, warn_of_symptoms
from frozenprefix.training.sampling import CaptionSamples, greedy_captions
from frozenprefix.training.tracking import read_log, text_of
from frozenprefix.training.trainer import Trainer, train

GOOD = CaptionSamples(
    images=[f"photos/{n}.jpg" for n in range(8)],
    captions=[f"a dog {n}" for n in range(8)],
    ended=1.0,
    fits=1.0,
    prefix_scale=1.1,
    prefix_spread=0.4,
    feature_spread=0.7,
)


def measured(samples=GOOD, loss=2.0, shuffled=2.5, **known) -> Measured:
    return Measured(samples, {"loss": loss, "shuffled_loss": shuffled}, learning_rate=1e-3, **known)


def same(count=8) -> CaptionSamples:
    return replace(GOOD, captions=["a dog"] * count + ["a cat"] * (8 - count))


def test_nothing_is_said_of_good_captions(caplog):
    warn_of_symptoms(9, measured())
    assert symptoms(measured(replace(GOOD, ended=0.0, fits=0.2))) == [], "references are as long"
    assert symptoms(measured(same(6))) == []
    assert symptoms(measured(replace(GOOD, images=["a"] * 2, captions=["a dog"] * 2))) == [], "too few to tell"
    assert caplog.messages == []


def test_what_is_wrong_is_named():
    assert symptoms(measured(same(7))) == ["7 of 8 images get the caption 'a dog'"]
    assert symptoms(measured(replace(GOOD, ended=0.0))) == ["none of 8 captions ends by itself"]
    (blind,) = symptoms(measured(shuffled=2.001))
    assert "does not look at the image: the validation loss is 2.000 with the right image and 2.001" in blind
    assert len(symptoms(measured(replace(same(), ended=0.0), shuffled=2.0))) == 3


WORDS = "times as large as word embeddings"
ADVICE = [
    (replace(GOOD, prefix_scale=12.0), {}, "learning rate", f"12.0 {WORDS}; lower"),
    (replace(GOOD, prefix_scale=0.05), {}, "scale", f"0.05 {WORDS}; set model.mapper.output_norm=layer"),
    (replace(GOOD, feature_spread=0.08), {}, "layer", "differ by only 8%; choose another model.vision_encoder"),
    (replace(GOOD, prefix_spread=0.001), {}, "learning rate", "differ by 70% into prefix embeddings that differ by"),
    (GOOD, {"first_loss": 1.9, "gradient_norm": 80.0}, "learning rate", "1.900 to 2.000, with a gradient norm of 80"),
    (
        GOOD,
        {"first_loss": 2.1, "gradient_norm": 80.0},
        "learning rate",
        "now 2.000, with a gradient norm of 80); raise",
    ),
    (GOOD, {"first_loss": 2.1, "shuffled": 2.001}, "learning rate", "hardly fallen (2.100 at first, now 2.000); raise"),
    (GOOD, {"shuffled": 2.001, "first_loss": 5.0}, "data", "fallen from 5.000, but a wrong image does as well"),
    (GOOD, {"shuffled": 2.001}, "data", "check that captions belong to their images"),
    (GOOD, {"first_loss": 6.0, "gradient_norm": 2.0}, "length of the run", "so the images are used; train longer"),
]


@pytest.mark.parametrize(("samples", "values", "what", "figure"), ADVICE)
def test_advice_goes_by_what_was_measured(samples, values, what, figure):
    text = advice(measured(samples, **values))
    assert text.startswith(f"{what}: ")
    assert figure in text


def test_the_warning_has_symptom_and_advice(caplog):
    warn_of_symptoms(9, measured(replace(same(), prefix_scale=12.0)))
    (message,) = caplog.messages
    assert message.startswith("step 9: 8 of 8 images get the caption 'a dog'. Change the learning rate: the prefix")
    assert "(now 1.0e-03)" in message


def test_captions_as_text_for_trackers():
    logged = {f"validation/{name}": value for name, value in GOOD.values().items()}
    assert text_of(logged)["validation/captions"].splitlines()[1] == "- 1.jpg: a dog 1"
    assert text_of({"validation/loss": 1.0}) == {}


# ── in a run ──


@pytest.fixture
def trainer(tiny_recipe, tmp_path):
    trainer = Trainer(tiny_recipe(tmp_path))
    trainer.setup()
    return trainer


def samples_of(trainer: Trainer, **options) -> CaptionSamples:
    parts = (trainer.model, trainer.processor, trainer.collator, trainer.validation_groups)
    samples = greedy_captions(*parts, **options)
    assert samples is not None
    return samples


def test_images_are_encoded_once(trainer, monkeypatch):
    encoder, seen = trainer.model.vision_encoder, []
    assert trainer.collator.features is not None
    monkeypatch.setattr(trainer.collator, "features", None)
    handle = encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    samples = samples_of(trainer)
    handle.remove()
    assert sum(seen) == len(samples.images)


def test_what_is_measured_of_a_model(trainer):
    samples = samples_of(trainer)
    assert samples.images == [str(group.images[0]) for group in trainer.validation_groups][:8]
    assert samples.prefix_scale == pytest.approx(1.0, abs=0.05), "it starts as large as words are"
    assert samples.prefix_spread > 0.02
    torch.nn.init.zeros_(trainer.model.mapper.body.output_layer.weight)
    flat = samples_of(trainer)
    assert flat.prefix_spread < 1e-3
    assert flat.feature_spread == samples.feature_spread > 0.02
    assert flat.distinct == 1


@pytest.mark.parametrize(("ids", "ended"), [([5, 6, 2], 1.0), ([5, 6, 7], 0.0)])
def test_share_of_captions_that_end(trainer, monkeypatch, ids, ended):
    monkeypatch.setattr("frozenprefix.training.sampling.generate_ids", lambda *_, **__: [ids] * 4)
    samples = samples_of(trainer, max_new_tokens=3)
    assert (samples.ended, samples.fits) == (ended, 0.0), "captions of drawings have more than three tokens"
    assert samples_of(trainer, max_new_tokens=30).fits == 1.0


def test_a_run_logs_and_shows_them(tiny_recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tiny_recipe(tmp_path, "training.log_every=2"))
    rows = read_log(tmp_path)
    (first, *_), steps = [r for r in rows if "validation/captions" in r], [r for r in rows if "data_wait_share" in r]
    assert 0 <= first["validation/ended_share"] <= 1
    assert 1 <= first["validation/distinct_captions"] <= len(first["validation/captions"])
    assert len(first["validation/caption_images"]) == len(first["validation/captions"])
    assert [row["step"] for row in steps] == [2, 4, 6]
    assert all(0 < row["data_wait_share"] < 1 for row in steps)
    name = first["validation/caption_images"][0].rpartition("/")[2]
    assert [m.partition(":")[0] for m in caplog.messages if f": {name}: " in m] == ["step 0", "step 3", "step 6"]
