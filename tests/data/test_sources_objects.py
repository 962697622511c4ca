"""Samples from Python objects: lists, data sets of torch, torchvision's form and Hugging Face's."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from frozenprefix.config import load_checkpoint_recipe, recipe_from_dict
from frozenprefix.data import Sample, load_image, load_source, source_from
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.training import train
from tests.helpers.drawings import draw_shape
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.training import assert_same_tensors


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def red():
    return draw_shape("red", "circle")


class StopAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def targets(source):
    return [sample.targets for sample in load_source(source)]


def test_a_sample_comes_back_as_it_was(red, shapes):
    photo = next((shapes / "images").iterdir())
    samples = [
        Sample("a", (photo,), ("red", "rot"), question="what color?", task="vqa", metadata={"answers": ("red", "red")}),
        Sample("b", (red, photo), ("yes",), history=(("what?", "a circle"),), question="round?", split="train"),
        Sample("c", (), ("no",), prompt="Say no."),
    ]
    first, second, third = load_source(source_from(samples))
    assert first == samples[0]
    assert hash(first) == hash(samples[0])
    assert np.array_equal(np.asarray(load_image(second.images[0])), np.asarray(red))
    assert (second.images[1], second.history, second.split) == (photo, (("what?", "a circle"),), "train")
    assert (third.images, third.prompt) == ((), "Say no.")


class Pairs(torch.utils.data.Dataset):
    """As torchvision's CocoCaptions: no iterator, and no error beyond its end."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.image, [f"caption {number}", "a circle"]


def test_data_sets_of_torch(red):
    assert targets(source_from(Pairs(red))) == [("caption 0", "a circle"), ("caption 1", "a circle")]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ({"image": red, "caption": str(number)} for number in range(3))

    assert targets(source_from(Stream())) == [("0",), ("1",), ("2",)]


def test_a_class_number_takes_its_name(red):
    class Classes(Pairs):
        classes = ("circle", "square")

        def __getitem__(self, number):
            return self.image, number

    samples = load_source(source_from(Classes(red)))
    assert [(sample.task, sample.targets) for sample in samples] == [
        ("classification", ("circle",)),
        ("classification", ("square",)),
    ]
    with pytest.raises(DataError, match=r"objects\[0\]: got the number 7 for a text, and no class of that number"):
        source_from([(red, 7)])


def test_a_data_set_of_hugging_face_keeps_the_bytes_of_its_images(red, shapes):
    photo = next((shapes / "images").iterdir())
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["round", "square"]),
            "words": datasets.Value("string"),
        }
    )
    rows = {"picture": [str(photo), red], "kind": [0, 1], "words": ["one", "two"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    captions = load_source(source_from(data, image="picture", captions="words"))
    assert [sample.targets for sample in captions] == [("one",), ("two",)]
    assert captions[0].images[0].read_bytes() == photo.read_bytes()
    labelled = load_source(source_from(data, image="picture", label="kind"))
    assert [sample.targets for sample in labelled] == [("round",), ("square",)]
    with pytest.raises(DataError, match="expected a list or a data set of samples; choose a split of it: train"):
        source_from(datasets.DatasetDict(train=data))


@pytest.mark.parametrize(
    "make",
    [
        lambda image: np.asarray(image),
        lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1),
        lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255,
        lambda image: image.convert("RGBA"),
    ],
    ids=["array", "tensor", "floats", "transparent"],
)
def test_pixels_of_all_kinds_are_kept_without_loss(red, make):
    (sample,) = load_source(source_from([(make(red), "a red circle")]))
    assert np.array_equal(np.asarray(load_image(sample.images[0])), np.asarray(red))


def test_samples_of_one_image_share_its_file_and_data_is_written_once(red, own_home):
    items = [(red, "a red circle"), (red.copy(), "what color?", "red")]
    source = source_from(items)
    one, other = load_source(source)
    assert one.images == other.images
    assert (other.task, other.question) == ("vqa", "what color?")
    files = {path: path.stat().st_mtime_ns for path in own_home.rglob("*")}
    assert source_from(items) == source
    assert {path: path.stat().st_mtime_ns for path in own_home.rglob("*")} == files
    assert source_from(items[:1])["path"] != source["path"]


def test_convert_and_fields_of_every_source(red):
    source = source_from(
        [{"img": red, "txt": "a"}], convert=lambda item: (item["img"], item["txt"]), prompt="Say:", name="x"
    )
    (sample,) = load_source(source)
    assert (sample.id, sample.prompt, sample.targets) == ("x:0", "Say:", ("a",))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "got no items"),
        (3, "got int, expected a list or a data set of samples"),
        (["text"], r"objects\[0\]: got 'text', expected a Sample, a dict"),
        ([{"image": "a.jpg", "words": "x"}], r"objects\[0\]: got columns image, words; name those to read"),
        ([{"caption": "x"}], r"objects\[0\]: `image`: no column 'image'; columns: caption"),
        ([(None, "x")], r"objects\[0\]: column 'image': got None"),
        ([("a.jpg", 1.5)], r"objects\[0\]: field 'captions': got 1.5, expected a text or a list of texts"),
        ([("http://x/a.jpg", "x")], "expected the path of a file on this machine"),
        ([(torch.randn(3, 8, 8), "x")], r"objects\[0\]: got values from -.* expected pixels that are not normalised"),
        ([(b"no image", "x"), (object(), "x")], r"objects\[1\]: got object, expected an image, a path or an array"),
        ([Sample("1", (), ("x",), metadata={"a": object()})], r"objects\[0\]: Object of type object is not JSON"),
    ],
)
def test_an_item_that_is_no_sample_is_named(items, message):
    with pytest.raises(DataError, match=message):
        source_from(items)


def test_columns_of_several_tasks_are_refused():
    with pytest.raises(ConfigError, match="columns of several tasks"):
        source_from([], captions="a", label="b")


def test_a_run_on_objects_equals_one_on_files_and_is_resumed(tiny_lm, shapes, tmp_path):
    recipe = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "files")
    for part in ("train", "validation"):
        recipe["data"][part] = recipe["data"][part][:1]
    train(recipe_from_dict(recipe))
    objects = {**recipe, "output_dir": str(tmp_path / "objects"), "data": {**recipe["data"]}}
    for part in ("train", "validation"):
        samples = load_source(recipe["data"][part][0])
        items = [(Image.open(sample.images[0]), list(sample.targets)) for sample in samples]
        objects["data"][part] = [source_from(items)]
    assert train(recipe_from_dict(objects), callbacks=[StopAtThree]).steps == 3
    result = train(recipe_from_dict(objects))
    assert_same_tensors(tmp_path / "files/last/model.safetensors", result.output_dir / "last/model.safetensors")
    sources = load_checkpoint_recipe(result.best).data.validation
    assert sources == objects["data"]["validation"]
    scores = evaluate_checkpoint(result.best, task="caption", num_beams=1)
    assert scores["n"] == len(load_source(sources[0]))
