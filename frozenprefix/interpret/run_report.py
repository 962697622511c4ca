"""The report of runs: curves, captions over time beside their images, best and worst captions, cost, recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from frozenprefix.config import read_yaml
from frozenprefix.errors import DataError
from frozenprefix.evaluation import Evaluation
from frozenprefix.interpret.card import results_in
from frozenprefix.interpret.curves import best_of, charts_of, draw
from frozenprefix.interpret.report import data_uri, embedded_image, page_template, score_table_of, verdict
from frozenprefix.training.tracking import read_log
from frozenprefix.utils import parse_json, read_text, write_text_atomic
from frozenprefix.version import __version__

_STAGES = 6  # of the captions of an image, evenly spaced
_EXTREMES = 6  # best captions, and as many worst ones
_UNTOLD = ("output_dir", "name")  # keys of recipes that differ in any case


@dataclass(frozen=True)
class RunLog:
    """What a run's folder tells.

    Attributes:
        name: for the page; log: rows of its log.jsonl.
        recipe: the resolved recipe as nested dicts, and yaml, its text; empty before the first checkpoint.
        minutes: of training, for logs that do not tell.
        evaluations: results of `frozenprefix evaluate` in the folder.

    Example:
        >>> RunLog("a", [{"step": 1, "loss": 2.0}]).evaluations
        ()
    """

    name: str
    log: Sequence[dict[str, Any]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    yaml: str = ""
    minutes: float | None = None
    evaluations: Sequence[Evaluation] = ()


def read_runs(folders: Sequence[str | Path]) -> list[RunLog]:
    """Read output folders of runs; they may still be training.

    Raises:
        TrainingError: a folder has no log.
        DataError: a folder is named twice, or a result in it is damaged.

    Example:
        >>> read_runs([tmp_path])
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: ...log.jsonl: no such log; is '...' the output folder of a run?
    """
    paths = [_run_folder(Path(folder)) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError("RUN: got the same run twice; name each once")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _run_folder(folder: Path) -> Path:
    """The folder of a run; its best/ and last/ name it, too."""
    return folder.parent if not (folder / "log.jsonl").is_file() and (folder.parent / "log.jsonl").is_file() else folder


def _read(folder: Path, name: str) -> RunLog:
    log = read_log(folder)
    checkpoint = next((folder / part for part in ("best", "last") if (folder / part / "recipe.yaml").is_file()), None)
    if checkpoint is None:
        return RunLog(name, log)
    text = read_text(checkpoint / "recipe.yaml")
    state = folder / "last" / "training_state.json"
    minutes = parse_json(read_text(state))["seconds"] / 60 if state.is_file() else None
    evaluations = [Evaluation.load(file) for file in results_in(folder, checkpoint)]
    return RunLog(name, log, read_yaml(text, str(checkpoint / "recipe.yaml")), text, minutes, evaluations)


def write_run_report(path: str | Path, runs: Sequence[RunLog], *, title: str = "", images: int = 8) -> Path:
    """Write a page about runs that needs no other file and no network. The same arguments give the same bytes.

    Args:
        images: most images whose captions over time are shown.

    Raises:
        DataError: without runs.

    Example:
        >>> page = write_run_report(tmp_path / "page.html", [RunLog("a", [{"step": 1, "loss": 3.0}])])
        >>> "Runs: a" in page.read_text(encoding="utf-8")
        True
    """
    if not runs:
        raise DataError("RUN: got none, expected the output folder of a run")
    charts = [(chart, data_uri(draw(chart), "svg+xml")) for chart in charts_of({run.name: run.log for run in runs})]
    page = page_template("run_report.html").render(
        title=title or "Runs: " + ", ".join(run.name for run in runs),
        version=__version__,
        runs=[_summary(run) for run in runs],
        charts=[{"src": src, "alt": chart.description()} for chart, src in charts],
        stories=captions_over_time(runs, images),
        tables=[
            {**score_table_of(evaluation.result["task"], evaluation.result), "run": run.name}
            for run in runs
            for evaluation in run.evaluations
        ],
        extremes=[extremes for run in runs for extremes in _extremes(run)],
        differences=differences(runs),
        names=[run.name for run in runs],
        recipes=[(run.name, run.yaml) for run in runs if run.yaml],
    )
    write_text_atomic(path, page)
    return Path(path)


# ── the table at the top ──


def _summary(run: RunLog) -> dict[str, Any]:
    """What a run cost, and how well it did."""
    rows, best = run.log, best_of(run.log)
    cider = [row["validation/cider_d"] for row in rows if isinstance(row.get("validation/cider_d"), int | float)]
    return {
        "name": run.name,
        "steps": rows[-1]["step"] if rows else 0,
        "minutes": _last(rows, "seconds", 1 / 60) or run.minutes,
        "targets_per_s": _middle(rows, "targets_per_s"),
        "memory_gb": _last(rows, "memory_gb"),
        "waiting": _middle(rows, "data_wait_share"),
        "best": None if best is None else best[1],
        "best_step": None if best is None else best[0],
        "shuffled": _at(rows, best[0], "validation/shuffled_loss") if best else None,
        "cider_d": max(cider, default=None),
    }


def _last(rows: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return values[-1] * scale if values else None


def _middle(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return median(values) if values else None


def _at(rows: Sequence[dict[str, Any]], step: int, name: str) -> float | None:
    return next((row[name] for row in rows if row["step"] == step and name in row), None)


# ── captions over time ──


def captions_over_time(runs: Sequence[RunLog], most: int) -> list[dict[str, Any]]:
    """Images with the captions that the runs logged of them: at most six steps of each run, the first, the last
    and that of the best validation loss among them, which is marked by True.

    Example:
        >>> row = {"step": 5, "validation/captions": ["a dog"], "validation/caption_images": [str(image_path)]}
        >>> captions_over_time([RunLog("a", [row])], 8)[0]["runs"]
        [('a', [(5, 'a dog', False)])]
    """
    told: dict[str, dict[str, list[tuple[int, str, bool]]]] = {}
    for run in runs:
        rows = [row for row in run.log if row.get("validation/caption_images")]
        best = best_of(rows)
        kept = next((row for row in rows if best is not None and row["step"] == best[0]), None)
        for row in _spaced(rows, _STAGES, kept):
            for image, text in zip(row["validation/caption_images"], row["validation/captions"], strict=False):
                told.setdefault(str(image), {}).setdefault(run.name, []).append((row["step"], str(text), row is kept))
    truths = _references(runs)
    return [
        {
            "title": Path(image).name,
            "image": embedded_image(image, (truths.get(image) or [""])[0]),
            "runs": list(texts.items()),
            "truth": truths.get(image, []),
        }
        for image, texts in list(told.items())[:most]
    ]


def _spaced(rows: Sequence[Any], most: int, kept: Any) -> list[Any]:
    """At most so many rows, evenly spaced, the first, the last and the kept one among them."""
    if len(rows) <= most:
        return list(rows)
    spaced = [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]
    if kept is None or any(row is kept for row in spaced):
        return spaced
    nearest = min(range(1, most - 1), key=lambda place: abs(spaced[place]["step"] - kept["step"]))
    return [*spaced[:nearest], kept, *spaced[nearest + 1 :]]


def _references(runs: Sequence[RunLog]) -> dict[str, list[str]]:
    """Image → its captions, as far as evaluations in the folders tell."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            for row in evaluation.rows.values():
                if len(row.get("images", ())) == 1 and row.get("question") is None:
                    found[str(row["images"][0])] = [str(text) for text in row.get("references", ())]
    return found


# ── best and worst ──


def _extremes(run: RunLog) -> list[dict[str, Any]]:
    """The captions with the highest and the lowest CIDEr-D of each evaluation."""
    found = []
    for evaluation in run.evaluations:
        scored = [
            (row["scores"]["model"]["cider_d"], row)
            for row in evaluation.rows.values()
            if "cider_d" in ((row.get("scores") or {}).get("model") or {})
        ]
        if not scored:
            continue
        scored.sort(key=lambda pair: -pair[0])
        count = min(_EXTREMES, len(scored) // 2) or 1
        parts = {"Best": scored[:count], "Worst": scored[count:][-count:][::-1]}
        for name, pairs in parts.items():
            if pairs:
                found.append({"run": run.name, "name": name, "of": len(scored), "cards": [_card(*p) for p in pairs]})
    return found


def _card(score: float, row: Mapping[str, Any]) -> dict[str, Any]:
    truth = next(iter(row.get("references") or [""]))
    return {
        "score": score,
        "images": [embedded_image(image, str(truth)) for image in row["images"]],
        "row": row,
        "verdict": verdict(row),
    }


# ── recipes ──


def differences(runs: Sequence[RunLog]) -> list[tuple[str, list[Any]]]:
    """Keys of the resolved recipes whose values differ, with the value of each run; "–" where a key is not there.

    Example:
        >>> one, two = (RunLog(name, [], {"seed": 0, "training": {"epochs": count}}) for name, count in ("a1", "b2"))
        >>> differences([one, two])
        [('training.epochs', ['1', '2'])]
    """
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    missing = "–"
    rows = [(key, [values.get(key, missing) for values in flat]) for key in keys if key not in _UNTOLD]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        parts = [_flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        parts = [_flat(item, f"{key}.{number}") for number, item in enumerate(value)]
    else:
        return {key: value}
    return {name: item for part in parts for name, item in part.items()}
