"""Recipes: defaults, overrides, YAML as people mean it, and every problem reported at once."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import GenericAlias

import pytest
from pydantic import BaseModel, ValidationError

from frozenprefix.config import ContrastiveRecipe, Recipe, load_recipe
from frozenprefix.config.errors import collect_problems, sections_in
from frozenprefix.config.yaml import read_yaml, write_yaml
from frozenprefix.data.sources import SOURCES
from frozenprefix.errors import ConfigError
from frozenprefix.models.mappers import MAPPERS
from frozenprefix.models.processing import DEFAULT_PROMPTS
from tests.helpers import ROOT

SHORT = """\
model:
  vision_encoder: {source: timm, name: resnet18, weights: random, output: pooled}
  mapper: {type: mlp, prefix_length: 4}
  language_model: {path: /models/tiny}
data:
  train: [{type: captions, path: data/photos, split: train}]
training: {epochs: 2}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    return path


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_recipe(file, list(overrides))
    return error.value.problems


def problem_of(file: Path, *overrides: str) -> str:
    (problem,) = problems_of(file, *overrides)
    return problem


# ── reading ──


def test_short_recipe_has_defaults(file):
    recipe = load_recipe(file)
    assert recipe.name == "short"
    assert recipe.output_dir == Path("runs/short")
    assert recipe.training.betas == (0.9, 0.999)
    assert recipe.training.images_per_step == 12
    assert recipe.training.warmup_steps == 50
    assert recipe.data.prompts == DEFAULT_PROMPTS
    assert recipe.data.feature_cache == "auto"
    assert recipe.evaluation.num_beams is None
    assert recipe.tracking.tensorboard is False


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=1e-4", 1e-4),
        ("training.learning_rate=1E-4", 1e-4),
        ("training.learning_rate=.5e-1", 0.05),
        ("training.learning_rate=2.", 2.0),
        ("training.learning_rate=3", 3.0),
        ("training.betas=[0.5, 0.25]", (0.5, 0.25)),
        ("training.targets_per_image=null", None),
        ("training.targets_per_image=", None),
        ("data.feature_cache=off", "off"),
        ("data.feature_cache=caches/a", "caches/a"),
        ("tracking.tensorboard=true", True),
        ("data.train.0.path=/x=y", "/x=y"),
        ("data.train.0.limit=10", 10),
        ("data.prompts.vqa='Q: {question}'", "Q: {question}"),
        ("name=no", "no"),
        ("name=1:30", "1:30"),
    ],
)
def test_override(file, override, expected):
    recipe = load_recipe(file, [override])
    value = recipe
    for part in override.partition("=")[0].split("."):
        value = (
            value[int(part) if part.isdecimal() else part] if isinstance(value, (list, dict)) else getattr(value, part)
        )
    assert value == expected
    assert type(value) is type(expected)


def test_float_spelling_in_the_file(file):
    file.write_text(SHORT.replace("epochs: 2", "epochs: 2, learning_rate: 1e-4, weight_decay: 5E-2"))
    training = load_recipe(file).training
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.05)


def test_later_override_wins_and_sections_are_made(file):
    recipe = load_recipe(file, ["evaluation.limit=3", "evaluation.limit=4"])
    assert recipe.evaluation.limit == 4


def test_epochs_give_way_to_steps(file):
    training = load_recipe(file, ["training.epochs=null", "training.max_steps=20"]).training
    assert (training.epochs, training.max_steps) == (None, 20)
    assert training.warmup_steps == 2, "the default warm-up is at most a tenth of the run"


def test_frozen_parts_take_the_dtype_of_the_training(file):
    model = load_recipe(file, ["training.precision=bf16", "model.language_model.dtype=float32"]).model
    assert (model.vision_encoder.dtype, model.language_model.dtype) == ("bfloat16", "float32")


def test_round_trip(file, tmp_path):
    overrides = ["training.precision=bf16", "name='1e-4'", "training.max_steps=30", "training.epochs=null"]
    recipe = load_recipe(file, [*overrides, "data.feature_cache=off", "data.train.0.split=[train, 'off']"])
    written = tmp_path / "again.yaml"
    written.write_text(recipe.to_yaml())
    again = load_recipe(written)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.fingerprint() == recipe.fingerprint()
    assert again.name == "1e-4"


@pytest.mark.parametrize(
    "value", ["off", "yes", "1e-4", "010", "1:30", "2024-01-01", "", "null", "~", "a: b", 1e-5, 1e22]
)
def test_yaml_round_trip_of_a_value(value):
    assert read_yaml(write_yaml({"key": value}), "test") == {"key": value}


def test_recipe_does_not_change(file):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(file).training.epochs = 3


# ── fingerprint ──


def test_fingerprint_is_json_and_sees_what_changes_the_weights(file):
    before = load_recipe(file).fingerprint()
    assert json.loads(json.dumps(before)) == before
    for override, key in [
        ("seed=1", "seed"),
        ("model.mapper.prefix_length=5", "model"),
        ("data.train.0.split=val", "data.train"),
        ("training.learning_rate=1e-4", "training.learning_rate"),
        ("training.epochs=3", "training.epochs"),
    ]:
        after = load_recipe(file, [override]).fingerprint()
        assert {name for name in before if before[name] != after[name]} == {key}


def test_fingerprint_leaves_out_what_does_not(file):
    before = load_recipe(file).fingerprint()
    free = ["name=b", "output_dir=/x", "training.save_every=3", "data.workers=0", "tracking.tensorboard=true"]
    assert load_recipe(file, free).fingerprint() == before


def test_a_constant_learning_rate_may_run_longer(file):
    short, long = (load_recipe(file, ["training.schedule=constant", f"training.epochs={n}"]) for n in (2, 3))
    assert short.fingerprint() == long.fingerprint()


# ── problems ──


def test_all_problems_at_once(file):
    file.write_text(
        """\
sead: 1
learning_rate: 3
name: 12
model:
  vision_encoder: {source: tim, nam: resnet18, layer: x, weights: random}
  mapper: {type: mpl, prefix_length: 4}
  language_model: {path: /models/tiny}
data:
  train: [{type: caption, path: a}, {type: captions, pth: 3}, {path: a}, 7]
  prompts: {vga: x, vqa: hi}
training: {epochs: 2.5, learning_rate: 1e-4x, tokens_per_row: 4, packing: none, schedule: cosin, betas: [0.9, 1.0]}
tracking: {tensorboard: "False"}
"""
    )
    types, mappers = ", ".join(SOURCES.names()), ", ".join(MAPPERS.names())
    assert set(problems_of(file, "training.warmup=2", "seed", "data.train.9.path=b")) == {
        "override 'seed': expected KEY=VALUE, as in training.learning_rate=1e-4",
        "data.train.9: no such item, expected a number from 0 to 3",
        "sead: unknown key (did you mean 'seed'?)",
        "learning_rate: unknown key (did you mean 'training.learning_rate'?)",
        "name: got 12, expected a string (put it in quotes)",
        "model.vision_encoder.source: got 'tim', expected 'timm', 'open_clip', 'transformers', 'fused' or 'features' "
        "(did you mean 'timm'?)",
        "model.vision_encoder.name: missing, expected architecture, as timm names it",
        "model.vision_encoder.layer: got 'x', expected a whole number or a list",
        "model.vision_encoder.nam: unknown key (did you mean 'name'?)",
        f"model.mapper.type: unknown mapper 'mpl' (did you mean 'mapl'?); known: {mappers}",
        f"data.train.0.type: unknown data source 'caption' (did you mean 'captions'?); known: {types}",
        "data.train.1.path: missing, expected folder: local, or a pypi:// reference",
        "data.train.1.pth: unknown key (did you mean 'path'?)",
        f"data.train.2.type: missing, expected one of: {types}",
        "data.train.3: got 7, expected a block of keys with a type",
        "data.prompts.vga: unknown task (did you mean 'vqa'?); known: caption, vqa, classification",
        "data.prompts.vqa: got 'hi', expected a template with a place for the {question}",
        "training.epochs: got 2.5, expected a whole number",
        "training.learning_rate: got '1e-4x', expected a number",
        "training.schedule: got 'cosin', expected 'cosine', 'linear' or 'constant' (did you mean 'cosine'?)",
        "training.betas: got [0.9, 1.0], expected two numbers from 0 to below 1",
        "training.tokens_per_row: got 4, which has no effect with packing 'none'; expected null, or other packing",
        "training.warmup: unknown key (did you mean 'warmup_steps'?)",
        "tracking.tensorboard: got 'False', expected true or false",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=10", "training.epochs: got 2 with max_steps 10, expected one of the two"),
        ("training.epochs=null", "training.epochs: missing, expected a number, or a number for max_steps"),
        ("training.epochs=true", "training.epochs: got True, expected a whole number"),
        ("training.epochs=0", "training.epochs: got 0, expected at least 1"),
        ("training.learning_rate=0", "training.learning_rate: got 0, expected more than 0"),
        ("training.learning_rate=.inf", "training.learning_rate: got inf, expected a finite number"),
        ("training.images_per_step='12'", "training.images_per_step: got '12', expected a whole number"),
        ("data.max_bad_share=2", "data.max_bad_share: got 2, expected at most 1"),
        ("data.feature_cache=Auto", "data.feature_cache: got 'Auto', expected 'auto', 'off' or a folder"),
        ("data.feature_cache=false", "data.feature_cache: got False, expected a string, 'auto', 'off' or a folder"),
        ("data.prompts.caption='{question}'", "data.prompts.caption: got '{question}', expected a template without"),
        ("data.train=[]", "data.train: got [], expected at least 1 item after validation, not 0"),
        ("data.train=null", "data.train: got None, expected a list"),
        ("data.train.0.type=[a]", "data.train.0.type: got ['a'], expected one of: captions, "),
        ("data.train.0.limit=0", "data.train.0.limit: got 0, expected at least 1"),
        ("model.mapper.depth=2", "model.mapper.depth: mapper 'mlp' has no such option"),
        ("training=fast", "training: got 'fast', expected a block of keys (max_steps, epochs,"),
        ("objectives.distillation={weight: 0}", "objectives.distillation.weight: got 0.0, which has no effect"),
        ("objectives.lm=0", "objectives.lm: got 0 with nothing else that learns from images"),
        ("training.epochs.x=3", "training.epochs.x: cannot be set, 'training.epochs' is the value 2"),
        ("training.early_stopping_patience=3", "training.early_stopping_patience: got 3, which has no effect"),
        ("name=[a", "override 'name=[a':1:3: not valid YAML: "),
        ("training.log_evry=3", "training.log_evry: unknown key (did you mean 'log_every'?)"),
    ],
)  # fmt: skip
def test_one_problem(file, override, expected):
    assert problem_of(file, override).startswith(expected)


def test_no_stopping_without_validation(file):
    line = "training.early_stopping_patience: got 3, which has no effect without data.validation"
    assert problem_of(file, "training.early_stopping_patience=3") == line
    validation = "data.validation=[{type: captions, path: data/photos, split: val}]"
    assert load_recipe(file, ["training.early_stopping_patience=3", validation]).training.early_stopping_patience == 3


def test_warmup_as_long_as_the_run_has_no_end(file):
    steps = ["training.epochs=null", "training.max_steps=10", "training.warmup_steps=10"]
    assert problem_of(file, *steps) == "training.warmup_steps: got 10, expected fewer than max_steps 10"


def test_a_wrong_value_does_not_hide_that_others_clash(file):
    found = problems_of(file, "training.max_steps=10", "training.schedule=cos")
    assert [problem.partition(":")[0] for problem in found] == ["training.schedule", "training.epochs"]


def test_a_wrong_length_is_not_reported_as_missing_too(file):
    assert problem_of(file, "training.epochs=two") == "training.epochs: got 'two', expected a whole number"


class Python310Alias(GenericAlias):
    """list[int] as Python 3.10 has it, where it passes for a class."""

    __class__ = property(lambda self: type)


def test_a_list_is_no_section_where_python_takes_it_for_a_class():
    class Inner(BaseModel):
        key: int

    class Outer(BaseModel):
        numbers: list[int]
        inner: Inner

    alias = Python310Alias(list, (int,))
    assert isinstance(alias, type)
    Outer.model_fields["numbers"].annotation = alias
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({})
    assert [problem.text for problem in collect_problems(caught.value.errors(), {}, Outer)] == [
        "missing, expected <class 'int'>",
        "missing, expected a block of keys (key)",
    ]


def test_empty_file(file):
    file.write_text("")
    assert "expected a block of keys (name, output_dir, seed, model, data, training" in problem_of(file)


def test_missing_blocks(file):
    file.write_text("seed: 1\n")
    assert [problem.split(", expected")[0] for problem in problems_of(file)] == [
        "model: missing",
        "data: missing",
        "training: missing",
    ]


def test_missing_file(file):
    with pytest.raises(
        ConfigError, match=r"recipe: got '.*shrt\.yaml', expected a YAML file that exists .*'short\.yaml'"
    ):
        load_recipe(file.with_name("shrt.yaml"))


def test_syntax_error_names_the_line(file):
    file.write_text("seed: 1\nmodel: {a: 1\ndata: 3\n")
    assert problem_of(file).startswith(f"{file}:3:5: not valid YAML: ")


def test_a_key_given_twice_is_refused(file):
    file.write_text("seed: 1\nseed: 2\n")
    assert problem_of(file) == f'{file}:2:1: not valid YAML: found duplicate key "seed"'


def test_tabs_and_control_characters_are_no_yaml(file):
    file.write_text("seed:\t1\x07\n")
    assert "not valid YAML" in problem_of(file)


# ── bases ──


def test_a_base_is_merged_key_by_key(file):
    recipe = file.with_name("own.yaml")
    recipe.write_text(
        """\
base: short.yaml
model:
  mapper: {prefix_length: 8}
data:
  train: [{type: captions, path: other}]
training: {epochs: null, max_steps: 40}
"""
    )
    loaded = load_recipe(recipe, ["model.mapper.hidden_dim=16"])
    assert (loaded.name, loaded.output_dir) == ("own", Path("runs/own"))
    assert loaded.model.mapper.model_dump() == {
        "type": "mlp",
        "prefix_length": 8,
        "output_norm": "layer",
        "hidden_dim": 16,
    }
    assert loaded.data.train == [{"type": "captions", "path": "other"}], "lists are replaced"
    assert (loaded.training.epochs, loaded.training.max_steps) == (None, 40)
    assert loaded.model.language_model.path == "/models/tiny"


def test_an_encoder_of_another_source_replaces_that_of_the_base(file):
    recipe = file.with_name("own.yaml")
    part = "{source: timm, name: resnet18, weights: random}"
    encoder = f"{{source: fused, image_size: 32, grid: 1, encoders: [{part}, {part}]}}"
    recipe.write_text(f"base: short.yaml\nmodel:\n  vision_encoder: {encoder}\n")
    encoder = load_recipe(recipe).model.vision_encoder
    assert (encoder.source, encoder.output, encoder.image_size) == ("fused", "patch", 32)


def test_name_and_folder_are_never_those_of_a_base(file):
    file.write_text(f"name: first\noutput_dir: /runs/first\n{SHORT}")
    recipe = file.with_name("second.yaml")
    recipe.write_text("base: short.yaml\n")
    assert (load_recipe(recipe).name, load_recipe(recipe).output_dir) == ("second", Path("runs/second"))


def test_a_base_is_found_beside_the_recipe_that_names_it(file):
    inner = file.parent / "bases"
    inner.mkdir()
    file.rename(inner / "short.yaml")
    (inner / "middle.yaml").write_text("base: short.yaml\nseed: 4\n")
    file.write_text("base: bases/middle.yaml\n")
    assert load_recipe(file).seed == 4


def test_a_recipe_is_checked_after_merging(file):
    recipe = file.with_name("own.yaml")
    recipe.write_text("base: short.yaml\nmodel: {mapper: {type: linear, hidden_dim: 3}}\ntraining: {max_steps: 3}\n")
    assert [line.partition(":")[0] for line in problems_of(recipe)] == ["model.mapper.hidden_dim", "training.epochs"]


def test_bases_that_cannot_be_read(file):
    recipe = file.with_name("own.yaml")
    recipe.write_text("base: shrt.yaml\n")
    assert problem_of(recipe) == (
        f"{recipe}: base: got '{file.with_name('shrt.yaml')}', expected a YAML file that exists "
        "(did you mean 'short.yaml'?)"
    )
    recipe.write_text("base: 3\n")
    assert problem_of(recipe) == f"{recipe}: base: got 3, expected the path of a recipe, relative to this one"
    recipe.write_text("base: other.yaml\n")
    file.with_name("other.yaml").write_text("base: own.yaml\n")
    assert "base: goes round in a circle: " in problem_of(recipe)
    assert "base: unknown key" in problem_of(file, "base=other.yaml")


def test_aliases_that_grow_without_end_are_refused(file):
    file.write_text("name: &a [*a]\n")
    assert problem_of(file) == f"{file}: not valid YAML: its aliases repeat more than 1,000,000 values"


# ── every key has a reader ──


def keys_of(section: type[BaseModel]) -> set[str]:
    """The keys of a section and of all sections inside it."""
    found = set(section.model_fields)
    for field in section.model_fields.values():
        for inner in sections_in(field):
            found |= keys_of(inner)
    return found


def test_every_key_is_read_outside_of_config():
    names: set[str] = set()
    for path in (ROOT / "frozenprefix").rglob("*.py"):
        if "config" in path.relative_to(ROOT).parts or path.name == "configuration.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    unread = (keys_of(Recipe) | keys_of(ContrastiveRecipe)) - names
    assert not unread
