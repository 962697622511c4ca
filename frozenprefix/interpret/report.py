"""One self-contained HTML page about a run: scores, loss, images with the model's texts, recipe."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from PIL import Image, ImageDraw

from frozenprefix.data.boxes import boxes_in, is_box
from frozenprefix.data.images import load_image
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.evaluation.metrics.vqa import comparable_answer
from frozenprefix.interpret.loss_curve import CURVES, describe_loss, draw_loss
from frozenprefix.utils import write_text_atomic
from frozenprefix.version import __version__

_LONG_SIDE = 224
_MAX_QUESTIONS = 12
_TRUE, _WRITTEN = (20, 150, 60), (240, 120, 0)  # colours of boxes
_TASK_TITLES = {"caption": "Captions", "vqa": "Answers to questions"}
# Not allowed in HTML: control characters, and halves of surrogate pairs, which cannot be written as UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

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
        path: the HTML file; its folder is created if needed.
        results: the result of `evaluation.evaluate_samples`, or several of them by task.
        predictions: rows of the predictions file, of all tasks together: `id`, `images`, `question` (None for a
            caption), `references`, `model`, and optionally `blind` and `shuffled`.
        log: rows of `training.tracking.read_log`.
        max_images: number of images on the page, evenly spaced over all evaluated images.

    Returns:
        The path.

    Raises:
        DataError: for results without metrics, or a prediction that lacks a key.

    Example:
        >>> row = {"images": [image_path], "question": None, "references": ["a red circle"], "model": "a circle"}
        >>> results = {"task": "caption", "metrics": {"cider_d": 0.5}, "n": 1}
        >>> page = write_report(
        ...     tmp_path / "report.html", title="A run", results=results, predictions=[row], log=[], recipe_yaml=""
        ... )
        >>> "a red circle" in page.read_text(encoding="utf-8")
        True
    """
    if max_images < 1:
        raise DataError(f"max_images must be ≥ 1, got {max_images}")
    images = _rows_by_images(predictions)
    count = min(max_images, len(images))
    keys = [list(images)[i * len(images) // count] for i in range(count)]
    page = page_template("report.html").render(
        title=title,
        version=__version__,
        tables=[score_table_of(task, result) for task, result in _results_by_task(results).items()],
        loss_description=describe_loss(log),
        loss_chart=data_uri(draw_loss(log), "svg+xml") if describe_loss(log) else "",
        validation_labels=[CURVES[name][0] for name in _VALIDATION],
        validation_rows=[
            (row["step"], [row.get(name) for name in _VALIDATION]) for row in log if any(n in row for n in _VALIDATION)
        ],
        cards=[_card(key, images[key]) for key in keys],
        total=len(images),
        recipe=recipe_yaml,
    )
    write_text_atomic(path, page)
    return Path(path)


def page_template(name: str) -> Template:
    """A template of this package, with every value escaped.

    Example:
        >>> page_template("samples.html").render(title="<b>", cards=[]).count("<b>")
        0
    """
    environment = Environment(
        loader=PackageLoader("frozenprefix.interpret", ""),
        autoescape=True,
        finalize=_without_forbidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template(name)


def _without_forbidden(value: Any) -> Any:
    """Applied to every value before it is escaped; `Markup` is the output of the template's own macros."""
    return _FORBIDDEN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: Any, decimals: int = 3) -> str:
    """A score in a table: three decimals by default, counts without decimals, a dash for None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    whole = isinstance(value, int) or (abs(value) > 1 and value.is_integer())
    return f"{value:.0f}" if whole else f"{value:.{decimals}f}"


# ── scores ──

_VALIDATION = [name for name in CURVES if name.startswith("validation/")]


def _results_by_task(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    by_task = {str(results.get("task", "")): results} if "metrics" in results else dict(results)
    for task, result in by_task.items():
        if not isinstance(result, Mapping) or not isinstance(result.get("metrics"), Mapping):
            raise DataError(
                f"results[{task!r}] has no 'metrics'; expected the result of evaluate_samples, or several by task"
            )
    return by_task


def score_table_of(task: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A task's scores as rows: the model beside its baselines, then the same by question type."""
    columns = {"model": result["metrics"], **result.get("baselines", {})}
    groups = result.get("groups") or {}
    sections = []
    for metric, types in groups.get("model", {}).items():
        rows = {kind: [groups.get(name, {}).get(metric, {}).get(kind) for name in columns] for kind in types}
        title = metric.replace("_", " ") if "_by_" in metric else f"{metric} by question type"
        sections.append((title, rows))
    return {
        "title": _TASK_TITLES.get(task, task or "Evaluation"),
        "n": result.get("n"),
        "columns": list(columns),
        "rows": {name: [scores.get(name) for scores in columns.values()] for name in result["metrics"]},
        "sections": sections,
    }


# ── images ──


def _rows_by_images(predictions: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    images: dict[tuple[str, ...], list[Row]] = {}
    for place, row in enumerate(predictions):
        missing = [key for key in ("images", "references", "model") if key not in row]
        if missing:
            raise DataError(f"predictions[{place}] has no {missing[0]!r}; expected rows of a predictions file")
        images.setdefault(tuple(map(str, row["images"])), []).append(row)
    return images


def _card(paths: tuple[str, ...], rows: Sequence[Row]) -> dict[str, Any]:
    captions = [row for row in rows if row.get("question") is None]
    questions = [row for row in rows if row.get("question") is not None]
    truth = next((str(text) for row in captions for text in row["references"]), "")
    return {
        "title": ", ".join(Path(path).name for path in paths),
        "images": [embedded_image(path, truth, **_boxes(rows)) for path in paths],
        "entries": [(row, verdict(row)) for row in [*captions, *questions[:_MAX_QUESTIONS]]],
        "left_out": max(0, len(questions) - _MAX_QUESTIONS),
    }


def _boxes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Texts of references and of the model that are boxes, of the rows that the page shows."""
    asked = [row for row in rows if row["references"] and is_box(str(row["references"][0]))][:_MAX_QUESTIONS]
    return {
        "boxes": [str(row["references"][0]) for row in asked],
        "written_boxes": [str(row["model"]) for row in asked],
    }


def verdict(row: Row) -> tuple[str, str]:
    """CSS class and mark. Answers are compared as VQA accuracy does; a caption in other words need not be wrong."""
    if not row["references"]:
        return "open", ""
    same = comparable_answer(str(row["model"])) in {comparable_answer(str(text)) for text in row["references"]}
    if row.get("question") is not None:
        return ("right", "✓ right") if same else ("wrong", "✗ wrong")
    return ("right", "✓ same words") if same else ("open", "≠ other words")


def embedded_image(
    path: str | Path | Image.Image, truth: str, *, boxes: Sequence[str] = (), written_boxes: Sequence[str] = ()
) -> dict[str, Any]:
    """Attributes of an `img` with its data inside, or the reason why the image cannot be shown.

    Args:
        path: of the image, or the image itself.
        boxes, written_boxes: texts of which those that are boxes are drawn; see `with_boxes`.

    Example:
        >>> embedded_image(image_path, "a red circle")["alt"]
        'Image red_circle.png: a red circle'
    """
    name = "" if isinstance(path, Image.Image) else f" {Path(path).name}"
    try:
        image = path.copy() if isinstance(path, Image.Image) else load_image(path)
    except BadImageError as error:
        return {"problem": error.reason}
    # Small drawings are embedded as they are, and scaled up by the browser without smoothing.
    scale = max(1, _LONG_SIDE // max(image.size))
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    if any(map(is_box, (*boxes, *written_boxes))):
        image = with_boxes(image, boxes, written_boxes)
    return {
        "src": image_uri(image),
        "alt": f"Image{name}" + (f": {truth}" if truth else ""),
        "width": image.width * scale,
        "height": image.height * scale,
        "crisp": scale > 1,
    }


def with_boxes(image: Image.Image, true: Sequence[str], written: Sequence[str]) -> Image.Image:
    """A copy of an image with the boxes that texts are: true ones in green, those of the model in orange.

    Example:
        >>> with_boxes(image, ["10 10 90 90"], ["20 20 80 80"]).size == image.size
        True
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 112))
    for texts, colour in ((true, _TRUE), (written, _WRITTEN)):
        for left, top, right, bottom in (box for text in texts if is_box(text) for box in boxes_in(text)):
            corners = (left * image.width, top * image.height, right * image.width - 1, bottom * image.height - 1)
            draw.rectangle(corners, outline=colour, width=width)
    return image


def image_uri(image: Image.Image) -> str:
    """The `src` of an `img` with its data inside: PNG for drawings, which have few colours, JPEG for photos.

    Example:
        >>> image_uri(image)[:22]
        'data:image/png;base64,'
    """
    drawing = max(image.size) <= _LONG_SIDE // 2 or image.getcolors(64) is not None
    buffer = io.BytesIO()
    if drawing:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80, optimize=True)
    return data_uri(buffer.getvalue(), "png" if drawing else "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
