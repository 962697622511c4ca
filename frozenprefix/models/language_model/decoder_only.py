"""Decoder-only language models: GPT-2, Llama, Qwen and their kin."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.loss.loss_utils import ForCausalLMLoss

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.attention import attention_for_rows, mask_per_kind
from frozenprefix.kernels.compat import CACHE
from frozenprefix.models.language_model.base import FrozenLM, LMOutput, positions_from_mask
from frozenprefix.models.language_model.beam_search import BeamSearch, beam_options
from frozenprefix.models.packing.loss import cap, next_token_loss
from frozenprefix.models.packing.trie import PackedBatch, ancestor_mask


class DecoderOnlyLM(FrozenLM[PackedBatch]):
    """A causal LM, split into its decoder (embeddings to last hidden states) and its head (to logits).

    With the split, logits are computed only where something is predicted. It is checked once, on three tokens.

    Attributes:
        softcap: Gemma 2's cap on logits, `softcap * tanh(logits / softcap)`; None without one.

    Raises:
        ConfigError: when decoder and head do not give the LM's own logits.
    """

    keeps_history = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._check_split()

    # Both are looked up at every use: peft replaces layers in place, the head among them.

    @property
    def decoder(self) -> nn.Module:
        return self.model.base_model

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _check_split(self) -> None:
        inputs_embeds = self.embed(torch.arange(3, device=self.model.device)[None])
        whole = self.model(inputs_embeds=inputs_embeds).logits.float()
        parts = self.logits(self.decoder(inputs_embeds=inputs_embeds).last_hidden_state, torch.float32)
        if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"model.language_model: {self.name} changes its logits after the output layer in a way that this "
                "package does not know; it cannot be trained through"
            )

    def packing_problem(self, longest: int = 0) -> str | None:
        """Packed rows need attention with a mask of its own (no state-space layers) and given positions (no ALiBi)."""
        config = self.config
        if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
            return (
                f"{self.name} derives positions from the mask (ALiBi), so targets cannot share a row; "
                "set training.packing=none"
            )
        recurrent = ("ssm_state_size", "state_size", "mamba_d_state", "linear_num_value_heads")
        if any(hasattr(config, field) for field in recurrent):
            return f"{self.name} has recurrent layers, which read a row from left to right; set training.packing=none"
        window = getattr(config, "sliding_window", None)
        if window and longest > window:
            return (
                f"a packed text of {longest} tokens is longer than the LM's sliding window ({window}); shorten "
                "max_target_tokens or set training.packing=none"
            )
        return None

    def layout(self, packed: PackedBatch) -> PackedBatch:
        """The rows as they are."""
        return packed

    def hidden(self, rows: PackedBatch, inputs_embeds: Tensor) -> Tensor:
        """As `FrozenLM.hidden`; rows of one text each are read as a plain batch by an LM that cannot read tries."""
        problem = self.packing_problem(int(rows.position_ids.max()) + 1)
        layout: dict[str, Any]
        if problem is None:
            mask = ancestor_mask(rows.subtree_end, inputs_embeds.dtype)
            layout = {"attention_mask": mask_per_kind(self.config, mask), "position_ids": rows.position_ids}
        elif rows.lengths is None:
            raise ConfigError(f"training.packing: {problem}")
        else:
            places = torch.arange(rows.input_ids.shape[1], device=rows.lengths.device)
            layout = {"attention_mask": (places < rows.lengths[:, None]).long()}
        # [R, T, D_lm] -> [R, T, D_lm]
        with attention_for_rows(self.model) if problem is None else nullcontext():
            hidden = self.decoder(inputs_embeds=inputs_embeds, use_cache=False, **layout).last_hidden_state
        # [R, T, D_lm] -> [K, D_lm]
        return hidden.flatten(0, 1)[rows.predict_index]

    def loss(self, rows: PackedBatch, inputs_embeds: Tensor) -> Tensor:
        hidden = self.hidden(rows, inputs_embeds)
        edges = (rows.edge_source, rows.edge_label, rows.edge_weight)
        return next_token_loss(hidden, self.head, *edges, softcap=self.softcap)

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        logits = self.head(hidden)
        return cap(logits if dtype is None else logits.to(dtype), self.softcap)

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.decoder(
            # the tokenizer may pad with an added token, whose id lies outside the LM's vocabulary
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

    def generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, own_search: bool = True, **kwargs: Any
    ) -> Any:
        """By this package's beam search where it follows all options, else by transformers."""
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        self.check_length(inputs_embeds.shape[1], kwargs.get("max_new_tokens") or 1)
        options = None
        if own_search and not args and self.packing_problem() is None:
            options = beam_options(self.model, inputs_embeds.shape[1] + self.num_virtual_tokens, kwargs)
        if options is None:
            generate = cast(Any, self.model).generate
            return generate(None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        search = BeamSearch(self.model, self.logits, options, self.num_virtual_tokens)
        sequences, scores = search(inputs_embeds, attention_mask)
        if not options.as_dict:
            return sequences
        return GenerateBeamDecoderOnlyOutput(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, scores))
