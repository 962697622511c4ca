"""Checkpoints of a model: the trained tensors, the config with the identity of every frozen part, the adapters."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.state_dict import copy_into

Model = TypeVar("Model")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


def trainable_state(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, except those of adapters, which are saved in files of their own.

    Args:
        model: with an `AdapterSet` as `adapters`.

    Example:
        >>> from frozenprefix.models.checkpoint import trainable_state
        >>> {name.split(".")[0] for name in trainable_state(model)}
        {'mapper'}
    """
    apart = model.adapters.parameter_ids()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and id(p) not in apart}


def save_checkpoint(
    model: Any, folder: str | PathLike[Any], state_dict: dict[str, Tensor] | None = None, **others: Any
) -> None:
    """Write config.json, model.safetensors with the trained tensors, and each adapter in peft's layout.

    Args:
        state_dict: values to write in place of the model's own; those of frozen parts are left out.
        others: arguments of transformers' `save_pretrained` that have no effect here.

    Raises:
        ConfigError: for any of `others`.

    Example:
        >>> from frozenprefix.models.checkpoint import save_checkpoint
        >>> save_checkpoint(model, tmp_path / "copy")
        >>> sorted(path.name for path in (tmp_path / "copy").iterdir())
        ['config.json', 'model.safetensors']
    """
    if others.pop("push_to_hub", False):
        raise ConfigError("push_to_hub: save first, then upload the folder with huggingface_hub.upload_folder")
    if others:
        raise ConfigError(f"save_pretrained: {', '.join(others)}: has no effect on a checkpoint of one small file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = trainable_state(model)
    state = own if state_dict is None else {name: state_dict[name] for name in own}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.adapters.save(folder)


def load_checkpoint(
    model_class: type[Model], source: str | PathLike[Any], part_names: tuple[str, ...], **options: Any
) -> Model:
    """Build a model and read its trained tensors; frozen parts come from where the config says.

    Args:
        model_class: its constructor takes a config, and ready-made parts by the names in `part_names`.
        source: a checkpoint folder or Hub id.
        options: `config`, ready-made parts, `device_map` ("cpu", "cuda", …), and the Hub's `revision`, `token`,
            `cache_dir`, `local_files_only`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: for a folder without weights, missing or unexpected keys, wrong shapes, or a frozen part that
            differs from the one trained with.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config, config_class = options.get("config"), model_class.config_class  # type: ignore[attr-defined]
    if not isinstance(config, config_class):
        config = config_class.from_pretrained(source, **hub)
    tensors = read_checkpoint(source, **hub)  # first, as building the parts takes longer
    parts = {name: options[name] for name in part_names if name in options}
    model: Any = model_class(config, **parts)  # type: ignore[call-arg]
    copy_into(trainable_state(model), tensors, str(source))
    model.adapters.load(source, **hub)
    device = options.get("device_map")
    return model.to(device).eval() if device not in (None, "auto") else model.eval()


def read_checkpoint(source: str | PathLike[Any], **hub: Any) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint folder or Hub id.

    Raises:
        CheckpointError: when there are none, or the file is damaged.

    Example:
        >>> from frozenprefix.models.checkpoint import read_checkpoint
        >>> read_checkpoint(checkpoint)["mapper.scale.norm.weight"].shape
        torch.Size([32])
    """
    folder = Path(source)
    try:
        path = folder / SAFE_WEIGHTS_NAME if folder.is_dir() else cached_file(source, SAFE_WEIGHTS_NAME, **hub)
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: {SAFE_WEIGHTS_NAME} is damaged ({error}); take another checkpoint, or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint ({error})") from error


def check_identity(saved: dict[str, dict[str, str]], loaded: dict[str, dict[str, str]]) -> None:
    """Refuse frozen parts other than those a checkpoint was trained with, naming what differs.

    Raises:
        CheckpointError: for a part whose identity differs.

    Example:
        >>> from frozenprefix.models.checkpoint import check_identity
        >>> check_identity({"language_model": {"path": "gpt2"}}, {"language_model": {"path": "gpt2-medium"}})
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: language_model: this checkpoint was trained with path='gpt2', ...
    """
    for part, fields in loaded.items():
        for field in sorted(saved.get(part, {}).keys() | fields.keys()) if part in saved else ():
            before, now = saved[part].get(field), fields.get(field)
            if before != now:
                raise CheckpointError(
                    f"{part}: this checkpoint was trained with {field}={before!r}, but got {field}={now!r}; "
                    "give the original part, or train a new mapper"
                )
