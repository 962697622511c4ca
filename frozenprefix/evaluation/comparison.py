"""Two evaluations of the same samples: differences of their scores, and whether they could be chance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError
from frozenprefix.evaluation.bootstrap import paired_bootstrap
from frozenprefix.evaluation.scoring import rows_of
from frozenprefix.utils import parse_json, read_jsonl, report
from frozenprefix.utils.damage import refusing_damage
from frozenprefix.utils.hashing import hash_file

Row = dict[str, Any]
_EXPECTED = "a result of frozenprefix evaluate --out"


@dataclass(frozen=True)
class Evaluation:
    """A result file, and its predictions by sample id.

    Example:
        >>> Evaluation(tmp_path / "result.json", {"task": "vqa", "metrics": {}}, {"1": {"model": "red"}}).rows["1"]
        {'model': 'red'}
    """

    file: Path
    result: dict[str, Any]
    rows: dict[str, Row]

    @classmethod
    def load(cls, file: str | Path) -> Evaluation:
        """Read what `frozenprefix evaluate --out` wrote, and the predictions that it names.

        Raises:
            DataError: a file is missing or has another content, or the predictions are those of another evaluation.
        """
        file = Path(file)
        result = _json_of(file)
        missing = [key for key in ("task", "metrics", "predictions") if key not in result]
        if missing:
            raise DataError(f"{file}: has no '{missing[0]}'; expected {_EXPECTED}")
        if not isinstance(result["metrics"], dict) or not isinstance(result["predictions"], str):
            raise DataError(f"{file}: got other metrics or predictions than evaluate writes; expected {_EXPECTED}")
        predictions = Path(result["predictions"])
        if not os.path.isfile(predictions):  # False for a name that no file can have
            predictions = file.parent / predictions.name  # both were moved together
        if not os.path.isfile(predictions):
            raise DataError(f"{file}: predictions: {result['predictions']} does not exist; evaluate again")
        if hash_file(predictions) != result.get("predictions_sha256"):
            raise DataError(
                f"{file}: predictions_sha256: {predictions} is not the file that was scored; a later evaluation wrote "
                "to the same place: evaluate again, with another --predictions"
            )
        with refusing_damage(DataError, f"{predictions}: these are no predictions of evaluate ({{reason}})"):
            return cls(file, result, {row["id"]: row for _, row in read_jsonl(predictions)})


def compare(a: Evaluation, b: Evaluation, *, n: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Compare the model's scores of two evaluations by paired bootstrap, drawing images with all their samples.

    Returns:
        `{"task", "n", "images", "metrics", "settings"}`. A metric has `a`, `b`, `difference` = b − a, and `low`, `high`
        (95 %) and `p_value`, which are None for a metric without scores per sample. `settings`: those that differ, as
        [a, b].

    Raises:
        DataError: the two do not have the same samples; the message names the field.

    Example:
        >>> rows = {"1": {"images": ["1.png"], "scores": {"model": {"accuracy": 1.0}}}}
        >>> result = Evaluation(tmp_path / "result.json", {"task": "vqa", "metrics": {"accuracy": 1.0}}, rows)
        >>> compare(result, result)["metrics"]["accuracy"]["difference"]
        0.0
    """
    with refusing_damage(DataError, f"{a.file}, {b.file}: these are no results of evaluate ({{reason}})"):
        return _compare(a, b, n, seed)


def _compare(a: Evaluation, b: Evaluation, n: int, seed: int) -> dict[str, Any]:
    _check_same(a, b)
    ids = list(a.rows)
    images = [tuple(a.rows[key]["images"]) for key in ids]
    metrics: dict[str, dict[str, float | None]] = {}
    shared = [name for name in a.result["metrics"] if name in b.result["metrics"]]
    every = {*a.result["metrics"], *b.result["metrics"]}
    alone = sorted(every - set(shared))
    report("compare", len(every), {"in one evaluation only": len(alone)}, what="metrics", examples=alone)
    for name in shared:
        (rows_a, metric, known), (rows_b, _, known_b) = (_rows(each, name, ids) for each in (a, b))
        if known and known_b:
            metrics[name] = asdict(paired_bootstrap(rows_a, rows_b, metric, n=n, seed=seed, clusters=images))
        else:
            first, second = a.result["metrics"][name], b.result["metrics"][name]
            nothing = dict.fromkeys(("low", "high", "p_value"))
            metrics[name] = {"a": first, "b": second, "difference": second - first, **nothing}
    return {
        "task": a.result["task"],
        "n": len(ids),
        "images": len(set(images)),
        "metrics": metrics,
        "settings": _different(a.result.get("settings", {}), b.result.get("settings", {})),
    }


def _rows(evaluation: Evaluation, name: str, ids: Sequence[str]) -> Any:
    per_sample = {key: evaluation.rows[key].get("scores", {}).get("model", {}) for key in ids}
    kinds = evaluation.rows[ids[0]].get("statistics", {})
    return rows_of(
        name, per_sample, {kind: {key: evaluation.rows[key]["statistics"][kind] for key in ids} for kind in kinds}
    )


def _check_same(a: Evaluation, b: Evaluation) -> None:
    fix = "compare evaluations of the same data, split and limit"
    if a.result["task"] != b.result["task"]:
        raise DataError(f"task: {a.file} has '{a.result['task']}', {b.file} has '{b.result['task']}'; {fix}")
    for first, second in ((a, b), (b, a)):
        alone = [key for key in first.rows if key not in second.rows]
        if alone:
            raise DataError(
                f"id: {len(alone)} of {len(first.rows)} samples of {first.file} are not in {second.file}, first "
                f"{alone[0]!r}; {fix}"
            )
    if not a.rows:
        raise DataError(f"{a.file}: predictions are empty; expected at least one sample")
    for key, row in a.rows.items():
        for field in ("question", "references"):
            if row.get(field) != b.rows[key].get(field):
                raise DataError(
                    f"{field}: of sample {key!r} {a.file} has {row.get(field)!r}, {b.file} has "
                    f"{b.rows[key].get(field)!r}; {fix}"
                )


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: [a.get(key), b.get(key)] for key in {**a, **b} if a.get(key) != b.get(key)}


def _json_of(file: Path) -> dict[str, Any]:
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; expected {_EXPECTED}") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); expected {_EXPECTED}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file}: got {type(values).__name__}, expected {_EXPECTED}")
    return values
