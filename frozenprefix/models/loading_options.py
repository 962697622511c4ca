"""Arguments of transformers' `from_pretrained`, honoured or refused by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import GenerationConfig

from frozenprefix.errors import ConfigError, did_you_mean, shorten
from frozenprefix.kernels.compat import attention_implementation, config_option

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_QUANTIZATION = ("quantization_config", "load_in_4bit", "load_in_8bit")
HONOURED = (
    *HUB_OPTIONS, *_QUANTIZATION, "config", "dtype", "torch_dtype", "device_map", "attn_implementation",
    "generation_config", "output_loading_info",
)  # fmt: skip
# Arguments that ask for what happens anyway, with the values that do.
GRANTED: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (True, False),
    "low_cpu_mem_usage": (True, False),
    "use_safetensors": (True,),
    "weights_only": (True,),
    "ignore_mismatched_sizes": (False,),
}


def check_options(options: Mapping[str, Any], part_names: Collection[str], *, local: bool = False) -> None:
    """Refuse arguments without effect, by name.

    Args:
        local: the checkpoint is a folder, of which there is one revision.

    Raises:
        ConfigError: for an argument that is unknown, or that this package does not honour.

    Example:
        >>> check_options({"devicemap": "cpu"}, ["language_model"])
        Traceback (most recent call last):
        frozenprefix.errors.ConfigError: from_pretrained: devicemap: unknown argument (did you mean 'device_map'?)
    """
    known = [*HONOURED, *GRANTED, *part_names]
    problems = []
    for name, value in options.items():
        # the Auto classes add names of their own
        is_granted = value is None or name.startswith("_") or name == "adapter_kwargs" or value in GRANTED.get(name, ())
        if name in HONOURED or name in part_names or is_granted:
            continue
        hint = "" if name in known else did_you_mean(name, known)
        reason = f"unknown argument{hint}" if hint else f"got {value!r}, which has no effect here; remove it"
        problems.append(f"from_pretrained: {name}: {reason}")
    if local and options.get("revision") not in (None, "main"):
        problems.append(
            f"from_pretrained: revision: got {options['revision']!r}, but a folder has no revisions; remove it"
        )
    own = options.get("generation_config")
    if own is not None and not isinstance(own, GenerationConfig):
        problems.append(f"from_pretrained: generation_config: got {shorten(own)}, expected a GenerationConfig")
    for name in part_names:
        part = options.get(name)
        is_place = name == "language_model" and isinstance(part, str | os.PathLike)
        if not (part is None or is_place or isinstance(part, nn.Module)):
            expected = "a model, or the folder of one" if name == "language_model" else "a ready-made module"
            problems.append(f"from_pretrained: {name}: got {shorten(part)}, expected {expected}")
    if problems:
        raise ConfigError(problems)


def apply_options(config: Any, options: Mapping[str, Any], ready: Mapping[str, Any] | None = None) -> None:
    """Put dtype, attention and quantisation into the sections of a config.

    Args:
        ready: ready-made parts by name, which none of these can change.

    Raises:
        ConfigError: for values that the sections do not take, and that ready-made parts do not have.
    """
    options = {**options, **_left_by_auto_classes(config, options)}
    _check_ready(options, ready or {})
    changes: dict[str, Any] = {}
    dtype = options.get("dtype") or options.get("torch_dtype")
    if dtype not in (None, "auto"):
        changes["dtype"] = str(dtype).removeprefix("torch.")
    for_language_model = _language_model_changes(options)
    if for_language_model and getattr(config, "language_model", None) is None and "language_model" not in (ready or {}):
        asked = [name for name in ("attn_implementation", *_QUANTIZATION) if options.get(name)]
        raise ConfigError(
            f"from_pretrained: {', '.join(asked)}: has no effect on this model, which loads no language model"
        )
    for part, more in (("language_model", for_language_model), ("vision_encoder", {})):
        section = getattr(config, part, None)
        if section is None or not {**changes, **more}:
            continue
        try:
            setattr(config, part, type(section).model_validate({**section.model_dump(), **changes, **more}))
        except ValidationError as error:
            lines = [f"from_pretrained: {e['loc'][-1]}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise ConfigError(lines) from error


def _left_by_auto_classes(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the Auto classes take out of the call and put into the config."""
    if config_option(config, "experts_implementation") is not None:
        raise ConfigError("from_pretrained: experts_implementation: has no effect here; remove it")
    attention = config_option(config, "attn_implementation")
    return {} if attention is None or options.get("attn_implementation") else {"attn_implementation": attention}


def _check_ready(options: Mapping[str, Any], ready: Mapping[str, Any]) -> None:
    """Refuse what ready-made parts cannot follow any more."""
    dtype = str(options.get("dtype") or options.get("torch_dtype") or "auto").removeprefix("torch.")
    problems = []
    for name, part in ready.items():
        own = str(next((p.dtype for p in part.parameters()), dtype)).removeprefix("torch.")
        if dtype not in ("auto", own):
            problems.append(
                f"from_pretrained: dtype: got {dtype}, but the {name} that was passed has {own}; load it so"
            )
    model = ready.get("language_model")
    if model is not None:
        asked = options.get("attn_implementation")
        if asked is not None and asked != attention_implementation(model.config):
            problems.append(f"from_pretrained: attn_implementation: got {asked!r}; load the language_model with it")
        for name in _QUANTIZATION:
            if options.get(name):
                problems.append(
                    f"from_pretrained: {name}: has no effect on a language_model that was passed; remove it"
                )
    if problems:
        raise ConfigError(problems)


def _language_model_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if options.get("attn_implementation") is not None:
        changes["attn_implementation"] = options["attn_implementation"]
    config = options.get("quantization_config")
    if not (config is None or isinstance(config, dict) or hasattr(config, "to_dict")):
        raise ConfigError(
            f"from_pretrained: quantization_config: got {shorten(config)}, expected a BitsAndBytesConfig or a dict"
        )
    values = config if isinstance(config, dict) else {} if config is None else config.to_dict()
    four, eight = (bool(options.get(name) or values.get(name)) for name in ("load_in_4bit", "load_in_8bit"))
    if config is not None and not (eight or (four and values.get("bnb_4bit_quant_type", "nf4") == "nf4")):
        raise ConfigError(
            "from_pretrained: quantization_config: expected bitsandbytes in 8 bits or in 4 bits of type nf4; pass "
            "another quantized model as language_model="
        )
    if four and eight:
        raise ConfigError("from_pretrained: load_in_4bit and load_in_8bit: got both, expected one of them")
    if four or eight:
        changes["quantization"] = "4bit" if four else "8bit"
    return changes


def device_of(device_map: Any) -> torch.device | None:
    """The one device that `device_map` names; "auto" is the accelerator if there is one.

    Raises:
        ConfigError: for a map over several devices, and a device that this machine does not have.

    Example:
        >>> device_of({"": "cpu"})
        device(type='cpu')
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ConfigError(
                f"from_pretrained: device_map: got {device_map!r}, expected one device for the whole model; pass a "
                "language model that is spread over devices as language_model="
            )
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "sequential"):
        device_map = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return None if device_map is None else _existing_device(device_map)


def _existing_device(name: Any) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    problem = (
        f"from_pretrained: device_map: got {name!r}, expected 'auto', or a device of this machine: {', '.join(kinds)}"
    )
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:  # no device at all, or a number where there is no accelerator
        raise ConfigError(problem) from error
    count = 1 if device.type == "cpu" or accelerator is None else torch.accelerator.device_count()
    if device.type not in kinds or (device.index or 0) >= count:
        raise ConfigError(problem + (f" ({count} of them)" if device.type in kinds else ""))
    return device
