"""Beam search with the results of transformers' `generate`, without copying keys and values.

transformers gives every beam a batch row of its own: the prompt is read k times, and in every step the whole cache is
copied into the new order of beams. Here all beams of a prompt share one row, and so do prompts about the same images
(`trie_reader`). Prompts whose beams are finished leave the batch. With one beam this is greedy search. Scores, stopping
and ties follow transformers, whose rules the comments name where they surprise.

Shape letters: N prompts, k beams, C candidates, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frozenprefix.kernels.compat import attention_implementation
from frozenprefix.models.language_model.base import BeamOptions
from frozenprefix.models.language_model.trie_reader import Reader

IMPOSSIBLE = -1e9  # the score that transformers gives to what must not be chosen
BLOCK = 64  # words of the vocabulary that are looked at together
LOGIT_ROWS = 32  # rows of logits that are in float32 at a time
HEAD_ROWS = 256  # hidden states whose logits are in memory at a time

# Sampling from the LM's own distribution has these; by default transformers cuts off what is unlikely.
WHOLE_DISTRIBUTION = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
UNCUT = {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}  # where they are given
# Options of `generate` that this search follows; those that only matter for sampling or the form of the output; and
# the values at which the others change nothing.
FOLLOWED = {
    "num_beams", "max_new_tokens", "eos_token_id", "pad_token_id", "length_penalty", "early_stopping",
    "num_return_sequences", "return_dict_in_generate",
}  # fmt: skip
WITHOUT_EFFECT = {
    "transformers_version", "_from_model_config", "bos_token_id", "max_length", "output_scores", "temperature", "top_k",
    "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_assistant_tokens", "assistant_lookbehind",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind",
}  # fmt: skip
NEUTRAL = {
    "do_sample": False, "use_cache": True, "min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "remove_invalid_values": False, "output_attentions": False, "output_logits": False,
    "output_hidden_states": False, "renormalize_logits": False, "low_memory": False, "is_assistant": False,
    "disable_compile": False,
}  # fmt: skip


def beam_options(language_model: PreTrainedModel, options: dict[str, Any]) -> BeamOptions | None:
    """Options of transformers' `generate` as `BeamOptions`; None if this search does not support all of them.

    Example:
        >>> beam_options(model.language_model, {"num_beams": 4, "max_new_tokens": 8}).candidates
        8
        >>> beam_options(model.language_model, {"num_beams": 4, "max_new_tokens": 8, "do_sample": True}) is None
        True

    Sampling needs all of `temperature=1.0, top_k=0, top_p=1.0`, and no other cut.
    """
    config = copy.deepcopy(cast(Any, language_model.generation_config))
    unknown = config.update(**options)
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    sampled = all(values.get(name) == value for name, value in WHOLE_DISTRIBUTION.items())
    sampled = sampled and all(values.get(name, value) == value for name, value in UNCUT.items())
    if sampled:
        values |= {"do_sample": False, "num_beams": values.get("num_return_sequences", 1)}
    others = values.keys() - FOLLOWED - WITHOUT_EFFECT
    if unknown or any(name not in NEUTRAL or values[name] != NEUTRAL[name] for name in others):
        return None
    greedy = values.get("num_beams", 1) == 1 and not sampled
    if "max_new_tokens" not in values or ((greedy or sampled) and values.get("output_scores")):
        return None
    text = language_model.config.get_text_config()
    if attention_implementation(text) not in ("sdpa", "eager"):
        return None
    ends = values.get("eos_token_id", ())
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    if greedy:  # the first text that ends is the one; its score is the mean log-probability
        values |= {"length_penalty": 1.0, "early_stopping": True}
    beams = BeamOptions(
        values.get("num_beams", 1),
        values["max_new_tokens"],
        ends,
        values.get("pad_token_id", ends[0] if ends else 0),
        values.get("length_penalty", 1.0),
        values.get("early_stopping", False),
        values.get("num_return_sequences", 1),
        values.get("return_dict_in_generate", False),
        sampled,
    )
    return beams if beams.candidates <= text.vocab_size else None


@dataclass
class _Beams:
    """Running and finished beams of the prompts in the batch; the first dimension of all tensors is the prompt."""

    prompt: Tensor  # int64[N]: number of the prompt in the whole batch
    words: Tensor  # int64[N, k, max_new_tokens]
    score: Tensor  # float32[N, k], best first
    done_words: Tensor
    done_score: Tensor  # float32[N, k], best first, with the length penalty
    done: Tensor  # bool[N, k]: whether a finished text takes that place
    hopeful: Tensor  # bool[N, 1]: whether a running beam may still become one of the best

    def keep(self, prompts: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value.index_select(0, prompts))


class BeamSearch:
    """One search over a batch of prompts.

    Args:
        reader: of the prompts, with room for the beams of `options`.
        logits: gives the logits of what `reader` returns, float[M, ...] -> float[M, V].
    """

    def __init__(self, reader: Reader, logits: Callable[[Tensor], Tensor], options: BeamOptions):
        self.reader, self.logits, self.options = reader, logits, options

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        """Continue the reader's prompts.

        Returns:
            int64[N * num_return_sequences, new tokens] padded with `pad_token`, and their scores float32.
        """
        options, reader = self.options, self.reader
        self.beams = self._start(len(reader.row), reader.row.device)
        words = torch.full_like(self.beams.words, options.pad_token)
        score = torch.zeros_like(self.beams.done_score)
        # `words` and `score` are in the order of the whole batch; `self.beams` holds the prompts that are still open.
        hidden = reader.read_prompts()
        for step in range(options.max_new_tokens):
            next_words, parents = self._advance(hidden, step)
            open_ = self._is_open(step)
            left = int(open_.sum())
            last = step + 1 == options.max_new_tokens or left == 0
            if last or left < len(open_):
                words[self.beams.prompt], score[self.beams.prompt] = self.beams.done_words, self.beams.done_score
            if last:
                break
            if left < len(open_):
                prompt = open_.nonzero()[:, 0]
                self.beams.keep(prompt)
                reader.keep(prompt)
                next_words, parents = next_words[prompt], parents[prompt]
            hidden = reader.read_words(next_words, parents)
        count = options.num_return_sequences
        return self._crop(words[:, :count].flatten(0, 1)), score[:, :count].flatten()

    def _start(self, prompts: int, device: torch.device) -> _Beams:
        k, new = self.options.num_beams, self.options.max_new_tokens
        words = torch.full((prompts, k, new), self.options.pad_token, device=device)
        nothing = torch.full((prompts, k), IMPOSSIBLE, device=device)
        # One beam at first: k equal ones would choose the same best word k times.
        return _Beams(
            prompt=torch.arange(prompts, device=device),
            words=words,
            score=torch.zeros(prompts, 1, device=device),
            done_words=words.clone(),
            done_score=nothing,
            done=torch.zeros_like(nothing, dtype=torch.bool),
            hopeful=torch.ones(prompts, 1, dtype=torch.bool, device=device),
        )

    # ── the beams ──

    def _advance(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choose among the next words of all beams, whose last hidden states are float[N * width, D_lm].

        `width` is 1 in the first step, where all beams are still the same, and k afterwards.

        Returns:
            The words that continue, int64[N, k], and the beams that they continue, int64[N, k].
        """
        beams, k, count = self.beams, self.options.num_beams, self.options.candidates
        if k == 1:
            return self._advance_one(hidden, step)
        prompts, width = beams.score.shape
        # The best C of a prompt are among the best C of each beam, so the rest of the vocabulary is dropped here.
        value, word = self._likeliest_words(hidden, count)
        # [N, width * C] -> the best C of them
        score, at = (beams.score[:, :, None] + value.view(prompts, width, count)).flatten(1).topk(count)
        word, parent = word.view(prompts, width * count).gather(1, at), at // count
        # in the last step every candidate counts as ended, whatever its word
        ended = torch.zeros_like(word, dtype=torch.bool) if step + 1 < self.options.max_new_tokens else word >= 0
        for token in self.options.end_tokens:
            ended = ended | (word == token)
        self._finish(score, word, parent, ended, step)
        # a beam that ended does not run on; as in transformers, it gets a score far below all others
        score, order = (score + ended * IMPOSSIBLE).topk(k)
        word, parent = word.gather(1, order), parent.gather(1, order)
        beams.score = score
        beams.words = _take(beams.words, parent)
        beams.words[:, :, step] = word
        return word, parent

    def _advance_one(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """As `_advance` with one beam, which takes its likeliest word: a tenth of the operations."""
        beams = self.beams
        value, word = self._likeliest_words(hidden, 1)
        beams.score = beams.score + value
        beams.words[:, :, step] = word
        beams.done = torch.full_like(word, step + 1 == self.options.max_new_tokens, dtype=torch.bool)
        for token in self.options.end_tokens:
            beams.done |= word == token
        beams.done_words, beams.done_score = beams.words, beams.score / (step + 1)
        return word, torch.zeros_like(word)

    def _likeliest_words(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """float[M, D_lm] -> log-probabilities float32[M, C] and words int64[M, C]; few rows of logits at a time."""
        values, words = [], []
        for part in hidden.split(HEAD_ROWS):
            logits = self.logits(part)
            value, word = top_tokens(logits, count)
            values.append(value - log_normaliser(logits)[:, None])
            words.append(word)
        return torch.cat(values), torch.cat(words)

    def _finish(self, score: Tensor, word: Tensor, parent: Tensor, ended: Tensor, step: int) -> None:
        """Let texts that ended among the best k candidates replace worse finished ones."""
        beams, k = self.beams, self.options.num_beams
        # an end token below the best k candidates is ignored, a rule that transformers took over from fairseq
        ended = ended & (torch.arange(score.shape[1], device=score.device) < k)
        score = score / (step + 1) ** self.options.length_penalty
        # what must not be chosen stays in the list, with a hopeless score: shapes are the same in every step
        full = beams.done.all(-1, keepdim=True) & (self.options.early_stopping is True)
        score = score + (full | ~beams.hopeful) * IMPOSSIBLE + ~ended * IMPOSSIBLE
        words = _take(beams.words, parent)
        words[:, :, step] = word
        beams.done_score, order = torch.cat([beams.done_score, score], dim=1).topk(k)
        beams.done_words = _take(torch.cat([beams.done_words, words], dim=1), order)
        beams.done = torch.cat([beams.done, ended], dim=1).gather(1, order)

    def _is_open(self, step: int) -> Tensor:
        """bool[N]: prompts of which a running beam may still win, by transformers' rule."""
        beams, options = self.beams, self.options
        if options.num_beams == 1:
            return ~beams.done[:, 0]
        # the best score a running beam can end with: at its present length, or with "never" at the greatest length
        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if longest else step + 1
        best = beams.score[:, :1] / length**options.length_penalty
        worst = beams.done_score.min(dim=1, keepdim=True).values.masked_fill(
            ~beams.done.all(-1, keepdim=True), IMPOSSIBLE
        )
        beams.hopeful = beams.hopeful & (best > worst)
        full = beams.done.all(-1) & (options.early_stopping is True)
        return beams.hopeful[:, 0] & ~full

    def _crop(self, words: Tensor) -> Tensor:
        """Cut off the columns after the last end token; what follows an end token is padding already."""
        ends = torch.isin(words, torch.tensor(self.options.end_tokens, dtype=words.dtype, device=words.device))
        after = ends.cumsum(-1) - ends.long() > 0
        return words[:, : int((~after).sum(-1).max())]


def _take(tensor: Tensor, beams: Tensor) -> Tensor:
    """Rows of float[B, k, ...] in the order of int64[B, n]."""
    return tensor.gather(1, beams[:, :, None].expand(-1, -1, tensor.shape[2]))


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every row: float[N, V] -> float32[N, count], int64[N, count].

    The `count` largest are in the `count` blocks with the largest maxima: only those are sorted.

    Example:
        >>> top_tokens(torch.tensor([[0.0, 3.0, 1.0]]), 2)[1].tolist()
        [[1, 2]]
    """
    if count == 1:  # of equal logits the first one, as in transformers' greedy search
        value, word = logits.max(dim=1, keepdim=True)
        return value.float(), word
    vocabulary = logits.shape[1]
    blocks = vocabulary // BLOCK
    if blocks <= count:
        value, word = logits.topk(count)
        return value.float(), word
    # block b holds the words b, b + blocks, b + 2 * blocks, …
    body = logits[:, : blocks * BLOCK].unflatten(1, (BLOCK, blocks))
    best = body.amax(dim=1).topk(count).indices
    inside = body.gather(2, best[:, None, :].expand(-1, BLOCK, -1)).flatten(1)
    words = (best[:, None, :] + torch.arange(0, blocks * BLOCK, blocks, device=logits.device)[:, None]).flatten(1)
    rest = torch.arange(blocks * BLOCK, vocabulary, device=logits.device).expand(len(logits), -1)
    value, at = torch.cat([inside, logits[:, blocks * BLOCK :]], dim=1).topk(count)
    return value.float(), torch.cat([words, rest], dim=1).gather(1, at)


def log_normaliser(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials of every row, in float32: float[N, V] -> float32[N]."""
    # the largest probability is exp(largest logit - normaliser); softmax is one pass where logsumexp takes four
    chunks = (rows.float() for rows in logits.split(LOGIT_ROWS))
    return torch.cat([rows.amax(dim=-1) - rows.softmax(dim=-1).amax(dim=-1).log() for rows in chunks])
