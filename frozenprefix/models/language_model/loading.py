"""Loading a frozen language model and its tokenizer, from a folder, a GGUF file, a wheel or the Hub."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.kernels.compat import commit_hash
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.utils import file_sha256, tree_sha256

logger = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "config.json")


@dataclass(frozen=True)
class ResolvedLanguageModel:
    """Where a language model is stored, and the exact identity of its weights."""

    location: str  # folder or Hub id
    identity: dict[str, str]
    revision: str | None = None


def resolve_language_model(config: LanguageModelConfig) -> ResolvedLanguageModel:
    """Turn `config.path` into a folder or a Hub id.

    A GGUF file is converted once into the user's cache. A string that is neither a local path nor a `pypi://`
    reference is a Hub id; its identity is the commit that gets loaded.

    Example:
        >>> resolve_language_model(LanguageModelConfig(path="gpt2", revision="main")).identity
        {'path': 'gpt2'}
    """
    path = config.path
    if not is_pypi(path) and not Path(path).expanduser().exists() and not path.endswith(".gguf"):
        return ResolvedLanguageModel(path, {"path": path}, config.revision)
    if config.revision is not None:
        raise ConfigError(f"model.language_model.revision has no effect on the local path '{path}'; remove it")
    local = resolve(path)
    if local.is_dir():
        return ResolvedLanguageModel(str(local), {"path": local.name, "sha256": tree_sha256(local, WEIGHTS)})
    if local.suffix == ".gguf":
        from frozenprefix.models.language_model.gguf import gguf_to_pretrained

        identity = {"path": path if is_pypi(path) else local.name, "sha256": file_sha256(local)}
        return ResolvedLanguageModel(str(gguf_to_pretrained(local)), identity)
    raise ConfigError(f"model.language_model.path: expected a folder, a .gguf file or a Hub id, got '{path}'")


def load_language_model(config: LanguageModelConfig) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load the LM in its compute dtype.

    Returns:
        The transformers model and its identity.

    Raises:
        AssetError: when the Hub id cannot be reached or the folder holds no language model.
        ConfigError: for a quantisation that this machine does not support.

    Example:
        >>> lm, identity = load_language_model(LanguageModelConfig(path=str(lm_folder)))
        >>> type(lm).__name__, sorted(identity)
        ('LlamaForCausalLM', ['architecture', 'path', 'sha256'])
    """
    resolved = resolve_language_model(config)
    options = quantization_options(config)
    try:
        with quiet_transformers():
            lm_config = AutoConfig.from_pretrained(resolved.location, revision=resolved.revision or "main")
            auto_class: Any = AutoModelForSeq2SeqLM if lm_config.is_encoder_decoder else AutoModelForCausalLM
            model = auto_class.from_pretrained(
                resolved.location,
                revision=resolved.revision or "main",
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attn_implementation,
                **options,
            )
    except (OSError, ValueError) as error:
        raise AssetError(
            f"model.language_model.path: '{config.path}' is neither a local folder nor a causal LM that the Hub gives "
            f"({str(error).splitlines()[0]}); give a local folder, a .gguf file or a pypi:// reference"
        ) from error
    identity = {**resolved.identity, "architecture": architecture(model)}
    if "sha256" not in identity:
        identity["revision"] = str(commit_hash(model.config))
    return model, identity


def architecture(model: PreTrainedModel) -> str:
    """A language model's class and size, which distinguish models whose weights are not files."""
    config = model.config.get_text_config()
    return f"{type(model).__name__}, {config.num_hidden_layers} layers, {config.vocab_size} words"


def language_model_identity(model: PreTrainedModel, folder: Path | None = None) -> dict[str, str]:
    """The identity of a ready-made language model, as far as it is known: its architecture, and a folder's hash.

    Example:
        >>> language_model_identity(model.language_model)
        {'architecture': 'LlamaForCausalLM, 2 layers, 300 words'}
    """
    identity = {"architecture": architecture(model)}
    if folder is not None:
        identity |= {"path": folder.name, "sha256": tree_sha256(folder, WEIGHTS)}
    return identity


def quantization_options(config: LanguageModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights in 4 bits (NF4 of QLoRA, Dettmers et al. 2023) or 8 (LLM.int8).

    Raises:
        ConfigError: without a GPU or without bitsandbytes.
    """
    if config.quantization == "none":
        return {}
    missing = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    missing += [] if importlib.util.find_spec("bitsandbytes") else ["the package bitsandbytes"]
    if missing:
        raise ConfigError(
            f"model.language_model.quantization: got '{config.quantization}', which needs {' and '.join(missing)}; "
            "use 'none' here"
        )
    if config.quantization == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = getattr(torch, config.dtype)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}


def load_tokenizer(config: LanguageModelConfig) -> PreTrainedTokenizerBase:
    """Load the LM's tokenizer; without a padding token it pads with its end token, as masks are always explicit.

    Raises:
        AssetError: when there is none, or it cannot be read.
        ConfigError: for a tokenizer without an end token.

    Example:
        >>> load_tokenizer(LanguageModelConfig(path=str(lm_folder))).eos_token
        '</s>'
    """
    resolved = resolve_language_model(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved.location, revision=resolved.revision or "main")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(
            f"model.language_model.path: '{config.path}' has no tokenizer that can be read "
            f"({str(error).strip().splitlines()[0]}); give a local folder with one, or a Hub id"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.language_model.path: the tokenizer of '{config.path}' has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class quiet_transformers:
    """Context manager that hides transformers' loading bars, which would disturb the trainer's own bar."""

    def __enter__(self) -> None:
        self.was_enabled = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: Any) -> None:
        if self.was_enabled:
            transformers_logging.enable_progress_bar()
