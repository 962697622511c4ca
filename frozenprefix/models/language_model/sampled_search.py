"""Samples from the LM's own distribution: those of a prompt grow side by side in its row, like beams."""

from __future__ import annotations

import torch
from torch import Tensor

from frozenprefix.models.language_model.beam_search import HEAD_ROWS, BeamSearch


class SampledSearch(BeamSearch):
    """As many independent samples of each prompt as there are beams; all of them are returned.

    The score of a sample is the mean log-probability of its words, the end token with them. For the shape letters see
    `beam_search`.
    """

    def _advance(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        beams, k = self.beams, self.options.num_beams
        prompts, width = beams.score.shape
        # in the first step all samples are drawn from one distribution, afterwards one from each
        parts = [self._draw(part, k // width) for part in hidden.split(HEAD_ROWS)]
        value, word = (torch.cat(each).view(prompts, k) for each in zip(*parts, strict=True))
        done = beams.done
        word, value = word.masked_fill(done, self.options.pad_token), value.masked_fill(done, 0.0)
        beams.score = beams.score + value
        beams.words[:, :, step] = word
        beams.done_words = beams.words
        beams.done_score = torch.where(done, beams.done_score, beams.score / (step + 1))
        beams.done = done.clone()
        for token in self.options.end_tokens:
            beams.done |= word == token
        parents = torch.arange(k, device=word.device) % width
        return word, parents.expand_as(word)

    def _draw(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """float[M, D_lm] -> log-probabilities float32[M, count] and words int64[M, count] after each of them."""
        chances = self.logits(hidden).float().log_softmax(dim=-1)
        # `torch.multinomial` draws a random number for every word of the vocabulary, which takes longer than a layer
        below = chances.double().exp_().cumsum(dim=-1)
        place = torch.rand(len(below), count, dtype=below.dtype, device=below.device) * below[:, -1:]
        words = torch.searchsorted(below, place, right=True).clamp_(max=below.shape[1] - 1)
        return chances.gather(1, words), words

    def _is_open(self, step: int) -> Tensor:
        return ~self.beams.done.all(dim=-1)
