"""The report of runs: what a run logs is on the page, in one file that is valid and needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.errors import DataError, TrainingError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.interpret import read_runs, write_run_report
from frozenprefix.interpret.curves import best_of, charts_of, draw
from frozenprefix.interpret.run_report import RunLog, captions_over_time, differences
from frozenprefix.training import train
from tests.interpret.test_report import Page

EVERY = ("training.max_steps=6", "training.validate_every=2", "training.log_every=1", "training.save_every=6")


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory) -> list[Path]:
    """Two runs that differ in a learning rate; the first one is evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("one", "1e-3"), ("two", "1e-2")):
        train(tiny_recipe(folder / name, *EVERY, f"training.learning_rate={rate}"))
    result = evaluate_checkpoint(folder / "one" / "best", task="caption", num_beams=1, limit=6)
    (folder / "one" / "scores.json").write_text(json.dumps(result))
    return [folder / "one", folder / "two"]


def test_the_page_of_two_runs(runs, tmp_path):
    path = write_run_report(tmp_path / "page.html", read_runs(runs), images=3)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r'(?:src|href)="(?!data:)', text), "one file"
    assert "<script" not in text
    for words in (
        "Runs: one, two",
        "Captions over time",
        "Best captions by CIDEr-D",
        "Worst captions",
        "Keys that differ",
    ):
        assert words in page.text
    assert "training.learning_rate 0.001 0.01" in page.text
    images = page.named("img")
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in images)
    charts = [image["alt"] for image in images if "svg" in image["src"][:30]]
    assert [alt.split(",")[0] for alt in charts] == [
        "Training loss",
        "Validation loss",
        "Validation loss",
        "Captions that end",
        "Speed",
        "Memory at the peak",
    ]
    again = write_run_report(tmp_path / "again.html", read_runs(runs), images=3)
    assert again.read_bytes() == path.read_bytes()


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.5}\n')
    path = write_run_report(tmp_path / "page.html", read_runs([tmp_path]))
    page = Page(path.read_text(encoding="utf-8"))
    assert "fewer than two steps" in page.text
    assert "No run has been evaluated" in page.text
    assert "Keys that differ" not in page.text


def test_a_run_is_named_by_its_checkpoints_too_and_only_once(runs, tmp_path):
    assert read_runs([runs[0] / "best"])[0].name == "one"
    with pytest.raises(DataError, match="the same run twice"):
        read_runs([runs[0], runs[0] / "last"])
    with pytest.raises(TrainingError, match="no such log"):
        read_runs([tmp_path])


def test_the_log_tells_time_and_memory(runs):
    rows = [row for row in read_runs(runs)[0].log if "loss" in row]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert all(row["memory_gb"] > 0.05 for row in rows)


def test_captions_are_spaced_and_the_kept_step_is_among_them():
    rows = [
        {
            "step": step,
            "validation/loss": abs(step - 70) + 1.0,
            "validation/captions": [f"<b>{step}"],
            "validation/caption_images": ["gone.jpg"],
        }
        for step in range(0, 210, 10)
    ]
    (story,) = captions_over_time([RunLog("a", rows)], 8)
    ((_, texts),) = story["runs"]
    assert [step for step, *_ in texts] == [0, 40, 70, 120, 160, 200]
    assert [step for step, _, kept in texts if kept] == [70]
    assert "problem" in story["image"]


def test_charts_leave_out_what_a_log_does_not_hold():
    old = [{"step": step, "loss": 3.0 / step, "validation/loss": 2.0} for step in (1, 2)]
    charts = charts_of({"old": old, "new": [{**row, "seconds": 60.0 * row["step"]} for row in old]})
    assert [(chart.title, chart.x, len(chart.curves)) for chart in charts] == [
        ("Training loss", "step", 2),
        ("Validation loss", "step", 2),
        ("Validation loss", "minutes", 1),
    ]
    assert charts[2].curves[0].points == [(1.0, 2.0), (2.0, 2.0)]
    assert draw(charts[0]) == draw(charts[0])
    assert best_of([{"step": 1, "validation/loss": "nan"}]) is None


def test_differences_go_into_sources():
    one = RunLog("a", [], {"name": "a", "data": {"train": [{"type": "csv", "limit": 1}]}, "seed": 0})
    two = RunLog("b", [], {"name": "b", "data": {"train": [{"type": "csv"}]}, "seed": 0})
    assert differences([one, two]) == [("data.train.0.limit", [1, "–"])]


def test_the_command(runs, tmp_path):
    out = tmp_path / "report.html"
    arguments = ["report", *map(str, runs), "--out", str(out)]
    for _ in range(2):  # its own page is replaced
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "open it in a browser" in result.stdout
    out.write_text("mine")
    assert CliRunner().invoke(app, arguments).exit_code == 2
