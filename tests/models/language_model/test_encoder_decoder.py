"""Encoder-decoder language models: T5 reads images and prompt in its encoder and writes the target."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import ConfigError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.configuration import FusionConfig
from frozenprefix.models.fusion import build_fusion
from frozenprefix.models.language_model.encoder_decoder import EncoderDecoderLM, close_source, divide
from frozenprefix.models.packing import Target, pack
from frozenprefix.planning.plan import plan
from frozenprefix.training.setup import build_model
from frozenprefix.training.trainer import train
from tests.helpers.drawings import draw_shape
from tests.helpers.lm import save_tiny_lm

NONE = "training.packing=none"
IMAGE = 300
EOS = 2


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("t5"), "t5", sharpness=3.0)


@pytest.fixture(scope="module")
def made(tiny_recipe, lm_folder, tmp_path_factory):
    model, processor = build_model(tiny_recipe(tmp_path_factory.mktemp("run"), NONE, lm=lm_folder))
    return model.eval(), processor


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


# ── sources and targets ──


def test_texts_are_divided_at_the_first_token_to_learn():
    targets = [[Target([IMAGE, IMAGE, 7, 8, 9, EOS], 3)], [Target([IMAGE, IMAGE, 5, EOS], 2, weight=-0.5)]]
    texts = divide(pack(targets, image_token_id=IMAGE, prefix_length=2, packing="none"), EOS)
    assert texts.input_ids.tolist() == [[IMAGE, IMAGE, 7, EOS], [IMAGE, IMAGE, EOS, 0]]
    assert texts.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert texts.prefix_index.tolist() == [[0, 1, -1, -1], [2, 3, -1, -1]]
    assert texts.labels.tolist() == [[8, 9, EOS], [5, EOS, -100]]
    assert texts.weights.tolist() == [[1, 1, 1], [-0.5, -0.5, 0]]


@pytest.mark.parametrize("packing", ["trie", "flat"])
def test_rows_that_targets_share_are_refused(packing):
    for second in ([IMAGE, 5, 7, EOS], [IMAGE, 6, EOS], [IMAGE, 5, 8]):
        targets = [[Target([IMAGE, 5, EOS], 1), Target(second, 1)]]
        with pytest.raises(ConfigError, match="targets share rows, which no encoder-decoder model can read"):
            divide(pack(targets, image_token_id=IMAGE, prefix_length=1, packing=packing), EOS)


def test_sources_are_closed_and_padded_on_the_right():
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, EOS], [5, 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    ids, mask = close_source(ids, mask, EOS)
    real = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert real == [[5, 6, EOS], [5, 6, 7, EOS], [5, EOS], [EOS]]
    assert all(sorted(row, reverse=True) == row for row in mask.tolist())


# ── the loss ──


@pytest.mark.parity
def test_the_loss_of_texts_is_that_of_transformers(made, lm_folder):
    """Without an image nothing stands between the ids and the LM: its own loss on the same texts has to come out."""
    model, processor = made
    texts = [("a red dog", "the cat sits"), ("what color is this", "blue")]
    reference = AutoModelForSeq2SeqLM.from_pretrained(lm_folder).eval()
    targets, sources, labels = [], [], []
    for prompt, text in texts:
        context, target = processor.encode_prompt(prompt), processor.encode_target(prompt, text)
        targets.append([Target([*context, *target], len(context))])
        sources.append([*context, EOS])
        labels.append(target)
    packed = pack(targets, image_token_id=model.config.image_token_id, prefix_length=2, packing="none",
                  images_per_group=[0, 0])  # fmt: skip
    width, length = max(map(len, sources)), max(map(len, labels))
    with torch.no_grad():
        found = model(packed=packed).loss
        expected = reference(
            input_ids=torch.tensor([row + [0] * (width - len(row)) for row in sources]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sources]),
            labels=torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        ).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_and_plain_batches_have_the_same_loss_and_gradient(made, pixels):
    model, processor = made
    prompts, answers = ["<image>a red", "<image>"], ["dog runs", "the cat"]
    targets = []
    for prompt, answer in zip(prompts, answers, strict=True):
        context = processor.encode_prompt(prompt)
        targets.append([Target([*context, *processor.encode_target(prompt, answer)], len(context))])
    packed = pack(targets, image_token_id=processor.image_token_id, prefix_length=2, packing="none")
    labels = [list(target[0].input_ids[target[0].num_context :]) for target in targets]
    width = max(map(len, labels))
    inputs = processor(text=prompts, return_tensors="pt")
    losses, gradients = [], []
    for batch in (
        {"packed": packed},
        {**inputs, "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels])},
    ):
        model.zero_grad()
        loss = model(pixel_values=pixels, **batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.mapper.parameters()])
    model.zero_grad()
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.language_model.parameters())
    with torch.no_grad():
        other = model(pixel_values=pixels.flip(0), packed=packed).loss
    assert not torch.isclose(other, losses[0], atol=1e-4), "the encoder does not read the image"


def test_labels_have_to_be_given(made, pixels):
    model, processor = made
    with pytest.raises(ConfigError, match="labels: got None; an encoder-decoder model reads input_ids"):
        model(**processor(text=["<image>"], return_tensors="pt"), pixel_values=pixels[:1])


# ── generation ──


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_texts_are_transformers_own(made, pixels, beams):
    model, processor = made
    inputs = processor(text=["<image>a red", "<image>"], return_tensors="pt")
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    found = model.generate(**inputs, pixel_values=pixels, **options)
    for row, prompt in enumerate(["<image>a red", "<image>"]):
        image = pixels[row : row + 1]
        alone = model.generate(**processor(text=[prompt], return_tensors="pt"), pixel_values=image, **options)
        ids = torch.tensor([[*processor.encode_prompt(prompt), EOS]])
        embeds = model.fuse(ids, model.prefix(image))[0]
        expected = model.language_model.generate(inputs_embeds=embeds, **options)
        assert expected[0, 0] == 0, "transformers gives the decoder's start token"
        assert alone.tolist() == expected[:, 1:].tolist()
        real = [int(i) for i in found[row] if i != 0]
        assert real == [int(i) for i in alone[0] if i != 0]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_captioner_scores_what_it_writes(made, beams):
    model, processor = made
    captioner = Captioner(model, processor)
    prompt = processor.prompt_for("caption")
    image = draw_shape("red", "cross")
    made_text = captioner.generate([prompt], [image], num_beams=beams, max_new_tokens=5)[0]
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    inputs = processor(text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, pixel_values=pixel_values, num_beams=beams, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs, pixel_values=pixel_values, labels=ids).logits[0].log_softmax(-1)
    assert made_text.score == pytest.approx(float(logits.gather(1, ids.T).mean()), abs=1e-4)
    assert made_text.text == processor.decode(ids[0])
    blind = captioner.generate([prompt], max_new_tokens=5)[0]
    assert blind.score is not None


# ── a run ──


def test_a_run_with_t5(tiny_recipe, lm_folder, shapes, tmp_path):
    result = train(tiny_recipe(tmp_path / "run", NONE, "model.fusion.type=deep_prefix", lm=lm_folder))
    captioner = Captioner.from_pretrained(result.best)
    assert type(captioner.model.language_model).__name__ == "T5ForConditionalGeneration"
    captions = list(captioner.caption([shapes / "images" / "red_circle.png"], num_beams=2, max_new_tokens=4))
    assert len(captions) == 1
    model, collator = captioner.model, Collator(captioner.processor, packing="none")
    sample = Sample("1", (shapes / "images" / "red_circle.png",), ("a red circle",))
    batch = collator([ImageGroup(sample.images, (sample,))], [[(sample, "a red circle")]])
    with torch.no_grad():
        before = model(**batch).loss
        for layer in model.fusion.up:
            layer.weight.normal_()
        assert not torch.isclose(model(**batch).loss, before), "the deep prefix does not reach the encoder's layers"


def test_what_an_encoder_decoder_cannot_do_is_refused_in_one_line(tiny_recipe, lm_folder, made, tmp_path):
    assert str(made[0].lm.packing_problem()).startswith("T5ForConditionalGeneration has an encoder")
    for name in ("cross_attention", "adapters", "residual"):
        with pytest.raises(ConfigError, match=f"got '{name}', expected prefix or deep_prefix with an encoder-decoder"):
            build_fusion(FusionConfig(type=name), made[0].language_model, 32)
    with pytest.raises(ConfigError, match="has an encoder of its own"):
        made[0].lm.text_states(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))


def test_it_is_planned(tiny_recipe, lm_folder, made, tmp_path):
    planned = plan(tiny_recipe(tmp_path / "run", NONE, lm=lm_folder), ["cpu"], calibrate=0)
    assert planned.parameters["language model"] == sum(p.numel() for p in made[0].language_model.parameters())
    assert sum(planned.flops.values()) > 0


def test_embeddings_that_ids_do_not_get_are_refused():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **sizes}
    model = BartForConditionalGeneration(BartConfig(**config, scale_embedding=True)).eval()
    EncoderDecoderLM(model)
    model.model.encoder.embed_tokens = torch.nn.Embedding(50, 16)
    with pytest.raises(ConfigError, match=r"Bart.* changes its word embeddings on their way into the encoder"):
        EncoderDecoderLM(model)
    model.config.eos_token_id = None
    with pytest.raises(ConfigError, match="names no single eos_token_id; set one"):
        EncoderDecoderLM(model)
