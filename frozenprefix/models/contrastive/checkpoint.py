"""Checkpoints of a locked-image text model: the trained tensors, and the config with the frozen parts' identity."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.tensors import copy_into


class TrainedTensors(nn.Module):
    """Saving and loading of what is trained. A mixin for transformers models."""

    config: Any

    def trainable_state(self) -> dict[str, Tensor]:
        """Every parameter that needs a gradient."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, save_directory: str | PathLike[Any], is_main_process: bool = True, **kwargs: Any) -> None:
        """Write config.json (with the frozen parts' identity) and model.safetensors (trained tensors only).

        Raises:
            ConfigError: for other arguments of transformers' `save_pretrained`, which have no effect here.
        """
        if kwargs:
            raise ConfigError(f"save_pretrained: got {', '.join(kwargs)}, which has no effect on one file of tensors")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.trainable_state().items()}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(folder)

    def load_trainable(self, tensors: dict[str, Tensor], *, source: str = "state") -> None:
        """Copy `tensors` into the trained parameters; the key sets and shapes must be equal."""
        copy_into(self.trainable_state(), tensors, source)


def read_checkpoint(source: str, **hub: Any) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint folder or Hub id."""
    try:
        return load_file(str(cached_file(source, SAFE_WEIGHTS_NAME, **hub)))
    except SafetensorError as error:
        raise CheckpointError(f"{source}: {SAFE_WEIGHTS_NAME} is damaged ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint ({error})") from error
