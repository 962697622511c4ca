"""Adapters in the frozen parts of a model: what training, saving and generation call."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.freezing import freeze
from frozenprefix.models.fusion import Fusion

if TYPE_CHECKING:  # peft takes seconds to import
    from frozenprefix.models.peft.adapter import Adapter
    from frozenprefix.models.peft.virtual_tokens import VirtualTokens

FOLDERS = {"language_model": "language_adapter", "vision_encoder": "vision_adapter"}
STATE_FILE = "adapter_state.safetensors"


class AdaptedParts(nn.Module):
    """A model into whose frozen parts peft may put something. A mixin.

    Attributes:
        adapters: "language_model" and "vision_encoder", where they have one.
    """

    config: FrozenPrefixConfig
    language_model: PreTrainedModel
    vision_encoder: nn.Module
    fusion: Fusion
    adapters: Mapping[str, Any] = MappingProxyType({})

    def add_adapters(self, given: Any = None) -> None:
        """Put the methods of the config into the frozen parts; before a fusion's hooks, which then stand outside.

        Args:
            given: a peft model around the language model, made by the user; what it trains goes on being trained.
        """
        adapters: dict[str, Adapter] = {}
        for part in FOLDERS:
            section = getattr(self.config, part)
            method = None if section is None else section.peft
            if part == "language_model" and given is not None:
                if method is not None:
                    raise ConfigError(
                        "language_model: got a peft model beside model.language_model.peft; give one of them"
                    )
                from frozenprefix.models.peft.adapter import adapter_of

                adapters[part] = adapter_of(given, f"model.{part}.peft")
            elif method is not None:
                from frozenprefix.models.peft.adapter import make_adapter

                module = self.language_model if part == "language_model" else library_model(self.vision_encoder)
                adapters[part] = make_adapter(module, method, part)
        self.adapters = adapters
        if self.virtual_tokens is not None:
            self.language_model.add_module("virtual_tokens", self.virtual_tokens)
            self.virtual_tokens.attach(self.language_model, lambda: getattr(self, "fusion", None))

    @property
    def virtual_tokens(self) -> VirtualTokens | None:
        """Learned tokens before every text, of prompt tuning and prefix tuning."""
        adapter = self.adapters.get("language_model")
        return None if adapter is None else adapter.virtual_tokens

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.virtual_tokens is None else self.virtual_tokens.count

    def adapter_parameters(self) -> set[int]:
        """Identities of the adapters' parameters, which are saved apart."""
        return {id(p) for adapter in self.adapters.values() for p in adapter.named_parameters().values()}

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Let the frozen parts compute inside the block what they compute without adapters."""
        with ExitStack() as stack:
            for adapter in self.adapters.values():
                stack.enter_context(adapter.disabled())
            yield

    def merge_adapters(self) -> None:
        """Add the adapters to the frozen weights: the same outputs, without the adapters' part of the time.

        Raises:
            ConfigError: for virtual tokens, and for quantised weights.
        """
        for adapter in self.adapters.values():
            adapter.merge()

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`: every bit of the frozen weights is as it was."""
        for adapter in self.adapters.values():
            adapter.unmerge()

    # ── training ──

    def set_total_steps(self, steps: int) -> None:
        """Say how many optimizer steps training will take; AdaLoRA plans its ranks by it."""
        for adapter in self.adapters.values():
            adapter.set_total_steps(steps)

    def adapter_penalty(self) -> Tensor | float:
        """What the methods add to a loss: AdaLoRA's regularisation, otherwise 0."""
        penalties = [adapter.penalty() for adapter in self.adapters.values()]
        return sum((p for p in penalties if p is not None), 0.0)

    def update_adapters(self, step: int) -> dict[str, float]:
        """Behind optimizer step `step` (the first is 1) and before gradients are zeroed; returns figures to log."""
        figures: dict[str, float] = {}
        for part, adapter in self.adapters.items():
            figures |= {f"{FOLDERS[part]}/{name}": value for name, value in adapter.update(step).items()}
        return figures

    # ── on disk ──

    def save_adapters(self, folder: Path) -> None:
        """Write each trained adapter into a folder of its own, in peft's layout."""
        for part, adapter in self.adapters.items():
            if adapter.named_parameters():
                adapter.save(folder / FOLDERS[part])

    def load_adapters(self, source: str | PathLike[Any], *, new: Collection[str] = (), **hub: Any) -> None:
        """Read the trained adapters of a checkpoint.

        Args:
            new: parts whose adapters stay as they are, because the checkpoint was made without any.

        Raises:
            CheckpointError: when they do not fit, or the checkpoint has one that this model lacks.
        """
        for part, name in FOLDERS.items():
            adapter = self.adapters.get(part)
            if adapter is not None and adapter.named_parameters():
                if part not in new:
                    adapter.load(source, name, **hub)
            elif adapter is None and (Path(source) / name).is_dir():
                raise CheckpointError(
                    f"{source} holds {name}/, and its config.json no peft method; give the peft model it was trained "
                    f"with as {part}="
                )

    def save_adapter_state(self, folder: Path) -> None:
        """Write what a resumed run needs of the adapters; nothing when none is trained."""
        state = {
            f"{part}:{name}": tensor.cpu().contiguous()
            for part, adapter in self.adapters.items()
            for name, tensor in adapter.training_state().items()
        }
        if state:
            save_file(state, folder / STATE_FILE)

    def load_adapter_state(self, folder: Path) -> None:
        """Restore what `save_adapter_state` wrote."""
        if not any(adapter.named_parameters() for adapter in self.adapters.values()):
            return
        try:
            state = load_file(folder / STATE_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: {STATE_FILE} cannot be read ({error}); use --resume never") from error
        for part, adapter in self.adapters.items():
            own = {name.removeprefix(f"{part}:"): t for name, t in state.items() if name.startswith(f"{part}:")}
            device = next(iter(adapter.peft_model.parameters())).device
            adapter.load_training_state({name: t.to(device) for name, t in own.items()}, str(folder))


def library_model(vision_encoder: nn.Module) -> nn.Module:
    """The library's own model inside a vision encoder, which peft's files then fit.

    Raises:
        ConfigError: for encoders of several models, and given features.
    """
    for name in ("model", "visual"):
        if isinstance(getattr(vision_encoder, name, None), nn.Module):
            return cast(nn.Module, getattr(vision_encoder, name))
    raise ConfigError(
        f"model.vision_encoder.peft: {type(vision_encoder).__name__} is not one network; use source timm, open_clip or "
        "transformers"
    )


def freeze_around(language_model: PreTrainedModel, given: Any = None) -> PreTrainedModel:
    """Freeze a language model, but for what trains in the adapter of a user's peft model around it."""
    mark = None if given is None else getattr(given.base_model, "prefix", None)
    trained = [] if mark is None else [p for name, p in given.named_parameters() if p.requires_grad and mark in name]
    freeze(language_model)
    for parameter in trained:
        parameter.requires_grad_(True)
    return language_model


def split_peft_model(language_model: Any) -> tuple[PreTrainedModel, Any]:
    """A transformers model, or a user's peft model around one -> the transformers model, and the peft model or None."""
    if isinstance(language_model, PreTrainedModel):
        return language_model, None
    from peft import PeftModel

    if not isinstance(language_model, PeftModel):
        raise ConfigError(
            f"language_model: got {type(language_model).__name__}, expected a transformers model or a peft model"
        )
    return cast(PreTrainedModel, language_model.get_base_model()), language_model
