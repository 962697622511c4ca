"""What a model can be evaluated on. A new task is an `EvaluationTask` in its own module, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.processes import Processes
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.registry import Registry

if TYPE_CHECKING:
    from frozenprefix.inference.captioner import Captioner


@dataclass(frozen=True)
class EvaluationOptions:
    """What a task is told beside the model and the samples.

    Attributes:
        predictions: JSONL file for every prediction; written by the main process.
        num_beams, max_new_tokens: the task's own when None.
        train_samples: the data's training split, for baselines and examples; may be empty.
        max_bad_share: share of images that may be unreadable, 0 to 1.
        features: where image features are kept.
        restart: throw away what a killed evaluation has left, instead of going on with it.
        processes: who takes part.
        progress: called with (done, in all) of this process.
        extra: options of one task only, by name; a task refuses those that it does not know.
    """

    predictions: Path
    num_beams: int | None = None
    max_new_tokens: int | None = None
    train_samples: Sequence[Sample] = ()
    max_bad_share: float = 0.01
    features: FeatureStorage = field(default_factory=FeatureStorage)
    restart: bool = False
    processes: Processes = field(default_factory=Processes)
    progress: Callable[[int, int], None] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def check_options(task: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise `ConfigError` for an option that the task does not have."""
    for name in given:
        if name not in known:
            hint = f"{did_you_mean(name, known)}; known: {', '.join(known)}" if known else "; it has none of its own"
            raise ConfigError(f"task '{task}' has no option {name!r}{hint}")


Run = Callable[[Any, Sequence[Sample], EvaluationOptions], dict[str, Any]]


def load_captioner(checkpoint: str | Path, device: str | None) -> Captioner:
    """The model that most tasks evaluate."""
    from frozenprefix.inference.captioner import Captioner

    return Captioner.from_pretrained(checkpoint, device=device)


@dataclass(frozen=True)
class EvaluationTask:
    """One way to evaluate a model.

    Attributes:
        run: (model, samples, options) → the result as plain JSON: `task`, `metrics`, `baselines` (name → metrics),
            `n`, `groups`, `intervals` (metric → [low, high]), `bad_images`, `settings`, `predictions`,
            `predictions_sha256`; the same in every process. `evaluation.result` makes it.
        sample_task: `Sample.task` of the samples that it takes.
        uses_train: from the task's own options, whether `options.train_samples` is wanted.
        takes_beams: whether it generates by beam search, so that `options.num_beams` has an effect.
        load: (checkpoint, device) → the model that `run` takes.
    """

    run: Run
    sample_task: str
    uses_train: Callable[[Mapping[str, Any]], bool] = lambda extra: False
    takes_beams: bool = False
    load: Callable[[str | Path, str | None], Any] = load_captioner


TASKS: Registry[EvaluationTask] = Registry(
    "evaluation task",
    {
        "caption": "frozenprefix.evaluation.tasks.generation:CAPTION",
        "classification": "frozenprefix.evaluation.tasks.classification:CLASSIFICATION",
        "fewshot": "frozenprefix.evaluation.tasks.few_shot:FEW_SHOT",
        "retrieval": "frozenprefix.evaluation.tasks.retrieval:RETRIEVAL",
        "video": "frozenprefix.evaluation.tasks.video:VIDEO",
        "vqa": "frozenprefix.evaluation.tasks.generation:VQA",
    },
)
