"""Importing the package is quick, loads nothing heavy, and registers with transformers whichever comes first."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import frozenprefix

AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor\n"
CHECK = """
config = AutoConfig.from_pretrained(folder)
assert type(config) is frozenprefix.FrozenPrefixConfig, config
assert type(AutoProcessor.from_pretrained(folder)) is frozenprefix.FrozenPrefixProcessor
model = AutoModelForImageTextToText.from_pretrained(folder)
assert type(model) is frozenprefix.FrozenPrefixForConditionalGeneration, model
assert AutoModelForImageTextToText._model_mapping[type(config)] is type(model)
assert AutoModel._model_mapping[type(config)] is type(model)
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def best_of(times: int, command: list[str]) -> float:
    """Seconds of the fastest run, less those of a Python that does nothing."""

    def once(arguments: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True, timeout=60)
        return time.perf_counter() - start

    bare = min(once([sys.executable, "-c", "pass"]) for _ in range(times))
    return min(once(command) for _ in range(times)) - bare


def test_import_is_quick_and_loads_nothing_heavy():
    heavy = run("import sys, frozenprefix; print({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules))")
    assert heavy.strip() == "set()"
    assert best_of(3, [sys.executable, "-c", "import frozenprefix"]) < 0.3


def test_every_export_is_there():
    for name in frozenprefix.__all__:
        assert getattr(frozenprefix, name) is not None
        assert name in dir(frozenprefix)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'frozenprefix' has no attribute 'Recipes'"):
        frozenprefix.Recipes  # noqa: B018


def test_version_is_the_distribution_s():
    from importlib.metadata import version

    assert version("frozenprefix") == frozenprefix.__version__


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_lm) -> str:
    """A whole checkpoint of a tiny random model."""
    from frozenprefix.models.configuration import FrozenPrefixConfig, LanguageModelConfig, vision_encoder_config
    from frozenprefix.models.language_model.loading import load_tokenizer
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
    from frozenprefix.models.processing import FrozenPrefixProcessor
    from frozenprefix.models.vision import build_vision_encoder

    vision = vision_encoder_config(source="timm", name="test_vit", weights="random", output="pooled", image_size=32)
    language_model = LanguageModelConfig(path=str(tiny_lm()))
    encoder = build_vision_encoder(vision)
    processor = FrozenPrefixProcessor(encoder.image_processor, load_tokenizer(language_model), prefix_length=2)
    config = FrozenPrefixConfig(
        vision_encoder=vision,
        mapper={"type": "linear", "prefix_length": 2},
        language_model=language_model,
        identity={"vision_encoder": encoder.identity},
        image_token_id=processor.image_token_id,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    FrozenPrefixForConditionalGeneration(config, vision_encoder=encoder.module).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


LAZY = """
assert AutoConfig.for_model("frozenprefix").model_type == "frozenprefix"
mapping = AutoModelForImageTextToText._model_mapping
stand_in = mapping[frozenprefix.FrozenPrefixConfig]
assert stand_in.__name__ == "FrozenPrefixForConditionalGeneration"
assert not {"frozenprefix.models.modeling", "frozenprefix.models.processing"} & set(sys.modules)
assert stand_in.main_input_name == "pixel_values"
"""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import frozenprefix\n" + AUTO + LAZY, id="package first"),
        pytest.param(AUTO + "import frozenprefix\n" + LAZY, id="transformers first"),
        pytest.param("import frozenprefix.models.modeling\n" + AUTO, id="model first"),
    ],
)
def test_auto_classes_in_every_order_of_import(checkpoint, first):
    run(f"import sys; folder = sys.argv[1]\n{first}{CHECK}", checkpoint)


def test_installing_twice_changes_nothing():
    from frozenprefix import _auto

    finders = list(sys.meta_path)
    _auto.install()
    assert sys.meta_path == finders
    assert sum(isinstance(finder, _auto._AfterImport) for finder in finders) == 1
