"""Abilities of every causal language model of the installed transformers in this package.

    python -m benchmarks.families            # prints the table
    python -m benchmarks.families --write    # writes it to docs/language_models.md

Each class is built with two small random layers, and each thing that it is let in for is compared with transformers'
own forward pass: the loss of packed or plain rows, and greedy and beam-searched texts.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from frozenprefix.errors import ConfigError
from frozenprefix.models.language_model import DecoderOnlyLM, wrap_language_model
from frozenprefix.models.packing import Target, pack

PAGE = Path(__file__).parent.parent / "docs" / "language_models.md"
MARK = "<!-- families -->"

# Values for the fields of a config that make a model small; names differ between families.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), 1),
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "shared_expert_intermediate_size": 64,
    "head_dim": 8,
    "vocab_size": 300,
    "is_decoder": True,
}
# Fields beside them that some families need to be consistent, by model type.
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granite": {"logits_scaling": 4.0},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
}

NO_RULES = {"forced_eos_token_id": None, "forced_bos_token_id": None}  # which BART and its kin set


@dataclass(frozen=True)
class Family:
    """One class: how it is used, or why it is not.

    Attributes:
        packed: "yes", or the reason why rows hold one text.
    searched: "yes" for this package's beam search, "no" for transformers', or why neither generates.
        refused: why it is not let in at all.
        wrong: what it was let in for and computed wrongly; has to be empty.
    """

    name: str
    packed: str = ""
    searched: str = ""
    refused: str = ""
    wrong: str = ""


def tiny_model(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model with two small layers that reads token ids.

    Raises:
        ValueError: when the sizes that this script knows do not fit the class.
    """
    fields = config_class().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in fields or name.endswith("token_id")}
    problem = "too large"
    for left_out in ((), ("head_dim",)):
        chosen = {name: value for name, value in sizes.items() if name not in left_out}
        try:
            model = _build(config_class(**{**chosen, **OWN.get(config_class.model_type, {})}), model_class)
            if model is not None:
                model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
                return model
        except Exception as error:  # whatever a class raises for sizes that do not fit each other
            problem = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"no small config: {problem}")


def _build(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel | None:
    with torch.device("meta"):
        if sum(p.numel() for p in model_class(config).parameters()) > 5_000_000:
            return None
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # words that depend on more than the last one
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    return model.eval().requires_grad_(False)


def examine(model: PreTrainedModel) -> Family:
    """Let a model in, and compare what it is used for with its own forward pass."""
    name = type(model).__name__
    try:
        lm = wrap_language_model(model)
    except ConfigError as error:
        return Family(name, refused=str(error).partition("cannot be used with images: ")[2] or str(error))
    assert isinstance(lm, DecoderOnlyLM)
    packing = lm.packing_problem()
    beams = lm.beam_options(3, {"num_beams": 2, "max_new_tokens": 4, "eos_token_id": None, **NO_RULES})
    searched = "yes" if beams else "no"
    wrong = [_wrong_loss(lm, packing)]
    try:
        wrong.append(_wrong_texts(lm))
    except Exception as error:  # transformers' own refusal to generate from embeddings
        searched = f"no text: {str(error).splitlines()[0][:100]}"
    reason = "" if packing is None else packing.partition("packed rows: ")[2].partition("; set training")[0]
    return Family(name, reason or "yes", searched, wrong="; ".join(problem for problem in wrong if problem))


def _wrong_loss(lm: DecoderOnlyLM, packing: str | None) -> str:
    """The mean loss of three texts in the rows that training would use, against one text at a time."""
    texts = [(5, 6, 7, 8, 9, 10, 11), (5, 6, 12, 13, 14), (5, 6, 7, 20, 21, 22)]
    targets = [[Target(text, 2) for text in texts]]
    how: Any = "trie" if packing is None else "none"
    rows = lm.layout(pack(targets, image_token_id=-1, prefix_length=0, images_per_group=[0], packing=how))
    loss = float(lm.loss(rows, lm.embed(rows.input_ids)))
    expected = 0.0
    for text in texts:
        ids = torch.tensor(text)
        logits = lm.model(input_ids=ids[None], use_cache=False).logits[0, 1:-1].float()
        expected += float(F.cross_entropy(logits, ids[2:], reduction="sum"))
    return "" if abs(loss - expected) <= 1e-4 * expected else f"loss {loss:.5f}, expected {expected:.5f}"


def _wrong_texts(lm: DecoderOnlyLM) -> str:
    """Greedy words after embeddings, against words chosen by one whole forward pass each."""
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **NO_RULES}
    generated = lm.generate(lm.embed(prompt), torch.ones_like(prompt), **options)[0].tolist()
    ids = prompt
    for _ in range(4):
        logits = lm.model(inputs_embeds=lm.embed(ids), use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    expected = ids[0, 3:].tolist()
    return "" if generated == expected else f"greedy text {generated}, expected {expected}"


def examine_all() -> list[Family]:
    """All causal LMs, by the name of their class; those without a small size are refused with that reason."""
    families = {}
    for config_class, model_classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in model_classes if isinstance(model_classes, tuple) else (model_classes,):
            try:
                model = tiny_model(config_class, model_class)
            except Exception as error:
                lines = str(error).splitlines() or [""]
                families[model_class.__name__] = Family(model_class.__name__, refused=lines[0][:120])
                continue
            families[model_class.__name__] = examine(model)
    return [families[name] for name in sorted(families)]


def table(families: list[Family]) -> str:
    """The Markdown table; classes that could not be built small are left out and counted."""
    lines = ["| class | packed rows | own beam search |", "|---|---|---|"]
    unknown = 0
    for family in families:
        if family.refused.startswith("no small config"):
            unknown += 1
        elif family.refused:
            lines.append(f"| {family.name} | refused: {family.refused} | |")
        else:
            lines.append(f"| {family.name} | {family.packed} | {family.searched} |")
    lines += ["", f"transformers {transformers.__version__}; {unknown} further classes have no small config here."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = table(examine_all())
    if options.write:
        head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        PAGE.write_text(f"{head}{MARK}\n\n{text}\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
