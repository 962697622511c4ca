"""Label likelihoods: equal to scoring each label alone, calibrated, and evaluated beside their baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.errors import ConfigError, DataError, TrainingError
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.confusion import draw_confusion
from frozenprefix.evaluation.tasks import classification
from frozenprefix.evaluation.tasks.classification import CLASSIFICATION, evaluate_classification
from frozenprefix.inference import Captioner, likelihood
from frozenprefix.inference.classifier import Classifier
from frozenprefix.inference.likelihood import log_likelihoods
from frozenprefix.models.packing import Target
from frozenprefix.training.setup import build_model
from tests.helpers import ROOT
from tests.helpers.drawings import COLOURS, SHAPES, draw_shape, write_shapes
from tests.helpers.lm import make_tokenizer, save_tiny_lm

LABELS = ["dog", "dog house", "cat", "red cat", "red", "a green dog sits in the grass"]
TEMPLATES = ["A photo of a", "this is the {label} in the street.", "Look: <image> a"]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2", "bloom"])
def parts(request, tiny_recipe, tmp_path_factory):
    """Model and processor; BLOOM cannot read tries, the others can."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bloom":
        torch.manual_seed(0)
        config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    else:
        save_tiny_lm(folder, request.param, sharpness=4.0)
    model, processor = build_model(tiny_recipe(tmp_path_factory.mktemp("run"), lm=folder))
    return model.eval(), processor


@pytest.fixture(scope="module")
def images():
    return [draw_shape("red", "circle"), draw_shape("blue", "square"), draw_shape("green", "cross")]


@torch.no_grad()
def one_by_one(model, processor, images, context, target) -> float:
    """Sum of log-probabilities of `target` after the ids `context`, in a plain forward pass of its own."""
    ids = torch.tensor([[*context, *target]])
    inputs = {} if images is None else processor.image_processor(images, return_tensors="pt")
    logits = model(input_ids=ids, **inputs).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(target)[:, None]).sum().item()


def target_ids(processor, prompt, text):
    return processor.encode_target(prompt, text)[:-1]


# ── the scores ──


def test_scores_equal_those_of_each_label_alone(parts, images):
    model, processor = parts
    scores = Classifier(model, processor, templates=TEMPLATES, batch_size=2).scores(images, LABELS)
    prompts = ["<image>A photo of a", "<image>this is the", "Look: <image> a"]
    tails = ["", " in the street.", ""]
    for image, row in zip(images, scores, strict=True):
        for label, score in zip(LABELS, row.tolist(), strict=True):
            alone = [
                one_by_one(model, processor, [image], processor.encode_prompt(p), target_ids(processor, p, label + t))
                for p, t in zip(prompts, tails, strict=True)
            ]
            assert score == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert (scores[0] - scores[1]).abs().max() > 1e-4, "images change nothing: this test proves nothing"


def test_calibration_takes_away_what_the_label_has_without_a_image(parts, images):
    model, processor = parts
    plain = Classifier(model, processor).scores(images, LABELS)
    calibrated = Classifier(model, processor, calibrate=True).scores(images, LABELS)
    context = processor.encode_prompt("A photo of a")
    blind = [one_by_one(model, processor, None, context, target_ids(processor, "A photo of a", x)) for x in LABELS]
    assert torch.allclose(plain - calibrated, torch.tensor(blind), rtol=1e-5, atol=1e-4)


def test_mean_over_tokens(parts, images):
    model, processor = parts
    sums = Classifier(model, processor).scores(images, LABELS)
    means = Classifier(model, processor, normalise="mean").scores(images, LABELS)
    counts = torch.tensor([len(target_ids(processor, "<image>A photo of a", label)) for label in LABELS])
    assert len(set(counts.tolist())) > 2
    assert torch.allclose(sums / counts, means, atol=1e-5)


def test_the_end_token_counts_when_asked_for(parts, images):
    model, processor = parts
    plain = Classifier(model, processor).scores(images, LABELS)
    closed = Classifier(model, processor, end_token=True).scores(images, LABELS)
    context = processor.encode_prompt("<image>A photo of a")
    ids = processor.encode_target("<image>A photo of a", "dog")
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert (closed < plain).all()
    assert closed[0, 0].item() == pytest.approx(one_by_one(model, processor, images[:1], context, ids), rel=1e-5)


def test_many_labels_take_several_rows(parts, images, monkeypatch):
    model, processor = parts
    labels = [f"{colour} {shape} {number}" for colour in COLOURS for shape in SHAPES for number in range(4)]
    whole = Classifier(model, processor).scores(images, labels)
    monkeypatch.setattr(likelihood, "TOKENS_PER_ROW", 24)
    split = Classifier(model, processor, batch_size=2).scores(images, labels)
    assert torch.allclose(whole, split, atol=1e-4)


def test_the_prefix_is_read_once_for_all_labels(tiny_checkpoint, images, monkeypatch):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    rows = []
    read = captioner.model.packed_hidden
    monkeypatch.setattr(
        captioner.model, "packed_hidden", lambda *args: (rows.append(args[0].input_ids), read(*args))[1]
    )
    Classifier(captioner.model, captioner.processor).scores(images, LABELS)
    assert [ids.shape[0] for ids in rows] == [3], "one row an image"
    image_token = captioner.processor.image_token_id
    assert ((rows[0] == image_token).sum(dim=1) == captioner.processor.prefix_length).all()


def test_features_and_files_give_the_same_as_images(tiny_checkpoint, shapes):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    paths = sorted((shapes / "images").iterdir())[:3]
    classifier = Classifier(captioner.model, captioner.processor, batch_size=2)
    images = [load_image(path) for path in paths]
    pixels = captioner.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    expected = classifier.scores(images, LABELS)
    assert torch.allclose(classifier.scores(paths, LABELS), expected, atol=1e-5)
    assert torch.allclose(classifier.scores(captioner.model.encode(pixels), LABELS), expected, atol=1e-5)
    assert classifier.scores([], LABELS).shape == (0, 6)


def test_classify(tiny_checkpoint, images):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    classifier = Classifier(captioner.model, captioner.processor)
    scores = classifier.scores(images, LABELS)
    for made, row in zip(classifier.classify(images, LABELS), scores, strict=True):
        assert made.label == LABELS[int(row.argmax())] == max(made.probabilities, key=made.probabilities.__getitem__)
        assert sum(made.probabilities.values()) == pytest.approx(1)
        assert list(made.probabilities) == LABELS


def test_a_text_longer_than_the_sliding_window_is_read_alone(tiny_recipe, tmp_path, images):
    lm = save_tiny_lm(tmp_path / "lm", "gemma2", sharpness=4.0)
    model, processor = build_model(tiny_recipe(tmp_path / "run", lm=lm))
    long = " ".join(["the dog sits in the grass"] * 12)
    labels = [f"{long} red", f"{long} blue"]
    prompt = "<image>A photo of a"
    assert len(processor.encode_prompt(prompt)) + len(target_ids(processor, prompt, labels[0])) > 64
    scores = Classifier(model, processor).scores(images[:1], labels)[0]
    context = processor.encode_prompt(prompt)
    alone = [one_by_one(model, processor, images[:1], context, target_ids(processor, prompt, x)) for x in labels]
    assert scores.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("fusion", ["deep_prefix", "cross_attention"])
def test_other_fusions(tiny_recipe, tmp_path, images, sharp_lm, fusion):
    options = ["model.fusion.every=1", "model.fusion.num_heads=2"] if fusion == "cross_attention" else []
    recipe = tiny_recipe(tmp_path, f"model.fusion.type={fusion}", *options, lm=sharp_lm)
    model, processor = build_model(recipe)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    model.eval()
    scores = Classifier(model, processor).scores(images, LABELS)
    context = processor.encode_prompt("<image>A photo of a")
    for image, row in zip(images, scores, strict=True):
        ids = [target_ids(processor, "<image>A photo of a", label) for label in LABELS]
        alone = [one_by_one(model, processor, [image], context, each) for each in ids]
        assert row.tolist() == pytest.approx(alone, rel=1e-4)
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_groups_of_several_images(tiny_checkpoint, images):
    """Groups that show two images and none, in one call."""
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    model, processor = captioner.model, captioner.processor
    two = processor.encode_prompt("<image>red<image>blue")
    none = processor.encode_prompt("the dog")
    groups = [[Target([*two, 5, 6], len(two)), Target([*two, 7], len(two))], [Target([*none, 8], len(none))]]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        prefix_embeds = model.prefix(pixels)
    first = log_likelihoods(model, [*groups, groups[0]], prefix_embeds[[0, 1, 1, 2]], images_per_group=[2, 0, 2])
    expected = [
        [one_by_one(model, processor, images[:2], two, ids) for ids in ([5, 6], [7])],
        [one_by_one(model, processor, None, none, [8])],
        [one_by_one(model, processor, images[1:], two, ids) for ids in ([5, 6], [7])],
    ]
    for values, right in zip(first, expected, strict=True):
        assert values.tolist() == pytest.approx(right, rel=1e-5)
    with pytest.raises(TrainingError, match="4 image placeholders, expected 2"):
        log_likelihoods(model, [groups[0]], prefix_embeds[:1])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([], ConfigError, r"labels: got \[\]"),
        ("dog", ConfigError, "expected a list of different labels"),
        (["dog", "cat", "dog"], ConfigError, "dog more than once"),
        (["dog", " "], DataError, "empty target"),
    ],
)
def test_wrong_labels(tiny_checkpoint, images, labels, error, message):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(error, match=message):
        Classifier(captioner.model, captioner.processor).scores(images, labels)


@pytest.mark.parametrize("options", [{"templates": "A photo of a"}, {"templates": []}, {"normalise": "max"}])
def test_wrong_options(tiny_checkpoint, options):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: got .*, expected"):
        Classifier(captioner.model, captioner.processor, **options)


# ── evaluation ──


def labelled(folder: Path) -> list[Sample]:
    return [
        Sample(f"{c}_{s}", (folder / f"images/{c}_{s}.png",), (s,), task="classification")
        for s in SHAPES
        for c in COLOURS
    ]


def options_for(path: Path, **more) -> EvaluationOptions:
    return EvaluationOptions(predictions=path, features=FeatureStorage("off"), **more)


def test_evaluation(captioner, shapes, tmp_path):
    samples, path = labelled(shapes), tmp_path / "made" / "p.jsonl"
    done = []
    result = evaluate_classification(
        captioner, samples, options_for(path, progress=lambda *counts: done.append(counts)), templates=["a"]
    )
    classifier = Classifier(captioner.model, captioner.processor, templates=["a"])
    labels = sorted(SHAPES)
    expected = [c.label for c in classifier.classify([sample.images[0] for sample in samples], labels)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == expected
    assert [row["shuffled"] for row in rows] == [*expected[6:], *expected[:6]]
    assert {row["blind"] for row in rows} == {labels[int(classifier.blind_scores(labels).argmax())]}
    hits = [row["model"] == row["references"][0] for row in rows]
    assert result["metrics"]["accuracy"] == sum(hits) / 12
    assert [row["scores"]["model"]["accuracy"] for row in rows] == hits
    assert result["baselines"]["blind"]["accuracy"] == result["baselines"]["chance"]["accuracy"] == 0.25
    assert result["baselines"].keys() == {"blind", "shuffled", "chance"}
    assert (result["n"], result["confusion"]["labels"], result["bad_images"]) == (12, labels, {})
    counts = result["confusion"]["counts"]
    assert [sum(row) for row in counts] == [3] * 4
    assert sum(counts[i][i] for i in range(4)) == sum(hits)
    assert result["groups"]["model"]["recall"] == {name: counts[i][i] / 3 for i, name in enumerate(labels)}
    low, high = result["intervals"]["accuracy"]
    assert low <= result["metrics"]["accuracy"] <= high
    assert done[-1] == (12, 12)
    assert Path(result["confusion"]["file"]).read_text().startswith("<?xml")
    json.dumps(result)


def test_more_labels_than_occur(captioner, shapes, tmp_path):
    labels = [*SHAPES, "dog"]
    result = evaluate_classification(captioner, labelled(shapes), options_for(tmp_path / "p.jsonl"), labels=labels)
    assert result["confusion"]["labels"] == labels
    assert result["baselines"]["chance"]["accuracy"] == pytest.approx(1 / 5)


def test_bad_images_are_left_out(captioner, tmp_path):
    folder = write_shapes(tmp_path / "shapes")
    (folder / "images/red_circle.png").write_bytes(b"no image")
    result = evaluate_classification(captioner, labelled(folder), options_for(tmp_path / "p.jsonl", max_bad_share=0.1))
    assert (result["n"], result["bad_images"]) == (11, {"not_an_image": 1})


def test_a_killed_evaluation_goes_on(captioner, shapes, tmp_path, monkeypatch):
    samples, path = labelled(shapes), tmp_path / "p.jsonl"
    scores, calls = Classifier.scores, []

    def counted(self, images, labels):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scores(self, images, labels)

    monkeypatch.setattr(Classifier, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_classification(captioner, samples, options_for(path))
    result = evaluate_classification(captioner, samples, options_for(path))
    assert calls == [3, 3, 3, 3, 3], "six images were not asked again"
    fresh = evaluate_classification(captioner, samples, options_for(tmp_path / "fresh.jsonl"))
    assert result["confusion"]["counts"] == fresh["confusion"]["counts"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "fresh.jsonl", "fresh_confusion.svg", "p.jsonl", "p_confusion.svg"
    ]  # fmt: skip


def test_the_task_takes_its_options_by_name(captioner, shapes, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(classification, "evaluate_classification", lambda *args, **options: given.update(options) or {})
    options = options_for(tmp_path / "p.jsonl", extra={"calibrate": True})
    CLASSIFICATION.run(captioner, labelled(shapes), options)
    assert given == {"calibrate": True}
    with pytest.raises(ConfigError, match=r"no option 'callibrate' \(did you mean 'calibrate'\?\)"):
        CLASSIFICATION.run(captioner, labelled(shapes), options_for(tmp_path / "p.jsonl", extra={"callibrate": 1}))


@pytest.mark.parametrize(
    ("sample", "labels", "error", "message"),
    [
        (Sample("1", (Path("a"),), ("cat",)), None, ConfigError, "task 'classification', got caption"),
        (Sample("1", (Path("a"),), ("a", "b"), task="classification"), None, DataError, "1 images and 2 targets"),
        (
            Sample("1", (Path("a"),), ("cat",), task="classification"),
            ["cats", "dogs"],
            DataError,
            r"'cat' is a sample's target but not a label \(did you mean 'cats'\?\)",
        ),
    ],
)
def test_samples_that_cannot_be_classified(captioner, tmp_path, sample, labels, error, message):
    with pytest.raises(error, match=message):
        evaluate_classification(captioner, [sample], options_for(tmp_path / "p.jsonl"), labels=labels)


def test_confusion_drawing(tmp_path):
    labels = ["cat", "<dog> & co", "x" * 40, "a$b$c_^{"]
    path = tmp_path / "confusion.svg"
    draw_confusion(labels, [[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], path)
    root = ElementTree.fromstring(path.read_text())
    texts = "".join(path.read_text().split())
    assert root.tag.endswith("svg")
    assert all(comment in texts for comment in ("<!--cat-->", "<!--3-->", "6of7"))


# ── real weights ──


@pytest.mark.slow
@pytest.mark.network
def test_real_weights_and_emoji(tmp_path):
    """SmolLM2 and EfficientNet-Lite0 on emoji: labels that share a row are scored as each alone."""
    from frozenprefix.config import load_recipe

    recipe = load_recipe(
        ROOT / "recipes" / "quickstart.yaml",
        [f"output_dir={tmp_path}", "training.precision=fp32"],
    )
    model, processor = build_model(recipe)
    command = [sys.executable, ROOT / "recipes" / "emoji.py", tmp_path / "emoji", "--classes", "easy"]
    subprocess.run(command, check=True)
    samples = load_source({"type": "captions", "path": str(tmp_path / "emoji"), "limit": 3})
    images = [load_image(sample.images[0]) for sample in samples]
    labels = ["dog", "cat", "ice cream", "strawberry", "hot air balloon"]
    scores = Classifier(model.eval(), processor).scores(images, labels)
    prompt = "<image>A photo of a"
    for image, row in zip(images, scores, strict=True):
        alone = [
            one_by_one(model, processor, [image], processor.encode_prompt(prompt), target_ids(processor, prompt, label))
            for label in labels
        ]
        assert row.tolist() == pytest.approx(alone, abs=2e-3)
