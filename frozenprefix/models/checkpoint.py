"""Checkpoints of a model: the trainable tensors, the config, and the identity of every frozen part."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.peft.adapter_set import AdaptedParts
from frozenprefix.models.state_dict import copy_into

Self = TypeVar("Self", bound="TrainableCheckpoint")


class TrainableCheckpoint(nn.Module):
    """Saving and loading for a model whose frozen parts are kept elsewhere. A mixin for transformers models.

    Attributes:
        part_names: arguments of the constructor that take ready-made parts.
    """

    config: Any
    config_class: Any
    part_names: ClassVar[tuple[str, ...]]

    def trainable_state(self) -> dict[str, Tensor]:
        """Every parameter that needs a gradient."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(
        self,
        save_directory: str | PathLike[Any],
        is_main_process: bool = True,
        state_dict: dict[Any, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write config.json (with the frozen parts' identity) and model.safetensors (trainable tensors only).

        Args:
            is_main_process: False writes nothing.
            state_dict: values to write in place of the model's own; those of frozen parts are left out.

        Raises:
            ConfigError: for other arguments of transformers' `save_pretrained`, which have no effect here.
        """
        if kwargs.pop("push_to_hub", False):
            raise ConfigError("push_to_hub: save first, then upload the folder with huggingface_hub.upload_folder")
        if args or kwargs:
            given = ", ".join([*map(repr, args), *kwargs])
            raise ConfigError(f"save_pretrained: got {given}, which has no effect on a checkpoint of one small file")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.trainable_state()
        state = own if state_dict is None else {name: state_dict[name] for name in own}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls: type[Self], pretrained_model_name_or_path: str | PathLike[Any] | None, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a checkpoint folder or Hub id; frozen parts come from where the config says, and must be the same ones.

        Args:
            kwargs: `config`, ready-made parts by the names of the constructor, `device_map` ("cpu", "cuda", …), and
                the Hub's `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            CheckpointError: for a folder without weights, missing or unexpected keys, wrong shapes, or a frozen part
                that is not the one trained with.
        """
        source = str(pretrained_model_name_or_path)
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, cls.config_class):
            config = cls.config_class.from_pretrained(source, **hub)
        tensors = read_checkpoint(source, **hub)  # first, as building the parts takes longer
        model = cls(config, **cls.ready_parts(config, kwargs))
        model.load_saved(tensors, source, **hub)
        device = kwargs.get("device_map")
        return model.to(device).eval() if device not in (None, "auto") else model.eval()

    @classmethod
    def ready_parts(cls, config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parts that are not to be loaded from where the config says."""
        return {name: given[name] for name in cls.part_names if name in given}

    def load_saved(self, tensors: dict[str, Tensor], source: str, **hub: Any) -> None:
        """Take over what a checkpoint holds: `tensors`, and what else `save_pretrained` wrote to `source`."""
        self.load_trainable(tensors, source=source)

    def load_trainable(self, tensors: dict[str, Tensor], *, source: str = "state") -> None:
        """Copy `tensors` into the trainable parameters; the key sets and shapes must be equal."""
        copy_into(self.trainable_state(), tensors, source)


class AdaptedCheckpoint(TrainableCheckpoint, AdaptedParts):
    """The same with adapters, which go into language_adapter/ and vision_adapter/, as peft writes them."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: all parameters that need a gradient, but for adapters, which have their own files."""
        apart = self.adapter_parameters()
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad and id(p) not in apart}

    def save_pretrained(
        self, save_directory: str | PathLike[Any], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Write a checkpoint, and beside it the adapters as they are, whatever `state_dict` holds."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self.save_adapters(Path(save_directory))

    def load_saved(self, tensors: dict[str, Tensor], source: str, **hub: Any) -> None:
        """Take over `tensors`, and the adapters that lie in `source`."""
        super().load_saved(tensors, source, **hub)
        self.load_adapters(source, **hub)


def read_checkpoint(source: str | PathLike[Any], **hub: Any) -> dict[str, Tensor]:
    """The trainable tensors of a checkpoint folder or Hub id.

    Raises:
        CheckpointError: when there are none, or the file is damaged.
    """
    folder = Path(source)
    try:
        path = folder / SAFE_WEIGHTS_NAME if folder.is_dir() else cached_file(source, SAFE_WEIGHTS_NAME, **hub)
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: {SAFE_WEIGHTS_NAME} is damaged ({error}); take another checkpoint, or fetch it anew"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint ({error})") from error


def check_identity(saved: dict[str, dict[str, str]], found: dict[str, dict[str, str]]) -> None:
    """Refuse frozen parts other than those a checkpoint was trained with, naming what differs."""
    for part, fields in found.items():
        for field in sorted(saved.get(part, {}).keys() | fields.keys()) if part in saved else ():
            before, now = saved[part].get(field), fields.get(field)
            if before != now:
                raise CheckpointError(
                    f"{part}: this checkpoint was trained with {field}={before!r}, but found {field}={now!r}; "
                    "give the original part, or train a new mapper"
                )
