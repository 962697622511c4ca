"""Beam search with the results of transformers' `generate(num_beams=k)`, without copying keys and values.

transformers gives every beam a batch row of its own: the prompt is read k times, and in every step the whole cache is
copied into the new order of beams. Here all beams of an image share one row. The cache grows by k tokens a step, one
per beam, and is never reordered; what changes is who sees whom:

    step          0     1     2            the cache of one image with k = 2 after three steps
    beam 0      p p p   a0    a1    a2     ancestors of beam 0 at step 2, if it descends from beam 1:
    beam 1              b0    b1    b2         p p p, b0, b1, a2

So a beam is a path in a trie of written tokens, its mask (`_Beams.ancestors`) says which tokens are on the path, and
its position is prompt length + step, as it would be in a row of its own. Images whose beams are finished leave the
batch. Scores, stopping and ties follow transformers, whose rules the comments name where they surprise.

Shape letters: B images, P prompt length, k beams, C candidates, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, PreTrainedModel

from frozenprefix.kernels.attention import additive_mask, attention_for_rows, mask_per_kind
from frozenprefix.kernels.compat import CACHE, attention_implementation
from frozenprefix.models.language_model.base import BeamOptions, positions_from_mask

IMPOSSIBLE = -1e9  # the score that transformers gives to what must not be chosen
BLOCK = 64  # words of the vocabulary that are looked at together
LOGIT_ROWS = 32  # rows of logits that are in float32 at a time
LEAVE_AT = 8  # finished images leave the batch when they are one in eight

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
    """
    config = copy.deepcopy(cast(Any, language_model.generation_config))
    unknown = config.update(**options)
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    others = values.keys() - FOLLOWED - WITHOUT_EFFECT
    if unknown or any(name not in NEUTRAL or values[name] != NEUTRAL[name] for name in others):
        return None
    if values.get("num_beams", 1) < 2 or "max_new_tokens" not in values:
        return None
    text = language_model.config.get_text_config()
    if attention_implementation(text) not in ("sdpa", "eager"):
        return None
    ends = values.get("eos_token_id", ())
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    beams = BeamOptions(
        values["num_beams"],
        values["max_new_tokens"],
        ends,
        values.get("pad_token_id", ends[0] if ends else 0),
        values.get("length_penalty", 1.0),
        values.get("early_stopping", False),
        values.get("num_return_sequences", 1),
        values.get("return_dict_in_generate", False),
    )
    return beams if beams.candidates <= text.vocab_size else None


class _Layer(DynamicLayer):
    """Keys and values of one layer, float[B, heads, room, D], in memory that is allocated once."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # transformers' own layer concatenates, which copies the whole cache in every step; here new tokens are written
        # after the others, and attention reads a view of the filled part.
        new = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stores = [
                states.new_empty((*states.shape[:2], self.room, states.shape[3]))
                for states in (key_states, value_states)
            ]
            self.filled = 0
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, self.filled : self.filled + new] = states
        self.filled += new
        self.keys, self.values = (store[:, :, : self.filled] for store in self.stores)
        return self.keys, self.values

    def keep(self, images: Tensor) -> None:
        self.stores = [store.index_select(0, images) for store in self.stores]
        self.keys, self.values = (store[:, :, : self.filled] for store in self.stores)


@dataclass
class _Beams:
    """Running and finished beams of the images in the batch; the first dimension of all tensors is the image."""

    image: Tensor  # int64[B]: number of the image in the whole batch
    words: Tensor  # int64[B, k, max_new_tokens]
    score: Tensor  # float32[B, k], best first
    ancestors: Tensor  # bool[B, k, k * max_new_tokens]: which written tokens a beam sees
    done_words: Tensor
    done_score: Tensor  # float32[B, k], best first, with the length penalty
    done: Tensor  # bool[B, k]: whether a finished text takes that place
    hopeful: Tensor  # bool[B, 1]: whether a running beam may still become one of the best

    def keep(self, images: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value.index_select(0, images))


class BeamSearch:
    """One search over a batch of images.

    Args:
        decoder: the LM without its head.
        logits: gives the logits of last hidden states, float[..., D_lm] -> float[..., V].
        virtual_tokens: tokens that the LM puts into its cache by itself.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        decoder: nn.Module,
        logits: Callable[[Tensor], Tensor],
        options: BeamOptions,
        virtual_tokens: int = 0,
    ):
        self.language_model, self.options, self.virtual_tokens = language_model, options, virtual_tokens
        self.decoder, self.logits = decoder, logits
        self.config = language_model.config.get_text_config()

    @torch.no_grad()
    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Continue float[B, P, D] with int64[B, P] (0 on padding, which is on the left).

        Returns:
            int64[B * num_return_sequences, new tokens] padded with `pad_token`, and their scores float32.
        """
        options = self.options
        images, prompt = attention_mask.shape
        room = self.virtual_tokens + prompt + options.num_beams * options.max_new_tokens
        self.layers = [_Layer(room) for _ in range(self.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.prompt_seen, self.prompt_length = attention_mask.bool(), attention_mask.sum(-1)
        self.beams = self._start(images, inputs_embeds.device)
        words = torch.full_like(self.beams.words, options.pad_token)
        score = torch.zeros_like(self.beams.done_score)
        # `words` and `score` are in the order of the whole batch, everything in `self.beams` is of the open images.
        logits = self._read_prompt(inputs_embeds)
        for step in range(options.max_new_tokens):
            next_words = self._advance(logits, step)
            open_ = self._is_open(step)
            last = step + 1 == options.max_new_tokens or not bool(open_.any())
            closed = int((~open_).sum())
            # Taking images out copies the cache of the others, so it waits until enough of them are finished.
            if last or closed * LEAVE_AT >= len(open_):
                words[self.beams.image], score[self.beams.image] = self.beams.done_words, self.beams.done_score
            if last:
                break
            if closed * LEAVE_AT >= len(open_) and closed:
                next_words = self._leave(open_, next_words)
            logits = self._read_words(next_words, step)
        count = options.num_return_sequences
        return self._crop(words[:, :count].flatten(0, 1)), score[:, :count].flatten()

    def _start(self, images: int, device: torch.device) -> _Beams:
        k, new = self.options.num_beams, self.options.max_new_tokens
        words = torch.full((images, k, new), self.options.pad_token, device=device)
        nothing = torch.full((images, k), IMPOSSIBLE, device=device)
        # One beam at first: k equal ones would make k copies of the same best word.
        return _Beams(
            image=torch.arange(images, device=device),
            words=words,
            score=torch.zeros(images, 1, device=device),
            ancestors=torch.zeros(images, 1, k * new, dtype=torch.bool, device=device),
            done_words=words.clone(),
            done_score=nothing,
            done=torch.zeros_like(nothing, dtype=torch.bool),
            hopeful=torch.ones(images, 1, dtype=torch.bool, device=device),
        )

    # ── the language model ──

    def _read_prompt(self, inputs_embeds: Tensor) -> Tensor:
        """float[B, P, D] -> logits of the first word, float[B, V]."""
        prompt = inputs_embeds.shape[1]
        causal = torch.ones(prompt, prompt, dtype=torch.bool, device=inputs_embeds.device).tril()
        # a row of the mask with nothing to see would give NaN: padding sees itself
        itself = torch.eye(prompt, dtype=torch.bool, device=inputs_embeds.device)
        seen = (causal & self.prompt_seen[:, None, :]) | itself
        return self._forward(inputs_embeds, seen, positions_from_mask(self.prompt_seen))[:, -1]

    def _read_words(self, next_words: Tensor, step: int) -> Tensor:
        """The words that the beams chose, int64[B, k] -> logits of the next ones, float[B * k, V]."""
        k = next_words.shape[1]
        embeds = self.language_model.get_input_embeddings()(next_words)
        written = self.beams.ancestors[:, :, : (step + 1) * k]
        seen = torch.cat([self.prompt_seen[:, None, :].expand(-1, k, -1), written], dim=-1)
        positions = (self.prompt_length[:, None] + step).expand(-1, k)
        return self._forward(embeds, seen, positions).flatten(0, 1)

    def _forward(self, inputs_embeds: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Logits where a word is predicted: at the last token of a prompt, at every written word."""
        mask = additive_mask(seen, inputs_embeds.dtype)
        with attention_for_rows(self.language_model):
            hidden = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=mask_per_kind(self.config, mask),
                position_ids=positions,
                use_cache=True,
                **{CACHE: self.cache},
            ).last_hidden_state
        # The head is the largest product: of a prompt, which is read while there is one beam, only the end is needed.
        if self.beams.score.shape[1] == 1:
            hidden = hidden[:, -1:]
        return self.logits(hidden)

    # ── the beams ──

    def _advance(self, logits: Tensor, step: int) -> Tensor:
        """Choose among the next words of all beams; returns the words that continue, int64[B, k].

        `width` is 1 in the first step, where all beams are still the same, and k afterwards.
        """
        beams, k, count = self.beams, self.options.num_beams, self.options.candidates
        images, width = beams.score.shape
        # The best C of an image are among the best C of each beam, so the rest of the vocabulary is dropped here.
        value, word = top_tokens(logits, count)
        value = value - log_normaliser(logits)[:, None]
        # [B, width * C] -> the best C of them
        score, at = (beams.score[:, :, None] + value.view(images, width, count)).flatten(1).topk(count)
        word, parent = word.view(images, width * count).gather(1, at), at // count
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
        # a new beam sees what its parent saw, and its own word, which will be token `step * k + place` of the cache
        beams.ancestors = _take(beams.ancestors, parent)
        place = torch.arange(k, device=word.device)
        beams.ancestors[:, place, step * k + place] = True
        return word

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
        """bool[B]: images of which a running beam may still win, by transformers' rule."""
        beams, options = self.beams, self.options
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

    def _leave(self, open_: Tensor, next_words: Tensor) -> Tensor:
        """Take finished images out of the batch."""
        rows = open_.nonzero()[:, 0]
        self.beams.keep(rows)
        self.prompt_seen, self.prompt_length = self.prompt_seen[rows], self.prompt_length[rows]
        for layer in self.layers:
            layer.keep(rows)
        return next_words[rows]

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
