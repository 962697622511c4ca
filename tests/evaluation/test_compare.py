"""`frozenprefix compare`: differences with their significance, and nothing compared that is not the same data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data.samples import Sample
from frozenprefix.errors import DataError
from frozenprefix.evaluation.comparison import Evaluation, compare
from frozenprefix.evaluation.result import write_predictions
from frozenprefix.evaluation.scoring import caption_scorer, vqa_scorer

SIZE = 60


def questions(count: int = SIZE) -> list[Sample]:
    """Two questions about each image."""
    return [
        Sample(f"q{i}", (Path(f"{i // 2}.png"),), ("yes",), question=f"is it {i}?", task="vqa") for i in range(count)
    ]


def answers(right_share: float, seed: int) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {f"q{i}": "yes" if rng.random() < right_share else "no" for i in range(SIZE)}


def write(folder: Path, name: str, samples, texts, scorer, **result) -> Path:
    """What an evaluation of these texts leaves behind."""
    predictions = folder / f"{name}.jsonl"
    scores = scorer(samples)(texts)
    write_predictions(predictions, samples, {"model": texts}, {"model": scores})
    values = {
        "task": samples[0].task,
        "metrics": scores.metrics,
        "n": len(samples),
        "settings": {"num_beams": 1},
        "predictions": str(predictions),
        "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
        **result,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(values))
    return file


@pytest.fixture
def pair(tmp_path):
    """A: half of the answers are right; B: nearly all."""
    a = write(tmp_path, "a", questions(), answers(0.5, 0), vqa_scorer)
    b = write(tmp_path, "b", questions(), answers(0.95, 1), vqa_scorer, settings={"num_beams": 3})
    return a, b


def compared(a, b, **options):
    return compare(Evaluation.load(a), Evaluation.load(b), **options)


def test_a_real_difference_is_significant(pair):
    result = compared(*pair)
    row = result["metrics"]["accuracy"]
    a, b = (json.loads(file.read_text())["metrics"]["accuracy"] for file in pair)
    assert (row["a"], row["b"]) == pytest.approx((a, b))
    assert row["difference"] == pytest.approx(b - a)
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert row["p_value"] < 0.01
    assert (result["task"], result["n"], result["images"]) == ("vqa", SIZE, SIZE // 2)
    assert result["settings"] == {"num_beams": [1, 3]}


def test_no_difference_is_not(pair):
    row = compared(pair[0], pair[0])["metrics"]["accuracy"]
    assert (row["difference"], row["p_value"]) == (0.0, 1.0)


def test_samples_are_matched_by_id_not_by_place(pair, tmp_path):
    a, _ = pair
    turned = write(tmp_path, "turned", questions()[::-1], answers(0.5, 0), vqa_scorer)
    row = compared(a, turned)["metrics"]["accuracy"]
    assert (row["low"], row["high"]) == (0.0, 0.0)


def test_captions_by_their_counts(tmp_path):
    """BLEU is compared by summed counts; the number of different captions has no significance."""
    samples = [Sample(str(i), (Path(f"{i}.png"),), (f"a dog number {i} runs on grass",)) for i in range(30)]
    good = {s.id: s.targets[0] for s in samples}
    poor = {s.id: "a dog runs" for s in samples}
    a = write(tmp_path, "a", samples, poor, caption_scorer)
    b = write(tmp_path, "b", samples, good, caption_scorer)
    metrics = compared(a, b, n=200)["metrics"]
    bleu = metrics["bleu_4"]
    assert bleu["a"] == pytest.approx(json.loads(a.read_text())["metrics"]["bleu_4"])
    assert bleu["b"] == pytest.approx(1.0)
    assert bleu["p_value"] == pytest.approx(2 / 201)
    distinct = metrics["distinct_captions"]
    assert distinct == {"a": 1.0, "b": 30.0, "difference": 29.0, "low": None, "high": None, "p_value": None}


def test_moved_files_find_each_other(pair, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.json", "a.jsonl"):
        shutil.move(tmp_path / name, moved / name)
    assert compared(moved / "a.json", pair[1])["n"] == SIZE


# ── what is refused ──


def test_other_tasks_are_refused(pair, tmp_path):
    other = write(tmp_path, "c", questions(), answers(0.5, 0), vqa_scorer, task="caption")
    with pytest.raises(DataError, match=r"task: .*a\.json has 'vqa', .*c\.json has 'caption'"):
        compared(pair[0], other)


def test_other_ids_are_refused(pair, tmp_path):
    fewer = questions(SIZE - 2)
    other = write(tmp_path, "c", fewer, {s.id: "yes" for s in fewer}, vqa_scorer)
    for first, second in ((pair[0], other), (other, pair[0])):
        with pytest.raises(DataError, match=r"id: 2 of 60 samples of .*a\.json are not in .*c\.json, first 'q58'"):
            compared(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("no",)}, r"references: of sample 'q3' .* has \['yes'\], .* has \['no'\]"),
        ({"question": "why?"}, r"question: of sample 'q3' .* has 'is it 3\?', .* has 'why\?'"),
    ],
)
def test_other_data_are_refused(pair, tmp_path, change, message):
    from dataclasses import replace

    samples = [replace(s, **change) if s.id == "q3" else s for s in questions()]
    other = write(tmp_path, "c", samples, answers(0.5, 0), vqa_scorer)
    with pytest.raises(DataError, match=message):
        compared(pair[0], other)


def test_predictions_of_a_later_evaluation_are_refused(pair, tmp_path):
    shutil.copy(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"predictions_sha256: .*a\.jsonl is not the file that was scored"):
        Evaluation.load(pair[0])


def test_wrong_files_are_refused(pair, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        Evaluation.load(tmp_path / "no.json")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    with pytest.raises(DataError, match="has no 'task'; expected a result of frozenprefix evaluate --out"):
        Evaluation.load(wrong)
    wrong.write_text("[]")
    with pytest.raises(DataError, match="got list"):
        Evaluation.load(wrong)
    wrong.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Evaluation.load(wrong)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"predictions: .*a\.jsonl does not exist; evaluate again"):
        Evaluation.load(pair[0])


# ── the command ──


def test_command(pair, tmp_path):
    out = tmp_path / "made" / "compared.json"
    run = CliRunner().invoke(app, ["compare", *map(str, pair), "--out", str(out)], terminal_width=200)
    assert run.exit_code == 0, run.output
    assert json.loads(out.read_text()) == compared(*pair)
    assert "num_beams: A has 1, B has 3" in run.output
    row = next(line for line in run.output.splitlines() if "accuracy" in line)
    shown = json.loads(out.read_text())["metrics"]["accuracy"]
    assert f"{shown['difference']:+.4f}" in row
    assert f"{shown['p_value']:.3f}" in row


def test_command_refuses_in_one_line(pair, tmp_path):
    other = write(tmp_path, "c", questions(), answers(0.5, 0), vqa_scorer, task="caption")
    run = CliRunner().invoke(app, ["compare", str(pair[0]), str(other)])
    assert run.exit_code == 2
    assert run.stderr.startswith("Error: task: ")
