"""Model cards: the head that the Hub reads, tables that render, and what is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.errors import CheckpointError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.interpret import read_run, write_card
from frozenprefix.utils import write_text_atomic


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint, tiny_recipe, shapes, tmp_path_factory) -> Path:
    """A run with a checkpoint in best/, its recipe, a log and an evaluation."""
    import json

    run = tmp_path_factory.mktemp("card") / "run"
    shutil.copytree(tiny_checkpoint, run / "best")
    write_text_atomic(run / "best" / "recipe.yaml", tiny_recipe(run).to_yaml())
    write_text_atomic(run / "log.jsonl", '{"step": 6, "loss": 2.0}\n')
    result = evaluate_checkpoint(
        run / "best", task="caption", data=shapes, split="val", predictions=run / "predictions.jsonl", num_beams=1
    )
    write_text_atomic(run / "scores.json", json.dumps(result))
    return run


@pytest.fixture
def run(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def test_the_head_holds_every_score_with_interval_and_baselines(run):
    card = ModelCard.load(write_card(read_run(run), licence="mit"))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-text-to-text")
    scores = {result.metric_type: result for result in data.eval_results}
    assert {"cider_d", "bleu_4", "rouge_l"} <= scores.keys()
    found = scores["cider_d"]
    assert (found.task_type, found.dataset_name, found.dataset_split) == ("image-to-text", "shapes", "val")
    assert {"baseline_blind", "baseline_shuffled", "interval_95"} <= found.metric_args.keys()
    low, high = found.metric_args["interval_95"]
    assert low <= found.metric_value <= high


def test_tables_and_images_render(run):
    path = write_card(read_run(run), images=3)
    page = MarkdownIt().enable("table").render(ModelCard.load(path).text)
    assert page.count("<table>") == 3
    assert page.count("<img") == 3
    assert "<th>95 % interval</th>" in page
    assert "<td>vision encoder, frozen</td>" in page
    assert "none: random weights" in page
    assert len(list((run / "best" / "examples").iterdir())) == 3
    text = path.read_text()
    assert "frozenprefix train recipe.yaml" in text
    assert "hidden_dim: 32" in text
    assert "- 6 steps" in text
    assert write_card(read_run(run), images=0).read_text().count("![]") == 0


def test_a_run_without_scores_says_so(run):
    (run / "scores.json").unlink()
    card = ModelCard.load(write_card(read_run(run)))
    assert card.data.eval_results is None
    assert "Not evaluated." in card.text


def test_the_command_and_a_file_in_the_way(run):
    result = CliRunner().invoke(app, ["card", str(run), "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["card", str(run)]).exit_code == 0  # its own card is replaced
    (run / "best" / "README.md").write_text("mine")
    result = CliRunner().invoke(app, ["card", str(run)])
    assert result.exit_code == 2
    assert "was not written by this command; give --force to replace it" in result.output.replace("\n", " ")
    assert (run / "best" / "README.md").read_text() == "mine"
    assert CliRunner().invoke(app, ["card", str(run), "--force"]).exit_code == 0


def test_folders_that_are_no_run(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; expected the output folder of a run"):
        read_run(tmp_path)
    (run / "best" / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"holds no recipe\.yaml"):
        read_run(run)
