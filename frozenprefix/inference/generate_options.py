"""Options of transformers' `generate` that a captioner, a dialog or a stream does not take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frozenprefix.errors import ConfigError

_ONE_TEXT = "a captioner returns one text and its score for each prompt; call model.generate for more"
_OWN_INPUT = "a captioner computes it from prompts and images; call model.generate to pass it"
#: Options of `generate` that a captioner does not take.
CAPTIONER_REFUSES = {
    "num_return_sequences": _ONE_TEXT,
    "return_dict_in_generate": _ONE_TEXT,
    "output_scores": _ONE_TEXT,
    "output_logits": _ONE_TEXT,
    "streamer": "a captioner works in batches; Dialog.stream gives a text word by word",
    "max_length": "it counts the image's prefix for some models; give max_new_tokens instead",
    **dict.fromkeys(("input_ids", "attention_mask", "inputs_embeds", "pixel_values", "image_features"), _OWN_INPUT),
}


def check_generate(options: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Refuse options of `generate` by name.

    Args:
        refused: option → what to do instead.

    Raises:
        ConfigError: with all problems at once, also for numbers of beams and tokens below 1.

    Example:
        >>> check_generate({"num_beams": 0}, {})
        Traceback (most recent call last):
        frozenprefix.errors.ConfigError: num_beams: got 0, expected at least 1
    """
    problems = [f"{name}: {refused[name]}" for name in options if name in refused]
    for name in ("num_beams", "max_new_tokens", "num_return_sequences"):
        value = options.get(name, 1)
        if name not in refused and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"{name}: got {value!r}, expected at least 1")
    if problems:
        raise ConfigError(problems)
