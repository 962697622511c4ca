"""The adapters of a model: one object that training, saving and generation call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.freezing import freeze
from frozenprefix.models.fusion import Fusion
from frozenprefix.utils.tensors import load_tensors, save_tensors

if TYPE_CHECKING:  # peft takes seconds to import
    from frozenprefix.models.peft.adapter import Adapter
    from frozenprefix.models.peft.virtual_tokens import VirtualTokens

FOLDERS = {"language_model": "language_adapter", "vision_encoder": "vision_adapter"}
STATE_FILE = "adapter_state.safetensors"


class AdapterSet(Mapping[str, "Adapter"]):
    """The adapters inside the frozen parts of a model: a mapping from "language_model" and "vision_encoder".

    Example:
        >>> dict(model.adapters)  # a model without peft methods
        {}
        >>> with model.adapters.disabled():
        ...     bare = model.generate(**processor(image, "<image>", return_tensors="pt"), max_new_tokens=2)
    """

    def __init__(self, adapters: Mapping[str, Adapter] | None = None):
        self._adapters = dict(adapters or {})
        self.unloaded = False  # whether frozen weights were changed for good

    @classmethod
    def from_config(
        cls,
        config: FrozenPrefixConfig,
        language_model: PreTrainedModel,
        vision_encoder: nn.Module,
        peft_model: Any = None,
    ) -> AdapterSet:
        """Inject the peft methods of a config into the frozen parts.

        Call it before a fusion is built, so that the fusion's hooks run outside of peft's layers.

        Args:
            peft_model: a user's own peft model around the language model, instead of a method in the config.
        """
        methods = {part: getattr(getattr(config, part), "peft", None) for part in FOLDERS}
        if peft_model is not None and methods["language_model"] is not None:
            raise ConfigError("language_model: got a peft model beside model.language_model.peft; give one of them")
        adapters: dict[str, Adapter] = {}
        if peft_model is not None or any(methods.values()):
            from frozenprefix.models.peft.build import adapter_of, make_adapter

            if peft_model is not None:
                adapters["language_model"] = adapter_of(peft_model, "model.language_model.peft")
            for part, method in methods.items():
                if method is not None:
                    module = language_model if part == "language_model" else _network(vision_encoder)
                    adapters[part] = make_adapter(module, method, part)
        adapter_set = cls(adapters)
        if adapter_set.virtual_tokens is not None:
            language_model.add_module("virtual_tokens", adapter_set.virtual_tokens)
            adapter_set.virtual_tokens.attach(language_model)
        return adapter_set

    def __getitem__(self, part: str) -> Adapter:
        return self._adapters[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def virtual_tokens(self) -> VirtualTokens | None:
        """Learned tokens before every text, from prompt tuning and prefix tuning."""
        adapter = self._adapters.get("language_model")
        return None if adapter is None else adapter.virtual_tokens

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.virtual_tokens is None else self.virtual_tokens.count

    def follow(self, fusion: Fusion) -> None:
        """Shift the image positions of `fusion` when virtual tokens precede the text."""
        if self.virtual_tokens is not None:
            self.virtual_tokens.follow(fusion)

    def parameter_ids(self) -> set[int]:
        """`id()` of every trained parameter of the adapters, which are saved in files of their own."""
        return {id(p) for adapter in self.values() for p in adapter.named_parameters().values()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch adapters off inside the block: frozen parts compute the same as without them."""
        with ExitStack() as stack:
            for adapter in self.values():
                stack.enter_context(adapter.disabled())
            yield

    def merge(self) -> None:
        """Add the adapters to the frozen weights: the same outputs in less time.

        Raises:
            ConfigError: for virtual tokens, and for quantised weights.
        """
        for adapter in self.values():
            adapter.merge()

    def unmerge(self) -> None:
        """Undo `merge`: the frozen weights are restored bit for bit."""
        for adapter in self.values():
            adapter.unmerge()

    def unload(self, part: str) -> None:
        """Merge the adapter of a part into its weights for good, and remove peft's layers.

        Raises:
            ConfigError: for virtual tokens, for quantised weights, and for a part without an adapter.
        """
        if part not in self._adapters:
            raise ConfigError(f"{part}: has no adapter to unload")
        self._adapters[part].unload()
        del self._adapters[part]
        self.unloaded = True

    # ── training ──

    def train(self, mode: bool) -> None:
        """Set the mode of the adapters' dropout."""
        for adapter in self.values():
            adapter.train(mode)

    def set_total_steps(self, steps: int) -> None:
        """Announce the number of optimizer steps; AdaLoRA schedules its ranks by it."""
        for adapter in self.values():
            adapter.set_total_steps(steps)

    def penalty(self) -> Tensor | float:
        """Regularisation that the methods add to a loss: AdaLoRA's, otherwise 0."""
        penalties = [adapter.penalty() for adapter in self.values()]
        return sum((p for p in penalties if p is not None), 0.0)

    def update(self, step: int) -> dict[str, float]:
        """Update ranks after optimizer step `step` (counted from 1), before gradients are zeroed.

        Returns:
            Figures to log.
        """
        figures: dict[str, float] = {}
        for part, adapter in self.items():
            figures |= {f"{FOLDERS[part]}/{name}": value for name, value in adapter.update(step).items()}
        return figures

    # ── on disk ──

    def save(self, folder: Path) -> None:
        """Write each trained adapter into a folder of its own, in peft's layout."""
        for part, adapter in self.items():
            if adapter.named_parameters():
                adapter.save(folder / FOLDERS[part])

    def load(
        self, source: str | PathLike[Any], *, new: Collection[str] = (), subfolder: str | None = None, **hub: Any
    ) -> None:
        """Read the trained adapters of a checkpoint.

        Args:
            new: parts whose adapters keep their initial values, because the checkpoint has none for them.

        Raises:
            CheckpointError: when they do not fit, or the checkpoint has one that this model lacks.
        """
        for part, name in FOLDERS.items():
            adapter = self._adapters.get(part)
            if adapter is not None and adapter.named_parameters():
                if part not in new:
                    adapter.load(source, name if subfolder is None else f"{subfolder}/{name}", **hub)
            elif adapter is None and (Path(source) / name).is_dir():
                raise CheckpointError(
                    f"{source} holds {name}/, but its config.json names no peft method; pass the peft model it was "
                    f"trained with as {part}="
                )

    def save_state(self, folder: Path) -> None:
        """Write the training state of adapters for a resumed run; without trained adapters no file is written."""
        state = {
            f"{part}:{name}": tensor
            for part, adapter in self.items()
            for name, tensor in adapter.training_state().items()
        }
        if state:
            save_tensors(state, folder / STATE_FILE)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote."""
        if not self.parameter_ids():
            return
        try:
            state = load_tensors(folder / STATE_FILE)
        except DataError as error:
            raise CheckpointError(f"{error}; use --resume never") from error
        for part, adapter in self.items():
            device = next(iter(adapter.peft_model.parameters())).device
            own = {n.removeprefix(f"{part}:"): t.to(device) for n, t in state.items() if n.startswith(f"{part}:")}
            adapter.load_training_state(own, str(folder))


def _network(vision_encoder: nn.Module) -> nn.Module:
    """The library's own network inside a vision encoder; peft's files then fit that library's model.

    Raises:
        ConfigError: for encoders with several networks, and for precomputed features.
    """
    for name in ("model", "visual"):
        if isinstance(getattr(vision_encoder, name, None), nn.Module):
            return cast(nn.Module, getattr(vision_encoder, name))
    raise ConfigError(
        f"model.vision_encoder.peft: {type(vision_encoder).__name__} is not a single network; use source timm, "
        "open_clip or transformers"
    )


def freeze_around(language_model: PreTrainedModel, peft_model: Any = None) -> PreTrainedModel:
    """Freeze a language model, except for the trained adapter parameters of a user's peft model around it."""
    mark = None if peft_model is None else getattr(peft_model.base_model, "prefix", None)
    trained = []
    if mark is not None:
        trained = [p for name, p in peft_model.named_parameters() if p.requires_grad and mark in name]
    freeze(language_model)
    for parameter in trained:
        parameter.requires_grad_(True)
    return language_model


def split_peft_model(language_model: Any) -> tuple[PreTrainedModel, Any]:
    """Split a language model into the transformers model and the user's peft model around it, None without one."""
    if isinstance(language_model, PreTrainedModel):
        return language_model, None
    from peft import PeftModel

    if not isinstance(language_model, PeftModel):
        raise ConfigError(
            f"language_model: got {type(language_model).__name__}, expected a transformers model or a peft model"
        )
    return cast(PreTrainedModel, language_model.get_base_model()), language_model
