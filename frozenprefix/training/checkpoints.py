"""Training state on disk: optimizer, random numbers, progress."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from frozenprefix.assets import check_checkpoint
from frozenprefix.errors import CheckpointError, DataError, did_you_mean
from frozenprefix.models.checkpoint import check_identity, check_named, read_checkpoint
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.peft.adapter_set import FOLDERS
from frozenprefix.models.state_dict import copy_into
from frozenprefix.training.averaging import WeightAverage
from frozenprefix.utils import read_text, write_text_atomic
from frozenprefix.utils.random_state import set_random_state
from frozenprefix.utils.sums import check_sums
from frozenprefix.utils.tensors import load_tensors, save_tensors

logger = logging.getLogger(__name__)
STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random_state.safetensors"
_Count = Annotated[int, Ge(0)]
# state of optimizers; other entries differ from optimizer to optimizer
_OF_THE_PARAMETERS_SHAPE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
AVERAGE_FILE = "average.safetensors"
RandomStates = Sequence[dict[str, Tensor]]  # of each process, in order of rank


@dataclass
class Progress:
    """State of a run besides weights and optimizer.

    Attributes:
        fingerprint: keys of the recipe that a resumed run must share.
        bad_validations: validations since the best one; validated_step: the step of the latest one.
        bad_steps: steps that were left out since the last good one.
        num_parts: micro-batches of a step, over all processes.
        scaler: state of the loss scaler, with fp16.

    Example:
        >>> Progress(step=3, targets_seen=48).best_value is None
        True
    """

    step: _Count = 0
    targets_seen: _Count = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: _Count = 0
    bad_validations: _Count = 0
    validated_step: int = -1
    bad_steps: _Count = 0
    num_parts: _Count = 1
    fingerprint: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False)

    def note_validation(self, value: float, *, lower_is_better: bool) -> bool:
        """Note a validation at this step; return whether it is the best so far, which no infinite value or NaN is.

        Example:
            >>> progress = Progress(step=3)
            >>> [progress.note_validation(value, lower_is_better=True) for value in (2.0, 2.5, float("nan"), 1.5)]
            [True, False, False, True]
        """
        best = self.best_value
        better = math.isfinite(value) and (best is None or (value < best if lower_is_better else value > best))
        if better:
            self.best_value, self.best_step, self.bad_validations = value, self.step, 0
        else:
            self.bad_validations += 1
        return better


_PROGRESS = TypeAdapter(Progress)


def save_training_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    random_states: RandomStates,
    average: WeightAverage | None = None,
) -> None:
    """Write optimizer, random states of all processes, averaged weights, and progress, as safetensors and JSON."""
    tensors: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    save_tensors(tensors, folder / OPTIMIZER_FILE)
    states = {f"{rank}.{name}": value for rank, state in enumerate(random_states) for name, value in state.items()}
    save_tensors(states, folder / RANDOM_FILE)
    if average is not None:
        save_tensors(average.state, folder / AVERAGE_FILE)
    write_text_atomic(folder / STATE_FILE, json.dumps(asdict(progress), indent=2))


def check_state(folder: Path) -> None:
    """Check that a folder holds the state of a run.

    Raises:
        CheckpointError: for a folder that is not there, or holds no state.

    Example:
        >>> check_state(tmp_path / "last")
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: --resume: no folder '...last'; expected auto, never or a run's last/
    """
    if not folder.is_dir():
        hint = did_you_mean(folder.name, (path.name for path in folder.parent.glob("*/")))
        raise CheckpointError(f"--resume: no folder '{folder}'{hint}; expected auto, never or a run's last/")
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(f"--resume: '{folder}' holds no {STATE_FILE}; expected auto, never or a run's last/")


def load_initial(model: FrozenPrefixForConditionalGeneration, folder: Path) -> None:
    """Load the trained tensors of a checkpoint with the same frozen parts into a new model.

    Contrastive heads and adapters keep their initial values if the checkpoint has none; all else must be there.

    Raises:
        CheckpointError: for a folder without a checkpoint, or one that does not fit.
    """
    source = f"training.init_from: {folder}"
    check_checkpoint(folder, field="training.init_from")
    check_sums(folder)
    tensors = read_checkpoint(folder)
    config = FrozenPrefixConfig.from_pretrained(folder)
    check_named(config.identity, model.config.identity, source)
    check_identity(config.identity, model.config.identity)
    own = model.trainable_state()
    heads = {name: p for name, p in own.items() if name.startswith("contrastive.")}
    if not heads.keys() & tensors.keys():
        tensors |= heads
    copy_into(own, tensors, source)
    adapted = [part for part in FOLDERS if getattr(getattr(config, part), "peft", None) is not None]
    trained = [part for part, name in FOLDERS.items() if part in adapted or (folder / name).is_dir()]
    lost = [part for part in trained if part not in model.adapters]
    if lost:
        raise CheckpointError(
            f"{source} holds {FOLDERS[lost[0]]}/, and the recipe has no model.{lost[0]}.peft; give the method that it "
            "was trained with"
        )
    new = [part for part in model.adapters if part not in trained]
    if new:
        logger.info("%s has no adapters in: %s; they start from their initial values", source, ", ".join(new))
    model.adapters.load(folder, new=new)


def load_training_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    *,
    rank: int = 0,
    num_parts: int = 1,
) -> Progress:
    """Restore what `save_training_state` wrote, and the random state of process `rank`.

    Args:
        num_parts: micro-batches of a step, over all processes. With another number than before, the steps see the same
            images, but other random numbers (dropout, sampling) than in an undisturbed run; a warning says so.

    Raises:
        CheckpointError: when the folder holds no state, or belongs to another recipe.
    """
    try:
        progress = _read_progress(folder)
        state, random_states = (_by_number(load_tensors(folder / name)) for name in (OPTIMIZER_FILE, RANDOM_FILE))
        _check_optimizer(state, optimizer)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} holds no training state that can be read ({error}); use --resume never"
        ) from error
    _check_fingerprint(folder, progress.fingerprint, fingerprint)
    if progress.num_parts != num_parts:
        logger.warning(
            "%s was saved with %d micro-batches a step (processes x gradient_accumulation_steps), now there are %d: "
            "dropout and sampling will draw other numbers",
            folder,
            progress.num_parts,
            num_parts,
        )
        progress.num_parts = num_parts
    try:
        set_random_state(random_states[rank if rank in random_states else 0])
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: {RANDOM_FILE} holds no random state ({error}); use --resume never") from error
    try:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {OPTIMIZER_FILE} lacks {error} or is another optimizer's") from error
    return progress


def _read_progress(folder: Path) -> Progress:
    try:
        return _PROGRESS.validate_json(read_text(folder / STATE_FILE), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{STATE_FILE}: {where or 'the file'}: {first['msg']}") from error


def _check_optimizer(state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Every value is finite, and moments have the shape of their parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state.items():
        for name, tensor in entries.items():
            where = f"{OPTIMIZER_FILE}: {number}.{name}"
            if not 0 <= number < len(parameters):
                raise ValueError(f"{where}: there are {len(parameters)} trained tensors")
            if name in _OF_THE_PARAMETERS_SHAPE and tensor.shape != parameters[number].shape:
                raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {tuple(parameters[number].shape)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{where} has values that are not finite")


def load_average(folder: Path, average: WeightAverage, *, updates: int) -> None:
    """Restore the averaged weights of a run that has made so many updates.

    Raises:
        CheckpointError: for a folder without them, or with those of another model.
    """
    try:
        tensors = load_tensors(folder / AVERAGE_FILE)
    except DataError as error:
        raise CheckpointError(
            f"{folder} holds no averaged weights that can be read ({error}); use --resume never"
        ) from error
    copy_into(average.state, tensors, str(folder / AVERAGE_FILE))
    average.updates = updates


def _by_number(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Group tensors named "NUMBER.KEY" by number."""
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        numbered.setdefault(int(number), {})[key] = tensor
    return numbered


def _check_fingerprint(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    differing = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    if differing:
        key = differing[0]
        what = "other data" if key.startswith("data.train (") else "another recipe"
        raise CheckpointError(
            f"{folder} belongs to a run with {what}: {key} was {saved.get(key)!r}, now "
            f"{current.get(key)!r}; restore it, choose another output_dir, or use --resume never"
        )
