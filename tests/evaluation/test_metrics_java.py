"""METEOR and SPICE: what is missing is said in one line, ids are paired rightly, METEOR equals pycocoevalcap."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from frozenprefix.errors import AssetError, DataError
from frozenprefix.evaluation.metrics import java, ptb_tokenize

FAKE_SPICE = """#!{python}
import json, sys
given = json.load(open(sys.argv[sys.argv.index("-out") - 1]))
rows = [{{"image_id": row["image_id"], "scores": {{"All": {{"f": len(row["test"].split()) / 10}}}}}} for row in given]
json.dump(sorted(rows, key=lambda row: row["image_id"]), open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""
FAKE_METEOR = """#!{python}
import sys
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(parts[-1].split()) if parts[-1] else 0, flush=True)
    else:
        print(*[float(part) / 10 for part in parts], sum(map(float, parts)) / 100, sep="\\n", flush=True)
"""
BROKEN = "#!/bin/sh\necho 'Could not reserve enough space' >&2\nexit 3\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program in the place of java, and empty files in the place of the jars."""
    package = tmp_path / "pycocoevalcap"
    for name in (*java._METEOR, *java._SPICE, *java._CORENLP):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)

    def write(text: str) -> Path:
        file = tmp_path / "bin" / "java"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.format(python=sys.executable))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
        return package

    return write


def test_spice_pairs_results_with_the_ids_they_name(program):
    """pycocoevalcap gives the scores in sorted order and pairs them with the ids as they came."""
    program(FAKE_SPICE)
    scores = java.spice({"b": "one", "a": "one two", "10": "one two three"}, {"b": ["x"], "a": ["x"], "10": ["x"]})
    assert scores.per_image == {"b": 0.1, "a": 0.2, "10": pytest.approx(0.3)}
    assert list(scores.per_image) == ["b", "a", "10"]
    assert scores.corpus == pytest.approx(0.2)


def test_meteor_speaks_its_protocol(program):
    program(FAKE_METEOR)
    scores = java.meteor({"b": "A dog, running!", "a": ""}, {"b": ["x", "y ||| z"], "a": ["x"]})
    assert scores.per_image == {"b": pytest.approx(0.3), "a": 0.0}
    assert scores.corpus == pytest.approx(0.03)


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_a_program_that_stops_says_its_last_words(program, metric):
    program(BROKEN)
    with pytest.raises(AssetError, match=r"stopped with code 3: Could not reserve enough space"):
        getattr(java, metric)({"a": "x"}, {"a": ["x"]})


def test_missing_models_are_named(program):
    package = program(FAKE_SPICE)
    (package / java._CORENLP[1]).unlink()
    with pytest.raises(AssetError, match=r"no package registry carries: spice/lib/stanford-corenlp-3.6.0-models.jar"):
        java.spice({"a": "x"}, {"a": ["x"]})
    (package / java._METEOR[0]).unlink()
    with pytest.raises(AssetError, match=r"METEOR needs meteor/meteor-1\.5\.jar"):
        java.meteor({"a": "x"}, {"a": ["x"]})


@pytest.mark.parametrize("check", [java.check_meteor, java.check_spice])
def test_missing_java_and_package_are_one_line(check, monkeypatch, program):
    program(BROKEN)
    with monkeypatch.context() as patch:
        patch.setattr(java, "find_spec", lambda name: None)
        with pytest.raises(AssetError, match="needs pycocoevalcap, which is not installed") as caught:
            check()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError, match="needs Java: there is no program 'java' on the PATH"):
        check()


def test_wrong_ids_and_references_are_refused(program):
    program(FAKE_METEOR)
    with pytest.raises(DataError, match="must have the same ids"):
        java.meteor({"a": "x"}, {"b": ["x"]})
    with pytest.raises(DataError, match=r"references\['a'\] must be a list"):
        java.meteor({"a": "x"}, {"a": "x"})


@pytest.mark.slow
@pytest.mark.parity
def test_meteor_equals_pycocoevalcap(data_root):
    """The Java program loads its paraphrases for seconds, on a busy machine for half a minute."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs java")
    from pycocoevalcap.meteor.meteor import Meteor

    lines = (data_root / "flickr8k" / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    rows = [json.loads(line) for line in lines]
    references = {row["image"]: row["captions"][1:] for row in reversed(rows)}
    said = {row["image"]: row["captions"][0] for row in rows}
    said[rows[0]["image"]], said[rows[1]["image"]] = "dog", rows[2]["captions"][0]
    ours = java.meteor(said, references)
    tokens = {key: [" ".join(ptb_tokenize(text)) for text in texts] for key, texts in references.items()}
    corpus, each = Meteor().compute_score(tokens, {key: [" ".join(ptb_tokenize(said[key]))] for key in tokens})
    assert ours.corpus == pytest.approx(corpus, abs=1e-6)
    assert list(ours.per_image.values()) == pytest.approx(each, abs=1e-6)
    assert list(ours.per_image) == list(references)
