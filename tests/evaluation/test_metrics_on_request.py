"""METEOR, SPICE and CLIPScore in `evaluate`: what they need is checked first, and their figures stand in the result."""

from __future__ import annotations

import numpy as np
import pytest

from frozenprefix.data.samples import Sample
from frozenprefix.errors import AssetError, CheckpointError, ConfigError
from frozenprefix.evaluation import EvaluationOptions, scoring
from frozenprefix.evaluation.metrics import java
from frozenprefix.evaluation.metrics.java import JavaScores
from frozenprefix.evaluation.tasks import captioning, evaluate_captions, runs
from frozenprefix.inference import Embedder
from tests.helpers.answers import saying
from tests.helpers.data import rows_of


@pytest.fixture
def samples(colour_images):
    colours = ("red", "green", "blue")
    return [Sample(colour, (colour_images / f"{colour}.png",), (f"a {colour} square",)) for colour in colours]


@pytest.fixture
def never_predicts(monkeypatch):
    monkeypatch.setattr(runs, "predict", lambda *_: pytest.fail("predicted before the check"))


@pytest.fixture
def says_the_name(monkeypatch):
    """Captions that are right for the image that is shown."""
    answer = saying(lambda asked, _: f"a {asked.images[0].stem} square" if asked.images else "a thing")
    monkeypatch.setattr(runs, "predict", answer)


@pytest.mark.parametrize("name", ["METEOR", "SPICE"])
def test_a_missing_program_is_one_line_before_anything_is_predicted(
    captioner, samples, tmp_path, monkeypatch, never_predicts, name
):
    monkeypatch.setattr(java.shutil, "which", lambda program: None)
    options = EvaluationOptions(tmp_path / "p.jsonl", extra={"metrics": [name.lower()]})
    with pytest.raises(AssetError, match=f"{name} needs Java: there is no program 'java' on the PATH") as caught:
        evaluate_captions(captioner, samples, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"metrics": "meteor"}, ConfigError, "metrics: got 'meteor', expected a list of meteor, spice"),
        ({"metrics": ["meter"]}, ConfigError, r"metrics: got \['meter'\]"),
        ({"clip_score": "no/such"}, CheckpointError, "got 'no/such', expected a checkpoint folder"),
        ({"metric": []}, ConfigError, r"no option 'metric' \(did you mean 'metrics'\?\)"),
    ],
)
def test_wrong_requests(captioner, samples, tmp_path, never_predicts, extra, error, message):
    with pytest.raises(error, match=message):
        evaluate_captions(captioner, samples, EvaluationOptions(tmp_path / "p.jsonl", extra=extra))


def test_figures_of_java(captioner, samples, tmp_path, monkeypatch, says_the_name):
    def words(texts, references):
        each = {key: float(len(text.split())) for key, text in texts.items()}
        return JavaScores(sum(each.values()) / len(each), each)

    monkeypatch.setitem(captioning.METRICS, "meteor", (lambda: None, scoring.meteor_scorer))
    monkeypatch.setitem(captioning.METRICS, "spice", (lambda: None, scoring.spice_scorer))
    monkeypatch.setattr(scoring, "meteor", words)
    monkeypatch.setattr(scoring, "spice", words)
    options = EvaluationOptions(tmp_path / "p.jsonl", extra={"metrics": ["meteor", "spice"]})
    result = evaluate_captions(captioner, samples, options)
    assert (result["metrics"]["meteor"], result["metrics"]["spice"]) == (3.0, 3.0)
    assert result["baselines"]["blind"]["meteor"] == 2.0
    assert "spice" in result["intervals"]
    assert "meteor" not in result["intervals"], "it is no mean over samples"
    assert result["settings"]["metrics"] == ["meteor", "spice"]
    assert all(row["scores"]["model"]["spice"] == 3.0 for row in rows_of(tmp_path / "p.jsonl"))


def test_clip_score(captioner, samples, tmp_path, monkeypatch, says_the_name, colour_embedder, tiny_checkpoint):
    monkeypatch.setattr(Embedder, "from_pretrained", classmethod(lambda cls, checkpoint: colour_embedder))
    options = EvaluationOptions(tmp_path / "p.jsonl", extra={"clip_score": str(tiny_checkpoint)})
    result = evaluate_captions(captioner, samples, options)
    images = colour_embedder.embed_images([sample.images[0] for sample in samples])[1]
    texts = colour_embedder.embed_texts([f"A photo depicts a {sample.id} square" for sample in samples])
    expected = 2.5 * np.maximum((images * texts).sum(axis=1), 0)
    assert result["metrics"]["clip_score"] == pytest.approx(expected.mean())
    assert result["metrics"]["clip_score"] > 1
    assert result["baselines"]["shuffled"]["clip_score"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["ref_clip_score"] > result["baselines"]["blind"]["ref_clip_score"]
    assert "clip_score" in result["intervals"]
