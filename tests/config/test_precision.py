"""`precision: auto`: decided where a run begins, kept when it goes on, and followed by the frozen parts."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from frozenprefix.config import load_checkpoint_recipe, precision, resolve_precision
from frozenprefix.errors import ConfigError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.evaluation.journal import Journal, header_of
from frozenprefix.evaluation.samples import recipe_storage
from frozenprefix.inference import Captioner
from frozenprefix.kernels import precision as kernel
from frozenprefix.kernels.precision import ProductRates, measure_products
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.planning import plan
from frozenprefix.training import train
from frozenprefix.training.caching import fill_cache
from tests.helpers.contrastive import contrastive_recipe

AUTO = "training.precision=auto"


@pytest.fixture
def rates(monkeypatch):
    """Sets the rates that are measured, and lists the sizes that they were measured for."""
    sizes: list[tuple[int, int]] = []

    def set_rates(float32: float, bfloat16: float) -> list[tuple[int, int]]:
        def measured(hidden: int, inner: int) -> ProductRates:
            sizes.append((hidden, inner))
            return ProductRates(float32, bfloat16)

        monkeypatch.setattr(precision, "measure_products", measured)
        return sizes

    return set_rates


def test_auto_is_the_default(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert type(recipe.training)(max_steps=1).precision == "auto"


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"), [(1e11, 2e11, "bf16"), (2e11, 1e11, "fp32"), (1e11, 1.05e11, "fp32")]
)
def test_the_faster_arithmetic_is_chosen_and_the_dtypes_follow(
    tiny_recipe, tmp_path, rates, caplog, float32, bfloat16, expected
):
    sizes = rates(float32, bfloat16)
    recipe = tiny_recipe(tmp_path, AUTO, "model.vision_encoder.dtype=float32")
    with caplog.at_level(logging.INFO):
        resolved = resolve_precision(recipe)
    assert sizes == [(32, 64)], "those of the language model"
    assert resolved.training.precision == expected
    assert resolved.model.language_model.dtype == {"bf16": "bfloat16", "fp32": "float32"}[expected]
    assert resolved.model.vision_encoder.dtype == "float32", "it names its own"
    assert recipe.training.precision == "auto", "the recipe itself does not change"
    assert f"precision: {expected}; products of 32 x 64 run at {float32 / 1e9:.0f} GFLOP/s in fp32 and" in caplog.text
    assert resolve_precision(resolved) is resolved


def test_an_open_dtype_is_not_written(tiny_recipe, tmp_path, rates):
    rates(1.0, 2.0)
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(tmp_path, AUTO).to_yaml())
    again = load_checkpoint_recipe(tmp_path)
    assert resolve_precision(again).model.language_model.dtype == "bfloat16"


def test_a_resumed_run_keeps_what_it_began_with(tiny_recipe, tmp_path, rates):
    sizes = rates(2.0, 1.0)
    short = (AUTO, "training.schedule=constant")
    train(tiny_recipe(tmp_path / "run", *short, "training.max_steps=3"))
    assert load_checkpoint_recipe(tmp_path / "run" / "last").training.precision == "fp32"
    rates(1.0, 2.0)
    assert train(tiny_recipe(tmp_path / "run", *short, "training.max_steps=4")).steps == 4
    other = tiny_recipe(tmp_path / "other", *short, "training.max_steps=4")
    assert train(other, resume=str(tmp_path / "run" / "last")).steps == 4
    assert len(sizes) == 1, "nothing is measured again"


def test_a_contrastive_run_is_measured_by_its_text_tower(tiny_bert, shapes, tmp_path, rates):
    sizes = rates(1.0, 2.0)
    resolved = resolve_precision(contrastive_recipe(tiny_bert, shapes, tmp_path, AUTO))
    assert (resolved.training.precision, resolved.model.vision_encoder.dtype) == ("bf16", "bfloat16")
    assert len(sizes) == 1


def test_cache_and_plan_choose_as_training_does(tiny_recipe, tmp_path, rates):
    rates(1.0, 2.0)
    recipe = tiny_recipe(tmp_path / "run", AUTO, f"data.feature_cache={tmp_path / 'features'}")
    fill_cache(recipe)
    assert '"encoder.dtype": "\\"bfloat16\\""' in (tmp_path / "features" / "manifest.json").read_text()
    half = plan(recipe, ["h100"], calibrate=0).memory["language model (frozen)"]
    rates(2.0, 1.0)
    assert plan(tiny_recipe(tmp_path, AUTO), ["h100"], calibrate=0).memory["language model (frozen)"] == 2 * half


@pytest.mark.parametrize(("half", "dtype"), [(2.0, torch.bfloat16), (0.5, torch.float32)])
def test_captions_compute_in_what_is_faster_here(tiny_checkpoint, tmp_path, rates, caplog, half, dtype):
    trained_in = torch.float32 if half > 1 else torch.bfloat16  # on another kind of machine
    model = FrozenPrefixForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=trained_in)
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "checkpoint")
    sizes = rates(1e11, half * 1e11)
    with caplog.at_level(logging.INFO):
        model = Captioner.from_pretrained(tmp_path / "checkpoint", device="cpu").model
    assert (model.language_model.dtype, next(model.vision_encoder.parameters()).dtype) == (dtype, dtype)
    assert {p.dtype for p in model.mapper.parameters()} == {torch.float32}
    assert sizes == [(32, 64)], "those of the language model"
    assert f"run at 100 GFLOP/s in fp32 and {100 * half:.0f} in bf16" in caplog.text
    own = Captioner.from_pretrained(tmp_path / "checkpoint", device="cpu", precision="fp16").model
    assert own.language_model.dtype == torch.float16


def test_evaluation_names_what_it_computed_in_and_resumes_in_nothing_else(tiny_checkpoint, shapes, tmp_path, rates):
    rates(1.0, 2.0)
    options = {"task": "vqa", "data": shapes, "limit": 2, "predictions": tmp_path / "p.jsonl"}
    assert evaluate_checkpoint(tiny_checkpoint, **options)["source"]["precision"] == "bf16"
    assert evaluate_checkpoint(tiny_checkpoint, precision="fp32", **options)["source"]["precision"] == "fp32"
    captioners = [Captioner.from_pretrained(tiny_checkpoint, device="cpu", precision=name) for name in ("bf16", "fp32")]
    headers = [header_of(captioner, [], {}) for captioner in captioners]
    Journal(tmp_path / "q.jsonl", headers[0]).add({("model", "1"): "a"})
    with pytest.raises(ConfigError, match="precision: an evaluation was begun with 'bfloat16' and not finished"):
        Journal(tmp_path / "q.jsonl", headers[1])


def test_features_in_another_dtype_are_computed_anew(tiny_recipe, shapes, tmp_path, rates):
    recipe = tiny_recipe(tmp_path / "run", f"data.feature_cache={tmp_path / 'features'}", "training.max_steps=1")
    best = train(recipe).best
    manifest = (tmp_path / "features" / "manifest.json").read_text()
    rates(1.0, 2.0)
    result = evaluate_checkpoint(best, task="caption", limit=2, num_beams=1)
    assert (result["n"], result["source"]["precision"]) == (2, "bf16")
    assert (tmp_path / "features" / "manifest.json").read_text() == manifest
    assert recipe_storage(best, {"encoder.dtype": '"float32"'}).feature_cache == str(tmp_path / "features")
    assert recipe_storage(best, {"encoder.dtype": '"bfloat16"'}).feature_cache == "auto"


def test_an_unknown_precision_is_refused(tiny_checkpoint):
    with pytest.raises(ConfigError, match="precision: got 'half', expected auto, fp32, bf16, fp16"):
        Captioner.from_pretrained(tiny_checkpoint, precision="half")


def test_rates_are_measured_in_little_time_and_once():
    first = measure_products(64, 96, seconds=0.02)
    assert min(first) > 0
    assert measure_products(64, 96, seconds=0.02) is first
    assert first.faster in (torch.float32, torch.bfloat16)


def test_a_disturbed_round_does_not_decide(monkeypatch):
    """Other programs take the processor in the first rounds of bfloat16, which is the faster one."""
    clock, calls = [0.0], {torch.float32: 0, torch.bfloat16: 0}

    class Layer:
        def __init__(self, dtype):
            self.dtype = dtype

        def forward(self, rows):
            calls[self.dtype] += 1
            disturbed = self.dtype == torch.bfloat16 and calls[self.dtype] <= 6  # the lay-out and two rounds
            clock[0] += 0.005 if self.dtype == torch.float32 else 0.05 if disturbed else 0.001
            return rows

    monkeypatch.setattr(kernel.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(kernel.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(kernel, "_feed_forward", lambda hidden, inner, dtype: [Layer(dtype), Layer(dtype)])
    rates = measure_products(48, 80)
    assert rates.faster == torch.bfloat16
    assert rates.bfloat16 == pytest.approx(5 * rates.float32)
    assert min(calls.values()) >= 2 * (1 + kernel.MIN_ROUNDS), "both are measured several times"
    assert clock[0] < 0.7


def test_one_core_is_measured_in_its_own_time():
    threads = torch.get_num_threads()
    rates = measure_products(96, 192, seconds=0.02)
    assert torch.get_num_threads() == threads
    assert min(measure_products(96, 192, seconds=0.02, all_cores=True)) > 0
    assert min(rates) > 0
