"""The interface of evaluation tasks, and the options of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from frozenprefix.data.features import FeatureStorage, ImageFeatures
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.inference.captioner import Captioner
from frozenprefix.utils import progress_bar
from frozenprefix.utils.processes import current_processes


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation, beside the model and the samples.

    Attributes:
        predictions: JSONL file for every prediction; written by the main process.
        num_beams, max_new_tokens: the task's own default when None.
        train_samples: the data's training split, for baselines and examples; may be empty.
        max_bad_share: share of images that may be unreadable, 0 to 1.
        features: where image features are kept.
        restart: discard what a killed evaluation left, instead of resuming it.
        processes: the processes that share the work.
        progress: called with (done, total) of this process.
        extra: options of one task only, by name; a task refuses those that it does not know.

    Example:
        >>> options = EvaluationOptions(tmp_path / "predictions.jsonl", num_beams=1)
        >>> options.features.feature_cache
        'auto'
    """

    predictions: Path
    num_beams: int | None = None
    max_new_tokens: int | None = None
    train_samples: Sequence[Sample] = ()
    max_bad_share: float = 0.01
    features: FeatureStorage = field(default_factory=FeatureStorage)
    restart: bool = False
    processes: PartialState = field(default_factory=current_processes)
    progress: Callable[[int, int], None] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def open_features(self, captioner: Captioner, samples: Iterable[Sample]) -> ImageFeatures:
        """The features of all images of `samples`, from the feature cache where there is one."""
        with progress_bar("encoding images", enabled=self.processes.is_main_process) as update:
            return ImageFeatures.from_encoder(
                captioner.encoder,
                [path for sample in samples for path in sample.images],
                self.features,
                max_bad_share=self.max_bad_share,
                processes=self.processes,
                progress=update,
            )


def check_options(task: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise `ConfigError` for an option that the task does not have.

    Example:
        >>> check_options("vqa", ["answring"], ["answering", "candidates"])
        Traceback (most recent call last):
        frozenprefix.errors.ConfigError: task 'vqa' has no option 'answring' (did you mean 'answering'?); known: ...
    """
    for name in names:
        if name not in known:
            hint = f"{did_you_mean(name, known)}; known: {', '.join(known)}" if known else "; it has none of its own"
            raise ConfigError(f"task '{task}' has no option {name!r}{hint}")


Run = Callable[[Any, Sequence[Sample], EvaluationOptions], dict[str, Any]]


@dataclass(frozen=True)
class EvaluationTask:
    """One way to evaluate a model.

    Attributes:
        run: (model, samples, options) → the result as plain JSON: `task`, `metrics`, `baselines` (name → metrics),
            `n`, `groups`, `intervals` (metric → [low, high]), `bad_images`, `settings`, `predictions`,
            `predictions_sha256`; the same in every process. See `evaluation.result`.
        sample_task: `Sample.task` of the samples that it takes.
        uses_train: from the task's own options, whether `options.train_samples` is used.
        takes_beams: whether it generates by beam search, so that `options.num_beams` has an effect.
        scoring: its options on which scores depend, and predictions do not.
        load: `load(checkpoint, device=…, language_model=…, precision=…)` → the model that `run` takes.

    Example:
        >>> EvaluationTask(lambda model, samples, options: {"n": len(samples)}, sample_task="caption").takes_beams
        False
    """

    run: Run
    sample_task: str
    uses_train: Callable[[Mapping[str, Any]], bool] = lambda extra: False
    takes_beams: bool = False
    scoring: tuple[str, ...] = ()
    load: Callable[..., Any] = Captioner.from_pretrained
