"""Several models that choose each word together."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.errors import ConfigError
from frozenprefix.evaluation.samples import folder_samples
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.evaluation.tasks.captioning import evaluate_captions
from frozenprefix.inference import Captioner
from frozenprefix.models.ensemble import Ensemble
from tests.helpers.peft import shake


@pytest.fixture(scope="module")
def other(tiny_checkpoint, tmp_path_factory):
    """A checkpoint with another mapper beside the same frozen parts."""
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in captioner.model.mapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("ensemble") / "other"
    captioner.model.save_pretrained(folder)
    captioner.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def joint(captioner, other):
    return captioner.together_with([other])


@pytest.fixture(scope="module")
def paths(shapes):
    return sorted((shapes / "images").iterdir())[:6]


def next_log_probs(model, processor, image, ids):
    """log p of every word after the image and `ids`, by a plain forward pass: float[V]."""
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    text = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
    return model(input_ids=text, pixel_values=inputs["pixel_values"]).logits[0, -1].log_softmax(-1)


@torch.no_grad()
def test_each_word_has_the_greatest_mean_log_probability(joint, paths):
    differ = 0
    for path in paths:
        text, words = joint.generate(["<image>"], [path], max_new_tokens=5, eos_token_id=None)[0], []
        for _ in range(5):
            each = [next_log_probs(m, joint.processor, path, words) for m in joint.ensemble.models]
            words.append(int(torch.stack(each).mean(0).argmax()))
            differ += len({int(one.argmax()) for one in each}) > 1
        assert text.text == joint.processor.decode(words)
    assert differ, "the models always agree: this test proves nothing"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_with_itself_is_the_model(captioner, tiny_checkpoint, paths, beams):
    twice = captioner.together_with([tiny_checkpoint])
    settings = {"num_beams": beams, "max_new_tokens": 6}
    for alone, both in zip(captioner.caption(paths, **settings), twice.caption(paths, **settings), strict=True):
        assert (alone.path, alone.text) == (both.path, both.text)
        assert alone.score == pytest.approx(both.score, abs=1e-4)


def test_batches_and_samples(joint, paths):
    alone = Captioner(joint.model, joint.processor, batch_size=1, ensemble=joint.ensemble)
    texts, ones = ([c.text for c in one.caption(paths, num_beams=3, max_new_tokens=6)] for one in (joint, alone))
    assert texts == ones
    assert len(set(texts)) > 1
    sampling = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert len(list(joint.caption(paths, max_new_tokens=3, **sampling))) == len(paths)


def test_deep_prefixes_do_not_mix(built, paths):
    """The hooks of each model see their own prefix."""
    model, processor = built("llama", "model.fusion={type: deep_prefix, rank: 4}", fresh=True)
    second, _ = built("llama", "model.fusion={type: deep_prefix, rank: 4}", fresh=True)
    torch.manual_seed(2)
    shake(second)
    prompts = {"prompts": ["<image>"], "images": paths[:1]}
    texts = [
        Captioner(model, processor, ensemble=Ensemble(models)).generate(**prompts, num_beams=2, max_new_tokens=6)[0]
        for models in ([model, second], [second, model])
    ]
    assert texts[0].text == texts[1].text
    assert texts[0].score == pytest.approx(texts[1].score, abs=1e-4)


def test_the_frozen_parts_are_the_same(built, captioner):
    model, _ = built("gpt2")
    with pytest.raises(ConfigError, match=r"ensemble: the language model of model 2 is not that of the first"):
        Ensemble([captioner.model, model])
    model, _ = built("llama", "model.fusion={type: cross_attention, every: 1}")
    with pytest.raises(ConfigError, match=r"fusion of model 1 reads the images in every step"):
        Ensemble([model])


def test_options_of_transformers_search_are_refused(joint, paths):
    with pytest.raises(ConfigError, match="need transformers' search"):
        joint.generate(["<image>"], paths[:1], repetition_penalty=1.2)


def test_evaluation_and_command(tiny_checkpoint, other, captioner, joint, shapes, tmp_path, paths):
    samples = folder_samples(shapes, "caption", split="val", limit=3)
    options = EvaluationOptions(tmp_path / "p.jsonl", num_beams=1, max_new_tokens=4, extra={"ensemble": [str(other)]})
    evaluate_captions(captioner, samples, options)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    expected = [one.text for one in joint.caption([s.images[0] for s in samples], num_beams=1, max_new_tokens=4)]
    assert [row["model"] for row in rows] == expected
    for value in ("runs/a", [3]):
        with pytest.raises(ConfigError, match=r"ensemble: got .* expected a list of checkpoints"):
            evaluate_captions(captioner, samples, EvaluationOptions(tmp_path / "q.jsonl", extra={"ensemble": value}))

    arguments = [tiny_checkpoint, paths[0], "--beams", 1, "--max-new-tokens", 4, "--ensemble", other]
    command = ["caption", *map(str, arguments)]
    written = next(joint.caption(paths[:1], num_beams=1, max_new_tokens=4)).text
    assert CliRunner().invoke(app, command).stdout.endswith(f"\t{written}\n")
    failed = CliRunner().invoke(app, [*command, "--engine", "llama.cpp"])
    assert failed.exit_code == 2
    assert "--ensemble: llama.cpp runs one model" in failed.output
    failed = CliRunner().invoke(app, [*command, "--evidence", "0"])
    assert failed.exit_code == 2
    assert "--evidence: it is that of one model" in failed.output
