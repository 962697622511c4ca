"""METEOR and SPICE, through the Java programs that pycocoevalcap ships. Missing parts are reported first.

METEOR: Denkowski & Lavie 2014, version 1.5, English, `-norm`. SPICE: Anderson et al. 2016, version 1.0. Both get the
tokens of `ptb_tokenize`, as the caption evaluation of MS COCO gives them Java's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from frozenprefix.errors import AssetError, DataError
from frozenprefix.evaluation.metrics.ids import check_same_ids
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize

_METEOR = ("meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz")
_SPICE = ("spice/spice-1.0.jar", "spice/lib/SceneGraphParser-1.0.jar")
_CORENLP = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class JavaScores:
    """A score for the corpus and one for each image, in [0, 1]. METEOR of a corpus is not a mean over images."""

    corpus: float
    per_image: dict[str, float]


def meteor(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> JavaScores:
    """METEOR of one caption per image, equal to pycocoevalcap's.

    Raises:
        AssetError: Java or the METEOR program is missing, or stopped before its time.
        DataError: an id is missing or unexpected, or an image has no reference.
    """
    folder = check_meteor()
    candidates, tokens = _tokens(predictions, references)
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx2G", "meteor-1.5.jar", *options]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=folder / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        )
        try:
            statistics = [
                _ask(process, " ||| ".join(["SCORE", *tokens[key], candidates[key]]), errors) for key in candidates
            ]
            scores = [float(_ask(process, " ||| ".join(["EVAL", *statistics]), errors))]
            scores += [float(_ask(process, None, errors)) for _ in candidates]
        finally:
            process.kill()
            process.communicate()
    return JavaScores(scores[-1], dict(zip(candidates, scores[:-1], strict=True)))


def spice(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> JavaScores:
    """SPICE's F-score of one caption per image; each result is paired with its image by the id that it names.

    Scene graphs are not kept between runs: their store does not open under every Java.

    Raises:
        AssetError: Java, the SPICE program or CoreNLP's models are missing, or SPICE failed.
        DataError: as `meteor`.
    """
    folder = check_spice()
    candidates, tokens = _tokens(predictions, references)
    rows = [{"image_id": key, "test": text, "refs": tokens[key]} for key, text in candidates.items()]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx8G", "spice-1.0.jar", str(source), "-out", str(target)]
        run = subprocess.run([*command, "-silent"], cwd=folder / "spice", capture_output=True, encoding="utf-8")
        if run.returncode or not target.is_file():
            raise AssetError(f"SPICE stopped with code {run.returncode}: {_last_line(run.stderr)}")
        results = json.loads(target.read_text(encoding="utf-8"))
    scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in results}
    check_same_ids(scores, candidates, "captions given to SPICE")
    return JavaScores(sum(scores.values()) / len(scores), {key: scores[key] for key in candidates})


def check_meteor() -> Path:
    """Folder of pycocoevalcap, when METEOR can run; else `AssetError` names in one line what is missing."""
    return _check("METEOR", _METEOR)


def check_spice() -> Path:
    """Folder of pycocoevalcap, when SPICE can run; else `AssetError` names in one line what is missing."""
    folder = _check("SPICE", _SPICE)
    missing = [name for name in _CORENLP if not (folder / name).is_file()]
    if missing:
        raise AssetError(
            f"SPICE needs the models of Stanford CoreNLP 3.6.0, which no package registry carries: {missing[0]} is "
            f"missing in {folder}; put both stanford-corenlp-3.6.0 jars of stanford-corenlp-full-2015-12-09.zip there"
        )
    return folder


def _check(metric: str, names: Sequence[str]) -> Path:
    if shutil.which("java") is None:
        raise AssetError(f"{metric} needs Java: there is no program 'java' on the PATH; install a Java runtime")
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(f"{metric} needs pycocoevalcap, which is not installed; pip install pycocoevalcap")
    folder = Path(next(iter(spec.submodule_search_locations)))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise AssetError(f"{metric} needs {missing[0]}, which {folder} lacks; install pycocoevalcap again")
    return folder


def _tokens(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    check_same_ids(predictions, references, "references")
    bad = [key for key, texts in references.items() if isinstance(texts, str) or not texts]
    if bad:
        raise DataError(f"references[{bad[0]!r}] must be a list of at least one caption, got {references[bad[0]]!r}")
    return (
        {key: _line(predictions[key]) for key in references},
        {key: [_line(text) for text in texts] for key, texts in references.items()},
    )


def _line(text: str) -> str:
    return " ".join(ptb_tokenize(text)).replace("|||", "")  # METEOR's separator


def _ask(process: subprocess.Popen[str], line: str | None, errors: IO[bytes]) -> str:
    """Send a line, if there is one, and return METEOR's answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if line is not None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline().strip()
    except BrokenPipeError:
        answer = ""
    if not answer:
        process.wait()
        errors.seek(0)
        raise AssetError(
            f"METEOR stopped with code {process.returncode}: {_last_line(errors.read().decode('utf-8', 'replace'))}"
        )
    return answer


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
