"""One adapter: a peft model around a frozen part, with saving, loading, merging and training state."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.kernels.precision import autocast_to
from frozenprefix.models.peft.virtual_tokens import VirtualTokens
from frozenprefix.models.state_dict import check_fit, copy_into, misfits
from frozenprefix.utils.damage import refusing_damage

NAME = "default"  # peft's name for the adapter; its files are then in the folder itself


class Adapter:
    """An adapter that peft injected into a frozen part in place, so that all other code sees the plain part.

    Attributes:
        peft_model: peft's wrapper of the part. It is not a submodule, or its parameters would count twice.
        virtual_tokens: the tokens of prompt tuning and prefix tuning; None for methods that change layers.
    """

    def __init__(self, peft_model: PeftModel, field: str):
        self.peft_model: Any = peft_model
        self.field = field
        self.config: Any = peft_model.peft_config[NAME]
        self.virtual_tokens = self._virtual_tokens() if self.config.is_prompt_learning else None
        self._merged: list[tuple[Tensor, Tensor]] = []  # each frozen weight, and a copy from before merging
        for layer in self.layers():
            compute_in_base_dtype(layer)

    def _virtual_tokens(self) -> VirtualTokens:
        in_layers = self.config.peft_type == "PREFIX_TUNING"
        model = self.peft_model
        return VirtualTokens(model.prompt_encoder, model.get_prompt, self.config.num_virtual_tokens, in_layers)

    def layers(self) -> list[Any]:
        """The layers with which peft replaced frozen ones."""
        return [module for module in self.peft_model.modules() if isinstance(module, BaseTunerLayer)]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the adapter, by peft's names."""
        holder, mark = (
            (self.peft_model, self.peft_model.base_model.prefix)
            if self.virtual_tokens is None
            else (self.virtual_tokens, "")
        )
        return {name: p for name, p in holder.named_parameters() if p.requires_grad and mark in name}

    def train(self, mode: bool) -> None:
        """Set the mode of the adapter's dropout; the frozen layers around it stay in evaluation mode."""
        if mode and self._merged:
            raise ConfigError(f"{self.field}: merged adapters cannot be trained; call adapters.unmerge() first")
        for layer in self.layers():
            dropout = getattr(layer, "lora_dropout", None)
            if dropout is not None:
                dropout.train(mode)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside the block: the part computes the same as without it."""
        layers, tokens = self.layers(), self.virtual_tokens
        trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        if tokens is not None:
            tokens.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, required in trained:  # peft's switch changes them too
                parameter.requires_grad_(required)
            if tokens is not None:
                tokens.enabled = True

    # ── merging ──

    def merge(self) -> None:
        """Add the adapter to the frozen weights, and keep a copy of them for `unmerge`.

        Raises:
            ConfigError: for virtual tokens, and for quantised weights.
        """
        if self._merged:
            return
        if self.virtual_tokens is not None:
            raise ConfigError(f"{self.field}: virtual tokens have no weights that could be merged")
        weights = [p for layer in self.layers() for p in layer.get_base_layer().parameters()]
        if not all(p.is_floating_point() for p in weights):
            raise ConfigError(f"{self.field}: cannot be merged into quantised weights")
        self._merged = [(p, p.detach().clone()) for p in weights]
        self.peft_model.base_model.merge_adapter()

    def unmerge(self) -> None:
        """Restore the frozen weights bit for bit."""
        if not self._merged:
            return
        # not by peft, whose subtraction leaves rounding, and fails for DoRA in GPT-2 before 0.21
        with torch.no_grad():
            for weight, before in self._merged:
                weight.copy_(before)
        for layer in self.layers():
            layer.merged_adapters.clear()
        self._merged = []

    def unload(self) -> None:
        """Merge for good, and replace peft's layers by plain ones."""
        self.merge()  # refuses what cannot be merged
        self.unmerge()
        self.peft_model.base_model.merge_and_unload(progressbar=False)

    # ── on disk ──

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which plain peft reads."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def load(self, source: str | PathLike[Any], subfolder: str, **hub: Any) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: for another method, missing or unexpected keys, or wrong shapes.
        """
        with refusing_damage(CheckpointError, f"{source}: {subfolder} cannot be read ({{reason}})"):
            saved = PeftConfig.from_pretrained(str(source), subfolder=subfolder, **hub)
            tensors = load_peft_weights(str(source), device="cpu", subfolder=subfolder, **hub)
        if saved.peft_type != self.config.peft_type:
            raise CheckpointError(f"{source}: {subfolder} holds {saved.peft_type}, expected {self.config.peft_type}")
        self.prepare_for(saved)
        check_fit(self.saved_tensors(), tensors, f"{source}: {subfolder}")
        set_peft_model_state_dict(self.peft_model, tensors, adapter_name=NAME)

    def prepare_for(self, saved: PeftConfig) -> None:
        """Change the adapter's shapes to those of a saved one."""

    def saved_tensors(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.peft_model, adapter_name=NAME, save_embedding_layers=False)

    # ── training ──

    def training_state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs; the folder that `save` writes may hold less."""
        return {f"parameter.{name}": p.detach() for name, p in self.named_parameters().items()}

    def load_training_state(self, state: dict[str, Tensor], source: str) -> None:
        """Restore a state from `training_state`."""
        own = self.training_state()
        saved = {name: tensor for name, tensor in state.items() if name.startswith("parameter.")}
        if misfits(own, saved):
            raise CheckpointError(f"{source}: the adapter's state does not fit {self.field}; use --resume never")
        copy_into(own, saved, source)

    def set_total_steps(self, steps: int) -> None:
        """Tell the method how many optimizer steps there will be."""

    def penalty(self) -> Tensor | None:
        """The term that the method adds to the loss, if any."""
        return None

    def update(self, step: int) -> dict[str, float]:
        """Update ranks after optimizer step `step` (from 1), before gradients are zeroed; return figures to log."""
        return {}


def compute_in_base_dtype(layer: Any) -> None:
    """Compute a layer's adapter in the dtype of the frozen weights; the adapter's own weights stay float32.

    peft would cast every input to float32 and the sum back: with LoRA in two matrices of 576 columns in bfloat16, 960
    tokens took 36 ms forward and backward on one CPU core, 16 ms this way, 14 ms without LoRA.
    """
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
        return
    layer.cast_input_dtype_enabled = False
    forward: Callable[..., Tensor] = layer.forward

    @functools.wraps(forward)
    def in_base_dtype(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with autocast_to(x.dtype, x.device):
            return forward(x, *args, **kwargs)

    layer.forward = in_base_dtype
