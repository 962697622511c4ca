"""Importing the package registers its models with transformers, whichever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys

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
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def best_of(times: int, command: list[str]) -> float:
    """Seconds of processor time of the fastest run, less those of a Python that does nothing."""

    def once(arguments: list[str]) -> float:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)  # time that other programs take does not count
        assert status == 0, arguments
        return used.ru_utime + used.ru_stime

    bare = min(once([sys.executable, "-c", "pass"]) for _ in range(times))
    return min(once(command) for _ in range(times)) - bare


def test_import_takes_as_long_as_the_auto_classes():
    """Registration imports the Auto classes; this package's own models add little to that."""
    theirs = best_of(2, [sys.executable, "-c", AUTO])
    assert best_of(2, [sys.executable, "-c", "import frozenprefix"]) < 1.5 * theirs


def test_no_training_library_is_imported():
    heavy = run("import sys, frozenprefix; print({'peft', 'datasets', 'matplotlib'} & set(sys.modules))")
    assert heavy.strip() == "set()"


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
    from frozenprefix.models.configuration import FrozenPrefixConfig, LanguageModelConfig
    from frozenprefix.models.encoder_configuration import vision_encoder_config
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


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import frozenprefix\n" + AUTO, id="package first"),
        pytest.param(AUTO + "import frozenprefix\n", id="transformers first"),
        pytest.param("import frozenprefix.models.modeling\n" + AUTO, id="model first"),
    ],
)
def test_auto_classes_in_every_order_of_import(checkpoint, first):
    run(f"import sys; folder = sys.argv[1]\n{first}{CHECK}", checkpoint)


def test_the_command_registers_nothing():
    """Its help must not wait for torch."""
    assert run("import sys; sys.argv[0] = '/bin/frozenprefix'; import frozenprefix; print('torch' in sys.modules)") == (
        "False\n"
    )


def test_a_locked_image_model_loads_by_the_auto_classes(tiny_bert, shapes, tmp_path):
    from transformers import AutoModel, AutoProcessor

    from frozenprefix.training.setup import build_locked_model
    from tests.helpers.contrastive import contrastive_recipe

    model, processor = build_locked_model(contrastive_recipe(tiny_bert, shapes, tmp_path))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    for name, tensor in model.trainable_state().items():
        assert loaded.trainable_state()[name].equal(tensor), name
