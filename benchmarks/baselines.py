"""The baselines of the benchmarks: ClipCap's training step and beam search, and transformers' Llava."""

from __future__ import annotations

import copy
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from benchmarks.workloads import END, FEATURE, PREFIX, random_lm


def padded(captions: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Captions cut or padded to `length`: token ids int64[B, length], and their mask float[B, length]."""
    words, mask = torch.zeros(len(captions), length, dtype=torch.long), torch.zeros(len(captions), length)
    for row, caption in enumerate(captions):
        kept = caption[:length]
        words[row, : len(kept)], mask[row, : len(kept)] = torch.tensor(kept), 1
    return words, mask


class ClipCapStep:
    """A step of ClipCap's prefix-only training (Mokady et al. 2021), as in its published code.

    Every caption is a row with its own mapper pass, padded to the length of the data set (mean plus ten standard
    deviations). The LM computes logits at every position. Its weights keep `requires_grad`, and their gradients
    accumulate, because only the mapper's are cleared. One difference favours the baseline: padding is masked, and not
    marked by the id of a real token.
    """

    def __init__(self, config: PreTrainedConfig, mapper: nn.Module, all_captions: list[list[list[int]]]):
        self.language_model = random_lm(config).train()
        self.mapper = copy.deepcopy(mapper).train()
        self.optimizer = torch.optim.AdamW(self.mapper.parameters(), lr=2e-5)
        lengths = [len(caption) for texts in all_captions for caption in texts]
        self.length = min(int(statistics.mean(lengths) + 10 * statistics.pstdev(lengths)), max(lengths))

    def __call__(self, features: Tensor, captions: list[list[list[int]]]) -> None:
        rows = [caption for texts in captions for caption in texts]
        words, mask = padded(rows, self.length)
        # [images, 1, D] -> [captions, 1, D]
        repeated = features.repeat_interleave(len(captions[0]), dim=0)
        prefix = self.mapper(repeated)
        embeds = torch.cat([prefix, self.language_model.get_input_embeddings()(words)], dim=1)
        seen = torch.cat([torch.ones(len(rows), PREFIX), mask], dim=1)
        logits = self.language_model(inputs_embeds=embeds, attention_mask=seen, use_cache=False).logits
        logits = logits[:, PREFIX - 1 : -1]
        labels = words.masked_fill(mask == 0, -100)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class LlavaStep:
    """A step of transformers' Llava that trains only the projector, on precomputed vision features."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype):
        vision = CLIPVisionConfig(
            hidden_size=FEATURE, intermediate_size=FEATURE, num_hidden_layers=1, num_attention_heads=8, image_size=32
        )
        text = copy.deepcopy(config)
        torch.manual_seed(0)
        self.model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=config.vocab_size - 1)
        )
        self.model = self.model.to(dtype).train()
        self.model.requires_grad_(False)
        self.projector = self.model.model.multi_modal_projector.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.projector.parameters(), lr=1e-3)
        self.dtype = dtype

    def __call__(self, features: Tensor, captions: list[list[list[int]]]) -> None:
        """`features`: float32[images, 1, 512]. Each is repeated PREFIX times, as many as a vision tower's tokens."""
        rows = [[*caption, END] for texts in captions for caption in texts]
        words, mask = padded(rows, max(map(len, rows)))
        tokens = features.repeat_interleave(len(captions[0]), dim=0).expand(-1, PREFIX, -1).to(self.dtype)
        embeds = torch.cat([self.projector(tokens), self.model.get_input_embeddings()(words)], dim=1)
        seen = torch.cat([torch.ones(len(rows), PREFIX), mask], dim=1).long()
        labels = F.pad(words.masked_fill(mask == 0, -100), (PREFIX, 0), value=-100)
        self.model(inputs_embeds=embeds, attention_mask=seen, labels=labels, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def clipcap_beam_search(
    language_model: nn.Module, prefix: Tensor, *, num_beams: int, new_tokens: int, end: int | None
) -> Tensor:
    """Beam search for one image as in ClipCap's script: every step runs the whole sequence again, without a cache.

    Args:
        prefix: float[1, P, D].

    Returns:
        int64[new tokens], the beam with the best mean log-probability.
    """
    embeddings = language_model.get_input_embeddings()
    generated, words = prefix, torch.empty(1, 0, dtype=torch.long)
    scores, lengths, stopped = torch.zeros(1), torch.ones(num_beams), torch.zeros(num_beams, dtype=torch.bool)
    for step in range(new_tokens):
        logits = language_model(inputs_embeds=generated, use_cache=False).logits[:, -1]
        steps = logits.softmax(-1).log()
        vocabulary = steps.shape[1]
        if step == 0:
            scores, chosen = steps[0].topk(num_beams)
            generated = generated.expand(num_beams, -1, -1)
            words = chosen[:, None]
        else:
            steps[stopped] = -float("inf")
            steps[stopped, 0] = 0
            total = scores[:, None] + steps
            lengths[~stopped] += 1
            average, flat = (total / lengths[:, None]).flatten().topk(num_beams)
            parent, chosen = flat // vocabulary, flat % vocabulary
            lengths, stopped, generated = lengths[parent], stopped[parent], generated[parent]
            words = torch.cat([words[parent], chosen[:, None]], dim=1)
            scores = average * lengths
        generated = torch.cat([generated, embeddings(chosen)[:, None]], dim=1)
        if end is not None:
            stopped = stopped | (chosen == end)
            if stopped.all():
                break
    return words[int((scores / lengths).argmax())]
