"""The recipe's section `data.retrieval`: what it refuses, and where the image stands in its prompt."""

from __future__ import annotations

import pytest

from frozenprefix.data.retrieval_options import RetrievalOptions
from frozenprefix.errors import ConfigError


def test_where_the_image_stands():
    options = RetrievalOptions(images=3, captions=2, template="Like: {captions}\n")
    texts = ["a dog", "a cat"]
    assert options.prompt(texts, "This:") == "Like: a dog\na cat\n<image>This:"
    assert options.prompt(texts, "See <image>:") == "Like: a dog\na cat\nSee <image>:"
    first = RetrievalOptions(template="<image>Like: {captions}.")
    assert first.prompt(texts, "<image>This:") == "<image>Like: a dog\na cat.This:"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.retrieval={image: 4}", r"data\.retrieval\.image.*did you mean 'images'"),
        ("data.retrieval={images: 4, ridge: 0.1}", r"data\.retrieval\.ridge.*no effect with images"),
        ("data.retrieval={ridge: 0}", r"data\.retrieval\.ridge.*expected more than 0"),
        ("data.retrieval={images: 2}", r"data\.retrieval\.captions: got 4, expected at most one for each of the 2"),
        ("data.retrieval={template: 'Like:'}", r"data\.retrieval\.template: got 'Like:', expected \{captions\} once"),
        ("data.retrieval={template: '{captions}{question}'}", r"data\.retrieval\.template"),
    ],
)
def test_recipe_refuses(tiny_recipe, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_recipe(tmp_path, override)
    assert len(error.value.problems) == 1


def test_recipe_needs_features(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError) as error:
        tiny_recipe(tmp_path, "data.retrieval={captions: 2}", "data.feature_cache=off")
    (line,) = error.value.problems
    assert line.startswith("data.feature_cache: got 'off', expected 'auto' or a folder with data.retrieval")
