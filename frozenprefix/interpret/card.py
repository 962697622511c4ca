"""A model card: what a checkpoint is made of, how it was trained, how well it does, and how to get it again.

The head of the card is YAML for the Hub, with every score in `model-index`; the rest, `card.md`, is read by people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from frozenprefix.config import load_recipe
from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.errors import CheckpointError
from frozenprefix.evaluation import Evaluation
from frozenprefix.interpret import card_parts
from frozenprefix.training.tracking import LOG_FILE, read_log
from frozenprefix.utils import atomic_folder, parse_json, read_text, write_text_atomic
from frozenprefix.utils.images import load_image
from frozenprefix.version import __version__

CARD = "README.md"
EXAMPLES = "examples"
_MARK = "card of frozenprefix"
PROGRESS = ("step", "seconds", "targets_seen", "best_step")
_SIDE = 320  # longest side of an example, in pixels


@dataclass(frozen=True)
class Run:
    """What a card tells about.

    Attributes:
        checkpoint: folder of the checkpoint; config: its config.json.
        recipe: that it was trained by, and recipe_yaml, its text.
        progress: `step`, `seconds`, `targets_seen`, `best_step` of the training, as far as the run's folder tells.
        evaluations: results of `frozenprefix evaluate` with their predictions.

    Example:
        >>> Run(tmp_path, {}, recipe, "").evaluations
        ()
    """

    checkpoint: Path
    config: Mapping[str, Any]
    recipe: BaseRecipe
    recipe_yaml: str
    progress: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()


def read_run(run: str | Path, scores: Sequence[str | Path] = ()) -> Run:
    """Read the output folder of a run, or a checkpoint folder.

    Args:
        scores: results of `frozenprefix evaluate --out`; those in the folder when empty.

    Raises:
        CheckpointError: the folder holds no checkpoint, or its recipe is missing.
        DataError: for a result that is none, or whose predictions are missing.

    Example:
        >>> read_run(tmp_path)
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: card: '...' holds no checkpoint; expected the output folder of a run...
    """
    run = Path(run)
    found = [folder for folder in (run / "best", run / "last", run) if (folder / "config.json").is_file()]
    if not found:
        raise CheckpointError(
            f"card: '{run}' holds no checkpoint; expected the output folder of a run, with best/, or a checkpoint"
        )
    checkpoint = found[0]
    recipe_file = checkpoint / "recipe.yaml"
    if not recipe_file.is_file():
        raise CheckpointError(f"card: '{checkpoint}' holds no recipe.yaml; a card tells how the checkpoint was trained")
    files = [Path(file) for file in scores] or results_in(run, checkpoint)
    return Run(
        checkpoint=checkpoint,
        config=parse_json(read_text(checkpoint / "config.json")),
        recipe=load_recipe(recipe_file),
        recipe_yaml=read_text(recipe_file),
        progress=_progress(run, checkpoint),
        evaluations=[Evaluation.load(file) for file in files],
    )


def write_card(
    run: Run, *, out: Path | None = None, licence: str | None = None, images: int = 6, force: bool = False
) -> Path:
    """Write the card of a run, and small copies of some evaluated images beside it.

    Args:
        out: folder for README.md and examples/; the checkpoint's when None, where the Hub looks for it.
        licence: of the trained weights, as the Hub names it.
        images: number of images with captions, evenly spaced over the evaluated ones; 0 for none.
        force: replace a README.md that is no card of frozenprefix.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: another README.md is in the way.

    Example:
        >>> from frozenprefix.utils import parse_json, read_text
        >>> run = Run(checkpoint, parse_json(read_text(checkpoint / "config.json")), recipe, "name: tiny")
        >>> write_card(run, out=tmp_path, licence="mit").name
        'README.md'
    """
    folder = run.checkpoint if out is None else Path(out)
    path = folder / CARD
    if path.is_file() and not force and _MARK not in read_text(path):
        raise CheckpointError(f"card: '{path}' was not written by this command; give --force to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    examples = _write_examples(run, folder, images)
    card = ModelCard.from_template(
        card_data=card_parts.card_data(run.recipe, run.config, run.evaluations, licence),
        template_path=str(Path(__file__).with_name("card.md")),
        name=run.recipe.name,
        mapper=run.config.get("mapper") or {"type": "none", "prefix_length": 0},
        is_whole=bool(run.config.get("origin")),
        has_code=bool(run.config.get("auto_map")),
        prompt=getattr(run.recipe.data, "prompts", {}).get("caption", ""),
        parts=card_parts.part_rows(run.config, run.checkpoint / "model.safetensors", licence),
        scores=[card_parts.score_table(evaluation.result) for evaluation in run.evaluations],
        examples=card_parts.example_table(examples) if examples else "",
        training=card_parts.training_lines(run.recipe, run.progress),
        recipe=run.recipe_yaml.rstrip(),
        commands=card_parts.commands(run.recipe, run.evaluations),
        mark=_MARK,
        version=__version__,
    )
    write_text_atomic(path, card.content.rstrip() + "\n")
    return path


def results_in(run: Path, checkpoint: Path) -> list[Path]:
    """Files in the run's folder, and in the checkpoint's, that `frozenprefix evaluate --out` wrote."""
    files = []
    for file in sorted({*run.glob("*.json"), *checkpoint.glob("*.json")}):
        values = parse_json(read_text(file))
        if isinstance(values, dict) and {"task", "metrics", "predictions"} <= values.keys():
            files.append(file)
    return files


def _progress(run: Path, checkpoint: Path) -> dict[str, Any]:
    for folder in (checkpoint, run / "last"):
        if (folder / "training_state.json").is_file():
            state = parse_json(read_text(folder / "training_state.json"))
            return {name: state[name] for name in PROGRESS if name in state}
    rows = read_log(run) if (run / LOG_FILE).is_file() else []
    return {"step": rows[-1]["step"]} if rows else {}


def _write_examples(run: Run, folder: Path, count: int) -> list[dict[str, str]]:
    """Small copies of evaluated images in examples/, and what belongs to each."""
    rows = [
        row
        for evaluation in run.evaluations
        for row in evaluation.rows.values()
        if len(row.get("images", ())) == 1 and isinstance(row.get("model"), str) and Path(row["images"][0]).is_file()
    ]
    chosen = [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]
    examples = []
    if chosen:
        with atomic_folder(folder / EXAMPLES) as draft:
            for number, row in enumerate(chosen, 1):
                image = load_image(row["images"][0])
                image.thumbnail((_SIDE, _SIDE))
                image.save(draft / f"{number}.jpg", quality=85)
                references = row.get("references") or [""]
                texts = {"question": row.get("question") or "", "model": row["model"], "reference": references[0]}
                examples.append(
                    {"image": f"{EXAMPLES}/{number}.jpg", **{key: str(text) for key, text in texts.items()}}
                )
    return examples
