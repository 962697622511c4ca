"""Base trainer: output folder, timing, loop, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import rich.style  # noqa: F401 - draws a random number when it is first imported, which must come before the seed
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, gather_object, set_seed
from torch.utils.data import DataLoader

from frozenprefix.config import resolve_precision
from frozenprefix.data.augmentation import Augmentation
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import StepDataset
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, Sample, digest_samples
from frozenprefix.data.streaming.features import streamed_features
from frozenprefix.data.streaming.groups import TrainingSet
from frozenprefix.errors import StoppedError
from frozenprefix.kernels.allocator import keep_freed_memory
from frozenprefix.models.checkpoint import check_identity, check_named, read_checkpoint
from frozenprefix.models.state_dict import copy_into
from frozenprefix.training.averaging import WeightAverage
from frozenprefix.training.callbacks import Callback, Callbacks
from frozenprefix.training.checkpoints import (
    Progress,
    RandomStates,
    check_state,
    load_average,
    load_training_state,
    save_training_state,
)
from frozenprefix.training.guards import report_bad_step, warn_of_leaks
from frozenprefix.training.memory import explaining_memory, peak_memory
from frozenprefix.training.mixture import LeftOut, Mixture, without_cache
from frozenprefix.training.overview import overview
from frozenprefix.training.pace import Pace
from frozenprefix.training.result import TrainingResult
from frozenprefix.training.run_folder import RunFolder, disk_errors
from frozenprefix.training.schedule import Clock, learning_rate_factor
from frozenprefix.training.setup import PreparedImages, find_shared_images, prepare_images
from frozenprefix.training.sharding import make_accelerator, requested_sharding
from frozenprefix.training.signals import StopSignals
from frozenprefix.training.tracking import Tracker
from frozenprefix.training.watchdog import Watchdog
from frozenprefix.utils import check_run_folder, progress_bar, write_text_atomic
from frozenprefix.utils.random_state import random_state

logger = logging.getLogger(__name__)
WINDOW = 50  # steps over which the progress bar averages loss and speed


class BaseTrainer(ABC):
    """One run, from set-up to the last checkpoint.

    A subclass builds `model`, `processor` and `optimizer`, calls `use_groups`, and implements `batches`, `step`,
    `measure` and `best_of`.

    Args:
        recipe: the experiment.
        mixed_precision: accelerate's setting; "fp16" scales the loss.
        accumulation: micro-batches of each process in a step.
        callbacks: of transformers' kind; see `Callbacks`.

    Example:
        >>> from frozenprefix.training import BaseTrainer, Trainer
        >>> issubclass(Trainer, BaseTrainer), Trainer(recipe).run(resume="never").steps
        (True, 6)
    """

    lower_is_better: ClassVar[bool] = True
    model: Any
    processor: Any
    optimizer: Any
    train_groups: Sequence[ImageGroup]
    validation_groups: list[ImageGroup]
    stream: ImageStream
    total_steps: int
    tracker: Tracker
    sharding: FullyShardedDataParallelPlugin | None = None  # with FSDP2
    augmentation: Augmentation | None = None
    average: WeightAverage | None = None  # with `training.ema`, set by `setup`

    def __init__(
        self, recipe: Any, *, mixed_precision: str = "no", accumulation: int = 1, callbacks: Sequence[Callback] = ()
    ):
        self.callbacks = Callbacks(callbacks)
        self.sharding = requested_sharding()
        self.accelerator = make_accelerator(mixed_precision, self.sharding)
        self.recipe = recipe = resolve_precision(recipe)
        self.settings = recipe.training
        keep_freed_memory()
        set_seed(recipe.seed)
        self.output_dir = Path(recipe.output_dir)
        self.folder = RunFolder(self.output_dir, keep_last=self.settings.keep_last)
        self.best_by = "loss"
        # micro-batches of a step, over all processes
        self.num_parts = accumulation * self.accelerator.num_processes
        self.progress = Progress(fingerprint=recipe.fingerprint(), num_parts=self.num_parts)
        self.clock = Clock(self.settings.max_minutes, self.accelerator.device)
        self.watchdog = Watchdog(self.settings.process_timeout)

    def run(self, resume: str = "auto") -> TrainingResult:
        """Set up, train, and save the best and the last checkpoint.

        Args:
            resume: "auto" continues from the last whole state in `output_dir`, if there is one, "never" starts a new
                run, and a path continues from that folder.

        Raises:
            LockError: another run is writing to the output folder.
            DataError: the folder holds something other than a run.
            StoppedError: SIGTERM or SIGINT arrived during a step; the state was saved after it.
            TrainingError: the output folder cannot be written to, or the training failed.
        """
        main, config = self.accelerator.is_main_process, self.recipe.model_dump(mode="json")
        # the outermost bar: whatever takes long in a run, a log without a terminal says so
        bar = progress_bar(self.recipe.name, enabled=main)
        if main:
            check_run_folder(self.output_dir)
        if resume not in ("auto", "never"):
            check_state(Path(resume))  # before images are encoded
        with disk_errors(self.output_dir), self.folder.lock() if main else nullcontext(), bar, self.watchdog:
            self.setup()
            self.restore(resume)
            step = self.progress.step
            self.tracker = Tracker(self.output_dir, self.recipe.tracking, resume_step=step, config=config, enabled=main)
            with self.tracker, StopSignals() as self.signals:
                self.loop()
        return TrainingResult.from_progress(self.output_dir, self.progress, best_by=self.best_by)

    def setup(self) -> None:
        """Build model, data and optimizer: everything that the first step needs."""
        with progress_bar("loading the models", enabled=self.accelerator.is_main_process):
            self.build_model()
        self.prepare_data()
        self.prepare_optimizer()
        if self.accelerator.is_main_process:
            logger.info("%s", overview(self.model, self.optimizer, self.output_dir))
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.average = None if self.settings.ema is None else WeightAverage(trained, self.settings.ema)

    # ── to be implemented ──

    @abstractmethod
    def build_model(self) -> None:
        """Set `model` and `processor`."""

    @abstractmethod
    def prepare_data(self) -> None:
        """Read the images and call `use_groups`."""

    @abstractmethod
    def prepare_optimizer(self) -> None:
        """Set `optimizer`."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Micro-batches of this process, from the next step on."""

    @abstractmethod
    def step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Take one optimizer step; returns `loss`, `targets` and further numbers to log."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Metrics on the validation images, and other values to log."""

    @abstractmethod
    def best_of(self, values: dict[str, Any]) -> tuple[str, float]:
        """Name and value of the metric that the best checkpoint is chosen by."""

    # ── data ──

    def load_mixture(self, *, without_images: bool = False) -> Mixture | None:
        """The training sources, if any is streamed or has a weight; else they are one list, and this is None."""
        if not self.recipe.data.mixed:
            return None
        mixture = Mixture.load(self.recipe.data, without_images=without_images)
        data = without_cache(self.recipe.data, mixture.streams)
        self.recipe = self.recipe.model_copy(update={"data": data})
        return mixture

    def mixed_groups(
        self, mixture: Mixture | None, prepared: PreparedImages
    ) -> tuple[Mapping[str, Sequence[ImageGroup]], FeatureCache | None]:
        """The groups, with the training set of a mixture if there is one, and the features that steps read."""
        if mixture is None:
            return prepared.groups, prepared.features
        groups = {**prepared.groups, "train": mixture.training_set(prepared.groups["train"])}
        fingerprint = ImageEncoder.from_model(self.model, self.processor).fingerprint
        streamed = streamed_features(mixture.streams, fingerprint, prepared.features)
        return groups, prepared.features if streamed is None else cast(FeatureCache, streamed)

    def encode_images(self, samples: dict[str, list[Sample]]) -> PreparedImages:
        """Fill the feature cache with the images of all samples, or only check them, under a progress bar."""
        main = self.accelerator.is_main_process
        with progress_bar("encoding images", enabled=main) as update:
            prepared = prepare_images(
                ImageEncoder.from_model(self.model, self.processor),
                samples,
                self.recipe.data,
                processes=self.accelerator.state,
                bad_list=self.output_dir / "bad_images.jsonl" if main else None,
                progress=update,
            )
        if main:
            warn_of_leaks(find_shared_images(prepared))
        return prepared

    def use_groups(self, groups: Mapping[str, Sequence[ImageGroup]], features: FeatureCache | None = None) -> None:
        """Set the images for training and validation, the order of the steps, and their number.

        A resumed run must have the same training samples: a digest of them is part of the state.
        """
        train, key = groups["train"], None if features is None else features.key_of
        if isinstance(train, TrainingSet):
            digest, order = train.digest(key), train.order(self.recipe.seed)
        else:
            digest, order = digest_samples([sample for group in train for sample in group.samples], key), None
        self.progress.fingerprint |= {f"data.train ({name})": value for name, value in digest.items()}
        settings, self.train_groups = self.settings, train
        self.validation_groups = list(groups.get("validation", []))[: settings.validation_images]
        self.stream = ImageStream(len(train), settings.images_per_step, self.recipe.seed, order)
        images = (settings.epochs or 1) * len(self.train_groups)
        self.total_steps = settings.max_steps or -(-images // settings.images_per_step)

    def load_steps(self, collator: Any, *, num_parts: int, parts: Sequence[int], in_memory: bool) -> Iterator[Any]:
        """Collate micro-batches from the next step on, in worker processes if images have to be decoded.

        Args:
            num_parts: micro-batches per step, over all processes; parts: those of this process.
        """
        dataset = StepDataset(
            self.train_groups,
            self.stream,
            collator,
            num_steps=self.total_steps,
            targets_per_image=self.settings.targets_per_image,
            num_parts=num_parts,
            parts=parts,
            augmentation=self.augmentation,
        )
        remaining = range(self.progress.step * len(parts), len(dataset))
        self.steps = dataset
        workers = 0 if in_memory else self.recipe.data.workers
        # With its own generator: the loader would draw from the global one, and a resumed run would draw other numbers.
        generator = torch.Generator()
        loader = DataLoader(dataset, batch_size=None, sampler=remaining, num_workers=workers, generator=generator)
        if not dataset.streamed:
            return self.watchdog.loading(loader)
        left_out = LeftOut(self.output_dir / "bad_images.jsonl", self.recipe.data.max_bad_share)
        return left_out.watch(self.watchdog.loading(loader), self.settings.images_per_step // num_parts)

    # ── loop ──

    def loop(self) -> None:
        """Train from the current step to the end."""
        if self.settings.max_minutes is not None:
            logger.warning(
                "training.max_minutes: the run ends by the clock, which the learning rate follows, so it cannot be "
                "repeated bit for bit; a run by max_steps or epochs alone can"
            )
        self.clock.start(self.progress.seconds)
        self.first_step = self.progress.step
        self.callbacks.call("on_train_begin", self)
        if self.first_step == 0:
            self.begin()
        self.take_steps()
        self.finish()
        self.callbacks.call("on_train_end", self)

    def begin(self) -> None:
        """Validate before the first step of a new run."""
        self.validate()

    def take_steps(self) -> None:
        """Take steps until the run is complete, out of time or out of patience."""
        settings, progress = self.settings, self.progress
        pace = Pace(WINDOW)
        batches = pace.watch(self.batches())
        self.model.train()
        with progress_bar("training", enabled=self.accelerator.is_main_process) as update:
            while progress.step < self.total_steps and self.clock.share() <= 1 and not self.ended_early():
                self.callbacks.call("on_step_begin", self)
                before = time.monotonic()
                with explaining_memory(settings, progress.step + 1):
                    values = self.step(batches)
                pace.end_step(values["loss"], values["targets"], time.monotonic() - before)
                note = f"loss {pace.loss:.3f}  {pace.targets_per_second:.1f} targets/s"
                update(progress.step, self.total_steps, note)
                asked = self.callbacks.end_step(self)
                if progress.step % settings.log_every == 0 or "bad_samples" in values or asked.should_log:
                    self.log_step(values, pace)
                if progress.step % settings.validate_every == 0 or asked.should_evaluate:
                    self.validate()
                if progress.step % settings.save_every == 0 or asked.should_save:
                    self.save_last()
                self.stop_if_told()

    def log_step(self, values: dict[str, Any], pace: Pace) -> None:
        """Log a step with the pace of the last ones and its cost."""
        cost = {"seconds": self.clock.seconds, "memory_gb": peak_memory(self.accelerator.device)}
        speed = {"targets_per_s": pace.targets_per_second, "data_wait_share": pace.wait_share}
        self.log({**values, **speed, **cost})
        data = self.recipe.data
        pace.warn_if_waiting(self.progress.step, workers=data.workers, cached=data.feature_cache != "off")

    def stop_if_told(self) -> None:
        """Save the state and end the run if any process got a signal to stop; all of them then stop at this step.

        Raises:
            StoppedError: so it is.
        """
        received = next((name for name in self.all_of(self.signals.received) if name), None)
        if received is None:
            return
        if self.progress.step % self.settings.save_every:
            self.save_last()
        raise StoppedError(
            f"stopped by {received} after step {self.progress.step} of {self.total_steps}; the state is in "
            f"'{self.output_dir / 'last'}': run the same command again to go on"
        )

    def all_of(self, value: Any) -> list[Any]:
        """A value of every process; all must call it."""
        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    def leave_out_step(self, problem: str, learning_rate: float, bad_parts: Sequence[int]) -> list[str]:
        """Record that a step whose loss or gradient is not finite changes nothing. All processes must call it.

        Args:
            bad_parts: micro-batches of this process whose loss is not finite, counted from 0.

        Returns:
            Ids of the samples in these micro-batches of all processes; of all micro-batches if there are none.

        Raises:
            TrainingError: too many in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        bad, whole = self._samples_of_step(bad_parts), self._samples_of_step(range(len(self.steps.parts)))
        self.progress.bad_steps += 1
        report_bad_step(
            f"step {self.progress.step + 1}: {problem} at learning rate {learning_rate:.2e}",
            bad or whole,
            in_a_row=self.progress.bad_steps,
            allowed=self.settings.max_bad_steps,
        )
        return bad or whole

    def _samples_of_step(self, parts: Iterable[int]) -> list[str]:
        """Ids of the samples in these micro-batches of all processes."""
        first = self.progress.step * len(self.steps.parts)
        own = [name for part in parts for name in self.steps.ids_of(first + part)]
        return [name for ids in self.all_of(own) for name in ids]

    def finish(self) -> None:
        """Validate and save after the last step."""
        if self.progress.validated_step != self.progress.step:
            self.validate()
        self.save_last()
        self.ensure_best()

    def count_step(self, targets: int) -> None:
        """Record that a step is done, which had `targets` targets over all processes."""
        self.progress.step += 1
        self.progress.targets_seen += targets
        if self.average is not None:
            self.average.update()
        self.progress.seconds = self.clock.seconds

    def share_done(self) -> float:
        """Share of the run that is over, in steps or in time, whichever is more."""
        return max(self.progress.step / self.total_steps, self.clock.share())

    def learning_rate_factor(self) -> float:
        """Share of the peak learning rate for the next step."""
        settings = self.settings
        return learning_rate_factor(settings.schedule, self.progress.step, settings.warmup_steps, self.share_done())

    def set_learning_rate(self) -> float:
        """Set the rates of all groups of parameters for the next step; returns `training.learning_rate`'s."""
        factor = self.learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self.settings.learning_rate * factor

    def ended_early(self) -> bool:
        """Whether a callback has stopped the run, or it is out of patience."""
        return self.callbacks.stopped(self) or self.out_of_patience()

    def out_of_patience(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.bad_validations >= patience

    def log(self, values: dict[str, Any]) -> None:
        """Write values of this step to the log and to trackers."""
        self.tracker.log(self.progress.step, values)
        self.callbacks.call("on_log", self, logs=dict(values))

    # ── validation and checkpoints ──

    def validate(self) -> None:
        """Measure, log, and keep the best checkpoint; without validation images the latest one is the best.

        With `training.ema` the averaged weights are measured and kept.
        """
        with self._averaged():
            self._validate()

    def _averaged(self) -> AbstractContextManager[None]:
        """While it is entered, the model has its averaged weights, if there are any."""
        return nullcontext() if self.average is None else self.average.applied()

    def _validate(self) -> None:
        self.progress.validated_step = self.progress.step
        if not self.validation_groups:
            self.save_best()
            return
        with progress_bar("validating", enabled=self.accelerator.is_main_process), self.watchdog.watched():
            values = self.measure()
        metrics = {f"validation/{name}": value for name, value in values.items()}
        self.log(metrics)
        if self.progress.step > 0:
            self._keep_if_best(values)
        self.callbacks.call("on_evaluate", self, metrics=metrics)

    def _keep_if_best(self, values: dict[str, Any]) -> None:
        self.best_by, value = self.best_of(values)
        if not math.isfinite(value):
            logger.warning("step %d: validation %s is %s, never the best", self.progress.step, self.best_by, value)
        if self.progress.note_validation(value, lower_is_better=self.lower_is_better):
            self.save_best()

    def restore(self, resume: str) -> None:
        """Continue an earlier run as `run` describes.

        Raises:
            CheckpointError: for a folder that does not exist, is damaged, or belongs to another recipe.
        """
        # all processes take the choice of the main one
        choice = [self.folder.state_to_resume(resume) if self.accelerator.is_main_process else None]
        folder = broadcast_object_list(choice)[0]
        if folder is None:
            self.folder.begin(None, 0)
            return
        self.read_model(folder)
        rank = self.accelerator.process_index
        self.progress = load_training_state(
            folder, self.optimizer, self.progress.fingerprint, rank=rank, num_parts=self.num_parts
        )
        if self.average is not None:
            load_average(folder, self.average, updates=self.progress.step)
        if self.accelerator.scaler is not None and self.progress.scaler:
            self.accelerator.scaler.load_state_dict(self.progress.scaler)
        self.folder.begin(folder, self.progress.step)
        logger.info("resumed from %s at step %d of %d", folder, self.progress.step, self.total_steps)

    def save_best(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.save_best(self.write_model)

    def ensure_best(self) -> None:
        """Save the last checkpoint as the best one too if no validation of this run has chosen one."""
        unchosen = bool(self.validation_groups) and self.progress.best_value is None
        if unchosen or not (self.output_dir / "best").is_dir():
            reason = "no validation has chosen the best checkpoint" if unchosen else "the best checkpoint is gone"
            if self.accelerator.is_main_process:
                logger.warning("step %d: %s; 'best' is the same as 'last'", self.progress.step, reason)
            with self._averaged():
                self.save_best()

    def save_last(self) -> None:
        """Save the state that a resumed run continues from. All processes must call it."""
        random_states = gather_object([random_state()])
        if self.accelerator.scaler is not None:
            self.progress.scaler = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            self.folder.save_state(self.progress.step, lambda folder: self.write_state(folder, random_states))
        self.callbacks.call("on_save", self)

    def read_model(self, folder: Path) -> None:
        """Load the trained weights of a checkpoint that was trained with the same frozen parts."""
        saved, own = type(self.model).config_class.from_pretrained(folder).identity, self.model.config.identity
        check_named(saved, own, str(folder))
        check_identity(saved, own)
        copy_into(self.model.trainable_state(), read_checkpoint(folder), str(folder))

    def write_model(self, folder: Path) -> None:
        """Write model, processor and recipe."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_text_atomic(folder / "recipe.yaml", self.recipe.to_yaml())

    def write_state(self, folder: Path, random_states: RandomStates) -> None:
        """Write a checkpoint with the state of the training."""
        self.write_model(folder)
        save_training_state(folder, self.optimizer, self.progress, random_states, self.average)
