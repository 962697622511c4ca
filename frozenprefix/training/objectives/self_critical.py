"""Self-critical training: captions are sampled, and those that score above a baseline become likelier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from frozenprefix.config.objectives import SelfCriticalSection
from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.samples import ImageGroup
from frozenprefix.evaluation.metrics.captions import caption_metrics, cider_d
from frozenprefix.evaluation.metrics.references import CaptionReferences
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing.trie import Packing, Target, pack
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.validation import batch_bounds

# A word in the place of the end token. A reward that does not see where a caption ends teaches endings such as "on a"
# (Hu, Cavicchioli & Capotondi 2023, arXiv 2305.12254).
END_WORD = "endofcaption"


class SelfCritical:
    """REINFORCE on CIDEr-D (Rennie et al. 2017, section 3): the mean of `-(r(sample) - baseline) * log p(sample)`.

    The baseline is the reward of the greedy caption, or the mean reward of the image's other samples (Luo 2020,
    arXiv 2003.09971). Document frequencies are those of the training captions. All samples of an image are one packed
    trie, in which a target's weight is its advantage.
    """

    name = "self_critical"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        section: SelfCriticalSection,
        references: CaptionReferences,
        packing: Packing = "trie",
    ):
        self.model, self.processor, self.section, self.weight = model, processor, section, section.weight
        self.references, self.packing = references, packing
        self.figures: dict[str, float] = {}

    def prepare(self, batch: dict[str, Any], number: int) -> None:
        images: dict[str, Tensor] = {n: batch[n] for n in ("pixel_values", "image_features") if n in batch}
        groups = [group for group, _ in batch["samples"]]
        prompts = [self._prompt(group) for group in groups]
        count = self.section.samples
        drawn = self.draw(prompts, images, count)
        samples = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        rewards = self._rewards(groups, samples)
        if self.section.baseline == "greedy":
            greedy = self.draw(prompts, images)
            baselines = self._rewards(groups, [[one] for one in greedy]).expand_as(rewards)
        else:
            baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / (count - 1)
        self.figures = {"reward": float(rewards.mean()), "baseline": float(baselines.mean())}
        advantages = (rewards - baselines).tolist()
        batch["sampled"] = pack(
            [
                [Target([*prompt, *ids], len(prompt), weight) for ids, weight in zip(drawn, weights, strict=True)]
                for prompt, drawn, weights in zip(prompts, samples, advantages, strict=True)
            ],
            image_token_id=self.processor.image_token_id,
            prefix_length=self.processor.prefix_length,
            packing=self.packing,
        ).to(self.model.device)

    def count(self, batch: dict[str, Any]) -> int:
        return batch["sampled"].num_targets

    def loss(self, batch: dict[str, Any], prefix_embeds: Tensor) -> Tensor:
        sampled = batch["sampled"]
        return self.model.packed_loss(sampled, prefix_embeds) * (sampled.num_tokens / sampled.num_targets)

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """`cider_d` of greedy captions."""
        made: dict[str, str] = {}
        for start, end in batch_bounds(len(groups), size):
            part = groups[start:end]
            inputs = collator.image_inputs([path for group in part for path in group.images])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            drawn = self.draw([self._prompt(group) for group in part], inputs)
            made |= {image_key(g): self.processor.decode(ids) for g, ids in zip(part, drawn, strict=True)}
        captions = {image_key(group): [text for s in group.samples for text in s.targets] for group in groups}
        return {"cider_d": caption_metrics(made, captions).corpus["cider_d"]}

    def _prompt(self, group: ImageGroup) -> list[int]:
        return self.processor.encode_prompt(prompt_of(group.samples[0], self.processor))

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[list[int]], images: dict[str, Tensor], samples: int | None = None
    ) -> list[list[int]]:
        """Continue prompts, each `samples` times at random, or once greedily.

        Returns:
            Token ids of each text with its end token, which it lacks when it was cut at `max_new_tokens`.
        """
        padded = self.processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        training = self.model.training
        self.model.eval()
        made = self.model.generate(
            **{name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask")},
            **images,
            max_new_tokens=self.section.max_new_tokens,
            eos_token_id=self.end_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            **self._options(samples),
        )
        self.model.train(training)
        return [self._until_end(row) for row in made.tolist()]

    def _options(self, samples: int | None) -> dict[str, Any]:
        """The LM's own probabilities, whose gradient is taken, whatever settings for chats it comes with."""
        options: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "do_sample": samples is not None}
        if samples is not None:
            options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
        if self.processor.image_token_id < len(cast(Tensor, self.model.get_output_embeddings().weight)):
            options["suppress_tokens"] = [self.processor.image_token_id]
        return options

    @property
    def end_tokens(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({self.processor.tokenizer.eos_token_id, *own})

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self.end_tokens]
        return ids[: ends[0] + 1] if ends else ids

    def _rewards(self, groups: Sequence[ImageGroup], samples: Sequence[Sequence[list[int]]]) -> Tensor:
        """CIDEr-D of token ids: float32[images, samples]."""
        rows = [
            [cider_d(self._text(ids), self.references, image_key(group)) for ids in drawn]
            for group, drawn in zip(groups, samples, strict=True)
        ]
        return torch.tensor(rows)

    def _text(self, ids: list[int]) -> str:
        end = f" {END_WORD}" if ids[-1] in self.end_tokens else ""
        return self.processor.decode(ids) + end


def reward_references(groups: Iterable[ImageGroup]) -> CaptionReferences:
    """All captions of the training images, each closed by the end word."""
    captions = {
        image_key(group): [f"{text} {END_WORD}" for sample in group.samples for text in sample.targets]
        for group in groups
    }
    return CaptionReferences(captions)


def image_key(group: ImageGroup) -> str:
    """What an image's captions are found by."""
    return "\n".join(map(str, group.images))
