"""From images and samples to model inputs, and how a step is divided."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from frozenprefix.data.collation import Collator, StepDataset, prompt_of
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, Sample, group_by_images
from frozenprefix.data.sources import load_sources
from frozenprefix.errors import BadImageError, ConfigError, TrainingError
from frozenprefix.models.processing import FrozenPrefixProcessor


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return FrozenPrefixProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def groups(shapes):
    sources = [{"type": kind, "path": str(shapes), "split": "train", "name": kind} for kind in ("captions", "qa")]
    return group_by_images(load_sources(sources))


def all_targets(groups):
    return [[(sample, text) for sample in group.samples for text in sample.targets] for group in groups]


def test_ids_and_context_by_hand(processor):
    target = Collator(processor).target(Sample("1", (Path("x"),), ("dog",), question="what?", task="vqa"), "dog")
    image, words = processor.image_token_id, processor.tokenizer
    context = [image, image, *words("Question: what? Answer:")["input_ids"]]
    assert target.input_ids == [*context, *words(" dog")["input_ids"], 2]
    assert target.num_context == len(context)


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        (Sample("1", (Path("a"),), ()), "<image>"),
        (Sample("1", (Path("a"), Path("b")), ()), "<image><image>"),
        (Sample("1", (Path("a"),), (), prompt="it shows"), "<image>it shows"),
        (Sample("1", (Path("a"), Path("b")), (), prompt="both: "), "<image><image>both: "),
        (Sample("1", (Path("a"), Path("b")), (), prompt="<image> or <image>?"), "<image> or <image>?"),
        (Sample("1", (Path("a"),), (), question="who?", task="vqa"), "<image>Question: who? Answer:"),
        (Sample("1", (Path("a"),), (), prompt="Q {question}", question="who?", task="vqa"), "<image>Q who?"),
    ],
)
def test_prompt_of_a_sample(processor, sample, prompt):
    assert prompt_of(sample, processor) == prompt


def test_a_prompt_without_a_place_for_the_question_is_refused(processor):
    with pytest.raises(ConfigError, match=r"got the question 'who\?'"):
        prompt_of(Sample("1", (), (), prompt="Answer:", question="who?", task="vqa"), processor)


def test_images_and_targets_of_a_batch(processor, groups):
    batch = Collator(processor)(groups[:3], all_targets(groups[:3]))
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    packed = batch["packed"]
    assert packed.num_targets == 3 * (3 + 2)
    held = packed.prefix_index[packed.prefix_index >= 0]
    assert sorted(held.tolist()) == list(range(3 * 2)), "each image's prefix is laid out once"


def test_groups_of_several_images(processor, groups):
    first, second = groups[0].images[0], groups[1].images[0]
    pair = Sample("pair", (first, second), ("different shapes",), prompt="<image> and <image>")
    group = ImageGroup(pair.images, (pair,))
    batch = Collator(processor)([groups[2], group], [all_targets([groups[2]])[0][:1], [(pair, "different shapes")]])
    assert batch["pixel_values"].shape[0] == 3
    assert sorted(batch["packed"].prefix_index[batch["packed"].prefix_index >= 0].tolist()) == [0, 1, 2, 3, 4, 5]


def test_a_prompt_with_too_few_places_for_its_images_is_an_error(processor, groups):
    sample = Sample("1", (groups[0].images[0], groups[1].images[0]), ("x",), prompt="<image> only")
    with pytest.raises(TrainingError, match="2 image placeholders, expected 4"):
        Collator(processor)([ImageGroup(sample.images, (sample,))], [[(sample, "x")]])


def test_long_targets_are_cut_closed_counted_and_said_once(processor, caplog):
    collator = Collator(processor, max_target_tokens=4)
    texts = ("a red dog runs on", "the man sits on grass", "a")
    sample = Sample("1", (Path("x"),), (*texts, texts[0]))
    with caplog.at_level(logging.WARNING):
        collator.check_targets([ImageGroup(sample.images, (sample,))], where="data.train")
        cut = [collator.target(sample, text) for text in texts]
    assert [len(target.input_ids) - target.num_context for target in cut] == [4, 4, 2]
    assert all(target.input_ids[-1] == 2 for target in cut)
    assert caplog.messages == [
        "data.train: 2 of 3 targets are cut: longer than training.max_target_tokens = 4 2 "
        "(a red dog runs on, the man sits on grass)"
    ]


def test_a_missing_image_is_named(processor):
    with pytest.raises(BadImageError, match=r"nowhere\.png") as caught:
        Collator(processor).image_inputs([Path("nowhere.png")])
    assert caught.value.reason == "missing"


class Recorder:
    """A collator that says what it was asked for."""

    def __call__(self, groups, chosen):
        return [
            (group.images[0].name, [text for _, text in pairs]) for group, pairs in zip(groups, chosen, strict=True)
        ]


def steps_of(groups, num_parts, parts, **options):
    stream = ImageStream(len(groups), 4, seed=7)
    return StepDataset(groups, stream, Recorder(), num_steps=5, num_parts=num_parts, parts=parts, **options)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_a_step_make_up_the_step(groups, num_parts):
    whole = steps_of(groups, 1, [0], targets_per_image=2)
    divided = [steps_of(groups, num_parts, [part], targets_per_image=2) for part in range(num_parts)]
    assert len(whole) == 5
    for step in range(5):
        joined = [item for part in divided for item in part[step]]
        assert sorted(joined) == sorted(whole[step])
        assert all(len(texts) == 2 for _, texts in joined)


def test_a_process_with_several_parts_takes_them_one_after_the_other(groups):
    both, apart = steps_of(groups, 4, [2, 3]), [steps_of(groups, 4, [part]) for part in (2, 3)]
    assert len(both) == 10
    assert [both[i] for i in range(10)] == [apart[i % 2][i // 2] for i in range(10)]


def test_an_item_does_not_depend_on_the_items_before(groups):
    dataset = steps_of(groups, 1, [0], targets_per_image=1)
    forwards = [dataset[i] for i in range(5)]
    assert [dataset[i] for i in reversed(range(5))][::-1] == forwards


def test_features_take_the_place_of_pixels(processor, groups):
    class Features:
        def key_of(self, path):
            return path.name

        def get(self, keys):
            return torch.tensor([[[float(len(key))]] for key in keys]).half().numpy()

    batch = Collator(processor, Features())(groups[:2], all_targets(groups[:2]))
    assert "pixel_values" not in batch
    assert batch["image_features"].dtype == torch.float32
    assert batch["image_features"].flatten().tolist() == [float(len(g.images[0].name)) for g in groups[:2]]
