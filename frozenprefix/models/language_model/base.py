"""The interface of frozen language models.

Shape letters: R rows, T row length, B texts, L target length, K predicting nodes, D_lm width of the LM, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from frozenprefix.errors import ConfigError
from frozenprefix.models.freezing import freeze
from frozenprefix.models.packing import PackedBatch


class Rows(Protocol):
    """The part of a packed batch that enters the LM as input embeddings.

    Attributes:
        input_ids: int64[R, T].
        prefix_index: int64[R, T], index of each image placeholder among all placeholders, -1 for text.
        latest_index: int64[R, T], index of the latest placeholder up to each token, -1 for none.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def prefix_index(self) -> Tensor: ...
    @property
    def latest_index(self) -> Tensor: ...


RowsT = TypeVar("RowsT", bound=Rows)
# arguments of `generate` that read the prompt's token ids, or would replace its embeddings
NEED_TOKENS = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "inputs_embeds", "negative_prompt_ids",
    "negative_prompt_attention_mask", "guidance_scale",
)  # fmt: skip


@dataclass
class LMOutput:
    """Result of a plain batch: logits float[B, T, V], the mean loss with labels, and keys and values."""

    logits: Tensor
    loss: Tensor | None = None
    cache: Any = None


@dataclass(frozen=True)
class BeamOptions:
    """Options of a search, with the meaning of transformers' `GenerationConfig`; one beam is greedy search.

    Attributes:
        sampled: the beams are independent samples from the LM's own distribution.
    """

    num_beams: int
    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    as_dict: bool = False
    sampled: bool = False

    @property
    def candidates(self) -> int:
        """Enough that `num_beams` continue even if every end token is among the best words of every beam."""
        return 1 if self.num_beams == 1 or self.sampled else max(2, 1 + len(self.end_tokens)) * self.num_beams


class FrozenLM(nn.Module, ABC, Generic[RowsT]):
    """A frozen language model that reads input embeddings.

    The model puts images into the embeddings; the LM computes hidden states, losses and continuations from them.

    Attributes:
        model: the transformers model.
        num_virtual_tokens: tokens that an adapter puts before every text and keeps in the LM's cache.
        keeps_history: whether a text can be continued from its cache, as a dialog needs.
        is_encoder_decoder: which kind of transformers' models the class wraps.

    Example:
        >>> model.lm.dim, model.lm.dtype, model.lm.start_token
        (32, torch.float32, 1)
        >>> model.lm.embed(torch.tensor([[5, 6, 7]])).shape
        torch.Size([1, 3, 32])
    """

    keeps_history: ClassVar[bool]
    is_encoder_decoder: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = _one_pass_activations(model)
        self.num_virtual_tokens = 0

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> FrozenLM[Any]:
        """Freeze any causal or encoder-decoder language model of transformers, in place, and wrap it.

        Raises:
            ConfigError: for a model that does not read embeddings, or is not causal.

        Example:
            >>> from transformers import AutoModelForCausalLM
            >>> lm = FrozenLM.from_model(AutoModelForCausalLM.from_pretrained(lm_folder))
            >>> lm.dim, any(parameter.requires_grad for parameter in lm.parameters())
            (32, False)
        """
        encoder = bool(model.config.is_encoder_decoder)
        kind = next(kind for kind in FrozenLM.__subclasses__() if kind.is_encoder_decoder == encoder)
        return kind(freeze(model))

    @property
    def config(self) -> Any:
        """The config of the text model, also for LMs that are part of a larger one."""
        return self.model.config.get_text_config()

    @property
    def name(self) -> str:
        """The transformers class, for messages."""
        return type(self.model).__name__

    @property
    def dim(self) -> int:
        """D_lm."""
        return word_embeddings(self.model).weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings: the size that a prefix starts with."""
        return embedding_rms(self.model)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the LM can read at once, without virtual tokens; None where nothing limits them."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return None if positions is None else positions - self.num_virtual_tokens

    @property
    def learned_positions(self) -> int | None:
        """Tokens that the LM's table of learned positions has room for (GPT-2, OPT); None if positions are computed.

        Example:
            >>> model.lm.learned_positions is None  # LLaMA rotates
            True
        """
        size, words = getattr(self.config, "max_position_embeddings", None), word_embeddings(self.model)
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding) and module is not words]
        # OPT and BART keep two more rows
        if size is None or all(table.num_embeddings not in (size, size + 2) for table in tables):
            return None
        return size - self.num_virtual_tokens

    def check_length(self, tokens: int, new: int = 1, *, what: str = "max_new_tokens: the prompt") -> None:
        """Raise `ConfigError` when `tokens`, and `new` generated ones after them, need more positions than there are.

        Example:
            >>> model.lm.check_length(1000, 1000)
        """
        positions = self.learned_positions
        if positions is None or tokens + new - 1 <= positions:  # the last new token is not read again
            return
        left = positions - tokens + 1
        room = f"there is room for {left} after it" if left > 0 else "shorten it"
        raise ConfigError(
            f"{what} of {tokens} tokens and {new} new ones are more than the {positions} learned "
            f"positions of {self.name}; {room}"
        )

    @property
    def start_token(self) -> int:
        """Id of the LM's start token, or of its end token if it has none (GPT-2 uses one token for both).

        Raises:
            ConfigError: when the LM's config names neither.
        """
        for token in (self.config.bos_token_id, self.config.eos_token_id):
            if isinstance(token, int) and token < self.config.vocab_size:
                return token
        raise ConfigError(
            f"model.language_model: the config of {self.name} names neither bos_token_id nor eos_token_id; this fusion "
            "puts one of them where an image is shown: set one, or use fusion 'prefix'"
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings: int64[B, T] -> float[B, T, D_lm]."""
        return word_embeddings(self.model)(input_ids)

    @abstractmethod
    def packing_problem(self, longest: int = 0) -> str | None:
        """One line that says why texts of up to `longest` tokens cannot share a row, or None when they can."""

    @abstractmethod
    def layout(self, packed: PackedBatch) -> RowsT:
        """The part of a packed batch that is the LM's input.

        Raises:
            ConfigError: when texts share a row and this LM cannot read such rows.
        """

    @abstractmethod
    def loss(self, rows: RowsT, inputs_embeds: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum over trained tokens of weight times -log p, as a float32 scalar; `inputs_embeds`: float[R, T, D_lm]."""

    @abstractmethod
    def hidden(self, rows: RowsT, inputs_embeds: Tensor) -> Tensor:
        """Last hidden states at the nodes that predict something: float[K, D_lm].

        Raises:
            ConfigError: for an LM with an encoder.
        """

    @abstractmethod
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Last hidden states float[..., D_lm] -> logits float[..., V] in `dtype`, or in the head's own."""

    @abstractmethod
    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states of texts without images: int64[B, T], padded on the right -> float[B, T, D_lm]."""

    @abstractmethod
    def prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Token ids int64[B, T] and mask (0 on padding) in the form that the LM reads."""

    @abstractmethod
    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None, **kwargs: Any
    ) -> LMOutput:
        """Read a plain batch.

        Args:
            inputs_embeds: float[B, T, D_lm]; attention_mask: int64[B, T], from `prompt`.
            labels: int64, -100 where nothing is learned.
            kwargs: further arguments of the transformers model.
        """

    def beam_options(self, prompt_length: int, options: dict[str, Any]) -> BeamOptions | None:
        """Options of this package's beam search for `generate`; None where transformers has to search.

        It may run the LM on a few tokens, so call it while no image is shown to the LM's hooks.
        """
        return None

    @abstractmethod
    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        beams: BeamOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts; arguments and results as in transformers' `generate`, without the prompt's tokens.

        Args:
            beams: search with this package's beam search, from `beam_options`.
        """

    def continue_rows(self, rows: RowsT, inputs_embeds: Tensor, beams: BeamOptions) -> Any:
        """Continue the prompts of packed rows (see `pack_prompts`) by this package's search, in their order.

        Args:
            inputs_embeds: float[R, T, D_lm]; beams: from `beam_options`.

        Returns:
            As `generate`. A text's score is the mean log-probability of its tokens, or what `length_penalty` makes of
            their sum.
        """
        raise ConfigError(f"{self.name} does not continue packed rows; continue texts one by one")


def check_generate_arguments(attention_mask: Tensor | None, arguments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for arguments of transformers' `generate` that do not go with images in the prompt.

    Args:
        attention_mask: int64[B, T], 0 on padding, which has to be on the left.
    """
    config = arguments.get("generation_config")
    if not (config is None or isinstance(config, GenerationConfig)):
        raise ConfigError(
            f"generate: generation_config: got {type(config).__name__}, expected a GenerationConfig; give options "
            "by their names"
        )
    # generation configs of older releases of transformers have 20 where nothing was set
    counted = config is not None and config.max_length not in (None, 20) and config.max_new_tokens is None
    if "max_length" in arguments or (counted and arguments.get("max_new_tokens") is None):
        raise ConfigError("max_length counts the image's prefix for some models; give max_new_tokens instead")
    asked = {name: arguments.get(name, getattr(config, name, None)) for name in NEED_TOKENS}
    refused = [name for name, value in asked.items() if value is not None and (name, value) != ("guidance_scale", 1)]
    if refused:
        raise ConfigError(f"generate: {', '.join(refused)}: needs a prompt of token ids alone; remove it")
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        raise ConfigError("input_ids are padded on the right; generation needs padding_side='left'")


def with_one_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` in which a generation config holds the options that were given beside it.

    transformers warns of both together, and its own pipelines give both.

    Example:
        >>> arguments = with_one_config({"generation_config": GenerationConfig(num_beams=2), "max_new_tokens": 5})
        >>> list(arguments), arguments["generation_config"].max_new_tokens
        (['generation_config'], 5)
    """
    rest = dict(arguments)
    config = copy.deepcopy(rest.pop("generation_config", None))
    return rest if config is None else {"generation_config": config, **config.update(**rest)}


def word_embeddings(language_model: PreTrainedModel) -> nn.Embedding:
    """The input embedding layer of a language model."""
    return cast(nn.Embedding, language_model.get_input_embeddings())


@torch.no_grad()
def embedding_rms(language_model: PreTrainedModel) -> float:
    """Root mean square of the word embeddings, with the scale that the embedding layer itself applies.

    Example:
        >>> 0 < embedding_rms(model.language_model) < 1
        True
    """
    embeddings = word_embeddings(language_model)
    words = len(embeddings.weight)
    ids = torch.arange(words, device=embeddings.weight.device)[:: max(1, words // 8192)]
    return float(embeddings(ids).float().pow(2).mean().sqrt())


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """int64[B, T]: 0, 1, 2, … over the real tokens of each row, 0 on padding.

    Example:
        >>> positions_from_mask(torch.tensor([[0, 0, 1, 1, 1]])).tolist()
        [[0, 0, 0, 1, 2]]
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _one_pass_activations(language_model: PreTrainedModel) -> PreTrainedModel:
    """Replace transformers' tanh GELU (GPT-2), which is composed of six operations, by torch's fused one."""
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return language_model
