"""The quickstart script from end to end, on a tiny language model, a tiny encoder and made-up drawings."""

from __future__ import annotations

import json
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from frozenprefix.errors import ConfigError
from tests.helpers import ROOT

SCRIPT = ROOT / "recipes" / "quickstart.py"
COLORS = ("red", "blue", "green")
SHAPES = ("circle", "rectangle")


def draw_easy_vqa(folder: Path, count: int) -> Path:
    """A folder as easy-VQA's: `count` drawings for training and as many to test on, four questions each."""
    for part in ("train", "test"):
        (folder / part / "images").mkdir(parents=True)
        questions = []
        for n in range(count):
            color, shape = COLORS[n % 3], SHAPES[n % 2]
            image = Image.new("RGB", (32, 32), "white")
            draw = ImageDraw.Draw(image)
            (draw.ellipse if shape == "circle" else draw.rectangle)((8, 8, 24, 24), fill=color)
            image.save(folder / part / "images" / f"{n}.png")
            questions += [
                ["what color is the shape?", color, n],
                ["what shape is in the image?", shape, n],
                [f"is there a {color} shape?", "yes", n],
                [f"is there no {shape}?", "no", n],
            ]
        (folder / part / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("quickstart", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_trains_evaluates_and_reports(script, tiny_lm, tmp_path, capsys):
    data, run = draw_easy_vqa(tmp_path / "easy", 12), tmp_path / "run"
    vision = "{source: timm, name: test_efficientnet, weights: random, image_size: 64}"
    overrides = [
        f"output_dir={run}",
        f"model.vision_encoder={vision}",
        "model.mapper.hidden_dim=16",
        f"model.language_model.path={tiny_lm()}",
        f"data.train.0.path={data}",
        f"data.validation.0.path={data}",
        "data.validation.0.val_fraction=0.5",
        "data.train.0.val_fraction=0.5",
        "data.feature_cache=off",
        "data.workers=0",
        "training.precision=fp32",
        "training.epochs=null",
        "training.max_steps=3",
        "training.warmup_steps=1",
        "training.images_per_step=2",
        "evaluation.limit=6",
    ]
    script.main(overrides)
    results = json.loads((run / "results.json").read_text())
    keys = {"accuracy", "exact_match", *(f"accuracy_{name}" for name in ("shape", "color", "yes_no", "shape_color"))}
    assert results["metrics"].keys() == keys
    assert {name: each.keys() for name, each in results["baselines"].items()} == {"blind": keys, "shuffled": keys}
    assert (results["n"], results["caption"]["n"], results["steps"]) == (24, 6, 3)
    assert 0 <= results["caption"]["metrics"]["exact_match"] <= 1
    assert results["seconds"]["total"] >= results["seconds"]["evaluation"] > 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 6
    assert 'alt="Loss over 3 steps. At the end: validation' in page
    shown = capsys.readouterr().out
    assert "shape and color together" in shown
    command = next(line for line in shown.splitlines() if line.startswith("  frozenprefix ask "))
    _, _, checkpoint, image, question = shlex.split(command)
    assert (Path(checkpoint), Path(image)) == (run / "best", data / "test" / "images" / "0.png")
    assert question == "what color is the shape?"

    before = (run / "best" / "model.safetensors").read_bytes()
    script.main(overrides)
    assert json.loads((run / "results.json").read_text())["steps"] == 3, "a complete run is only evaluated again"
    assert (run / "best" / "model.safetensors").read_bytes() == before


def test_question_types_by_hand(script):
    groups = {"color": 1.0, "shape": 0.5, "yes-no": 0.25}
    result = {
        "n": 8,
        "metrics": {"accuracy": 0.5},
        "baselines": {"blind": {"accuracy": 0.1}, "shuffled": {"accuracy": 0.2}},
        "groups": {name: {"accuracy": groups} for name in ("model", "blind", "shuffled")},
    }
    flat = script.with_question_types(result, {"color": 1, "shape": 3, "yes-no": 4})
    types = {"accuracy_color": 1.0, "accuracy_shape": 0.5, "accuracy_yes_no": 0.25, "accuracy_shape_color": 0.625}
    assert flat == {
        "n": 8,
        "metrics": {"accuracy": 0.5, **types},
        "baselines": {"blind": {"accuracy": 0.1, **types}, "shuffled": {"accuracy": 0.2, **types}},
    }


def test_exact_captions_by_hand(script):
    rows = [
        {"id": "1", "references": ["a red circle"], "model": "a red circle", "blind": "", "shuffled": "a red circle"},
        {"id": "2", "references": ["a red circle"], "model": "A  red circle", "blind": "", "shuffled": "a blue circle"},
    ]
    result = {"metrics": {}, "baselines": {"blind": {"bleu_1": 0.0}, "shuffled": {}}}
    exact = script.with_exact_match(result, rows)
    assert exact["metrics"] == {"exact_match": 1.0}
    assert exact["baselines"] == {"blind": {"bleu_1": 0.0, "exact_match": 0.0}, "shuffled": {"exact_match": 0.5}}


def test_wrong_override_is_refused(script):
    with pytest.raises(ConfigError, match="learning_rat"):
        script.main(["training.learning_rat=1"])
