"""Adapters of every method, and the inputs, logits and gradients by which tests compare models that have them."""

from __future__ import annotations

import torch

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample

LM = "model.language_model.peft="
LORA = LM + "{type: lora, r: 2, target_modules: all-linear}"
PREFIX = LM + "{type: prefix_tuning, num_virtual_tokens: 3}"
PROMPT = LM + "{type: prompt_tuning, num_virtual_tokens: 3}"
METHODS = {
    "lora": LORA,
    "dora": LM + "{type: dora, r: 2}",
    "adalora": LM + "{type: adalora, init_r: 3, target_r: 1}",
    "ia3": LM + "{type: ia3}",
    "prefix_tuning": PREFIX,
    "prompt_tuning": PROMPT,
}
PROMPTS = ["<image>", "a red <image> question", "<image> what color is this", "the <image> dog <image> man"]
TEXTS = ["a red circle", "a red dog in grass", "the dog runs", "a cat"]


def shake(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for adapter in model.adapters.values():
            for parameter in adapter.named_parameters().values():
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def inputs_of(processor, prompts, pixel_values):
    texts = [processor.with_image(prompt) for prompt in prompts]
    return {**processor(text=texts, return_tensors="pt"), "pixel_values": pixel_values}


def logits_of(model, processor, pixels):
    with torch.no_grad():
        return model(**inputs_of(processor, PROMPTS, pixels)).logits


def batch_of(processor, shapes, packing: str):
    groups = []
    for number, name in enumerate(("red_circle", "green_square")):
        path = shapes / "images" / f"{name}.png"
        groups.append(ImageGroup((path,), (Sample(f"s{number}", (path,), tuple(TEXTS)),)))
    return Collator(processor, packing=packing)(groups, [[(g.samples[0], text) for text in TEXTS] for g in groups])


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {f"{part}.{n}": p.grad for part, a in model.adapters.items() for n, p in a.named_parameters().items()}
    return loss.detach(), {name: grad.clone() for name, grad in found.items()}
