"""One self-contained HTML page about a run: images with what the model says of them, scores, loss, recipe."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from frozenprefix.version import __version__
from frozenprefix.data.images import load_image
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.evaluation.metrics.vqa import normalize_vqa_answer
from frozenprefix.interpret.loss_curve import loss_curve
from frozenprefix.interpret.markup import escape, foreign, number

_LONG_SIDE = 224
_MOST_QUESTIONS = 12
_TASKS = {"caption": "Captions", "vqa": "Answers to questions"}

Row = Mapping[str, Any]


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Any],
    predictions: Sequence[Row],
    log: Sequence[dict[str, Any]],
    recipe_yaml: str,
    max_images: int = 48,
) -> Path:
    """Write a page that needs no other file and no network. The same arguments give the same bytes.

    Args:
        path: the HTML file; its folder is made when it is not there.
        results: what `evaluation.evaluate_samples` returns, or several of them by task.
        predictions: rows of the predictions file, of all tasks together: `id`, `images`, `question` (None for a
            caption), `references`, `model`, and `blind` and `shuffled` if there are any.
        log: rows of `training.tracking.read_log`.
        max_images: images on the page, taken at even distances from all.

    Returns:
        The path.

    Raises:
        DataError: for results without metrics, or a prediction without one of its keys.
    """
    if max_images < 1:
        raise DataError(f"max_images must be ≥ 1, got {max_images}")
    images = _by_images(predictions)
    count = min(max_images, len(images))
    chosen = [list(images)[i * len(images) // count] for i in range(count)]
    spread = ", at even distances" if len(chosen) < len(images) else ""
    template = Template(files("frozenprefix.interpret").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=escape(f"Written by frozenprefix {__version__}."),
        scores="\n".join(_scores(task, result) for task, result in _by_task(results).items()),
        curve=loss_curve(log),
        shown=f"{len(chosen)} of {len(images)} evaluated images{spread}.",
        images="\n".join(_article(key, images[key]) for key in chosen),
        recipe=escape(recipe_yaml),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


# ── scores ──


def _by_task(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    by_task = {str(results.get("task", "")): results} if "metrics" in results else dict(results)
    for task, result in by_task.items():
        if not isinstance(result, Mapping) or not isinstance(result.get("metrics"), Mapping):
            raise DataError(
                f"results[{task!r}] has no 'metrics'; expected the result of evaluate_samples, or several by task"
            )
    return by_task


def _scores(task: str, result: Mapping[str, Any]) -> str:
    columns = {"model": result["metrics"], **result.get("baselines", {})}
    groups = result.get("groups") or {}
    rows = [_score_row(name, [scores.get(name) for scores in columns.values()]) for name in result["metrics"]]
    for metric, types in groups.get("model", {}).items():
        rows.append(f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(_title(metric))}</th></tr>')
        for kind in types:
            rows.append(_score_row(kind, [groups.get(name, {}).get(metric, {}).get(kind) for name in columns]))
    count = f" (n = {number(result['n'])})" if "n" in result else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("metric", *columns))
    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<caption>{escape(_TASKS.get(task, task or 'Evaluation'))}{count}</caption>",
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
        ]
    )


def _score_row(name: str, values: Sequence[Any]) -> str:
    cells = "".join(f"<td>{number(value)}</td>" for value in values)
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


# ── images ──


def _by_images(predictions: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    images: dict[tuple[str, ...], list[Row]] = {}
    for place, row in enumerate(predictions):
        missing = [key for key in ("images", "references", "model") if key not in row]
        if missing:
            raise DataError(f"predictions[{place}] has no {missing[0]!r}; expected rows of a predictions file")
        images.setdefault(tuple(map(str, row["images"])), []).append(row)
    return images


def _article(images: tuple[str, ...], rows: Sequence[Row]) -> str:
    captions = [row for row in rows if row.get("question") is None]
    questions = [row for row in rows if row.get("question") is not None]
    truth = next((str(text) for row in captions for text in row["references"]), "")
    shown = [*captions, *questions[:_MOST_QUESTIONS]]
    left_out = len(captions) + len(questions) - len(shown)
    return "\n".join(
        [
            "<article>",
            f"<h3>{escape(', '.join(Path(image).name for image in images))}</h3>",
            *(_image(image, truth) for image in images),
            '<ul class="answers">',
            *(_entry(row) for row in shown),
            *([f"<li><small>and {left_out} more</small></li>"] if left_out else []),
            "</ul>",
            "</article>",
        ]
    )


def _entry(row: Row) -> str:
    """What the model says of an image, the truth, and beneath it what it says without the image or of another."""
    asked, references = row.get("question"), [str(text) for text in row["references"]]
    style, mark = _verdict(row)
    label = "Caption" if asked is None else foreign(str(asked))
    truth = " / ".join(foreign(text) for text in references) or "<em>(not known)</em>"
    baselines = [f"{name}: {foreign(str(row[name]))}" for name in ("blind", "shuffled") if row.get(name) is not None]
    return "\n".join(
        [
            f'<li class="{style}">{label} <strong>{foreign(str(row["model"]))}</strong>',
            f'<span class="mark">{mark}</span>',
            f"<small>truth: {truth}</small>",
            *(f"<small>{line}</small>" for line in baselines),
            "</li>",
        ]
    )


def _verdict(row: Row) -> tuple[str, str]:
    """Answers are right or wrong, compared as VQA accuracy does; other words for a caption need not be wrong."""
    if not row["references"]:
        return "open", ""
    said = normalize_vqa_answer(str(row["model"]))
    same = said in {normalize_vqa_answer(str(text)) for text in row["references"]}
    if row.get("question") is not None:
        return ("right", "✓ right") if same else ("wrong", "✗ wrong")
    return ("right", "✓ same words") if same else ("open", "≠ other words")


def _image(path: str, truth: str) -> str:
    """An `img` with its data inside; an image that has gone since is named in its place."""
    try:
        image = load_image(path)
    except BadImageError as error:
        return f'<p class="missing">This image cannot be shown: {escape(error.reason)}.</p>'
    alt = f"Image {Path(path).name}" + (f": {truth}" if truth else "")
    # Small drawings are embedded as they are, and scaled up by the browser without smoothing.
    scale = max(1, _LONG_SIDE // max(image.size))
    style = ' class="crisp"' if scale > 1 else ""
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    size = f'width="{image.width * scale}" height="{image.height * scale}"'
    return f'<img src="{_data_uri(image)}" alt="{escape(alt)}" {size}{style}>'


def _data_uri(image: Image.Image) -> str:
    """PNG for drawings, which have few colours, JPEG for photos."""
    drawing = max(image.size) <= _LONG_SIDE // 2 or image.getcolors(64) is not None
    buffer = io.BytesIO()
    if drawing:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80, optimize=True)
    kind = "png" if drawing else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _title(metric: str) -> str:
    """What a group's figures are: "accuracy by question type", unless the name itself says by what."""
    return metric.replace("_", " ") if "_by_" in metric else f"{metric} by question type"
