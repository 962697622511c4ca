"""Loading a frozen language model and its tokenizer, from a folder, a GGUF file, a wheel or the Hub."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from frozenprefix.assets import is_hub_id, is_pypi, resolve
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.pretrained import (
    check_folder,
    check_loaded,
    hub_commit,
    not_found,
    quiet_transformers,
    read_config,
    reading,
    report_unused,
)
from frozenprefix.utils import file_sha256, tree_sha256

logger = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "config.json")
FIELD = "model.language_model.path"
_KIND = "a causal or encoder-decoder language model"
# one of them is in every folder with a tokenizer
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


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

    Raises:
        AssetError: for a folder without a whole language model, and a path that does not exist.

    Example:
        >>> resolve_language_model(LanguageModelConfig(path="gpt2", revision="main")).identity
        {'path': 'gpt2'}
    """
    path = config.path
    if not is_pypi(path) and not Path(path).expanduser().exists() and not path.endswith(".gguf"):
        if not is_hub_id(path):
            raise not_found(path, FIELD, _KIND)
        return ResolvedLanguageModel(path, {"path": path}, config.revision)
    if config.revision is not None:
        raise ConfigError(f"model.language_model.revision has no effect on the local path '{path}'; remove it")
    try:
        local = resolve(path)
    except AssetError as error:
        raise AssetError(f"{FIELD}: {error}") from error
    if local.is_dir():
        check_folder(local, FIELD)
        return ResolvedLanguageModel(str(local), {"path": local.name, "sha256": _weights_sha256(local)})
    if local.suffix == ".gguf":
        from frozenprefix.models.language_model.gguf import gguf_to_pretrained

        identity = {"path": path if is_pypi(path) else local.name, "sha256": file_sha256(local)}
        return ResolvedLanguageModel(str(gguf_to_pretrained(local)), identity)
    raise ConfigError(
        f"{FIELD}: got the file '{path}', expected a folder, a .gguf file or a Hub id; give the folder "
        f"'{local.parent}' if the model lies there"
    )


def language_model_config(config: LanguageModelConfig) -> Any:
    """The transformers config of a language model, without its weights.

    Raises:
        AssetError: it cannot be read, or is none of a language model.

    Example:
        >>> language_model_config(LanguageModelConfig(path=str(lm_folder))).model_type
        'llama'
    """
    resolved = resolve_language_model(config)
    return _read_config(resolved)


def _read_config(resolved: ResolvedLanguageModel) -> Any:
    lm_config = read_config(resolved.location, FIELD, resolved.revision)
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if lm_config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(lm_config) not in known:
        raise AssetError(
            f"{FIELD}: '{resolved.location}' holds a model of type '{lm_config.model_type}', expected {_KIND}"
        )
    return lm_config


def _weights_sha256(folder: Path) -> str:
    """Hash of config and weights; of weights in torch's format where there are no others."""
    others = () if any(folder.glob("*.safetensors")) else ("pytorch_model*.bin",)
    return tree_sha256(folder, (*WEIGHTS, *others))


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
    if "sha256" not in resolved.identity:  # of the Hub: from here on the very commit
        commit = hub_commit(resolved.location, FIELD, resolved.revision)
        resolved = ResolvedLanguageModel(resolved.location, {**resolved.identity, "revision": commit}, commit)
    options = quantization_options(config)
    lm_config = _read_config(resolved)
    auto_class: Any = AutoModelForSeq2SeqLM if lm_config.is_encoder_decoder else AutoModelForCausalLM
    with quiet_transformers(), reading(resolved.location, FIELD, _KIND):
        model, info = auto_class.from_pretrained(
            resolved.location,
            revision=resolved.revision or "main",
            adapter_kwargs={"revision": resolved.revision or "main"},  # for which older releases take "main"
            dtype=getattr(torch, config.dtype),
            attn_implementation=_attention(config, lm_config),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **options,
        )
    check_loaded(info, resolved.location, FIELD)
    report_unused(info, model, resolved.location)
    identity = {**resolved.identity, "architecture": architecture(model)}
    return model, identity


def _attention(config: LanguageModelConfig, lm_config: Any) -> str | None:
    """The attention to load; an LM that caps its scores (Gemma 2) has "eager" only.

    "sdpa" has no cap, and transformers before 5.22 leaves it out without a word.

    Raises:
        ConfigError: when "sdpa" is asked of such an LM.
    """
    if getattr(lm_config.get_text_config(), "attn_logit_softcapping", None) is None:
        return config.attn_implementation
    if config.attn_implementation == "sdpa":
        raise ConfigError(
            "model.language_model.attn_implementation: got 'sdpa', which leaves out the cap on this LM's attention "
            "(attn_logit_softcapping); remove it, or give 'eager'"
        )
    return "eager"


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
        identity |= {"path": folder.name, "sha256": _weights_sha256(folder)}
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
        AssetError: when there is none, it cannot be read, or gives ids that the LM has no embeddings for.
        ConfigError: for a tokenizer without an end token.

    Example:
        >>> load_tokenizer(LanguageModelConfig(path=str(lm_folder))).eos_token
        '</s>'
    """
    resolved = resolve_language_model(config)
    lm_config = _read_config(resolved)
    folder = Path(resolved.location)
    if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise AssetError(
            f"{FIELD}: '{folder}' holds no tokenizer; expected tokenizer.json, tokenizer.model or vocab.json there: "
            "save the tokenizer that the model was trained with into the folder"
        )
    with reading(resolved.location, FIELD, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.location, revision=resolved.revision or "main", trust_remote_code=False
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{FIELD}: the tokenizer of '{config.path}' has no end-of-text token")
    _check_vocabulary(tokenizer, lm_config.get_text_config().vocab_size, config.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, path: str) -> None:
    """Refuse a tokenizer with tokens beyond the LM's embeddings.

    Special tokens that no text or template yields, such as a padding token that was added to the tokenizer alone, may
    lie beyond them.
    """
    template = str(tokenizer.chat_template or "")
    unseen = {
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and str(token) not in (tokenizer.eos_token, tokenizer.bos_token, "")
    }
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    read = sorted(number for token, number in beyond.items() if token not in unseen or token in template)
    if read:
        raise AssetError(
            f"{FIELD}: '{path}' has a tokenizer with {len(read)} tokens beyond the {embeddings} embeddings of its "
            f"model (first {read[0]}, {tokenizer.convert_ids_to_tokens(read[0])!r}); save the tokenizer that the model "
            "was trained with into the folder"
        )
