"""The LM on text alone, before and after training."""

from __future__ import annotations

import json
import math

import pytest
import torch

from frozenprefix.errors import DataError, TrainingError
from frozenprefix.evaluation.text_ability import text_ability, text_perplexity, text_windows
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.setup import build_model
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.lm import make_tokenizer

TEXT = "a man runs on the green grass and a woman sits in the street . what color is this ? " * 12
ADAPTERS = "model.fusion={type: adapters}"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm, text_file):
    return lambda folder, *overrides: tiny_recipe(folder, f"evaluation.text={text_file}", *overrides, lm=sharp_lm)


def test_perplexity_by_hand(recipe_of, tmp_path):
    """The tiny LM has 128 positions: windows of 128 tokens, the first token of each is given."""
    model, processor = build_model(recipe_of(tmp_path))
    ids = processor.tokenizer(TEXT)["input_ids"]
    windows = [ids[at : at + 128] for at in range(0, len(ids), 128)]
    assert len(windows) > 2
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model.language_model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-float(logits[place, token]) for place, token in enumerate(window[1:])]
    measured = text_ability(model.train(), processor.tokenizer, TEXT)
    assert measured.tokens == len(losses) == len(ids) - len(windows)
    assert measured.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert text_perplexity(model, processor.tokenizer, TEXT) == measured.perplexity
    assert model.training, "the mode is as it was"


def test_adapters_can_be_left_out(recipe_of, tmp_path):
    bare = build_model(recipe_of(tmp_path))[0]
    model, processor = build_model(recipe_of(tmp_path, ADAPTERS))
    torch.manual_seed(0)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = text_ability(bare, processor.tokenizer, TEXT)
    assert text_ability(model, processor.tokenizer, TEXT, adapted=False) == plain
    adapted = text_ability(model, processor.tokenizer, TEXT)
    assert adapted.logits_sha256 != plain.logits_sha256
    assert adapted.perplexity != pytest.approx(plain.perplexity, rel=1e-3)


def test_one_bit_of_one_weight_shows(recipe_of, tmp_path):
    model, processor = build_model(recipe_of(tmp_path))
    before = text_ability(model, processor.tokenizer, TEXT)
    assert text_ability(model, processor.tokenizer, TEXT) == before
    weight = model.language_model.model.norm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert text_ability(model, processor.tokenizer, TEXT).logits_sha256 != before.logits_sha256


def test_windows_start_with_the_start_token_where_the_tokenizer_sets_one():
    tokenizer = make_tokenizer()
    ids = tokenizer("a dog runs", add_special_tokens=False)["input_ids"]
    assert text_windows(tokenizer, "a dog runs", 100) == [ids], "this one has a start token and does not set it"

    class Starting:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [1] * add_special_tokens + [7] * len(text)}

    assert text_windows(Starting(), "abcde", 3) == [[1, 7, 7], [1, 7, 7], [1, 7]]
    with pytest.raises(DataError, match="text: got 0 tokens, expected at least 2"):
        text_windows(tokenizer, "", 3)


def test_a_frozen_lm_is_unchanged_to_the_bit(recipe_of, tmp_path):
    trainer = Trainer(recipe_of(tmp_path))
    logits = []
    build = trainer.build_model

    def build_and_look():
        build()
        logits.append(logits_of(trainer.model))

    trainer.build_model = build_and_look
    trainer.run("never")
    assert torch.equal(logits[0], logits_of(trainer.model))
    summary = json.loads((tmp_path / "text_ability.json").read_text())
    assert summary["unchanged"] is True
    assert summary["before"] == summary["after"]
    rows = [row for row in read_log(tmp_path) if "text/perplexity" in row]
    assert [row["step"] for row in rows] == [0, 6]
    assert [row["text/perplexity"] for row in rows] == [summary["before"]["perplexity"]] * 2
    assert rows[1]["text/unchanged"] is True


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.language_model(input_ids=torch.arange(3, 40)[None]).logits


def test_adapters_change_is_reported(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, ADAPTERS))
    summary = json.loads((tmp_path / "text_ability.json").read_text())
    assert summary["unchanged"] is False
    assert summary["before"]["perplexity"] != summary["after"]["perplexity"]
    assert summary["before"]["tokens"] == summary["after"]["tokens"] > 100
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.output_dir / "last")
    assert text_perplexity(model, make_tokenizer(), TEXT) == pytest.approx(summary["after"]["perplexity"], rel=1e-5)
    before = text_perplexity(model, make_tokenizer(), TEXT, adapted=False)
    assert before == pytest.approx(summary["before"]["perplexity"], rel=1e-5)


def test_a_resumed_run_knows_what_was_before(recipe_of, tmp_path):
    train(recipe_of(tmp_path / "a", ADAPTERS, "training.schedule=constant", "training.max_steps=3"))
    train(recipe_of(tmp_path / "a", ADAPTERS, "training.schedule=constant", "training.max_steps=6"))
    train(recipe_of(tmp_path / "b", ADAPTERS, "training.schedule=constant", "training.max_steps=6"))
    summaries = [json.loads((tmp_path / name / "text_ability.json").read_text()) for name in "ab"]
    assert summaries[0] == summaries[1]


def test_a_frozen_lm_that_changes_stops_the_run(recipe_of, tmp_path, monkeypatch):
    take = Trainer.step

    def step_and_spoil(self, batches):
        with torch.no_grad():
            self.model.language_model.model.norm.weight += 0.01
        return take(self, batches)

    monkeypatch.setattr(Trainer, "step", step_and_spoil)
    with pytest.raises(TrainingError, match="the language model is frozen, but its logits on"):
        train(recipe_of(tmp_path))


def test_the_text_has_to_be_there(tiny_recipe, tmp_path):
    with pytest.raises(DataError, match=r"evaluation\.text: got '/nowhere', expected a text file in UTF-8"):
        train(tiny_recipe(tmp_path, "evaluation.text=/nowhere"))
