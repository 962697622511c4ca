"""Self-critical training: sampled captions become more likely the more they score above a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from frozenprefix.config.objectives import SelfCriticalSection
from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.samples import ImageGroup
from frozenprefix.evaluation.metrics.captions import cider_d, word_precision
from frozenprefix.evaluation.metrics.references import CaptionReferences
from frozenprefix.models.language_model import end_tokens
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import Packing, Target, pack
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives.base import Batch, Objective, image_inputs
from frozenprefix.training.sampling import generate_ids, greedy_cider_d

# Stands for the end token. A reward that does not see where a caption ends teaches endings such as "on a"
# (Hu, Cavicchioli & Capotondi 2023, arXiv 2305.12254).
END_WORD = "endofcaption"


class SelfCritical(Objective):
    """REINFORCE on CIDEr-D (Rennie et al. 2017, section 3): the mean of `-(r(sample) - baseline) * log p(sample)`.

    The baseline is the reward of the greedy caption, or the mean reward of the image's other samples (Luo 2020,
    arXiv 2003.09971). Document frequencies are those of the training captions. With `word_precision` words that no
    reference has cost more than CIDEr-D takes for them: captions say less, and more of it is true. All samples of an
    image are packed into one trie, in which the weight of a target is its advantage.

    Args:
        references: captions of the training images, each closed by `END_WORD`; see `reward_references`.

    Example:
        >>> SelfCritical.name
        'self_critical'
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
        super().__init__(section.weight)
        self.model, self.processor, self.section = model, processor, section
        self.references, self.packing = references, packing

    def prepare(self, batch: Batch, number: int) -> None:
        images, count = image_inputs(batch), self.section.samples
        groups = [group for group, _ in batch["samples"]]
        prompts = [self.prompt(group) for group in groups]
        drawn = self.draw(prompts, images, count)
        samples = [drawn[start : start + count] for start in range(0, len(drawn), count)]
        rewards = self.rewards(groups, samples)
        if self.section.baseline == "greedy":
            greedy = self.draw(prompts, images)
            baselines = self.rewards(groups, [[ids] for ids in greedy]).expand_as(rewards)
        else:
            baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / (count - 1)
        self.figures = {"reward": float(rewards.mean()), "baseline": float(baselines.mean())}
        advantages = (rewards - baselines).tolist()
        targets = [
            [Target([*prompt, *ids], len(prompt), weight) for ids, weight in zip(texts, weights, strict=True)]
            for prompt, texts, weights in zip(prompts, samples, advantages, strict=True)
        ]
        batch["sampled"] = pack(
            targets,
            image_token_id=self.processor.image_token_id,
            prefix_length=self.processor.prefix_length,
            packing=self.packing,
        ).to(self.model.device)

    def count(self, batch: Batch) -> int:
        return batch["sampled"].num_targets

    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        sampled = batch["sampled"]
        return self.model.packed_loss(sampled, prefix_embeds) * (sampled.num_tokens / sampled.num_targets)

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """`cider_d` of greedy captions."""
        parts = (self.model, self.processor, collator, groups)
        value = greedy_cider_d(*parts, images_per_batch=size, max_new_tokens=self.section.max_new_tokens)
        return {"cider_d": value}

    def prompt(self, group: ImageGroup) -> list[int]:
        """Token ids of the prompt of a group's first sample."""
        return self.processor.encode_prompt(prompt_of(group.samples[0], self.processor))

    def draw(
        self, prompts: Sequence[list[int]], images: dict[str, Tensor], samples: int | None = None
    ) -> list[list[int]]:
        """Captions as token ids; see `generate_ids`."""
        length = self.section.max_new_tokens
        return generate_ids(self.model, self.processor, prompts, images, max_new_tokens=length, samples=samples)

    def rewards(self, groups: Sequence[ImageGroup], samples: Sequence[Sequence[list[int]]]) -> Tensor:
        """Rewards of the token ids of each image's samples: float32[images, samples]."""
        ends = end_tokens(self.model, self.processor.tokenizer)
        rows = []
        for group, texts in zip(groups, samples, strict=True):
            key = group.key
            closed = [self.processor.decode(ids) + (f" {END_WORD}" if ids[-1] in ends else "") for ids in texts]
            rows.append([self.reward(text, key) for text in closed])
        return torch.tensor(rows)

    def reward(self, text: str, key: str) -> float:
        """Reward of a caption, closed by `END_WORD` if it ended, for the image `key`."""
        reward, weight = cider_d(text, self.references, key), self.section.word_precision
        return reward + weight * word_precision(text, self.references, key) if weight else reward


def reward_references(groups: Iterable[ImageGroup]) -> CaptionReferences:
    """All captions of the training images, each closed by the end word.

    Example:
        >>> from pathlib import Path
        >>> from frozenprefix.data.samples import ImageGroup, Sample
        >>> sample = Sample(id="1", images=(Path("a.png"),), task="caption", targets=("a red circle",))
        >>> len(reward_references([ImageGroup(sample.images, (sample,))]))
        1
    """
    captions = {
        group.key: [f"{text} {END_WORD}" for sample in group.samples for text in sample.targets] for group in groups
    }
    return CaptionReferences(captions)
