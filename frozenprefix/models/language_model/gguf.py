"""GGUF files → folders that `from_pretrained` reads, converted once per file with transformers' own GGUF support."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from frozenprefix.errors import AssetError
from frozenprefix.models.language_model.gguf_header import read_gguf_header
from frozenprefix.models.pretrained import is_lfs_pointer
from frozenprefix.utils import build_once, file_sha256, user_cache

logger = logging.getLogger(__name__)

# Part of the folder's name: raise it when a change here makes folders that older versions wrote wrong.
CONVERSION_VERSION = 1

# Values of `tokenizer.ggml.pre` for which llama.cpp splits at each digit and then as GPT-2 does (llama-vocab.cpp).
_SINGLE_DIGIT_PRE_TOKENIZERS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def gguf_to_pretrained(gguf_path: Path) -> Path:
    """Convert a GGUF file once to a transformers folder in the user's cache, and return that folder.

    The folder is `user_cache()/gguf/SHA256`. Its weights are the dequantised values, in the narrowest of float16,
    bfloat16 and float32 that holds all of them exactly; for quantised files that is float32.

    Raises:
        AssetError: there is no such file, the `gguf` package is missing, or the file is damaged or of a kind that
            transformers does not read.
    """
    gguf_path = Path(gguf_path)
    if not gguf_path.is_file():
        raise AssetError(f"GGUF file '{gguf_path}' does not exist")
    folder = user_cache() / "gguf" / f"{file_sha256(gguf_path)[:16]}-v{CONVERSION_VERSION}"
    return build_once(folder, lambda target: _convert(gguf_path, target))


def _convert(gguf_path: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(f"reading the GGUF file '{gguf_path}' needs the gguf package: run `pip install gguf`")
    read_gguf_header(gguf_path)  # its sizes are true before a reader allocates them
    logger.info("converting %s, once", gguf_path)
    try:
        model, tokenizer = _load(gguf_path)
    except Exception as error:
        # a damaged file can raise any error in the reader
        raise AssetError(f"GGUF file '{gguf_path}' {_why_unread(gguf_path, error)}") from error
    model.to(_narrowest_exact_dtype(model))  # type: ignore[arg-type]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _why_unread(gguf_path: Path, error: Exception) -> str:
    from gguf import GGUFReader

    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if is_lfs_pointer(gguf_path):
        return "is a Git LFS pointer in place of the file itself; run `git lfs pull` in its folder"
    try:
        field = GGUFReader(gguf_path).fields["general.architecture"]
        architecture = bytes(field.parts[field.data[0]]).decode()
    except Exception:
        size = gguf_path.stat().st_size
        return f"({size} bytes) is damaged, cut short or no GGUF file ({reason}); fetch it again"
    if architecture == "clip":
        return "holds the vision part of a model (mmproj); give the GGUF file of its language model"
    return (
        f"holds a model of architecture '{architecture}', which transformers {transformers.__version__} could not load "
        f"({reason}); give a folder in the format of transformers"
    )


def _load(gguf_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder, name = str(gguf_path.parent), gguf_path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    _split_digits(gguf_path, tokenizer)
    _name_special_tokens(gguf_path, tokenizer)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # versions that have this class refuse to save a model loaded without it
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, **options)
    return model, tokenizer


def _split_digits(gguf_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Split text at every digit before byte-level BPE if the file names a pre-tokenizer that does so.

    transformers ignores these names and uses GPT-2's pre-tokenizer, which groups white space before a digit
    ("a  2", "\\n\\n1.") differently than in the model's training.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).fields.get("tokenizer.ggml.pre")
    if field is not None and bytes(field.parts[field.data[0]]).decode() in _SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _name_special_tokens(gguf_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the special tokens from the file: releases of transformers before 5.18 take another one for the end."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_path).fields
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0])))


def _narrowest_exact_dtype(model: PreTrainedModel) -> torch.dtype:
    weights = [weight for weight in model.state_dict().values() if weight.is_floating_point()]
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return torch.float32
