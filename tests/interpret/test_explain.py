"""Explanations: evidence against its definition, maps against known ones, the page, and models without a part."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data.caption_retriever import CaptionRetriever, image_keys
from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference import Captioner, EvidenceScorer
from frozenprefix.inference.evidence import split_words, target_of
from frozenprefix.interpret import Explainer, write_explanations
from frozenprefix.interpret.explain import TRUSTED, trusted
from frozenprefix.interpret.explain.attention import _rollout, mapper_attention, prefix_attention
from frozenprefix.interpret.explain.occlusion import occluded, rank_correlation
from frozenprefix.training.setup import build_model
from tests.interpret.test_report import Page

TEXT = "a red dog's shape, runs."


def make(tiny_recipe, folder, lm, mapper, **parts) -> Captioner:
    from frozenprefix.config import recipe_from_dict

    values = tiny_recipe(folder, lm=lm).model_dump(mode="json", exclude_unset=True)
    values["model"]["mapper"] = mapper
    values["model"] |= parts
    model, processor = build_model(recipe_from_dict(values))
    return Captioner(model.eval(), processor)


@pytest.fixture(scope="module")
def perceiver(tiny_recipe, sharp_lm, tmp_path_factory):
    """A captioner whose mapper attends to the four patches of a tiny ViT."""
    mapper = {"type": "perceiver", "prefix_length": 3, "hidden_dim": 32, "num_layers": 2, "num_heads": 4}
    return make(tiny_recipe, tmp_path_factory.mktemp("perceiver"), sharp_lm, mapper)


@pytest.fixture(scope="module")
def files(shapes):
    return sorted((shapes / "images").iterdir())


# ── words and evidence ──


@pytest.mark.parametrize("text", [TEXT, "two-year-old café — ‘日本語’", "...", "a  b"])
def test_each_token_belongs_to_one_word(captioner, text):
    ids = captioner.processor.encode_target("<image>", text)[:-1]
    words = split_words(captioner.processor.tokenizer, ids)
    spans = [place for word in words for place in range(word.first, word.last)]
    assert spans == list(range(len(ids)))
    assert "".join(word.text for word in words) == "".join(text.split())


@torch.no_grad()
def test_evidence_is_what_its_definition_says(captioner, files):
    own, others = captioner.encoder(files[:2]), captioner.encoder(files[4:7])
    found = EvidenceScorer(captioner, others)(["<image>", "<image>"], [TEXT, "the dog"], own)
    for text, words, features in zip((TEXT, "the dog"), found, own, strict=True):
        target = target_of(captioner, "<image>", text)
        ids = torch.tensor(target.input_ids)[None]
        lines = []
        for image in (features, *others):
            logits = captioner.model(input_ids=ids, image_features=image[None]).logits[0].log_softmax(-1)
            free = range(target.num_context, len(target.input_ids) - 1)
            lines.append([float(logits[place - 1, target.input_ids[place]]) for place in free])
        table = np.array(lines)
        spans = split_words(captioner.processor.tokenizer, target.input_ids[target.num_context : -1])
        for word, span in zip(words, spans, strict=True):
            sums = table[:, span.first : span.last].sum(axis=1)
            assert word.text == span.text
            assert word.log_prob == pytest.approx(sums[0], abs=1e-4)
            assert word.evidence == pytest.approx(sums[0] - sums[1:].mean(), abs=1e-4)


def test_an_image_among_equal_ones_is_no_evidence(captioner, files):
    own = captioner.encoder(files[:1])
    words = EvidenceScorer(captioner, own.repeat(3, 1, 1))(["<image>"] * 2, [TEXT, ""], own.repeat(2, 1, 1))
    assert [word.evidence for word in words[0]] == pytest.approx([0.0] * len(words[0]), abs=1e-5)
    assert words[1] == []


def test_evidence_needs_other_images(captioner):
    with pytest.raises(DataError, match="others: got no images"):
        EvidenceScorer(captioner, [])


def test_a_model_that_reads_similar_captions_gets_them_here_too(captioner, files):
    features, keys = captioner.encoder(files[:3]), image_keys(captioner.model.vision_encoder, files[:3])
    captions = [["a dog"], ["a cat"], ["a cow"]]
    pooled = features.mean(dim=1).half().cpu().numpy()
    store = CaptionRetriever(RetrievalOptions(captions=1), keys, captions, pooled)
    reading = Captioner(captioner.model, captioner.processor, retriever=store)
    explain = Explainer(reading, others=files[4:6])
    explanation = explain(files[1], TEXT, heat_maps=False)
    assert explanation.prompt == reading.caption_prompts([files[1]], features[1:2])[0] != "<image>"
    assert "captions of similar images" in explanation.unavailable["evidence"]
    assert explain(files[1], TEXT, prompt="It is", heat_maps=False).prompt == "<image>It is"
    with Image.open(files[1]) as opened, pytest.raises(ConfigError, match="expected a file"):
        explain(opened, TEXT)


@torch.no_grad()
def test_an_encoder_decoder_has_evidence_and_occlusion(tiny_recipe, lm_of, files, tmp_path):
    mapper = {"type": "linear", "prefix_length": 4}
    captioner = make(tiny_recipe, tmp_path, lm_of("t5"), mapper)
    explanation = Explainer(captioner, files[2:5])(files[0], TEXT)
    target = target_of(captioner, "<image>", TEXT)
    ids = torch.tensor(target.input_ids)[None]
    context, labels = ids[:, : target.num_context], ids[:, target.num_context :]
    features = captioner.encoder(files[:1])
    logits = captioner.model(input_ids=context, image_features=features, labels=labels).logits[0].log_softmax(-1)
    expected = logits.gather(1, labels[0, :, None])[:-1].sum()
    assert sum(word.log_prob for word in explanation.words) == pytest.approx(float(expected), abs=1e-3)
    assert explanation.evidence is not None
    assert np.abs(explanation.occlusion).max() > 0
    assert explanation.attention is None
    assert "encoder of its own" in explanation.unavailable["attention"]


# ── maps ──


def test_occlusion_covers_a_square_of_the_images_mean():
    pixels = torch.arange(3 * 8 * 8.0).view(1, 3, 8, 8)
    copies = occluded(pixels, grid=2)
    assert copies.shape == (4, 3, 8, 8)
    changed = (copies != pixels).any(dim=1)
    assert changed[1, :4, 4:].all()
    assert changed[1].sum() == 16
    assert copies[1, 2, 0, 7] == pixels[0, 2].mean()


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy defines the truth")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        one, two = torch.randint(0, 6, (2, 5, 5), generator=generator).float()
        expected = stats.spearmanr(one.flatten(), two.flatten()).statistic
        assert rank_correlation(one, two) == pytest.approx(expected, abs=1e-5)
    assert rank_correlation(torch.ones(4), torch.arange(4.0)) == 0


def test_the_map_of_a_word_is_where_its_evidence_is(tiny_recipe, sharp_lm, tmp_path, files, monkeypatch):
    """An encoder that sees one cell only: occlusion matters nowhere else."""
    captioner = make(tiny_recipe, tmp_path, sharp_lm, {"type": "linear", "prefix_length": 4})
    encode = type(captioner.encoder).encode

    def one_cell(self, pixel_values):
        kept = torch.zeros_like(pixel_values)
        kept[..., :16, 16:] = pixel_values[..., :16, 16:]
        return encode(self, kept)

    monkeypatch.setattr(type(captioner.encoder), "encode", one_cell)
    explanation = Explainer(captioner)(files[0], TEXT)
    assert explanation.occlusion.shape[1:] == (2, 2)
    assert np.abs(explanation.occlusion[:, 0, 1]).max() > 1e-3
    other = explanation.occlusion[:, [0, 1, 1], [0, 0, 1]]
    assert np.abs(other).max() < 1e-5


def test_attention_to_the_prefix_is_the_gradient_of_the_weights(perceiver, files):
    """A prefix embedding that nothing attends to helps no word; the sum of all is the sum of positive products."""
    features = perceiver.encoder(files[:1])
    target = target_of(perceiver, "<image>", TEXT)
    words = split_words(perceiver.processor.tokenizer, target.input_ids[target.num_context : -1])
    rows = prefix_attention(perceiver, target, words, features)
    assert rows.shape == (len(words), 3)
    assert (rows >= 0).all()
    assert rows.sum() > 0
    again = prefix_attention(perceiver, target, words, features)
    assert torch.equal(rows, again)


def test_rollout_of_two_layers_by_hand():
    cross = torch.tensor([[0.8, 0.2]])
    # a resampler: one query, two patches, keys are patches and queries
    keys = torch.tensor([[0.4, 0.4, 0.2]])
    found = _rollout([(cross, True), (keys, True)], patches=2, length=1)
    # after the first layer the query is half of the weights: 0.4, 0.1; then (q + 0.4, 0.4 + 0.2 q) / 2
    second = torch.tensor([[(0.4 + 0.4 + 0.2 * 0.4) / 2, (0.1 + 0.4 + 0.2 * 0.1) / 2]])
    assert torch.allclose(found, second / second.sum())


@pytest.mark.parametrize(
    "mapper",
    [
        {"type": "linear", "prefix_length": 2},
        {"type": "mlp", "prefix_length": 4},
        {"type": "pixel_shuffle", "prefix_length": 1, "shuffle": 2},
        {"type": "transformer", "prefix_length": 3, "hidden_dim": 32, "num_layers": 2, "num_heads": 4},
        {"type": "mapl", "prefix_length": 3, "hidden_dim": 32, "num_layers": 2},
        {"type": "q_former", "prefix_length": 3, "hidden_dim": 32, "num_layers": 2, "num_heads": 4},
        {"type": "attention_pool", "prefix_length": 3, "hidden_dim": 32},
    ],
    ids=lambda mapper: mapper["type"],
)
def test_every_mapper_leads_to_patches(tiny_recipe, sharp_lm, tmp_path, files, mapper):
    captioner = make(tiny_recipe, tmp_path, sharp_lm, mapper)
    explanation = Explainer(captioner)(files[0], TEXT)
    assert explanation.attention.shape == (len(explanation.words), 2, 2)
    assert np.isfinite(explanation.attention).all()
    assert explanation.attention.max() > 0
    assert explanation.rank_correlations.shape == (len(explanation.words),)
    rows = mapper_attention(captioner.model, captioner.encoder(files[:1]))
    assert torch.allclose(rows.sum(dim=1), torch.ones(len(rows)), atol=1e-5)


@pytest.mark.parametrize("fusion", ["deep_prefix", "adapters", "cross_attention", "residual"])
def test_every_fusion_has_what_it_can_have(tiny_recipe, sharp_lm, tmp_path, files, fusion):
    mapper = {"type": "linear", "prefix_length": 4}
    options = {"every": 1} if fusion == "cross_attention" else {}
    captioner = make(tiny_recipe, tmp_path, sharp_lm, mapper, fusion={"type": fusion, **options})
    explanation = Explainer(captioner, files[1:4])(files[0], TEXT)
    assert explanation.evidence is not None
    assert explanation.occlusion.shape == (len(explanation.words), 2, 2)
    if fusion in ("cross_attention", "residual"):
        assert set(explanation.unavailable) == {"attention", "prefix"}
        assert fusion in explanation.unavailable["attention"]
    else:
        assert explanation.unavailable == {}


@pytest.mark.parametrize(
    ("family", "peft"),
    [("gpt2", None), ("gemma2", None), ("llama", {"type": "prompt_tuning", "num_virtual_tokens": 2}),
     ("llama", {"type": "prefix_tuning", "num_virtual_tokens": 2})],
)  # fmt: skip
def test_attention_is_read_from_every_family_and_behind_virtual_tokens(
    tiny_recipe, lm_of, tmp_path, files, family, peft
):
    language_model = {"path": str(lm_of(family)), **({} if peft is None else {"peft": peft})}
    parts = {"language_model": language_model}
    captioner = make(tiny_recipe, tmp_path, lm_of(family), {"type": "linear", "prefix_length": 4}, **parts)
    explanation = Explainer(captioner)(files[0], TEXT)
    assert explanation.attention.max() > 0
    target = target_of(captioner, "<image>", TEXT)
    with torch.no_grad():
        ids, features = torch.tensor(target.input_ids)[None], captioner.encoder(files[:1])
        logits = captioner.model(input_ids=ids, image_features=features).logits[0].log_softmax(-1)
    expected = sum(
        float(logits[place - 1, target.input_ids[place]])
        for place in range(target.num_context, len(target.input_ids) - 1)
    )
    assert sum(word.log_prob for word in explanation.words) == pytest.approx(expected, abs=1e-3)


def test_the_nearest_word_of_a_words_own_embedding_is_the_word(perceiver, files, monkeypatch):
    model = perceiver.model
    ids = perceiver.processor.tokenizer("dog cat red", add_special_tokens=False)["input_ids"][:3]
    monkeypatch.setattr(model, "map_features", lambda features: model.lm.embed(torch.tensor(ids))[None])
    places = Explainer(perceiver)(files[0], "a dog", heat_maps=False).prefix
    decode = perceiver.processor.tokenizer.decode
    assert [place.by_cosine[0][0] for place in places] == [decode([token]) for token in ids]
    assert places[0].by_cosine[0][1] == pytest.approx(1.0, abs=1e-5)
    assert all(sum(p for _, p in place.by_head) <= 1.0001 for place in places)


# ── explanation, page, command ──


def test_an_explanation_is_json_and_a_figure(perceiver, files):
    explanation = Explainer(perceiver, files[1:4])(files[0], TEXT)
    values = json.loads(json.dumps(explanation.to_dict()))
    assert values["text"] == TEXT
    assert [word["text"] for word in values["words"]] == [word.text for word in explanation.words]
    first = explanation.words[0].choices[0]
    assert first.alternatives[0][1] >= first.probability > 0
    assert len(explanation.plot(words=[0, 1]).axes) == 5
    assert explanation.image.size == (32, 32)
    with pytest.raises(DataError, match="plot:"):
        Explainer(perceiver)(files[0], TEXT, heat_maps=False).plot()


def test_a_text_without_a_word_is_refused(perceiver, files):
    with pytest.raises(DataError, match="text: got ' '"):
        Explainer(perceiver)(files[0], " ")


@pytest.mark.parametrize("agree", [True, False])
def test_the_page_says_whether_attention_is_to_be_trusted(perceiver, files, tmp_path, agree):
    from dataclasses import replace

    explanation = Explainer(perceiver, files[1:4])(files[0], "a <b> dog")
    maps = explanation.occlusion if agree else -explanation.occlusion
    explanation = replace(explanation, attention=maps)
    assert (trusted([explanation]) >= TRUSTED) is agree
    page = Page(write_explanations(tmp_path / "page.html", [explanation], title="T & C").read_text())
    assert ("not to be trusted" in page.text) is not agree
    kinds = [image["alt"].split()[2] for image in page.named("img") if image["alt"].startswith("Map of")]
    assert kinds[:2] == (["attention", "occlusion"] if agree else ["occlusion", "attention"])
    assert "T & C" in page.text
    assert all(image["src"].startswith("data:") for image in page.named("img"))


def test_the_command_writes_page_and_json(tiny_checkpoint, shapes, files, tmp_path):
    out, numbers = tmp_path / "page.html", tmp_path / "page.json"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    arguments = ["explain", str(tiny_checkpoint), str(files[0]), str(broken), "--text", "a red circle"]
    options = ["--others", str(shapes / "images"), "--num-others", "3", "--out", str(out), "--json", str(numbers)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 1  # one cannot be read
    assert "broken.png" in result.output
    assert "No attention" in Page(out.read_text()).text
    (row,) = json.loads(numbers.read_text())
    assert row["others"] == 3
    assert row["image"] == files[0].name


def test_colours_are_those_of_the_image(perceiver, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 20), (200, 30, 40)).save(path)
    shown = Explainer(perceiver)(path, "a dog", heat_maps=False).image
    assert np.abs(np.asarray(shown).reshape(-1, 3).mean(axis=0) - [200, 30, 40]).max() <= 1
