"""Fusions over LM families: closed gates change nothing, packing changes nothing, images reach the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FusionConfig
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.fusion import FUSIONS, validate_fusion
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import pack
from frozenprefix.training.setup import build_model
from tests.helpers.freezing import frozen_tensors
from tests.helpers.lm import save_tiny_lm

FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "gemma3"]
FUSION_OPTIONS = {
    "prefix": {},
    "deep_prefix": {"rank": 4},
    "cross_attention": {"every": 1, "num_heads": 2, "head_dim": 8},
    "adapters": {"placement": "feed_forward_and_attention"},
    "residual": {"mode": "attention"},
    "residual/sum": {},
    "residual/product": {"mode": "product"},
}
GATED = [name for name in FUSION_OPTIONS if name.startswith(("cross", "residual"))]


@pytest.fixture(scope="module")
def made(tiny_recipe, tmp_path_factory):
    """`made("cross_attention", "llama", awake=True)` -> (model, processor), its gates and zero layers moved."""
    folders = {}

    def make(name: str, family: str = "llama", *, awake: bool = True):
        if family not in folders:
            folders[family] = save_tiny_lm(tmp_path_factory.mktemp(f"fusion_{family}"), family, sharpness=6.0)
        options = [f"model.fusion.{key}={value}" for key, value in FUSION_OPTIONS[name].items()]
        kind = f"model.fusion.type={name.partition('/')[0]}"
        recipe = tiny_recipe(tmp_path_factory.mktemp("run"), kind, *options, lm=folders[family])
        model, processor = build_model(recipe)
        if awake:
            torch.manual_seed(5)
            with torch.no_grad():
                for parameter in model.fusion.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.eval(), processor

    return make


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


def inputs_of(processor, texts, pixel_values):
    return {
        **processor(text=[processor.with_image(t) for t in texts], return_tensors="pt"),
        "pixel_values": pixel_values,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GATED)
def test_closed_gates_leave_the_bare_lm_bit_for_bit(made, pixels, name, family):
    model, processor = made(name, family, awake=False)
    inputs = inputs_of(processor, ["a red dog", "the man sits on grass"], pixels[:2])
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, model.lm.start_token)
    ids = ids.masked_fill(inputs["attention_mask"] == 0, 0)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        bare = model.language_model(ids, attention_mask=inputs["attention_mask"], position_ids=positions).logits
        assert torch.equal(model(**inputs).logits, bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_prefix_starts_as_the_plain_one(made, pixels, family):
    deep, processor = made("deep_prefix", family, awake=False)
    plain, _ = made("prefix", family)
    plain.mapper.load_state_dict(deep.mapper.state_dict())
    inputs = inputs_of(processor, ["a red dog"], pixels[:1])
    with torch.no_grad():
        assert torch.equal(deep(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FUSION_OPTIONS)
def test_packed_loss_and_gradient_are_those_of_the_plain_batch(made, name, family):
    model, processor = made(name, family)
    images = [
        ((None, 1), ["a red dog", "a red cat sits"]),
        (("<image>what <image>color is this", 2), ["blue", "blue dog in grass"]),
        (("question <image>", 1), ["the man runs"]),
    ]
    features = torch.randn(4, model.vision_encoder.num_tokens, model.vision_encoder.encoder_dim)
    results = {}
    for packing in ("trie", "none"):
        collator = Collator(processor)
        batch = pack(
            [
                [collator.target(Sample("s", (Path("p"),) * count, (), prompt=prompt), text) for text in texts]
                for (prompt, count), texts in images
            ],
            image_token_id=processor.image_token_id,
            prefix_length=processor.prefix_length,
            images_per_group=[count for (_, count), _ in images],
            packing=packing,
        )
        model.zero_grad()
        loss = model(packed=batch, image_features=features).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results[packing] = loss.detach(), torch.cat(gradients)
    (loss, gradient), (plain_loss, plain_gradient) = results["trie"], results["none"]
    assert torch.allclose(loss, plain_loss, rtol=1e-5)
    assert (gradient - plain_gradient).norm() < 2e-5 * plain_gradient.norm()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", FUSION_OPTIONS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_batches_is_that_of_one_by_one(made, pixels, name, family, beams):
    model, processor = made(name, family)
    texts = ["a red", "the man sits on", "<image> dog <image> man"]
    batch = model.generate(
        **inputs_of(processor, texts, pixels), max_new_tokens=5, num_beams=beams, do_sample=False, eos_token_id=-1
    )
    start = 0
    for row, text in enumerate(texts):
        count = max(1, text.count("<image>"))
        alone = model.generate(
            **inputs_of(processor, [text], pixels[start : start + count]),
            max_new_tokens=5,
            num_beams=beams,
            do_sample=False,
            eos_token_id=-1,
        )
        start += count
        assert batch[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", FUSION_OPTIONS)
def test_generated_words_are_those_of_the_whole_text_read_again(made, pixels, name):
    """Every step of a generation sees what one pass over the finished text sees."""
    model, processor = made(name)
    inputs = inputs_of(processor, ["a red dog"], pixels[:1])
    made_ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], made_ids], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        logits = model(**whole).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    assert logits.argmax(-1).tolist() == made_ids[0].tolist()


@pytest.mark.parametrize("name", FUSION_OPTIONS)
def test_the_image_reaches_the_text_and_only_behind_it(made, pixels, name):
    model, processor = made(name)
    inputs = inputs_of(processor, ["a red <image> dog"], pixels[:1])
    other = {**inputs, "pixel_values": pixels[1:2]}
    with torch.no_grad():
        one, two = model(**inputs).logits[0], model(**other).logits[0]
    place = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    assert torch.equal(one[:place], two[:place])
    assert not torch.allclose(one[-1], two[-1])


@pytest.mark.parametrize("name", FUSION_OPTIONS)
def test_training_moves_the_fusion_and_not_the_lm_and_it_is_saved(made, pixels, name, tmp_path):
    model, processor = made(name)
    before = hash_tensors(frozen_tensors(model))
    inputs = inputs_of(processor, ["a red dog", "the cat"], pixels[:2])
    text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != processor.image_token_id)
    labels = inputs["input_ids"].masked_fill(~text, -100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert hash_tensors(frozen_tensors(model)) == before
    model.save_pretrained(tmp_path)
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_without_a_image_only_adapters_change_the_lm(made):
    ids = torch.tensor([[1, 40, 41, 42]])
    for name in FUSION_OPTIONS:
        model, _ = made(name)
        bare, _ = made("prefix")
        with torch.no_grad():
            same = torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)
        assert same is not FUSIONS.get(name.partition("/")[0]).changes_text


def test_wrong_options_are_named():
    def lines(**section):
        return validate_fusion(FusionConfig.model_validate(section))

    assert lines(type="prefix") == []
    assert "did you mean 'cross_attention'" in lines(type="cross_atention")[0]
    assert "model.fusion.evry: fusion 'cross_attention' has no such option" in lines(type="cross_attention", evry=2)[0]
    assert lines(type="residual", mode="mean")[0].startswith("model.fusion.mode:")


def test_a_fusion_that_does_not_fit_the_lm_is_refused(made, tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.fusion\.every: got 3, expected at most 2"):
        build_model(tiny_recipe(tmp_path, "model.fusion.type=cross_attention", "model.fusion.every=3"))
    with pytest.raises(ConfigError, match=r"num_heads: got 5, expected a divisor"):
        build_model(
            tiny_recipe(
                tmp_path, "model.fusion.type=residual", "model.fusion.mode=attention", "model.fusion.num_heads=5"
            )
        )
