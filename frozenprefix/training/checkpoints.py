"""Training state on disk: optimizer, random numbers, progress."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME

from frozenprefix.errors import CheckpointError, DataError
from frozenprefix.models.checkpoint import check_identity, read_checkpoint
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.peft.adapter_set import FOLDERS
from frozenprefix.models.state_dict import copy_into
from frozenprefix.training.averaging import WeightAverage
from frozenprefix.utils import read_text, write_text_atomic
from frozenprefix.utils.random_state import set_random_state

logger = logging.getLogger(__name__)
STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random_state.safetensors"
AVERAGE_FILE = "average.safetensors"
RandomStates = Sequence[dict[str, Tensor]]  # of each process, in order of rank


@dataclass
class Progress:
    """State of a run besides weights and optimizer.

    Attributes:
        fingerprint: keys of the recipe that a resumed run must share.
        bad_validations: validations since the best one; validated_step: the step of the latest one.
        scaler: state of the loss scaler, with fp16.

    Example:
        >>> Progress(step=3, targets_seen=48).best_value is None
        True
    """

    step: int = 0
    targets_seen: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int = 0
    bad_validations: int = 0
    validated_step: int = -1
    fingerprint: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


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
        tensors |= {f"{index}.{name}": torch.as_tensor(value).cpu().contiguous() for name, value in entry.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)
    states = {f"{rank}.{name}": value for rank, state in enumerate(random_states) for name, value in state.items()}
    save_file(states, folder / RANDOM_FILE)
    if average is not None:
        save_file({name: tensor.contiguous() for name, tensor in average.state.items()}, folder / AVERAGE_FILE)
    write_text_atomic(folder / STATE_FILE, json.dumps(asdict(progress), indent=2))


def load_initial(model: FrozenPrefixForConditionalGeneration, folder: Path) -> None:
    """Load the trained tensors of a checkpoint with the same frozen parts into a new model.

    Contrastive heads and adapters keep their initial values if the checkpoint has none; all else must be there.

    Raises:
        CheckpointError: for a folder without a checkpoint, or one that does not fit.
    """
    source = f"training.init_from: {folder}"
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{source} holds no {CONFIG_NAME}; expected a checkpoint folder, such as a run's best/")
    tensors = read_checkpoint(folder)
    config = FrozenPrefixConfig.from_pretrained(folder)
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
    processes: int = 1,
) -> Progress:
    """Restore what `save_training_state` wrote, and the random state of process `rank`.

    With another number of processes than before, the steps see the same images, but other random numbers (dropout,
    sampling) than in an undisturbed run; a warning says so.

    Raises:
        CheckpointError: when the folder holds no state, or belongs to another recipe.
    """
    try:
        progress = Progress(**json.loads(read_text(folder / STATE_FILE)))
        state, random_states = (_by_number(load_file(folder / name)) for name in (OPTIMIZER_FILE, RANDOM_FILE))
    except (DataError, OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no training state that can be read ({error}); use --resume never"
        ) from error
    _check_fingerprint(folder, progress.fingerprint, fingerprint)
    if len(random_states) != processes:
        logger.warning(
            "%s was saved by %d processes and is resumed by %d: dropout and sampling will draw other numbers",
            folder,
            len(random_states),
            processes,
        )
    set_random_state(random_states[rank if rank in random_states else 0])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def load_average(folder: Path, average: WeightAverage, *, updates: int) -> None:
    """Restore the averaged weights of a run that has made so many updates.

    Raises:
        CheckpointError: for a folder without them, or with those of another model.
    """
    try:
        tensors = load_file(folder / AVERAGE_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no averaged weights that can be read ({error}); use --resume never"
        ) from error
    copy_into(average.state, tensors, str(folder / AVERAGE_FILE))
    average.updates = updates


def _by_number(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Group tensors named "NUMBER.KEY" by number."""
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
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
