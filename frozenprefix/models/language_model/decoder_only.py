"""Decoder-only language models: GPT-2, Llama, Qwen and their kin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.attention import attention_for_rows, mask_per_kind
from frozenprefix.kernels.compat import CACHE
from frozenprefix.kernels.prepack import prepacked_to_generate
from frozenprefix.models.freezing import evaluating
from frozenprefix.models.language_model.base import (
    BeamOptions,
    FrozenLM,
    LMOutput,
    positions_from_mask,
    with_one_config,
)
from frozenprefix.models.language_model.beam_search import beam_options
from frozenprefix.models.language_model.search import generated, search, search_rows
from frozenprefix.models.language_model.trie_reader import Prompts, TrieReader
from frozenprefix.models.packing import PackedBatch, Target, ancestor_mask, pack
from frozenprefix.models.packing.loss import cap, next_token_loss

logger = logging.getLogger(__name__)

# Fields by which configs name the number of tokens that some of their layers look back.
WINDOW_FIELDS = ("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention")
# Fields by which configs name a cap on the logits: Gemma 2, RecurrentGemma, xLSTM.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Relative differences that rounding may cause. In bfloat16 it caused 0.09 in a random LM with large weights, as much as
# some errors cause: there the exact test for a text that sees its neighbour has to find them.
# Nudge of the embeddings, in units of rounding, and how often the change that it causes may be found again.
NUDGE = 4.0
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.2}


class DecoderOnlyLM(FrozenLM[PackedBatch]):
    """A causal LM, split into its decoder (embeddings to last hidden states) and its head (to logits).

    With the split, logits are computed only where something is predicted. The abilities of an LM are not looked up in a
    list of names but tested on a few tokens: the split when it is wrapped, packed rows and beam search before their
    first use.

    Attributes:
        softcap: cap on the logits, `softcap * tanh(logits / softcap)` (Gemma 2); None without one.
        logit_scale: factor on the logits (Granite, Cohere, Falcon-H1), 1 for most LMs.

    Raises:
        ConfigError: when decoder and head do not give the LM's own logits.

    Example:
        >>> lm = DecoderOnlyLM(model.language_model)
        >>> lm.packing_problem() is None, lm.logit_scale
        (True, 1.0)
    """

    keeps_history = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        caps = (getattr(self.config, name, None) for name in SOFTCAP_FIELDS)
        self.softcap: float | None = next((cap for cap in caps if cap is not None), None)
        self.logit_scale = 1.0
        self._trials: dict[str, str | None] = {}
        self._find_split()

    # Both are looked up at every use: peft replaces layers in place, the head among them.

    @property
    def decoder(self) -> nn.Module:
        decoder = self.model.base_model
        # Llama 4's text model names a base model that only the model around it has
        return decoder if decoder is not self.model else cast(Any, self.model).model

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _find_split(self) -> None:
        """Check on three tokens that the LM is causal, and that decoder and head give its logits, scaled or not."""
        problem = "its logits are not those of its output layer, nor scaled by a factor in its config"
        try:
            inputs_embeds = self.embed(torch.arange(3, device=self.model.device)[None])
            whole = self.model(inputs_embeds=inputs_embeds, use_cache=False).logits.float()
            if not torch.isfinite(whole).all():
                raise ConfigError("its logits are not finite; its weights are damaged, or too large for its dtype")
            start = self.model(inputs_embeds=inputs_embeds[:, :2], use_cache=False).logits.float()
            if self._difference(start, whole[:, :2]):
                raise ConfigError("it is not causal: its tokens see those after them")
            hidden = self.decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
            for scale in _logit_scales(self.config):
                self.logit_scale = scale
                parts = self.logits(hidden, torch.float32)
                if whole.shape == parts.shape and not self._difference(parts, whole):
                    return
        except ConfigError as error:
            problem = str(error)
        except Exception as error:  # any error that the code of a model raises if it does not read embeddings
            problem = _one_line(error)
        raise ConfigError(f"model.language_model: {self.name} cannot be used with images: {problem}")

    def _to_head(self, hidden: Tensor) -> Tensor:
        """Last hidden states -> input of the head, which carries the scale of the logits."""
        before_head = getattr(self.model, "lm_head", self.head)
        if all(module is not self.head for module in before_head.modules()):  # ModernBERT has a layer in between
            hidden = before_head(hidden)
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    # ── what this LM can do ──

    def packing_problem(self, longest: int = 0) -> str | None:
        """As `FrozenLM.packing_problem`: found out by packing two short texts, once per model."""
        problem = self._try("packed rows", self._try_packed_rows)
        if problem is not None:
            return f"{problem}; set training.packing=none"
        window = self._window
        if window is not None and longest > window:
            return (
                f"a packed text of {longest} tokens is longer than the LM's sliding window ({window}); shorten "
                "max_target_tokens or set training.packing=none"
            )
        return None

    @property
    def _window(self) -> int | None:
        """Tokens that the layer with the shortest sight looks back; packed rows and own beam search ignore it."""
        windows = [getattr(self.config, name, None) for name in WINDOW_FIELDS]
        return min((window for window in windows if isinstance(window, int) and window > 0), default=None)

    def _try(self, ability: str, trial: Callable[[], str | None]) -> str | None:
        """Run a trial, once per model and process; return one line that says what is wrong, or None."""
        if ability not in self._trials:
            key = (type(self.model), self.model.config.to_json_string(), self.dtype, self.model.device.type, ability)
            if key not in _TRIALS:
                try:
                    # no dropout, and gradients also where the caller has switched them off
                    with evaluating(self.model), torch.inference_mode(False), torch.enable_grad():
                        problem = trial()
                except (
                    Exception
                ) as error:  # any error that the code of a model raises for a mask or cache it cannot use
                    problem = _one_line(error)
                _TRIALS[key] = None if problem is None else f"{self.name} cannot be used with {ability}: {problem}"
            self._trials[ability] = _TRIALS[key]
            if _TRIALS[key] is not None:
                logger.info("%s", _TRIALS[key])
        return self._trials[ability]

    def _try_packed_rows(self) -> str | None:
        """Compare loss and input gradient of a packed row with those of its two texts one by one."""
        if "local" in getattr(self.config, "attention_layers", ()):  # GPT-Neo
            return "its local layers count tokens in the row, not in the text"
        texts = ((0, 1, 2, 3, 4, 5), (0, 1, 6, 7, 8, 9))
        words = self.embed(torch.arange(10, device=self.model.device)).detach().requires_grad_()
        rows = pack([[Target(text, 1) for text in texts]], image_token_id=-1, prefix_length=0, images_per_group=[0])
        rows = rows.to(self.model.device)
        inputs_embeds = words[rows.input_ids]
        # the second text alone must not depend on the words of the first: exactly, so in every dtype
        second = replace(rows, edge_weight=rows.edge_weight * (rows.edge_label >= 6))
        (gradient,) = torch.autograd.grad(self.loss(second, inputs_embeds), words, retain_graph=True)
        if gradient[2:6].any():
            return "a text sees the text before it in the row"
        packed, alone = self.loss(rows, inputs_embeds), self._loss_alone(texts, words)
        gradients = [torch.autograd.grad(loss, words)[0].float() for loss in (packed, alone)]
        if self._difference(packed, alone) is None and self._difference(*gradients) is not None:
            # rounding grows on its way back through large activations: how much does it, in texts of their own?
            signs = 1 - 2 * (torch.arange(self.dim, device=words.device) % 2)
            nudged = (words + words * (NUDGE * torch.finfo(words.dtype).eps) * signs).detach().requires_grad_()
            (moved,) = torch.autograd.grad(self._loss_alone(texts, nudged), nudged)
            if (gradients[0] - gradients[1]).norm() <= NUDGE * (moved.float() - gradients[1]).norm():
                return None
        return self._difference(packed, alone) or self._difference(*gradients)

    def _loss_alone(self, texts: Sequence[Sequence[int]], words: Tensor) -> Tensor:
        """Loss of texts that are read one by one; `words`: float[words, D_lm], the embeddings of all of them."""
        loss = torch.zeros((), device=words.device)
        for text in texts:
            ids = torch.tensor(text, device=words.device)
            logits = self.model(inputs_embeds=words[ids][None], use_cache=False).logits[0, :-1].float()
            loss = loss + F.cross_entropy(logits, ids[1:], reduction="sum")
        return loss

    def _try_beam_search(self) -> str | None:
        """Compare the scores of a short beam search with those of its texts read as a whole."""
        options = BeamOptions(num_beams=2, max_new_tokens=3)
        prompts = self.embed(torch.arange(6, device=self.model.device).view(2, 3))
        mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=self.model.device)
        words, scores = self._search(Prompts.from_mask(prompts, mask), options)
        expected = []
        for prompt, length, written in zip(prompts, mask.sum(1).tolist(), words, strict=True):
            inputs_embeds = torch.cat([prompt[-length:], self.embed(written)])[None]
            logits = self.model(inputs_embeds=inputs_embeds, use_cache=False).logits[0, length - 1 : -1].float()
            expected.append(logits.log_softmax(dim=-1).gather(1, written[:, None]).mean())
        return self._difference(scores, torch.stack(expected))

    def _difference(self, value: Tensor, expected: Tensor) -> str | None:
        relative = float((value.detach() - expected.detach()).norm() / expected.detach().norm())
        # written so that NaN, too, is a difference
        return None if relative <= TOLERANCE[self.dtype] else f"its results differ by {relative:.2g}"

    def _search(self, prompts: Prompts, options: BeamOptions) -> tuple[Tensor, Tensor]:
        """As `BeamSearch`."""
        with self._reading(prompts, options) as reader:
            return search(reader, self.logits, options)

    @contextmanager
    def _reading(self, prompts: Prompts, options: BeamOptions) -> Iterator[TrieReader]:
        """A reader of prompts; inside the block the LM's weights are packed for it."""
        with prepacked_to_generate(self.model):
            yield TrieReader(
                self.model,
                self.decoder,
                prompts,
                num_beams=options.num_beams,
                new_tokens=options.max_new_tokens,
                virtual_tokens=self.num_virtual_tokens,
            )

    @contextmanager
    def reading_rows(self, rows: PackedBatch, inputs_embeds: Tensor, options: BeamOptions) -> Iterator[TrieReader]:
        """A reader of the prompts of packed rows, for `search_rows` inside the block."""
        self.check_length(int(rows.position_ids.max()) + 1, options.max_new_tokens)
        with self._reading(Prompts.from_packed(rows, inputs_embeds), options) as reader:
            yield reader

    # ── packed rows ──

    def layout(self, packed: PackedBatch) -> PackedBatch:
        """The rows themselves; an LM that cannot read tries gets rows of one text each as a plain batch."""
        problem = self.packing_problem(int(packed.position_ids.max()) + 1)
        if problem is None:
            return replace(packed, lengths=None)
        if packed.lengths is None:
            raise ConfigError(f"training.packing: {problem}")
        return packed

    def hidden(self, rows: PackedBatch, inputs_embeds: Tensor) -> Tensor:
        layout: dict[str, Any]
        if rows.lengths is None:
            mask = ancestor_mask(rows.subtree_end, inputs_embeds.dtype)
            layout = {"attention_mask": mask_per_kind(self.config, mask), "position_ids": rows.position_ids}
        else:
            places = torch.arange(rows.input_ids.shape[1], device=rows.lengths.device)
            layout = {"attention_mask": (places < rows.lengths[:, None]).long()}
        # [R, T, D_lm] -> [R, T, D_lm]
        with attention_for_rows(self.model) if rows.lengths is None else nullcontext():
            hidden = self.decoder(inputs_embeds=inputs_embeds, use_cache=False, **layout).last_hidden_state
        # [R, T, D_lm] -> [K, D_lm]
        return hidden.flatten(0, 1)[rows.predict_index]

    def loss(self, rows: PackedBatch, inputs_embeds: Tensor, label_smoothing: float = 0.0) -> Tensor:
        hidden = self._to_head(self.hidden(rows, inputs_embeds))
        edges = (rows.edge_source, rows.edge_label, rows.edge_weight)
        return next_token_loss(hidden, self.head, *edges, softcap=self.softcap, label_smoothing=label_smoothing)

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        logits = self.head(self._to_head(hidden))
        return cap(logits if dtype is None else logits.to(dtype), self.softcap)

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.decoder(
            # the tokenizer may pad with an added token, whose id is outside the LM's vocabulary
            input_ids=input_ids.masked_fill(attention_mask == 0, 0),
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            use_cache=False,
        ).last_hidden_state

    def prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As they are."""
        return input_ids, attention_mask

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None, **kwargs: Any
    ) -> LMOutput:
        """As `FrozenLM.forward`; `labels`: int64[B, T], shifted inside as in transformers."""
        if kwargs.get("position_ids") is None and attention_mask is not None and kwargs.get(CACHE) is None:
            kwargs["position_ids"] = positions_from_mask(attention_mask)
        # [B, T, D_lm] -> [B, T, V]
        outputs = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        loss = None if labels is None else ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1])
        return LMOutput(outputs.logits, loss, outputs.get(CACHE))

    def beam_options(self, prompt_length: int, options: dict[str, Any]) -> BeamOptions | None:
        """As `FrozenLM.beam_options`; an LM that fails a trial is searched by transformers."""
        beams = beam_options(self.model, options)
        if beams is None:
            return None
        length = self.num_virtual_tokens + prompt_length + beams.max_new_tokens
        if self.packing_problem() is not None or (self._window is not None and length >= self._window):
            return None
        problem = self._try("this package's beam search", self._try_beam_search)
        return beams if problem is None else None

    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        beams: BeamOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        self.check_length(inputs_embeds.shape[1], kwargs.get("max_new_tokens") or 1)
        if beams is None:
            generate, kwargs = cast(Any, self.model).generate, with_one_config(kwargs)
            return generate(None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return generated(*self._search(Prompts.from_mask(inputs_embeds, attention_mask), beams), beams)

    def continue_rows(self, rows: PackedBatch, inputs_embeds: Tensor, beams: BeamOptions) -> Any:
        with self.reading_rows(rows, inputs_embeds, beams) as reader:
            return search_rows(reader, self.logits, rows, beams)


# what was found out about models in this process, by class, config, dtype, kind of device and ability
_TRIALS: dict[tuple[Any, ...], str | None] = {}


def _logit_scales(config: Any) -> list[float]:
    """Factors on the logits that a config may name; 1 first."""
    factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    return [1.0, *(float(f) for f in factors if isinstance(f, int | float)), *([1.0 / divisor] if divisor else [])]


def _one_line(error: Exception) -> str:
    """An error of third-party code as part of a line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__
