"""Virtual tokens before everything else in a text, the image included: prompt tuning and prefix tuning.

For its callers, a language model with virtual tokens looks like one without. Two hooks around the decoder hide them:

    before   first pass     put V embeddings in front (prompt tuning), or start the cache with V keys and values in
                            every layer (prefix tuning)
             every pass     widen the mask by V columns, and shift positions by V
    after    first pass     take the V hidden states off again (prompt tuning)
             every pass     let the cache count the tokens after the virtual ones only

The last line is needed because callers use the cache's length: `generate` derives from it which tokens are new. While
the decoder runs, the cache has to count all of its tokens, so the hooks switch between the two. Packed rows,
transformers' `generate` and this package's beam search need no changes. A packed row has the virtual
tokens once, and all its texts see them.

Shape letters: B rows, T tokens, S tokens including those in the cache, V virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.compat import CACHE
from frozenprefix.models.fusion import Fusion, ImageContext

Mask = Tensor | dict[str, Any] | None


class VirtualTokens(nn.Module):
    """The output of peft's prompt encoder, before every text that the language model reads.

    Args:
        encoder: peft's prompt encoder, which holds the trained parameters.
        prompt: computes embeddings float[1, V, D_lm] or a cache of keys and values, for a batch of one.
        count: V.
        in_layers: True for keys and values in every layer (prefix tuning), False for embeddings (prompt tuning).
    """

    def __init__(self, encoder: nn.Module, prompt: Callable[[int], Any], count: int, in_layers: bool):
        super().__init__()
        self.encoder = encoder
        self.count, self.in_layers = count, in_layers
        self.enabled = True
        self._prompt = prompt
        self._context: ImageContext | None = None
        self._is_first = False
        # wrapped in a function, or the fusion would become a submodule of the language model
        self._fusion: Callable[[], Fusion | None] = lambda: None

    def attach(self, language_model: PreTrainedModel) -> None:
        """Put hooks around the decoder.

        Raises:
            ConfigError: for a language model that cannot hold virtual tokens.
        """
        # a method, not the layer: peft may replace the layer later
        self._embeddings = language_model.get_input_embeddings
        self._window = getattr(language_model.config.get_text_config(), "sliding_window", None)
        decoder = language_model.get_decoder()
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        # also after an error, or the fusion would keep the shifted context
        decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._probe(language_model)

    def follow(self, fusion: Fusion) -> None:
        """Shift the image positions that `fusion` shows the LM's layers by the tokens in front."""
        self._fusion = lambda: fusion

    @torch.no_grad()
    def _probe(self, language_model: PreTrainedModel) -> None:
        """Check on one token that the LM keeps the virtual ones in its cache."""
        token = torch.zeros(1, 1, dtype=torch.long, device=language_model.device)
        reason = "its decoder keeps no keys and values of them"
        try:
            cache = language_model(inputs_embeds=self._embeddings()(token), use_cache=True).get(CACHE)
            held = [] if cache is None else [layer.get_seq_length() for layer in cache.layers]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            held, reason = [], str(error).splitlines()[0] if str(error) else type(error).__name__
        if not held or any(length != self.count + 1 for length in held):
            raise ConfigError(
                f"model.language_model.peft: {type(language_model).__name__} takes no virtual tokens ({reason}); "
                "use lora, or another language model"
            )

    # ── before and after the decoder ──

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return None
        # callers pass arguments by position or by name; from here on all have names
        names = list(inspect.signature(decoder.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        # The decoder derives masks and positions from the length of the cache, so it has to see the whole length.
        cache = kwargs.get(CACHE)
        if cache is not None:
            self._check_is_ours(cache)
            show_length(cache)
        self._is_first = cache is None or cache.get_seq_length() == 0
        # Keys and values in the cache add columns to the mask only; embeddings in the input add rows to everything.
        rows = self._is_first and not self.in_layers
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = self._shift(positions, rows)
        kwargs["attention_mask"] = self._widen(kwargs.get("attention_mask"), rows, kwargs.get("position_ids"))
        if self._is_first:
            self._begin(kwargs)
        return (), kwargs

    def _begin(self, kwargs: dict[str, Any]) -> None:
        """First pass of a text: put the virtual tokens into the input, or into the cache."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self._embeddings()(kwargs["input_ids"])
        if self.in_layers:
            kwargs[CACHE] = self._fill(kwargs.get(CACHE), embeds)
            return
        # computed once and expanded: all rows have the same virtual tokens
        prompt = self._prompt(1).to(embeds.dtype).expand(len(embeds), -1, -1)
        # [B, T, D_lm] -> [B, V + T, D_lm]
        kwargs["inputs_embeds"], kwargs["input_ids"] = torch.cat([prompt, embeds], dim=1), None
        # A fusion looks up by place which image a token sees: while the decoder runs, these places are V further right.
        fusion = self._fusion()
        self._context = None if fusion is None else fusion.context
        if fusion is not None and self._context is not None:
            places = (self._context.prefix_index, self._context.image)
            index, image = (F.pad(place, (self.count, 0), value=-1) for place in places)
            fusion.context = replace(self._context, prefix_index=index, image=image)

    def _fill(self, cache: Cache | None, embeds: Tensor) -> Cache:
        """A cache that starts with the keys and values of the virtual tokens."""
        prompt = self._prompt(1)
        if cache is None:
            cache = Cache(layers=[DynamicLayer() for _ in prompt.layers])
        for number, layer in enumerate(prompt.layers):
            keys, values = (t.to(embeds.dtype).expand(len(embeds), -1, -1, -1) for t in (layer.keys, layer.values))
            cache.update(keys, values, number)
        return cache

    def _after(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.enabled:
            return
        fusion = self._fusion()
        if fusion is not None and self._context is not None:
            fusion.context, self._context = self._context, None
        if output is None:  # the decoder raised an error
            return
        if self._is_first and not self.in_layers:
            output.last_hidden_state = output.last_hidden_state[:, self.count :]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(hidden[:, self.count :] for hidden in output.hidden_states)
        if output.get(CACHE) is not None:
            hide_length(output[CACHE], self.count)

    # ── masks and positions ──

    def _check_is_ours(self, cache: Cache) -> None:
        if cache.get_seq_length() > 0 and not hides_length(cache):
            raise ConfigError(f"{CACHE}: got a cache that was filled without the virtual tokens; start a new one")

    def _shift(self, positions: Tensor, rows: bool) -> Tensor:
        """int64[B, T] -> int64[B, T], or int64[B, V + T] when the virtual tokens are in the input."""
        shifted = positions + self.count
        if not rows:
            return shifted
        own = torch.arange(self.count, dtype=positions.dtype, device=positions.device)
        return torch.cat([own.expand(len(positions), -1), shifted], dim=1)

    def _widen(self, mask: Mask, rows: bool, positions: Tensor | None) -> Mask:
        """Let all tokens see the virtual ones: [B, S] -> [B, V + S], [B, H, T, S] -> [B, H, (V +) T, V + S].

        Args:
            rows: whether the virtual tokens are in the input, so that a 4-D mask needs rows for them too. They see
                each other causally, and nothing after them.
        """
        if isinstance(mask, dict):
            return {kind: self._widen(one, rows, positions) for kind, one in mask.items()}
        if mask is None or mask.ndim == 2:
            return None if mask is None else F.pad(mask, (self.count, 0), value=1)
        if self._window and positions is not None and int(positions.max()) >= self._window:
            raise ConfigError(
                f"model.language_model.peft.num_virtual_tokens: with them a text is longer than the LM's sliding "
                f"window ({self._window}); shorten max_target_tokens, or take fewer of them"
            )
        # a 4-D mask is either bool, or added to the scores: 0 where a token is seen, the lowest number elsewhere
        seen, unseen = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        wide = F.pad(mask, (self.count, 0), value=seen)
        if not rows:
            return wide
        own = wide.new_full((*mask.shape[:2], self.count, wide.shape[3]), unseen)
        causal = torch.ones(self.count, self.count, dtype=torch.bool, device=mask.device).tril()
        own[..., : self.count] = own[..., : self.count].masked_fill(causal, seen)
        return torch.cat([own, wide], dim=2)


def hide_length(cache: Cache, count: int) -> None:
    """Let a cache count the tokens after the `count` virtual ones only, as its users do."""
    if not hides_length(cache):
        cache.get_seq_length = lambda layer_idx=0: type(cache).get_seq_length(cache, layer_idx) - count  # type: ignore[method-assign]


def show_length(cache: Cache) -> None:
    """Undo `hide_length`."""
    vars(cache).pop("get_seq_length", None)


def hides_length(cache: Cache) -> bool:
    return "get_seq_length" in vars(cache)
