"""`frozenprefix plan`: what it counts is what is there, and what it predicts follows from that."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.recipes import small_parts
from frozenprefix.cli import train
from frozenprefix.cli.main import app
from frozenprefix.cli.plan import duration
from frozenprefix.config import load_recipe, write_yaml
from frozenprefix.config.sections import RunSection
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samples import group_by_images
from frozenprefix.errors import ConfigError
from frozenprefix.kernels.linear import prepackable_dtypes
from frozenprefix.kernels.prepack import prepackable_layers, prepacked_bytes
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.freezing import count_parameters
from frozenprefix.planning import costs, stages
from frozenprefix.planning.calibration import step_trainer
from frozenprefix.planning.costs import LanguageModelShape, OptimizerCosts, StepShape, cache_size, cached_bytes
from frozenprefix.planning.counting import KeptMeter
from frozenprefix.planning.hardware import COMPUTE_SHARE, HARDWARE
from frozenprefix.planning.plan import plan
from frozenprefix.planning.stages import estimate_stages
from frozenprefix.planning.step_costs import counted_costs, language_model_shape, step_costs
from frozenprefix.training.averaging import WeightAverage
from frozenprefix.training.caching import fill_cache
from frozenprefix.training.optimizer import build_optimizer
from frozenprefix.training.setup import build_model, load_parts
from tests.helpers import ROOT
from tests.helpers.contrastive import contrastive_recipe
from tests.helpers.lm import tiny_lm_config
from tests.helpers.recipes import tiny_recipe_dict

FAMILIES = ["llama", "gpt2", "opt"]
# one of each kind; the others are planned in the slow tests
QUICKLY_PLANNED = ("lora", "flamingo", "prefix_tuning", "fromage", "quickstart")


@pytest.fixture
def one_step(tiny_recipe, tiny_lm, tmp_path):
    """`one_step("llama")` -> model, batch, and the size of that step."""

    def make(family: str):
        recipe = tiny_recipe(tmp_path / family, lm=tiny_lm(family))
        groups = {part: group_by_images(listed) for part, listed in load_parts(recipe.data).items()}
        trainer = step_trainer(recipe, groups)
        batch = next(trainer.batches())
        return trainer.model, batch, StepShape.from_parts([batch["packed"]])

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(one_step, family):
    model, batch, step = one_step(family)
    model(**batch)  # checks its parts at the first call
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    mapper = costs.mapper_flops(model.mapper, batch["image_features"])
    assert mapper > 0
    expected = sum(costs.step_flops(LanguageModelShape.from_model(model.language_model), step, mapper).values())
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_keeps(one_step, family):
    model, batch, step = one_step(family)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss  # noqa: F841 - keeps the graph, and with it the storages, alive
    predicted = costs.activation_bytes(
        LanguageModelShape.from_model(model.language_model), step.part_cells, step.row_length
    )
    assert predicted == pytest.approx(sum(kept.values()), rel=0.3)


@pytest.mark.skipif(len(prepackable_dtypes()) < 2, reason="the processor has no products in bfloat16")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_copies_are_those_that_training_makes(family, dtype):
    lm = AutoModelForCausalLM.from_config(tiny_lm_config(family), dtype=dtype).requires_grad_(False)
    step = StepShape(1, 1, 1, 1, 1, 1, 1, 1)
    memory = costs.step_memory(
        LanguageModelShape.from_model(lm), step, encoder_bytes=0, trainable=0, optimizer=OptimizerCosts(16, 28)
    )
    assert memory[costs.PREPACKED_COPIES] == prepacked_bytes(prepackable_layers(lm)) > 0


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_an_optimizer_keeps_what_is_predicted(name, ema):
    layer = torch.nn.Linear(512, 512)
    optimizer = build_optimizer(name, layer.named_parameters(), learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.99))
    layer(torch.ones(512)).sum().backward()
    optimizer.step()
    kept = [t for p in layer.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if torch.is_tensor(t)]
    if ema is not None:
        kept += WeightAverage(dict(layer.named_parameters()), ema).state.values()
    predicted = OptimizerCosts.from_settings(RunSection(max_steps=1, warmup_steps=0, optimizer=name, ema=ema))
    total = sum(p.numel() for p in layer.parameters())
    assert sum(t.nbytes for t in kept) == pytest.approx(predicted.kept * total, rel=0.02)


def test_a_step_is_counted_by_hand(one_step):
    _, batch, step = one_step("llama")
    packed = batch["packed"]
    rows, length = packed.input_ids.shape
    assert (step.cells, step.scores) == (rows * length, rows * length**2)
    assert step.nodes == int((packed.position_ids != 0).sum()) + len(packed.predict_index.new_zeros(4))  # 4 images
    assert step.predicted == len(packed.predict_index)
    assert step.targets == packed.num_targets == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_from_the_config_is_that_of_the_model(tiny_lm, family):
    folder = tiny_lm(family)
    shape = language_model_shape(LanguageModelConfig(path=str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape == LanguageModelShape.from_model(model)
    assert shape.parameters == count_parameters(model).trainable
    assert (shape.hidden, shape.layers, shape.heads, shape.inner, shape.vocabulary) == (
        32, 2, 4, 128 if family == "gpt2" else 64, 300,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_cache_size_is_that_of_the_folder(tiny_recipe, tmp_path, dtype):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={tmp_path / 'features'}", f"data.feature_dtype={dtype}")
    filled = fill_cache(recipe)
    paths = [p for listed in load_parts(recipe.data).values() for sample in listed for p in sample.images]
    fixed = (filled.folder / "manifest.json").stat().st_size + 10_240  # a tar file ends on such a block
    predicted = cache_size(dtype, 4, 64, list(dict.fromkeys(paths)))
    assert predicted == pytest.approx(filled.bytes, abs=fixed)
    assert cached_bytes(dtype, 49, 1280) == pytest.approx(49 * 1280 * (1 if dtype == "int8" else 2), rel=0.05)


def test_plan_of_a_tiny_recipe(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={tmp_path / 'features'}")
    made = plan(recipe, ["h100", "cpu"], calibrate=0.1)
    model, _ = build_model(recipe)
    counted = count_parameters(model)
    assert made.parameters["trainable"] == counted.trainable
    assert made.parameters["language model"] + made.parameters["vision encoder"] == counted.frozen
    assert made.memory["mapper, gradients, optimizer"] == 16 * counted.trainable
    assert made.images == {"all": 12, "cached": 0, "train": 8, "validation": 4}
    assert list(made.machines) == ["here", "h100", "cpu"]
    here = made.machines["here"]
    assert here.steps == 6
    assert here.seconds_to_train > 6 * here.seconds_per_step > 0
    assert here.seconds_to_encode == pytest.approx(12 / here.encode_per_second)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "features").exists()
    million, hundred_millions = made.scale
    assert million["cache_bytes"] == 1_000_000 * made.cache_bytes_per_image
    h100 = hundred_millions["machines"]["h100"]
    assert h100["epoch_hours"] == pytest.approx(100e6 / 4 * made.machines["h100"].seconds_per_step / 3600)
    assert h100["encode_hours"] == pytest.approx(100 * million["machines"]["h100"]["encode_hours"])


@pytest.mark.parametrize(("option", "about"), [("--plan", ""), (None, "about "), ("--no-plan", None)])
def test_training_says_its_stages_first(tiny_lm, shapes, tmp_path, monkeypatch, option, about):
    monkeypatch.setattr(train, "CALIBRATE", 0.01)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")))
    options = [] if option is None else [option]
    result = CliRunner().invoke(app, ["train", str(recipe), *options, f"data.feature_cache={tmp_path / 'cache'}"])
    assert result.exit_code == 0, result.output
    number = rf"{about}\d+ (s|min|h)"
    first = result.stdout.splitlines()[0]
    expected = (
        rf"stages: encode 12 images \({number}\), train 6 steps \({number}\), validate meanwhile \({number}\), "
        rf"evaluate 4 images afterwards \({number}\); {number} in all"
    )
    assert bool(re.fullmatch(expected, first)) == (about is not None), first
    assert "6 steps, " in result.stdout


def test_an_estimate_never_fails_and_says_nothing(tiny_recipe, tmp_path, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path, "training.validate_every=3")
    missing = recipe.data.model_copy(update={"train": [{"type": "captions", "path": "/nowhere"}]})
    names = ["encode images", "train 6 steps", "validate meanwhile", "evaluate afterwards"]
    assert [stage.name for stage in estimate_stages(recipe.model_copy(update={"data": missing}))] == names
    monkeypatch.setattr(stages, "MOST_TEXT", 0)
    assert [stage.name for stage in estimate_stages(recipe)] == names, "large data are not read twice"
    assert [stage.seconds for stage in estimate_stages(recipe)] == [None] * 4
    monkeypatch.undo()
    assert estimate_stages(recipe)[0].seconds is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [stage.seconds for stage in estimate_stages(recipe)] == [None] * 4, "nobody waits for other processes"
    assert caplog.messages == []
    assert not list(tmp_path.glob("run*"))


def test_one_of_several_processes_is_not_measured(tiny_lm, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")))
    result = CliRunner().invoke(app, ["train", str(recipe), "--plan"])
    assert result.exit_code == 2
    assert "--plan: measures one process" in result.output
    assert not (tmp_path / "run").exists()


def test_stages_add_up_to_the_run(tiny_recipe, tmp_path):
    made = plan(tiny_recipe(tmp_path, f"data.feature_cache={tmp_path / 'features'}"), ["h100"], calibrate=0)
    machine = made.machines["h100"]
    stages = dict(made.stages("h100"))
    assert 0 < machine.seconds_to_validate < machine.seconds_to_train
    assert sum(stages.values()) == pytest.approx(machine.seconds_to_encode + machine.seconds_to_train)


def test_images_in_the_cache_are_not_counted_again(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={tmp_path / 'features'}")
    fill_cache(recipe)
    made = plan(recipe, ["h100"], calibrate=0)
    assert made.images["cached"] == 12
    assert list(made.machines) == ["h100"]
    assert made.machines["h100"].seconds_to_encode == 0


def test_a_time_limit_ends_the_run(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, "training.max_steps=100000", "training.max_minutes=0.01")
    machine = plan(recipe, ["h100"], calibrate=0).machines["h100"]
    assert machine.seconds_to_train == pytest.approx(0.6)
    assert 0 < machine.steps < 2000


def test_without_a_cache_every_step_encodes(tiny_recipe, tmp_path):
    with_cache = plan(tiny_recipe(tmp_path), ["cpu"], calibrate=0).machines["cpu"]
    without = plan(tiny_recipe(tmp_path, "data.feature_cache=off"), ["cpu"], calibrate=0).machines["cpu"]
    assert without.seconds_to_encode == 0
    encoding = without.seconds_per_step - with_cache.seconds_per_step
    assert encoding == pytest.approx(4 / without.encode_per_second, rel=0.01)


def test_unknown_hardware_names_the_nearest(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown hardware 'h10' \(did you mean 'h100'\?\)"):
        plan(tiny_recipe(tmp_path), ["h10"])


def test_time_on_hardware_is_that_of_the_slowest_part():
    h100 = HARDWARE.get("h100")
    assert h100.seconds(989.4e12, 1, half=True) == pytest.approx(1 / COMPUTE_SHARE)
    assert h100.seconds(66.9e12, 1, half=False) == pytest.approx(1 / COMPUTE_SHARE)
    assert h100.seconds(1, 3.35e12 * 0.7, half=True) == pytest.approx(1)
    assert h100.seconds(1, 1, half=True, layers=10) == pytest.approx(10 * 80 * 5e-6)
    assert HARDWARE.get("cpu").seconds(14.7e12, 1, half=True, layers=10) == pytest.approx(1 / COMPUTE_SHARE)
    assert h100.encode_seconds(1, 1, 0.014, half=True) == pytest.approx(0.001)


def test_the_command_prints_and_writes(tiny_lm, shapes, tmp_path):
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out" / "plan.json"
    recipe.write_text(write_yaml(tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")))
    result = CliRunner().invoke(
        app, ["plan", str(recipe), "--hardware", "a100", "--calibrate", "0", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "NVIDIA A100 SXM 80 GB" in result.stdout
    assert "100 M images" in result.stdout
    written = json.loads(out.read_text())
    assert written["parameters"]["trainable"] == 10_400
    assert written["machines"]["a100"]["fits"] is True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (19_800, "5.5 h"), (31 * 86_400, "31 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# beside the small parts: what of the recipes' schedules or data is not there in small
SMALL = {
    "adalora": [f"model.language_model.peft.{key}=1" for key in ("tinit", "tfinal", "deltaT")],
    "capdec": ["model.vision_encoder.name=ViT-B-32", "model.vision_encoder.image_size=32"],
    "quickstart": ["data.prompts={caption: 'Caption:'}"],
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem not in QUICKLY_PLANNED else [], id=path.stem)
        for path in RECIPES
    ],
)
def test_every_shipped_recipe_is_planned(path, tmp_path):
    made = plan(load_recipe(path, [*small_parts(path, tmp_path), *SMALL.get(path.stem, [])]), ["h100"], calibrate=0.01)
    assert made.parameters["trainable"] > 0
    assert sum(made.flops.values()) > 0
    assert made.memory["activations"] > 0
    assert made.machines["here"].seconds_to_train > 0
    assert made.machines["h100"].fits is True


def test_counted_and_calculated_costs_agree(tiny_recipe, tmp_path):
    """The same recipe by both ways."""
    recipe = tiny_recipe(tmp_path)
    groups = {part: group_by_images(listed) for part, listed in load_parts(recipe.data).items()}
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    counted = counted_costs(recipe, groups, 0)
    calculated = step_costs(recipe, groups, encoder, calibrate=0)
    assert counted.parameters == calculated.parameters
    per_cell = [sum(one.flops.values()) / one.step.cells for one in (counted, calculated)]
    assert per_cell[0] == pytest.approx(per_cell[1], rel=0.05)
    kept = [one.memory["activations"] / one.step.part_cells for one in (counted, calculated)]
    assert kept[0] == pytest.approx(kept[1], rel=0.35)


@pytest.mark.parametrize(
    "changes",
    [
        ["model.language_model.peft={type: lora, r: 4}"],
        ["model.fusion.type=cross_attention", "model.fusion.every=1"],
        ["model.vision_encoder.trainable=all", "data.feature_cache=off"],
    ],
    ids=["lora", "cross_attention", "trained encoder"],
)
def test_trained_parameters_of_a_plan_are_those_of_the_model(tiny_recipe, tmp_path, changes):
    recipe = tiny_recipe(tmp_path, *changes)
    made = plan(recipe, ["h100"], calibrate=0)
    model, _ = build_model(recipe)
    assert made.parameters["trainable"] == count_parameters(model).trainable
    plain = plan(tiny_recipe(tmp_path), ["h100"], calibrate=0)
    assert made.parameters["trainable"] > plain.parameters["trainable"]
    assert list(made.machines) == ["h100"]


def test_the_contrastive_kind_is_planned(tiny_bert, shapes, tmp_path):
    made = plan(contrastive_recipe(tiny_bert, shapes, tmp_path), ["h100"], calibrate=0.01)
    assert made.parameters["text tower"] > made.parameters["trainable"] > 0
    assert made.step.targets == 8
    assert made.machines["here"].steps == 6


def test_what_autograd_keeps_is_counted_while_it_is_kept():
    meter = KeptMeter()
    with meter.counting():
        for size in (1000, 3000, 2000):
            y = torch.ones(size, requires_grad=True).exp()
            del y
    assert (meter.peak, meter.now) == (12_000, 0)
