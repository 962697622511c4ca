"""Tiny random language models, and a tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path

WORDS = "a the dog cat man woman red blue green runs sits on in grass street shape what color is this question answer"


TINY = {"hidden": 32, "layers": 2, "heads": 4, "positions": 128}


def tiny_lm_config(family: str, vocab_size: int = 300):
    """A two-layer config of one LM family."""
    import transformers as t

    h, n, a, p = TINY["hidden"], TINY["layers"], TINY["heads"], TINY["positions"]
    llama_like = {
        "vocab_size": vocab_size,
        "hidden_size": h,
        "intermediate_size": 2 * h,
        "num_hidden_layers": n,
        "num_attention_heads": a,
        "num_key_value_heads": 2,
        "max_position_embeddings": p,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    builders = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=vocab_size, n_embd=h, n_layer=n, n_head=a, n_positions=p, bos_token_id=1, eos_token_id=2
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=vocab_size,
            hidden_size=h,
            num_hidden_layers=n,
            num_attention_heads=a,
            ffn_dim=2 * h,
            max_position_embeddings=p,
            word_embed_proj_dim=h,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=h,
            num_hidden_layers=n,
            num_attention_heads=a,
            intermediate_size=2 * h,
            max_position_embeddings=p,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "llama": lambda: t.LlamaConfig(**llama_like, tie_word_embeddings=True),
        "mistral": lambda: t.MistralConfig(**llama_like, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**llama_like),
        "qwen3": lambda: t.Qwen3Config(**llama_like, head_dim=8),
        "phi3": lambda: t.Phi3Config(**llama_like),
        "t5": lambda: t.T5Config(
            vocab_size=vocab_size,
            d_model=h,
            d_kv=h // a,
            d_ff=2 * h,
            num_layers=n,
            num_heads=a,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
        "gemma": lambda: t.GemmaConfig(**llama_like, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(
            **llama_like,
            head_dim=8,
            sliding_window=64,
            query_pre_attn_scalar=8,
            attn_implementation="eager",  # before 5.22 transformers leaves out the cap on its attention otherwise
        ),
        "gemma3": lambda: t.Gemma3TextConfig(**llama_like, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    }
    return builders[family]()


def make_tokenizer():
    """A byte-level BPE tokenizer with 300 entries at most, `<s>` = 1 and `</s>` = 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny_lm(folder: Path, family: str, sharpness: float = 1.0) -> Path:
    """Save a random LM and the tokenizer. A `sharpness` over 1 makes its words depend on more than the last token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = tiny_lm_config(family)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= sharpness
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def with_room(folder: Path, positions: int = 1024) -> Path:
    """Let a saved LM with rotary positions read longer texts, such as dialogs."""
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": positions}))
    return folder
