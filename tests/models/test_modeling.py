"""The model over LM families: saving and loading, plain against packed loss, and generation in batches."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import frozenprefix  # noqa: F401 - registers with the Auto classes
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import Sample
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.setup import build_model
from tests.helpers.data import pack_samples
from tests.helpers.lm import save_tiny_lm

FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "gemma", "gemma3"]
PROMPTS = ["<image>", "a red <image> question", "<image> what color is this", "the <image> dog <image> man", ""]
IMAGES_IN = [1, 1, 1, 2, 1]  # the processor puts one in front of the last


@pytest.fixture(scope="module")
def made(tiny_recipe, tmp_path_factory):
    """`made("opt", "model.mapper.prefix_length=1")` -> (model, processor); the LM's words depend on all before them."""
    cache: dict[tuple[str, ...], tuple] = {}
    folders: dict[str, object] = {}

    def make(family: str, *overrides: str):
        if (family, *overrides) not in cache:
            if family not in folders:
                folders[family] = save_tiny_lm(tmp_path_factory.mktemp(f"sharp_{family}"), family, sharpness=6.0)
            recipe = tiny_recipe(tmp_path_factory.mktemp("run"), *overrides, lm=folders[family])
            model, processor = build_model(recipe)
            with torch.no_grad():  # prefixes that differ between images as much as words do
                model.mapper.scale.norm.weight.mul_(1.5)
            cache[(family, *overrides)] = model.eval(), processor
        return cache[(family, *overrides)]

    return make


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


def inputs_of(processor, prompts, pixel_values):
    texts = [processor.with_image(prompt) for prompt in prompts]
    return {**processor(text=texts, return_tensors="pt"), "pixel_values": pixel_values}


# ── saving and loading ──


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_the_same_model(made, pixels, tmp_path, family):
    model, processor = made(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(tensors) == [
        "mapper.body.layers.0.bias",
        "mapper.body.layers.0.weight",
        "mapper.body.layers.3.bias",
        "mapper.body.layers.3.weight",
        "mapper.scale.norm.bias",
        "mapper.scale.norm.weight",
    ]
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.config.identity["language_model"].keys() == {"architecture", "path", "sha256"}
    inputs = inputs_of(processor, PROMPTS[:4], pixels[:5])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_auto_classes_load_a_checkpoint(tiny_checkpoint, pixels):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(model) is FrozenPrefixForConditionalGeneration
    assert type(processor) is FrozenPrefixProcessor
    assert AutoConfig.from_pretrained(tiny_checkpoint).prefix_length == 2
    ids = model.generate(**inputs_of(processor, ["a"], pixels[:1]), max_new_tokens=2)
    assert ids.shape == (1, 2)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A checkpoint of one's own, to spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_wrong_keys_and_shapes_are_refused_by_name(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["mapper.body.layers.9.bias"] = tensors.pop("mapper.body.layers.0.bias")
    tensors["mapper.scale.norm.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)
    for part in (
        "missing mapper.body.layers.0.bias",
        "unexpected mapper.body.layers.9.bias",
        "mapper.scale.norm.bias has shape (7,), expected (32,)",
    ):
        assert part in str(caught.value)


def test_a_folder_without_weights_is_no_checkpoint(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)


def edit_config(checkpoint, change):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_another_base_model_is_refused(checkpoint, tiny_lm):
    edit_config(checkpoint, lambda config: config["language_model"].update(path=str(tiny_lm("qwen2"))))
    with pytest.raises(CheckpointError, match=r"language_model: this checkpoint was trained with architecture='Llama"):
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)


def test_the_same_name_with_other_weights_is_refused(checkpoint, sharp_lm, tmp_path):
    other = shutil.copytree(sharp_lm, tmp_path / sharp_lm.name)
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    edit_config(checkpoint, lambda config: config["language_model"].update(path=str(other)))
    with pytest.raises(CheckpointError, match="language_model: this checkpoint was trained with sha256="):
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)


def test_another_encoder_is_refused(checkpoint):
    edit_config(checkpoint, lambda config: config["identity"]["vision_encoder"].update(sha256="0" * 64))
    with pytest.raises(CheckpointError, match="vision_encoder: this checkpoint was trained with sha256='000"):
        FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)


def test_save_takes_a_state_dict_and_refuses_what_has_no_effect(made, tmp_path):
    model, _ = made("llama")
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    saved = load_file(tmp_path / "given" / "model.safetensors")
    assert saved.keys() == model.trainable_state().keys()
    assert torch.equal(saved["mapper.scale.norm.bias"], model.mapper.scale.norm.bias.detach() + 1)
    with pytest.raises(ConfigError, match="variant"):
        model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_gradient_checkpointing_is_not_promised(made):
    """transformers' does nothing while the LM is in evaluation mode; asking for it must not pass silently."""
    model = made("llama")[0]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        enable()


# ── losses ──


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_labels_equals_packed_loss(made, pixels, family, side):
    model, processor = made(family)
    captions = [["a red dog", "a red cat sits", "the man"], ["blue street"]]
    samples = [Sample(str(i), (), tuple(texts), prompt="<image> shape") for i, texts in enumerate(captions)]
    collator = Collator(processor)
    targets = [[collator.target(sample, text) for text in sample.targets] for sample in samples]
    rows = [(image, target) for image, listed in enumerate(targets) for target in listed]
    width = max(len(target.input_ids) for _, target in rows)
    shape = (len(rows), width)
    input_ids, mask = torch.full(shape, 2), torch.zeros(shape, dtype=torch.long)  # padded with the end token
    labels = torch.full(shape, -100)
    for row, (_, target) in enumerate(rows):
        length = len(target.input_ids)
        at = slice(width - length, None) if side == "left" else slice(0, length)
        input_ids[row, at], mask[row, at] = torch.tensor(target.input_ids), 1
        labels[row, at] = torch.tensor([-100] * target.num_context + list(target.input_ids[target.num_context :]))
    assert (labels == 2).sum() == len(rows), "one end token to learn per target"
    images = pixels[torch.tensor([image for image, _ in rows])]
    plain = model(input_ids=input_ids, attention_mask=mask, labels=labels, pixel_values=images)
    packed = pack_samples(collator, samples)
    assert packed.num_tokens == (labels != -100).sum()
    loss = model(packed=packed, pixel_values=pixels[:2]).loss
    assert loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)


def test_a_padding_token_behind_the_vocabulary_does_no_harm(made, pixels):
    """Qwen's tokenizer brings such a token with it; the mask says that nobody looks at it."""
    model, processor = made("llama")
    words = torch.tensor([processor.encode_prompt("<image> dog")])
    padded = torch.cat([torch.full((1, 2), 10_000), words], dim=1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), torch.ones_like(words)], dim=1)
    logits = model(input_ids=padded, attention_mask=mask, pixel_values=pixels[:1]).logits
    alone = model(input_ids=words, pixel_values=pixels[:1]).logits
    torch.testing.assert_close(logits[:, 2:], alone, rtol=1e-4, atol=1e-4)
    ids = model.generate(input_ids=padded, attention_mask=mask, pixel_values=pixels[:1], max_new_tokens=3)
    assert torch.equal(ids, model.generate(input_ids=words, pixel_values=pixels[:1], max_new_tokens=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_no_logit(made, pixels, family):
    model, processor = made(family)
    ids = torch.tensor([processor.encode_prompt("the <image> dog")])
    alone = model(input_ids=ids, pixel_values=pixels[:1]).logits
    pad = torch.full((1, 3), 2)
    for order in (lambda a, b: [a, b], lambda a, b: [b, a]):
        padded = torch.cat(order(ids, pad), dim=1)
        mask = torch.cat(order(torch.ones_like(ids), torch.zeros_like(pad)), dim=1)
        logits = model(input_ids=padded, attention_mask=mask, pixel_values=pixels[:1]).logits
        torch.testing.assert_close(logits[mask.bool()], alone[0], rtol=1e-4, atol=1e-4)


def test_pixel_values_and_image_features_give_the_same(made, pixels):
    model, processor = made("llama")
    inputs = inputs_of(processor, PROMPTS[:4], pixels[:5])
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    features = model.encode(pixels[:5])
    assert features.shape == (5, 4, model.vision_encoder.encoder_dim)
    assert torch.equal(model(**inputs).logits, model(**text, image_features=features).logits)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4), model.generate(**text, image_features=features, max_new_tokens=4)
    )
    with pytest.raises(ConfigError, match="pixel_values or image_features, not both"):
        model(**inputs, image_features=features)


def test_the_image_changes_the_logits(made, pixels):
    model, processor = made("llama")
    ids = torch.tensor([processor.encode_prompt("<image> a")])
    one, two = (model(input_ids=ids, pixel_values=pixels[i : i + 1]).logits for i in (0, 1))
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": None}, DataError, "hold 2 image placeholders, the images give 0"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, DataError, "hold 2 image placeholders, the images give 4"),
        ({"input_ids": None}, DataError, "input_ids: got None"),
        (
            {"pixel_values": None, "image_features": torch.zeros(1, 5, 64)},
            ConfigError,
            r"image_features: got shape \(1, 5, 64\), expected \(images, 4, 64\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(made, pixels, change, error, message):
    model, processor = made("llama")
    inputs = inputs_of(processor, ["a"], pixels[:1]) | change
    with pytest.raises(error, match=message):
        model(**inputs)


# ── generation ──


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_one_by_one_gives(made, pixels, family, beams):
    """Prompts of five lengths, before and after the image, one with two images: padded on the left."""
    model, processor = made(family)
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    batch = model.generate(**inputs_of(processor, PROMPTS, pixels), **settings)
    assert len({tuple(row.tolist()) for row in batch.sequences}) > 1, "all outputs are equal: this test proves nothing"
    start = 0
    for row, (prompt, count) in enumerate(zip(PROMPTS, IMAGES_IN, strict=True)):
        alone = model.generate(**inputs_of(processor, [prompt], pixels[start : start + count]), **settings)
        start += count
        length = alone.sequences.shape[1]
        assert batch.sequences[row, :length].tolist() == alone.sequences[0].tolist(), prompt
        if beams > 1:
            assert batch.sequences_scores[row].item() == pytest.approx(alone.sequences_scores[0].item(), abs=1e-4)
        else:
            for step, scores in enumerate(alone.scores):
                torch.testing.assert_close(batch.scores[step][row], scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_of_one_and_an_empty_prompt(made, pixels, family):
    """`inputs_embeds` of length 1: the first word must follow from the image, and the rest from greedy decoding."""
    model, processor = made(family, "model.mapper.prefix_length=1")
    inputs = inputs_of(processor, [""], pixels[:1])
    assert inputs["input_ids"].shape == (1, 1)
    made_ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    ids = inputs["input_ids"]
    by_hand = []
    for _ in made_ids:
        by_hand.append(model(input_ids=ids, pixel_values=pixels[:1]).logits[0, -1].argmax().item())
        ids = torch.cat([ids, torch.tensor([[by_hand[-1]]])], dim=1)
    assert made_ids == by_hand
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[0] == 1


def test_one_beam_is_greedy(made, pixels):
    model, processor = made("llama")
    inputs = inputs_of(processor, PROMPTS, pixels)
    greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(greedy, model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=1))
    assert torch.equal(greedy, model.generate(inputs["input_ids"], **without(inputs, "input_ids"), max_new_tokens=5))


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


def test_nucleus_sampling_follows_the_seed(made, pixels):
    model, processor = made("llama")
    inputs = inputs_of(processor, PROMPTS, pixels)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=6, do_sample=True, top_p=0.9, temperature=2.0).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_max_length_and_right_padding_are_refused(made, pixels):
    model, processor = made("llama")
    inputs = inputs_of(processor, PROMPTS, pixels)
    with pytest.raises(ConfigError, match="give max_new_tokens instead"):
        model.generate(**inputs, max_length=20)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ConfigError, match="padding_side='left'"):
        model.generate(**inputs, max_new_tokens=2)


def test_without_a_length_twenty_tokens_at_most(made, pixels):
    """transformers' default; a long prompt must not eat it up."""
    model, processor = made("llama")
    long = inputs_of(processor, ["<image> " + "dog " * 30], pixels[:1])
    assert long["input_ids"].shape[1] > 30
    ids = model.generate(**long, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, 20)
