"""The parts of a model card: its head for the Hub, tables, and lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from frozenprefix.assets import is_hub_id, origin_of_reference
from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.evaluation import Evaluation
from frozenprefix.utils import file_sha256
from frozenprefix.version import __version__

_TASKS = {"caption": "image-to-text", "vqa": "visual-question-answering", "classification": "image-classification"}
_UNKNOWN = "not known to frozenprefix; see its source"
_OF_SOURCE = ("type", "path", "split", "name")  # what a card says of a source of data


# ── the head ──


def card_data(
    recipe: BaseRecipe, config: Mapping[str, Any], evaluations: Sequence[Evaluation], licence: str | None
) -> ModelCardData:
    """What the Hub reads: library, task, base models, data sets, and every score in `model-index`."""
    results = [result for evaluation in evaluations for result in eval_results(evaluation.result)]
    return ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=_base_models(config) or None,
        datasets=_hub_datasets(recipe) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=recipe.name if results else None,
        eval_results=results or None,
        tags=["frozenprefix", "image-captioning", "prefix-embeddings"],
    )


def eval_results(result: Mapping[str, Any]) -> list[EvalResult]:
    """One entry per metric of an evaluation, with its interval and the same metric of the baselines.

    Example:
        >>> result = {"task": "caption", "metrics": {"cider_d": 0.4}, "intervals": {"cider_d": [0.3, 0.5]}, "n": 2}
        >>> entry = eval_results({**result, "baselines": {"blind": {"cider_d": 0.0}}})[0]
        >>> entry.metric_value, entry.metric_args
        (0.4, {'baseline_blind': 0.0, 'interval_95': [0.3, 0.5]})
    """
    intervals, source = result.get("intervals") or {}, result.get("source") or {}
    entries = []
    for metric, value in result["metrics"].items():
        if not isinstance(value, int | float):
            continue
        baselines = (result.get("baselines") or {}).items()
        arguments: dict[str, Any] = {f"baseline_{name}": found[metric] for name, found in baselines if metric in found}
        if intervals.get(metric):
            arguments["interval_95"] = list(intervals[metric])
        entries.append(
            EvalResult(
                task_type=_TASKS.get(result["task"], result["task"]),
                dataset_type="custom",
                dataset_name=_data_name(source),
                dataset_split=source.get("split") or "validation",
                dataset_args={"samples": result.get("n")},
                metric_type=metric,
                metric_name=metric,
                metric_value=value,
                metric_args=arguments,
                source_name=f"frozenprefix {source.get('frozenprefix', __version__)}, evaluate",
                source_url="https://pypi.org/project/frozenprefix",
            )
        )
    return entries


def _data_name(source: Mapping[str, Any]) -> str:
    return Path(source["data"]).name if source.get("data") else "validation data of the recipe"


def _base_models(config: Mapping[str, Any]) -> list[str]:
    """Hub ids of the frozen parts, or of the same weights elsewhere."""
    found = []
    for part in frozen_parts(config).values():
        reference = _reference(part)
        origin = origin_of_reference(reference)
        if origin is not None and origin.hub_id is not None:
            found.append(origin.hub_id)
        elif part.get("revision") and is_hub_id(reference):
            found.append(reference)
    return found


def _hub_datasets(recipe: BaseRecipe) -> list[str]:
    paths = [str(source.get("path", "")) for source in recipe.data.train if source.get("type") == "hf_dataset"]
    return sorted({path for path in paths if "/" in path and is_hub_id(path)})


# ── tables and lines ──


def frozen_parts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Identities of the frozen parts by name; a checkpoint with copies of them keeps those of the originals.

    Example:
        >>> identity, origin = {"language_model": {"path": "copy"}}, {"language_model": {"path": "gpt2"}}
        >>> frozen_parts({"identity": identity, "origin": origin})
        {'language_model': {'path': 'gpt2'}}
    """
    return {**(config.get("identity") or {}), **(config.get("origin") or {})}


def _reference(part: Mapping[str, Any]) -> str:
    """What names a part's weights: a path, a tag, a Hub id."""
    return str(part.get("path") or part.get("weights") or part.get("name") or "")


def part_rows(config: Mapping[str, Any], weights: Path, licence: str | None) -> list[dict[str, str]]:
    """Name, weights, identity and licence of every part.

    Args:
        weights: file of what was trained; licence: of it.
    """
    rows = []
    for name, part in frozen_parts(config).items():
        reference = _reference(part)
        label = f"{part['name']}, " if part.get("name") not in (None, reference) else ""
        kind = next((key for key in ("revision", "sha256") if part.get(key)), None)
        rows.append(
            {
                "name": f"{name.replace('_', ' ')}, frozen",
                "weights": f"{label}`{reference}`",
                "identity": f"{kind} `{part[kind]}`" if kind else str(part.get("architecture", "not known")),
                "licence": _licence_of(part),
            }
        )
    identity = f"sha256 `{file_sha256(weights)}`" if weights.is_file() else "not known"
    trained = {"name": "mapper and what else was trained", "weights": f"`{weights.name}`", "identity": identity}
    return [*rows, {**trained, "licence": licence or "not stated"}]


def _licence_of(part: Mapping[str, Any]) -> str:
    origin = origin_of_reference(_reference(part))
    if origin is not None:
        return origin.licence
    if str(part.get("weights", "")).startswith("random"):
        return "none: random weights"
    if part.get("source") == "timm" and part.get("weights") == "pretrained":
        import timm

        return str(getattr(timm.get_pretrained_cfg(str(part.get("name"))), "license", None) or _UNKNOWN)
    return _UNKNOWN


def score_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """A task's scores as a table in Markdown: the model with its interval, beside its baselines."""
    baselines, intervals = result.get("baselines") or {}, result.get("intervals") or {}
    source, settings = result.get("source") or {}, result.get("settings") or {}
    rows = []
    for metric, value in result["metrics"].items():
        low, high = intervals.get(metric) or (None, None)
        interval = "–" if low is None else f"{number(low)} to {number(high)}"
        rows.append([metric, f"**{number(value)}**", interval, *(number(b.get(metric)) for b in baselines.values())])
    said = [f"{key} {value}" for key, value in settings.items() if isinstance(value, int | float)]
    said += [f"precision {source['precision']}"] if source.get("precision") else []
    data = _data_name(source)
    return {
        "task": result["task"],
        "n": result.get("n"),
        "data": f"`{data}`" if source.get("data") else f"the {data}",
        "settings": ", ".join(said),
        "rows": table(["metric", "model", "95 % interval", *baselines], rows),
    }


def number(value: Any) -> str:
    """A score in a table: three decimals, counts without decimals, a dash for None."""
    if not isinstance(value, int | float):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def example_table(examples: Sequence[Mapping[str, str]]) -> str:
    """Images, questions if there are any, what the model wrote, and a reference, as a table in Markdown."""
    keys = [key for key in ("question", "model", "reference") if key != "question" or any(e[key] for e in examples)]
    rows = [[f"![]({example['image']})", *(plain(example[key]) for key in keys)] for example in examples]
    return table(["image", *keys], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> table(["a", "b"], [["1", "2"]]).splitlines()
        ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def plain(text: str) -> str:
    r"""A text in one line, in which Markdown and HTML read nothing but text.

    Example:
        >>> print(plain("a *red*\n| dog"))
        a \*red\* \| dog
    """
    one_line = " ".join(text.split())
    return "".join("\\" + char if char in "\\|`*_<>[]#~" else char for char in one_line) or "–"


def training_lines(recipe: BaseRecipe, progress: Mapping[str, Any]) -> list[str]:
    """What was read, and how long."""
    lines = []
    for source in recipe.data.train:
        values = {key: source[key] for key in _OF_SOURCE if source.get(key) is not None}
        lines.append("data: " + ", ".join(f"{key} `{value}`" for key, value in values.items()))
        origin = origin_of_reference(str(values.get("path", "")))
        lines[-1] += f" (licence {origin.licence})" if origin is not None else ""
    if "step" in progress:
        line = f"{progress['step']} steps"
        line += f", {progress['targets_seen']:,} target texts" if "targets_seen" in progress else ""
        line += f", {progress['seconds'] / 60:.1f} minutes" if "seconds" in progress else ""
        lines.append(line)
    return lines


def commands(recipe: BaseRecipe, evaluations: Sequence[Evaluation]) -> list[str]:
    """Command lines that install this release, train by the recipe, and evaluate again."""
    folder = Path(recipe.output_dir)
    lines = [
        f"pip install frozenprefix=={__version__}",
        "# recipe.yaml is the recipe above, and lies in this repository; put the data where it says",
        "frozenprefix train recipe.yaml",
    ]
    for result in [evaluation.result for evaluation in evaluations] or [{"task": "caption"}]:
        source = result.get("source") or {}
        given = {"--data": source.get("data"), "--split": source.get("split"), "--limit": source.get("limit")}
        options = "".join(f" {key} {value}" for key, value in given.items() if value is not None)
        lines.append(f"frozenprefix evaluate {folder / 'best'} --task {result['task']}{options} --out scores.json")
    return lines
