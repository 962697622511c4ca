"""Every task on real weights (SmolLM2-135M, EfficientNet-Lite0) after a minute of training on easy-VQA's drawings.

Each test asserts what a blind model, or one that is shown wrong images, would fail.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

from frozenprefix import Captioner
from frozenprefix.config import load_recipe
from frozenprefix.data.caption_retriever import CaptionRetriever
from frozenprefix.data.images import load_image
from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.evaluation.tasks.few_shot_episodes import binding_episodes
from frozenprefix.inference.dialog import Dialog
from frozenprefix.inference.embedding import Embedder
from frozenprefix.inference.few_shot import Episode, choose_answers
from frozenprefix.inference.image_index import ImageIndex
from frozenprefix.models.processing import IMAGE_TOKEN
from frozenprefix.training.trainer import train
from tests.helpers import ROOT
from tests.test_recipes import script

pytestmark = [pytest.mark.slow, pytest.mark.network]

RECIPES = ROOT / "recipes"
EASY_VQA = {"type": "easy_vqa", "path": "pypi://easy-vqa==1.0/easy_vqa/data"}
ASKED = "what shape is in the image?"
SHORT = [
    "data.validation=[]",
    "data.workers=0",
    "training.epochs=null",
    "training.max_minutes=null",
    "training.warmup_steps=5",
]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """500 drawings to train on and 60 to test on: captions, and the questions that yes and no do not answer."""
    folder = tmp_path_factory.mktemp("drawings")
    captions, questions = [], []
    for split, limit in (("train", 500), ("test", 60)):
        for sample in load_source({**EASY_VQA, "split": split, "limit": limit, "captions": True}):
            row = {"image": str(sample.images[0]), "split": split}
            if sample.task == "caption":
                captions.append({**row, "captions": list(sample.targets)})
            elif (kind := sample.metadata["question_type"]) != "yes-no":
                questions.append({**row, "question": sample.question, "answer": sample.targets[0], "type": kind})
    for name, rows in (("captions.jsonl", captions), ("qa.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train_short(drawings, tmp_path_factory):
    """`train_short("quickstart", ["captions"], *overrides)` -> the checkpoint of a recipe trained on the drawings."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, types: Sequence[str], *overrides: str) -> Path:
        listed = [{"type": type_, "path": str(drawings), "split": "train"} for type_ in types]
        own = [
            f"output_dir={folder / '-'.join([name, *types])}",
            f"data.train={json.dumps(listed)}",
            f"data.feature_cache={folder / name}-features",
        ]
        return train(load_recipe(RECIPES / f"{name}.yaml", [*own, *SHORT, *overrides])).best

    return make


@pytest.fixture(scope="module")
def seeing(train_short) -> Path:
    """The quickstart's model, trained until it tells shapes."""
    size = ("training.max_steps=90", "training.images_per_step=16", "training.targets_per_image=3")
    return train_short("quickstart", ["captions", "qa"], *size)


@pytest.fixture(scope="module")
def conversing(train_short, drawings, seeing) -> Captioner:
    """`seeing`, taught prompts of three images, and chats of two turns with an image in each."""
    shown = load_source({"type": "captions", "path": str(drawings), "split": "train"})
    draw = random.Random(0)
    pairs = [draw.sample(shown, 2) for _ in range(320)]
    chats = [
        ([*one.images, *two.images], [(f"{IMAGE_TOKEN}{ASKED}", shape_of(drawn.targets[0])) for drawn in (one, two)])
        for one, two in pairs
    ]
    episodes = [(episode.images, [(episode.prompt, episode.answer)]) for episode in shape_episodes(shown, 320)]
    listed = []
    for name, talks, prompt in (("chats", chats, None), ("episodes", episodes, "{question}")):
        script("drawings").write_talks(drawings / f"{name}.json", talks)
        source = {"type": "llava", "path": str(drawings), "file": f"{name}.json", "name": name}
        listed.append({**source, "prompt": prompt} if prompt else source)
    run = train_short(
        "quickstart",
        ["conversations"],
        f"data.train={json.dumps(listed)}",
        f"training.init_from={seeing}",
        "training.max_steps=150",
        "training.images_per_step=8",
        "training.learning_rate=1e-3",
    )
    captioner = Captioner.from_pretrained(run, device="cpu")
    captioner.model.float()
    return captioner


@pytest.fixture(scope="module")
def captioner(seeing) -> Captioner:
    """In float32, so that the same computed in two ways is the same."""
    captioner = Captioner.from_pretrained(seeing, device="cpu")
    captioner.model.float()
    return captioner


@pytest.fixture(scope="module")
def tested(drawings) -> list[Sample]:
    """Drawings of the test split, each with its caption."""
    return load_source({"type": "captions", "path": str(drawings), "split": "test"})


@pytest.fixture(scope="module")
def of_shape(tested) -> dict[str, list[Path]]:
    """Drawings of the test split by the shape that they show."""
    found: dict[str, list[Path]] = {}
    for sample in tested:
        found.setdefault(shape_of(sample.targets[0]), []).append(sample.images[0])
    return found


def shape_of(caption: str) -> str:
    return caption.rpartition(" ")[2]


def shape_episodes(samples: Sequence[Sample], episodes: int) -> list[Episode]:
    """Two drawings with their shapes named, which are real words, and a third to be named."""
    labelled = [Sample(s.id, s.images, (shape_of(s.targets[0]),), task="classification") for s in samples]
    return binding_episodes(labelled, ways=2, shots=1, names=None, induction=False, episodes=episodes)


def rolled(items: list) -> list:
    """Each item at the place of the one half the list away."""
    half = len(items) // 2
    return items[half:] + items[:half]


def share_of_equal(made: Sequence[str], right: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(made, right, strict=True)) / len(right)


@torch.no_grad()
def log_likelihood(captioner: Captioner, prompt: str, images: Sequence[Path], text: str) -> float:
    """Sum over the tokens of log p(text | images and prompt), in a plain pass of its own."""
    model, processor = captioner.model, captioner.processor
    context, target = processor.encode_prompt(prompt), processor.encode_target(prompt, text)[:-1]
    pixel_values = processor.image_processor([load_image(path) for path in images], return_tensors="pt")["pixel_values"]
    logits = model(input_ids=torch.tensor([[*context, *target]]), pixel_values=pixel_values).logits[0].float()
    values = logits[len(context) - 1 : -1].log_softmax(dim=-1)
    return values.gather(1, torch.tensor(target)[:, None]).sum().item()


# ── one image ──


def test_captions_name_the_shapes_that_are_there(captioner, tested):
    right = [shape_of(sample.targets[0]) for sample in tested]
    made = [shape_of(caption.text) for caption in captioner.caption(sample.images[0] for sample in tested)]
    assert share_of_equal(made, right) > 0.8
    assert share_of_equal(made, rolled(right)) < 0.6


def test_answers_follow_the_image(seeing, captioner, drawings, of_shape):
    result = evaluate_checkpoint(seeing, task="vqa", data=drawings, split="test", feature_cache="off")
    assert result["n"] > 100
    assert result["metrics"]["exact_match"] > 0.5
    assert result["baselines"]["shuffled"]["exact_match"] < 0.4
    assert result["baselines"]["blind"]["exact_match"] < 0.2
    asked = [(path, shape) for shape, paths in of_shape.items() for path in paths[:5]]
    assert share_of_equal([captioner.answer(path, ASKED) for path, _ in asked], [shape for _, shape in asked]) > 0.75


def test_classes_are_told_apart(seeing, tmp_path):
    """24 labels, colour and shape, behind the beginning of the captions that were learned."""
    result = evaluate_checkpoint(
        seeing,
        task="classification",
        data=EASY_VQA["path"],
        split="test",
        limit=60,
        templates=["Caption: a"],
        predictions=tmp_path / "predictions.jsonl",
        feature_cache="off",
    )
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    shapes = [(shape_of(row["model"]), shape_of(row["references"][0])) for row in rows]
    assert sum(a == b for a, b in shapes) > 0.8 * len(rows)
    assert result["metrics"]["accuracy"] > 2 * result["baselines"]["shuffled"]["accuracy"]


# ── search ──


def test_a_text_finds_its_drawings(train_short, drawings, tested):
    """FROMAGe's two heads, half a minute of captions and contrast."""
    size = ("training.max_steps=30", "training.images_per_step=32", "training.targets_per_image=1")
    run = train_short(
        "fromage", ["captions"], *size, "training.learning_rate=5e-3", "model.vision_encoder.image_size=128"
    )
    embedder, caption_of = Embedder.from_pretrained(run), {s.images[0]: s.targets[0] for s in tested}
    index = ImageIndex.build(embedder, caption_of)
    queries = sorted(set(caption_of.values()))
    hits = index.search(embedder.embed_texts(queries), k=3)
    found = [shape_of(caption_of[hit.path]) for row in hits for hit in row]
    wanted = [shape_of(query) for query in queries for _ in range(3)]
    assert share_of_equal(found, wanted) > 0.7
    result = evaluate_checkpoint(run, task="retrieval", data=drawings, split="test")
    chance, shuffled = result["baselines"]["chance"], result["baselines"]["shuffled"]
    for name in ("text_to_image_recall@5", "image_to_text_recall@5"):
        assert result["metrics"][name] > 2 * max(chance[name], shuffled[name])


# ── captions of similar images ──


def test_similar_captions_help(train_short, seeing, captioner, drawings, tested):
    run = train_short(
        "quickstart",
        ["captions"],
        f"training.init_from={seeing}",
        "data.retrieval={captions: 3}",
        "training.max_steps=6",
        "training.learning_rate=1e-3",
    )
    augmented = Captioner.from_pretrained(run, device="cpu")
    augmented.model.float()
    retriever, right = augmented.retriever, [sample.targets[0] for sample in tested]
    assert retriever is not None
    features = augmented._features({"images": [load_image(sample.images[0]) for sample in tested]})
    shown, keys = retriever(features, ["new"] * len(tested)), ["new"] * len(tested)
    near, far = (
        sum(shape_of(text) == shape_of(own) for texts, own in zip(shown, owns, strict=True) for text in texts)
        for owns in (right, rolled(right))
    )
    assert near > 1.3 * far, "similar images show the same shape"
    prompts = retriever.prompts([augmented.processor.prompt_for("caption")] * len(tested), features, keys)
    gain = 0.0
    for sample, own, other in list(zip(tested, prompts, rolled(prompts), strict=True))[:12]:
        assert own.startswith("Similar images:\n")
        assert own.endswith(f"\n{IMAGE_TOKEN}Caption:")
        gain += log_likelihood(augmented, own, sample.images, sample.targets[0])
        gain -= log_likelihood(augmented, other, sample.images, sample.targets[0])
    assert gain > 0, "the right caption is likelier behind captions of images like this one"
    # with a caption of its own for every training image: none of them is shown its own
    numbers = [[f"number {n}"] for n in range(len(retriever.keys))]
    named = CaptionRetriever(RetrievalOptions(images=3, captions=3), retriever.keys, numbers, retriever.features)
    own = retriever.features[:, None]
    assert all(f"number {n}" not in texts for n, texts in enumerate(named(own, retriever.keys)))
    assert all(f"number {n}" in texts for n, texts in enumerate(named(own, ["new"] * len(own))))


# ── several images in one prompt ──


def test_a_choice_is_the_likeliest_read_alone(captioner, tested):
    labelled = [Sample(s.id, s.images, (shape_of(s.targets[0]),), task="classification") for s in tested]
    episodes = binding_episodes(labelled, ways=2, shots=1, episodes=8)
    alone = []
    for episode in episodes:
        assert episode.prompt.count(IMAGE_TOKEN) == 3
        scores = [log_likelihood(captioner, episode.prompt, episode.images, choice) for choice in episode.choices]
        alone.append(episode.choices[scores.index(max(scores))])
    assert choose_answers(captioner, episodes) == alone


def test_the_last_image_decides(conversing, tested, of_shape):
    episodes = shape_episodes(tested, 24)
    others = [next(name for name in episode.choices if name != episode.answer) for episode in episodes]
    swapped = [
        replace(e, query=next(path for path in of_shape[other] if path not in e.images))
        for e, other in zip(episodes, others, strict=True)
    ]
    # who does not look gives the same answers to both, and is right in one of them at most
    assert share_of_equal(choose_answers(conversing, episodes), [episode.answer for episode in episodes]) > 0.75
    assert share_of_equal(choose_answers(conversing, swapped), others) > 0.75


# ── dialog ──


def test_a_second_turn_is_that_of_the_whole_conversation(captioner, of_shape):
    circle, triangle = of_shape["circle"][0], of_shape["triangle"][0]
    dialog = Dialog(captioner.model, captioner.processor)
    dialog.ask("what color is the shape?", [circle], max_new_tokens=12)
    before = dialog.num_tokens
    reply = dialog.ask("and what shape is in this image?", [triangle], max_new_tokens=12)
    assert dialog.num_tokens > before
    text = captioner.processor.apply_chat_template(dialog.messages[:-1], add_generation_prompt=True)
    assert text.count("<|im_start|>user") == text.count(IMAGE_TOKEN) == 2
    images = [load_image(circle), load_image(triangle)]
    assert captioner.generate([text], images, num_beams=1, max_new_tokens=12)[0].text == reply


def test_replies_of_a_dialog_name_the_image(captioner, of_shape, monkeypatch):
    """Without a chat template a turn has the prompt that was trained."""
    for part in (captioner.processor, captioner.processor.tokenizer):
        monkeypatch.setattr(part, "chat_template", None)
    dialog, replies, right = Dialog(captioner.model, captioner.processor), [], []
    for shape, path in [(shape, path) for shape, paths in of_shape.items() for path in paths[:4]]:
        dialog.reset()
        replies.append(dialog.ask(ASKED, [path], max_new_tokens=4))
        right.append(shape)
    assert share_of_equal(replies, right) > 0.75


def test_a_second_turn_names_its_own_image(conversing, of_shape):
    """Through the chat template."""
    dialog, right, replies = Dialog(conversing.model, conversing.processor), [], []
    for one, two in [*permutations(of_shape, 2)] * 2:
        dialog.reset()
        dialog.ask(ASKED, [of_shape[one][len(right) // 6]], max_new_tokens=4)
        replies.append(dialog.ask(ASKED, [of_shape[two][-1 - len(right) // 6]], max_new_tokens=4))
        right.append(two)
    assert share_of_equal(replies, right) > 0.75


# ── video ──


def test_a_clip_is_told_shape_by_shape(captioner, of_shape, tmp_path):
    pytest.importorskip("av")
    from frozenprefix.inference.video import VideoCaptioner
    from tests.helpers.video import write_clip

    shapes = ["circle", "triangle", "rectangle"]
    # drawings that it knows: what is asked here is what stands when
    told = ((shape, made) for shape in shapes for made in captioner.caption(of_shape[shape][:5]))
    shown = {shape: made.path for shape, made in told if shape_of(made.text) == shape}
    assert sorted(shown) == sorted(shapes)
    clip = write_clip(tmp_path / "clip.mp4", [load_image(shown[shape]) for shape in shapes], each=20)
    segments = VideoCaptioner(captioner, frames=3).summary(clip, sampler="uniform")
    assert [shape_of(segment.caption) for segment in segments] == shapes
    assert [(segment.start, segment.end) for segment in segments] == [pytest.approx(x) for x in pairwise((0, 2, 4, 6))]
