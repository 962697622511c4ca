"""Callbacks of a run, with the conventions of transformers' `TrainerCallback`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from frozenprefix.errors import ConfigError

Callback = TrainerCallback | type[TrainerCallback]
_FOR_ONE_STEP = ("should_log", "should_evaluate", "should_save")


class Callbacks:
    """Calls the callbacks of a run, and collects what they ask for.

    Events are those of transformers: `on_train_begin`, `on_step_begin`, `on_step_end`, `on_log` (with `logs`),
    `on_evaluate` (with `metrics`), `on_save` and `on_train_end`, each as `(args, state, control, **kwargs)`. Here
    `args` is the recipe, and the keyword arguments hold `model`, `processing_class` (the processor) and `optimizer`. A
    callback may set `should_training_stop`, `should_evaluate`, `should_save` and `should_log` of `control`.

    Every process calls its own callbacks; what one of them asks for, all do.

    Args:
        callbacks: objects of `TrainerCallback`, or classes of it, which are called without arguments.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> from transformers import TrainerCallback
        >>> class StopAt(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 2
        >>> from frozenprefix.training import train
        >>> train(recipe, resume="never", callbacks=[StopAt]).steps
        2
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks = [one() if inspect.isclass(one) else one for one in callbacks]
        for number, one in enumerate(self._callbacks):
            if not isinstance(one, TrainerCallback):
                raise ConfigError(
                    f"callbacks.{number}: got {type(one).__name__}, expected an object or a class of "
                    "transformers.TrainerCallback"
                )
        self.state, self.control = TrainerState(), TrainerControl()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def stopped(self, trainer: Any) -> bool:
        """Whether a callback of any process has ended the training; all processes must call it."""
        return bool(self._callbacks) and any(trainer.all_of(self.control.should_training_stop))

    def call(self, event: str, trainer: Any, **values: Any) -> None:
        """Call a method of all callbacks.

        Args:
            trainer: the `BaseTrainer`, whose state the callbacks are shown.
            values: further keyword arguments: `logs`, `metrics`.
        """
        if not self._callbacks:
            return
        self._update(trainer)
        if "logs" in values:
            self.state.log_history.append({**values["logs"], "step": trainer.progress.step})
        parts = {"model": trainer.model, "processing_class": trainer.processor, "optimizer": trainer.optimizer}
        parts |= {"lr_scheduler": None, "train_dataloader": None, "eval_dataloader": None}
        for one in self._callbacks:
            result = getattr(one, event)(trainer.recipe, self.state, self.control, **parts, **values)
            self.control = result or self.control

    def end_step(self, trainer: Any) -> TrainerControl:
        """Call `on_step_end`; returns what is to be done after this step, the same on all processes."""
        if not self._callbacks:
            return self.control
        self.call("on_step_end", trainer)
        wanted = trainer.all_of([getattr(self.control, name) for name in _FOR_ONE_STEP])
        for name in _FOR_ONE_STEP:
            setattr(self.control, name, False)
        agreed = map(any, zip(*wanted, strict=True))
        return TrainerControl(**dict(zip(_FOR_ONE_STEP, agreed, strict=True)))

    def _update(self, trainer: Any) -> None:
        """Write into `state` how far the run is."""
        state, progress = self.state, trainer.progress
        state.global_step, state.max_steps = progress.step, trainer.total_steps
        state.epoch = progress.step * trainer.settings.images_per_step / max(1, len(trainer.train_groups))
        state.best_metric, state.best_global_step = progress.best_value, progress.best_step or None
        state.best_model_checkpoint = str(trainer.folder.path / "best") if progress.best_step else None
        state.is_world_process_zero = trainer.accelerator.is_main_process
        state.is_local_process_zero = trainer.accelerator.is_local_main_process
