"""Fusion x mapper x LM family x PEFT: every pair of choices trains a step, is saved, loaded, generates, or is refused.

All combinations would be thousands; the cases are chosen so that every two choices of different kinds meet in one.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.mappers import MAPPERS
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.trainer import train

# test_vit at 32 pixels gives 4 tokens of 64 channels
PREFIX_LENGTH = {"pixel_shuffle": 4}
MAPPER_OPTIONS = {
    "transformer": {"num_layers": 1, "num_heads": 4},
    "perceiver": {"num_layers": 1, "num_heads": 4},
    "q_former": {"hidden_dim": 32, "num_layers": 2, "num_heads": 4},
    "mapl": {"hidden_dim": 32, "num_layers": 1, "num_heads": 4},
    "attention_pool": {"num_heads": 4},
}
FUSION_OPTIONS = {"cross_attention": {"every": 1, "num_heads": 2, "head_dim": 8}}
LM_FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "t5")
PEFT_OPTIONS = {
    "none": {},
    "lora": {"r": 2},
    "dora": {"r": 2},
    "adalora": {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "ia3": {},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
}
KINDS: dict[str, list[str]] = {
    "fusion": FUSIONS.names(),
    "mapper": MAPPERS.names(),
    "lm": list(LM_FAMILIES),
    "peft": list(PEFT_OPTIONS),
}


def pairs_of(case: dict[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(combinations(sorted(case.items()), 2))


def covering_cases() -> list[dict[str, str]]:
    """A short list of cases in which every two choices of different kinds meet: always the one with most new pairs."""
    everything = [dict(zip(KINDS, values, strict=True)) for values in product(*KINDS.values())]
    missing = set().union(*(pairs_of(case) for case in everything))
    cases = []
    while missing:
        best = max(everything, key=lambda case: len(pairs_of(case) & missing))
        cases.append(best)
        missing -= pairs_of(best)
    return cases


CASES = covering_cases()


def refusal(case: dict[str, str]) -> str | None:
    """What the one-line error says for a combination that cannot work."""
    if case["lm"] == "t5" and case["peft"] in ("prefix_tuning", "prompt_tuning"):
        return r"model\.language_model\.peft\.type: '\w+' needs an LM without an encoder"
    if case["lm"] == "t5" and case["fusion"] not in ("prefix", "deep_prefix"):
        return r"model\.fusion"
    return None


def overrides(case: dict[str, str]) -> list[str]:
    sections = {
        "model.mapper": {
            "type": case["mapper"],
            "prefix_length": PREFIX_LENGTH.get(case["mapper"], 2),
            **MAPPER_OPTIONS.get(case["mapper"], {}),
        },
        "model.fusion": {"type": case["fusion"], **FUSION_OPTIONS.get(case["fusion"], {})},
    }
    if case["peft"] != "none":
        chosen = {"type": case["peft"], **PEFT_OPTIONS[case["peft"]]}
        if case["lm"] == "phi3" and case["peft"] in ("lora", "dora", "adalora", "ia3"):
            chosen["target_modules"] = "[qkv_proj]"  # peft knows no default for it
        if case["lm"] == "phi3" and case["peft"] == "ia3":
            chosen["feedforward_modules"] = "[]"
        sections["model.language_model.peft"] = chosen
    settings = [f"training.max_steps={3 if case['peft'] == 'adalora' else 1}", "training.validate_every=3"]
    settings += ["training.packing=none"] if case["lm"] == "t5" else []
    # one override per section, so that no option of the tiny recipe's own mapper is left
    return [f"{key}={flow(value)}" for key, value in sections.items()] + settings


def flow(section: dict[str, object]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in section.items()) + "}"


def test_every_two_choices_meet():
    met = set().union(*(pairs_of(case) for case in CASES))
    for (one, first), (two, second) in combinations(KINDS.items(), 2):
        for a, b in product(first, second):
            assert tuple(sorted([(one, a), (two, b)])) in met
    assert len(CASES) < 150


@pytest.mark.parametrize("case", CASES, ids=["-".join(case.values()) for case in CASES])
def test_combination_trains_saves_loads_and_generates(case, tiny_recipe, tiny_lm, tmp_path):
    expected = refusal(case)
    if expected is not None:
        with pytest.raises(ConfigError, match=expected) as caught:
            train(tiny_recipe(tmp_path, *overrides(case), lm=tiny_lm(case["lm"])))
        assert "\n" not in str(caught.value).strip()
        return
    result = train(tiny_recipe(tmp_path, *overrides(case), lm=tiny_lm(case["lm"])))
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    processor = FrozenPrefixProcessor.from_pretrained(result.best)
    inputs = processor(text=["<image>a", "<image>the dog"], return_tensors="pt")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = model.generate(**inputs, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2
    assert 1 <= ids.shape[1] <= 4
    again = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert torch.equal(again.generate(**inputs, pixel_values=pixels, max_new_tokens=3, do_sample=False), ids)
