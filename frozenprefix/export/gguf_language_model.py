"""A language model of the LLaMA family and its tokenizer as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frozenprefix.assets import resolve
from frozenprefix.errors import ExportError
from frozenprefix.export.gguf_tensors import FileType, write_tensors
from frozenprefix.inference.llama_cpp.captioner import SHA256_KEY

_ELSEWHERE = "convert it by llama.cpp's convert_hf_to_gguf.py, or use `frozenprefix export embeds` with another engine"
# transformers' model_type -> llama.cpp's architecture; those of "llama" rotate neighbouring pairs of query and key
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm"}
# llama.cpp's names of regular expressions that split text before byte-level BPE, by a text that is in them
_LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
_QWEN2 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_language_model(
    lm: Any, path: Path, file_type: FileType, *, tokenizer: Any = None, gguf_path: str = "", sha256: str | None = None
) -> None:
    """Write a language model of transformers.

    Args:
        tokenizer: its tokenizer; without one the file has none, and is read by token ids and embeddings only.
        gguf_path: the GGUF file that the language model came from, whose tokenizer is then copied.
        sha256: hash of the weights of the training, which `caption --engine llama.cpp` compares.

    Raises:
        ExportError: for another family than LLaMA, Mistral, Qwen 2 and Qwen 3, scaled rotary positions, and a tokenizer
            that is no byte-level BPE known to llama.cpp.

    Example:
        >>> write_language_model(model.language_model, tmp_path / "lm.gguf", "f32", tokenizer=processor.tokenizer)
    """
    import gguf

    config = lm.config
    if config.model_type not in _ARCHITECTURES:
        raise ExportError(
            f"model.language_model: a model of type '{config.model_type}', expected one of "
            f"{', '.join(_ARCHITECTURES)}; {_ELSEWHERE}"
        )
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(str(getattr(config, "name_or_path", "")).rpartition("/")[2] or config.model_type)
    _add_sizes(writer, config)
    if sha256 is not None:
        writer.add_string(SHA256_KEY, sha256)
    if gguf_path:
        _copy_tokenizer(writer, resolve(gguf_path))
    elif tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    write_tensors(writer, _tensors(lm, config, architecture), file_type)


def _add_sizes(writer: Any, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" or getattr(config, "sliding_window", None):
        what = f"rotary positions of type '{kind}'" if kind != "default" else "a sliding window"
        raise ExportError(f"model.language_model: it has {what}, which this export does not write; {_ELSEWHERE}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(lm: Any, config: Any, architecture: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in lm.base_model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers":
            inner, kind = ".".join(parts[2:-1]), parts[-1]
            if inner not in _LAYER:
                raise ExportError(f"model.language_model: its weight {name} has no place in llama.cpp's {architecture}")
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(_LAYER[inner])
            if architecture == "llama" and heads is not None:
                tensor = _interleave(tensor, heads)
            tensors[f"blk.{parts[1]}.{_LAYER[inner]}.{kind}"] = tensor
        else:
            tensors[f"{_WHOLE[parts[0]]}.{parts[-1]}"] = tensor
    head = lm.get_output_embeddings().weight
    if not torch.equal(head, tensors["token_embd.weight"]):
        tensors["output.weight"] = head
    return tensors


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of query or key in llama.cpp's order: the halves that are rotated together become neighbours."""
    # [heads * 2 * half, …] -> [heads, 2, half, …] -> [heads, half, 2, …]
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(content)
    tokens, types = _vocabulary(content, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_token_merges(merges)
    starts = tokenizer("")["input_ids"]
    writer.add_add_bos_token(bool(starts) and starts[0] == tokenizer.bos_token_id)
    for name in ("bos", "eos"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < vocab_size:
            getattr(writer, f"add_{name}_token_id")(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _vocabulary(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer does not use get a name of their own."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, number in content["model"]["vocab"].items():
        if number < vocab_size:
            tokens[number], types[number] = token, _NORMAL
    for added in content["added_tokens"]:
        if added["id"] < vocab_size:  # `<image>` lies beyond it
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a text is split before byte-level BPE."""
    steps = content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    if (
        content["model"]["type"] != "BPE"
        or not kinds
        or kinds[-1] != "ByteLevel"
        or content.get("normalizer") not in (None, {"type": "NFC"})
    ):
        raise ExportError(
            f"model.language_model: its tokenizer ({content['model']['type']}) is no byte-level BPE; {_ELSEWHERE}"
        )
    patterns = [str(part.get("pattern", {}).get("Regex", "")) for part in parts if part.get("type") == "Split"]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    for start, name in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
        if len(patterns) == 1 and patterns[0].startswith(start):
            return name
    raise ExportError(
        "model.language_model: its tokenizer splits text in a way that this export does not know under a name of "
        f"llama.cpp's; {_ELSEWHERE}"
    )


def _copy_tokenizer(writer: Any, path: Path) -> None:
    """Copy all keys `tokenizer.*` of a GGUF file."""
    import gguf

    for field in gguf.GGUFReader(path).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        is_text = field.types[-1] == gguf.GGUFValueType.STRING
        values = [bytes(field.parts[i]).decode() if is_text else field.parts[i].tolist()[0] for i in field.data]
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, values)
        else:
            writer.add_key_value(field.name, values[0], field.types[0])
