"""Arguments of transformers' `from_pretrained`, honoured or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from frozenprefix.errors import ConfigError, did_you_mean

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


def check_options(options: Mapping[str, Any], part_names: Collection[str]) -> None:
    """Refuse arguments without effect, by name.

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
    if problems:
        raise ConfigError(problems)


def apply_options(config: Any, options: Mapping[str, Any]) -> None:
    """Put dtype, attention and quantisation into the sections of a config.

    Raises:
        ConfigError: for values that the sections do not take.
    """
    changes: dict[str, Any] = {}
    dtype = options.get("dtype") or options.get("torch_dtype")
    if dtype not in (None, "auto"):
        changes["dtype"] = str(dtype).removeprefix("torch.")
    for part, more in (("language_model", _language_model_changes(options)), ("vision_encoder", {})):
        section = getattr(config, part, None)
        if section is None or not {**changes, **more}:
            continue
        try:
            setattr(config, part, type(section).model_validate({**section.model_dump(), **changes, **more}))
        except ValidationError as error:
            lines = [f"from_pretrained: {e['loc'][-1]}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise ConfigError(lines) from error


def _language_model_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if options.get("attn_implementation") is not None:
        changes["attn_implementation"] = options["attn_implementation"]
    config = options.get("quantization_config")
    values = config if isinstance(config, dict) else {} if config is None else config.to_dict()
    four, eight = (bool(options.get(name) or values.get(name)) for name in ("load_in_4bit", "load_in_8bit"))
    if config is not None and not (eight or (four and values.get("bnb_4bit_quant_type", "nf4") == "nf4")):
        raise ConfigError(
            "from_pretrained: quantization_config: expected bitsandbytes in 8 bits or in 4 bits of type nf4; pass "
            "another quantized model as language_model="
        )
    if four or eight:
        changes["quantization"] = "4bit" if four else "8bit"
    return changes


def device_of(device_map: Any) -> torch.device | None:
    """The one device that `device_map` names; "auto" is the accelerator if there is one.

    Raises:
        ConfigError: for a map over several devices.

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
    return None if device_map is None else torch.device(device_map)
