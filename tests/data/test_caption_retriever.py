"""Captions of similar training images in the prompt: what is retrieved, who sees it, and where it is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from frozenprefix.data.caption_retriever import (
    ARRAYS_FILE,
    TEXTS_FILE,
    CaptionRetriever,
    ImageLookup,
    image_keys,
)
from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.data.samples import Sample
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.evaluation import evaluate_samples
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.evaluation.tasks import runs
from frozenprefix.evaluation.tasks.captioning import evaluate_captions
from frozenprefix.inference import Captioner
from frozenprefix.training.setup import add_similar_captions, build_model, load_parts, prepare_images
from frozenprefix.training.trainer import train

OPTIONS = RetrievalOptions(images=3, captions=2, template="Like: {captions}\n")


class Table:
    """Stands for a feature cache: the key of an image is what its "file" holds."""

    def __init__(self, **images: tuple[str, list[float]]):
        self.images = images
        self.by_key = dict(images.values())

    def keys_of(self, paths):
        return [self.images[path.stem][0] for path in paths]

    def get(self, keys):
        return np.array([[self.by_key[key]] for key in keys], dtype=np.float32)


def caption(name: str, *targets: str, **more) -> Sample:
    return Sample(name, (Path(f"{name}.jpg"),), targets, **more)


DOGS = [
    caption("dog", "a brown dog runs", "a dog on grass"),
    caption("hound", "a dog runs on grass", "an animal"),
    caption("poodle", "a dog runs in a field"),
    caption("car", "a red car", "a car in a street"),
]
TABLE = Table(
    dog=("d", [1, 0, 0.1]),
    hound=("h", [0.9, 0.1, 0.1]),
    poodle=("p", [0.8, 0, 0.2]),
    car=("c", [-1, 1, 0]),
    copy=("d", [1, 0, 0.1]),
    new=("n", [1, 0, 0.1]),
)
LOOKUP = ImageLookup.from_cache(TABLE)


# ── what is retrieved ──


def test_one_caption_of_each_image_those_that_agree_first():
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, OPTIONS)
    (found,) = retriever([[[1, 0, 0.1]]], ["n"])
    assert len(found) == 2
    assert "an animal" not in found  # of the same image, and alone with its words
    assert not any("car" in text for text in found)
    owner = {text: sample.id for sample in DOGS for text in sample.targets}
    assert len({owner[text] for text in found}) == 2
    assert retriever([[[1, 0, 0.1]]], ["n"]) == [found]


def test_own_captions_are_left_out_also_under_another_name():
    options = RetrievalOptions(images=1, captions=1)
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, options)
    new, own, copy = retriever.with_prompts([caption("new"), caption("dog"), caption("copy")], LOOKUP, prompt="")
    assert any(text in new.prompt for text in DOGS[0].targets)
    for sample in (own, copy):
        assert not any(text in sample.prompt for text in DOGS[0].targets)
        assert any(text in sample.prompt for text in DOGS[1].targets)


REGRESSION = RetrievalOptions(captions=2)


def test_by_regression_those_first_that_agree_with_its_prediction():
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, REGRESSION)
    (found,) = retriever([[[1, 0, 0.1]]], ["n"])
    texts = [text for sample in DOGS for text in sample.targets]
    (scores,) = retriever.agreement([texts], [[[1, 0, 0.1]]], ["n"])
    assert found[0] == texts[scores.argmax()]
    owner = {text: sample.id for sample in DOGS for text in sample.targets}
    assert len({owner[text] for text in found}) == 2
    assert not any("car" in text for text in found)
    assert retriever([[[-1, 1, 0]]], ["n"])[0][0] in DOGS[3].targets


def test_by_regression_own_captions_are_left_out():
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, REGRESSION)
    features, keys = TABLE.get(["d", "d"]), ["n", "d"]
    as_new, as_known = retriever(features, keys)
    assert set(as_new) & set(DOGS[0].targets)
    assert not set(as_known) & set(DOGS[0].targets)
    new, known = retriever.agreement([["a brown dog runs"]] * 2, features, keys)
    assert known[0] < new[0]


def test_by_regression_no_wording_twice():
    samples = [caption("dog", "A dog ."), caption("hound", "a dog"), caption("poodle", "a poodle"), DOGS[3]]
    found = CaptionRetriever.from_samples(samples, TABLE, RetrievalOptions(captions=3))([[[1, 0, 0]]], ["n"])[0]
    assert len(found) == 3
    assert len({"A dog .", "a dog"} & set(found)) == 1


def test_many_images_at_once_are_as_one_by_one():
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(150)]
    captions = [[" ".join(rng.choice(list("abcdefgh"), 4)) for _ in range(2)] for _ in keys]
    features = rng.normal(size=(150, 1, 5)).astype(np.float16)
    retriever = CaptionRetriever(RetrievalOptions(), keys, captions, features[:, 0])
    assert retriever(features, keys) == [retriever(features[[i]], [key])[0] for i, key in enumerate(keys)]


def test_equal_images_are_one_entry():
    retriever = CaptionRetriever.from_samples([*DOGS, caption("copy", "a hairy friend")], TABLE, OPTIONS)
    assert list(retriever.keys) == ["d", "h", "p", "c"]
    assert retriever.captions[0] == ["a brown dog runs", "a dog on grass", "a hairy friend"]
    texts = retriever([[[1, 0, 0.1]]], ["d"])[0]
    assert not set(texts) & set(retriever.captions[0])


def test_no_text_twice():
    samples = [caption(name, "a dog") for name in ("dog", "hound", "poodle", "car")]
    assert CaptionRetriever.from_samples(samples, TABLE, OPTIONS)([[[1, 0, 0]]], ["n"]) == [["a dog"]]


def test_refuses_what_cannot_be_retrieved_from():
    with pytest.raises(DataError, match="captions of 1 different images, expected at least 2"):
        CaptionRetriever.from_samples([DOGS[0], caption("copy", "a dog")], TABLE, OPTIONS)
    both = Sample("two", (Path("dog.jpg"), Path("car.jpg")), ("a dog and a car",))
    with pytest.raises(DataError, match="sample 'two' has 2 images, expected 1"):
        CaptionRetriever.from_samples([*DOGS, both], TABLE, OPTIONS)


# ── the prompt ──


def test_captions_cannot_break_the_prompt(tiny_checkpoint):
    processor = Captioner.from_pretrained(tiny_checkpoint, device="cpu").processor
    odd = ["{captions} {0} {x", "a <image> {question}\nof } it"]
    samples = [caption("dog", odd[0]), caption("hound", odd[1]), DOGS[3]]
    retriever = CaptionRetriever.from_samples(samples, TABLE, RetrievalOptions(images=2, captions=2))
    (shown,) = retriever.with_prompts([caption("new", "a dog")], LOOKUP, prompt="")
    assert {"{captions} {0} {x", "a of } it"} <= set(shown.prompt.splitlines())
    assert prompt_of(shown, processor).count("<image>") == 1


def test_other_tasks_keep_their_prompt_and_own_prompts_stay():
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, OPTIONS)
    question = caption("dog", "brown", task="vqa", question="what color?")
    mine = caption("new", "a dog", prompt="In short:")
    asked = retriever.with_prompts([question, mine], LOOKUP, prompt="never seen")
    assert asked[0] == question
    assert asked[1].prompt.startswith("Like: ")
    assert asked[1].prompt.endswith("\n<image>In short:")


# ── in a checkpoint ──


def test_saved_and_read_back(tmp_path):
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, OPTIONS)
    retriever.save(tmp_path)
    again = CaptionRetriever.load(tmp_path)
    assert again is not None
    assert again.options == OPTIONS
    assert again.features.dtype == np.float16
    keys, features = ["n", "d", "c"], TABLE.get(["n", "d", "c"])
    assert again(features, keys) == retriever(features, keys)


def test_a_damaged_datastore_is_named(tmp_path):
    assert CaptionRetriever.load(tmp_path) is None
    CaptionRetriever.from_samples(DOGS, TABLE, OPTIONS).save(tmp_path)
    texts = json.loads((tmp_path / TEXTS_FILE).read_text())
    (tmp_path / TEXTS_FILE).write_text(json.dumps({**texts, "keys": texts["keys"][1:]}))
    with pytest.raises(CheckpointError, match=r"cannot be read .*\(3, 4, 7\), expected \(4, 4, 7\)"):
        CaptionRetriever.load(tmp_path)
    (tmp_path / ARRAYS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{ARRAYS_FILE} is missing"):
        CaptionRetriever.load(tmp_path)


# ── recipe, training and test ──


def retrieving(tiny_recipe, folder: Path, *overrides: str, **more):
    section = 'data.retrieval={images: 2, captions: 2, template: "like {captions} "}'
    return tiny_recipe(folder, section, *overrides, **more)


@pytest.fixture(scope="module")
def checkpoint(tiny_recipe, sharp_lm, tmp_path_factory) -> Path:
    """An untrained checkpoint with the captions of the eight training drawings."""
    folder = tmp_path_factory.mktemp("retrieving")
    recipe = retrieving(tiny_recipe, folder, lm=sharp_lm)
    model, processor = build_model(recipe)
    prepared = prepare_images(ImageEncoder.from_model(model, processor), load_parts(recipe.data), recipe.data)
    retriever = add_similar_captions(prepared, recipe.data)
    assert retriever is not None
    for part in (model, processor):
        part.save_pretrained(folder)
    retriever.save(folder)
    return folder


def test_prompts_of_training(tiny_recipe, tiny_lm, tmp_path):
    recipe = retrieving(tiny_recipe, tmp_path)
    model, processor = build_model(recipe)
    prepared = prepare_images(ImageEncoder.from_model(model, processor), load_parts(recipe.data), recipe.data)
    before = {part: [group.images for group in groups] for part, groups in prepared.groups.items()}
    add_similar_captions(prepared, recipe.data)
    assert before == {part: [group.images for group in groups] for part, groups in prepared.groups.items()}
    assert {part: len(groups) for part, groups in prepared.groups.items()} == {"train": 8, "validation": 4}
    train_texts = {t for g in prepared.groups["train"] for s in g.samples if s.task == "caption" for t in s.targets}
    for group in (group for groups in prepared.groups.values() for group in groups):
        described = next(sample for sample in group.samples if sample.task == "caption")
        assert described.prompt.startswith("like ")
        assert described.prompt.endswith(" <image>")
        shown = described.prompt.removeprefix("like ").removesuffix(" <image>").split("\n")
        assert len(shown) == 2
        assert set(shown) <= train_texts - set(described.targets)
        assert all(sample.prompt is None for sample in group.samples if sample.task == "vqa")
    # read once: the retrieved captions and the image are the start that all targets of an image share
    group = prepared.groups["train"][0]
    described = next(sample for sample in group.samples if sample.task == "caption")
    packed = Collator(processor, prepared.features).pack([[(described, text) for text in described.targets]], [1])
    context = processor.encode_prompt(described.prompt)
    assert packed.input_ids[0, : len(context)].tolist() == context
    assert (packed.input_ids == processor.image_token_id).sum() == processor.prefix_length


def prompts_seen(captioner: Captioner, monkeypatch) -> list[str]:
    seen: list[str] = []
    generate = captioner.generate_groups

    def spy(groups, *args, **more):
        seen.extend(prompt for prompts in groups for prompt in prompts)
        return generate(groups, *args, **more)

    monkeypatch.setattr(captioner, "generate_groups", spy)
    return seen


def test_captioner_builds_the_prompts_of_training(checkpoint, shapes, tmp_path, monkeypatch):
    captioner = Captioner.from_pretrained(checkpoint, device="cpu", batch_size=3)
    seen = prompts_seen(captioner, monkeypatch)
    shutil.copy(shapes / "images/red_circle.png", tmp_path / "other.png")
    paths = [shapes / "images/red_circle.png", tmp_path / "other.png", shapes / "images/blue_circle.png"]
    made = list(captioner.caption(paths, num_beams=1, max_new_tokens=3))
    assert [caption.path for caption in made] == paths
    own = {"a red circle", "a circle in red", "the circle is red"}
    assert seen[0] == seen[1]  # by content, not by name
    assert not any(text in seen[0] for text in own)
    assert all(prompt.startswith("like ") and prompt.endswith(" <image>") for prompt in seen)
    seen.clear()
    list(captioner.caption(paths[:1], prompt="it is", num_beams=1, max_new_tokens=3))
    assert seen[0].startswith("like ")
    assert seen[0].endswith(" <image>it is")


def test_captions_change_with_what_is_retrieved(checkpoint, shapes):
    with_them = Captioner.from_pretrained(checkpoint, device="cpu")
    without = Captioner(with_them.model, with_them.processor)
    paths = sorted((shapes / "images").iterdir())
    options = {"num_beams": 1, "max_new_tokens": 5}
    assert [c.score for c in with_them.caption(paths, **options)] != [
        c.score for c in without.caption(paths, **options)
    ]


def test_evaluation_and_its_baselines(checkpoint, shapes, tmp_path, monkeypatch):
    captioner = Captioner.from_pretrained(checkpoint, device="cpu", batch_size=3)
    asked: dict[str, dict[str, tuple]] = {}  # run -> sample id -> prompt and images
    predict = runs.predict

    def spy(captioner, batch, *rest):
        for one in batch:
            for prompt, askers in one.askers.items():
                for run, key in askers:
                    asked.setdefault(run, {})[key] = (prompt, one.images)
        return predict(captioner, batch, *rest)

    monkeypatch.setattr(runs, "predict", spy)
    samples = [caption_of(shapes, name) for name in ("blue_circle", "blue_square", "blue_triangle", "blue_cross")]
    result = evaluate_samples(
        captioner, samples, predictions=tmp_path / "p.jsonl", num_beams=1, max_new_tokens=3, train_samples=()
    )
    assert result["baselines"].keys() == {"blind", "shuffled", "retrieval_only"}
    lookup = ImageLookup(
        lambda paths: image_keys(captioner.model.vision_encoder, paths),
        captioner.encoder,
    )
    shown = [sample.prompt for sample in captioner.retriever.with_prompts(samples, lookup, prompt="")]
    other = [(i + 2) % 4 for i in range(4)]
    assert asked["model"] == {s.id: (shown[i], s.images) for i, s in enumerate(samples)}
    # the other image: once with the captions retrieved for it, once with the sample's own
    assert asked["shuffled"] == {s.id: (shown[j], samples[j].images) for s, j in zip(samples, other, strict=True)}
    own = zip(samples, shown, other, strict=True)
    assert asked["retrieval_only"] == {s.id: (prompt, samples[j].images) for s, prompt, j in own}
    assert set(asked["blind"].values()) == {("<image>", ())}


def caption_of(shapes: Path, name: str) -> Sample:
    colour, shape = name.split("_")
    return Sample(name, (shapes / f"images/{name}.png",), (f"a {colour} {shape}",), split="val")


def test_training_leaves_the_datastore_in_its_checkpoints(tiny_recipe, tmp_path, shapes):
    recipe = retrieving(tiny_recipe, tmp_path / "run")
    result = train(recipe)
    for folder in (result.best, tmp_path / "run" / "last"):
        retriever = CaptionRetriever.load(folder)
        assert retriever is not None
        assert len(retriever.keys) == 8
        assert retriever.options == RetrievalOptions(images=2, captions=2, template="like {captions} ")
    other = retrieving(tiny_recipe, tmp_path / "run", "data.retrieval.captions=1")
    with pytest.raises(CheckpointError, match=r"another recipe: data\.retrieval was"):
        train(other)


# ── to choose among beams ──


def test_both_in_the_prompt_and_to_choose_by(tiny_recipe, tmp_path, shapes):
    recipe = tiny_recipe(tmp_path / "run", "data.retrieval={use: both, captions: 2, template: 'like {captions} '}")
    captioner = Captioner.from_pretrained(train(recipe).best, device="cpu")
    assert captioner.retriever is captioner.reranker
    samples = [caption_of(shapes, name) for name in ("blue_circle", "blue_square")]
    result = evaluate_samples(
        captioner, samples, predictions=tmp_path / "p.jsonl", num_beams=3, max_new_tokens=3, train_samples=()
    )
    assert result["settings"]["rerank"] == {"ridge": 0.5}
    assert "retrieval_only" in result["baselines"]


def test_agreement_is_that_with_the_captions_of_similar_images():
    retriever = CaptionRetriever.from_samples(DOGS, TABLE, RetrievalOptions(use="rerank", images=2))
    texts = ["a red car", "a dog runs", "a brown dog runs"]
    features = TABLE.get(["n", "d"])
    new, known = retriever.agreement([texts, texts], features, ["n", "d"])
    assert new.argmax() == 2, "the nearest two are the dog and the hound"
    assert known.argmax() == 1, "without its own captions: the hound and the poodle"
    assert (new >= 0).all()
    assert (new <= 1).all()


def test_of_the_beams_the_one_that_agrees(checkpoint, shapes, tmp_path):
    captioner = Captioner.from_pretrained(checkpoint, device="cpu", batch_size=3)
    paths = sorted((shapes / "images").iterdir())[:4]
    written = []

    class Third:
        """Prefers the third beam."""

        options = RetrievalOptions(use="rerank", images=2)

        def agreement(self, texts, features, keys):
            written.extend(texts)
            return [np.eye(len(each))[2] for each in texts]

    plain = [one.text for one in Captioner(captioner.model, captioner.processor).caption(paths, num_beams=4)]
    choosing = Captioner(captioner.model, captioner.processor, reranker=Third())
    chosen = list(choosing.caption(paths, num_beams=4, max_new_tokens=30))
    assert [len(set(texts)) for texts in written] == [4] * 4
    assert [one.text for one in chosen] == [texts[2] for texts in written]
    assert [texts[0] for texts in written] == plain
    written.clear()
    assert len(list(choosing.caption(paths, num_beams=1, max_new_tokens=5))) == 4
    assert not written, "greedy search has one text"
    samples = [caption_of(shapes, name) for name in ("blue_circle", "blue_square", "blue_triangle", "blue_cross")]
    result = evaluate_samples(choosing, samples, predictions=tmp_path / "p.jsonl", num_beams=4, max_new_tokens=3)
    assert result["settings"]["rerank"] == {"images": 2}
    assert len(written) == 4, "an image has one caption, its own or shuffled"
    written.clear()
    options = EvaluationOptions(tmp_path / "q.jsonl", num_beams=4, max_new_tokens=3)
    result = evaluate_captions(choosing, samples, replace(options, extra={"rerank": False}))
    assert result["settings"]["rerank"] is False
    assert not written
    for value, message in ((True, "rerank: the checkpoint holds no captions"), ("yes", "rerank: got 'yes'")):
        with pytest.raises(ConfigError, match=message):
            evaluate_captions(captioner, samples, replace(options, extra={"rerank": value}))


def test_a_recipe_reranks_without_longer_prompts(tiny_recipe, tmp_path, shapes):
    recipe = tiny_recipe(tmp_path / "run", "data.retrieval={use: rerank, images: 2}")
    result = train(recipe)
    captioner = Captioner.from_pretrained(result.best, device="cpu")
    assert captioner.retriever is None
    assert captioner.reranker.options == RetrievalOptions(use="rerank", images=2)
    assert len(captioner.reranker.keys) == 8
    assert len(list(captioner.caption([shapes / "images/red_circle.png"], num_beams=3))) == 1
    with pytest.raises(ConfigError, match=r"captions.*no effect with use 'rerank'"):
        tiny_recipe(tmp_path, "data.retrieval={use: rerank, images: 2, captions: 2}")
