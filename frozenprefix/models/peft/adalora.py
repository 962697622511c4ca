"""AdaLoRA (Zhang et al. 2023): ranks that change during training.

peft adds the regularisation only in the forward pass of its own model, which packed rows do not use; it is computed
here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.adalora import RankAllocator
from torch import Tensor

from frozenprefix.errors import ConfigError, TrainingError
from frozenprefix.models.peft.adapter import NAME, Adapter
from frozenprefix.models.peft.methods import STEPS_UNKNOWN


class AdaLoraAdapter(Adapter):
    """An adapter whose ranks change while it is trained."""

    def __init__(self, peft_model: PeftModel, field: str):
        super().__init__(peft_model, field)
        self.tuner: Any = peft_model.base_model

    def set_total_steps(self, steps: int) -> None:
        first, last = self.config.tinit, steps - self.config.tfinal
        if first >= last:
            raise ConfigError(
                f"{self.field}.tinit: got {first} with tfinal {self.config.tfinal}, which leaves none of {steps} steps "
                "to change ranks in; lower them, or train longer"
            )
        self.tuner.rankallocator.set_total_step(steps)

    def penalty(self) -> Tensor:
        """Distance of the singular vectors from orthogonality (the paper's section 3.1), averaged over matrices."""
        products = []
        for name, parameter in self.named_parameters().items():
            if ".lora_A." in name:
                products.append(parameter @ parameter.T)
            elif ".lora_B." in name:
                products.append(parameter.T @ parameter)
        eye = torch.eye(max(len(p) for p in products), device=products[0].device)
        norms = [torch.linalg.matrix_norm(p - eye[: len(p), : len(p)]) for p in products]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def update(self, step: int) -> dict[str, float]:
        if self.config.total_step == STEPS_UNKNOWN:
            raise TrainingError(
                f"{self.field}: AdaLoRA needs the number of steps; call adapters.set_total_steps(steps)"
            )
        allocator = self.tuner.rankallocator
        if allocator.init_bgt > allocator.target_bgt:  # a loaded adapter may have its final ranks already
            self.tuner.update_and_allocate(step)
        ranks = self.ranks()
        return {"rank_total": float(sum(ranks)), "rank_min": float(min(ranks)), "rank_max": float(max(ranks))}

    def ranks(self) -> list[int]:
        """Rank of every matrix: the number of singular values that are not pruned."""
        if self.config.rank_pattern is None:
            return [len(values) for values in self._singular_values().values()]
        return [sum(mask) for mask in self.config.rank_pattern.values()]

    def _singular_values(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.tuner.model.named_parameters() if f".lora_E.{NAME}" in name}

    # ── on disk ──

    def saved_tensors(self) -> dict[str, Tensor]:
        """peft's tensors as they are in memory, without pruning."""
        pattern, self.config.rank_pattern = self.config.rank_pattern, None
        try:
            return super().saved_tensors()
        finally:
            self.config.rank_pattern = pattern

    def save(self, folder: Path) -> None:
        """Write the pruned ranks too, unless they are zero: between two allocations they may have grown again."""
        pattern = self.config.rank_pattern
        if pattern is not None and not self._is_exact(pattern):
            self.config.rank_pattern = None
        elif pattern is not None:
            self.config.rank_pattern = dict(pattern)
        try:
            super().save(folder)
        finally:
            self.config.rank_pattern = pattern

    def _is_exact(self, pattern: dict[str, list[bool]]) -> bool:
        """Whether all singular values that `pattern` prunes are zero."""
        for name, values in self._singular_values().items():
            mask = torch.tensor(pattern[name], device=values.device)
            if bool((values.detach().flatten()[~mask] != 0).any()):
                return False
        return True

    def prepare_for(self, saved: PeftConfig) -> None:
        """Cut the matrices to the ranks of a saved adapter."""
        pattern = getattr(saved, "rank_pattern", None)
        if pattern is None:
            return
        self.tuner.resize_modules_by_rank_pattern(pattern, NAME)
        for layer in self.layers():
            for matrices in (layer.lora_A, layer.lora_B, layer.lora_E):
                matrices[NAME].data = matrices[NAME].data.float()
        # its budget starts from the ranks that it finds
        self.tuner.rankallocator = RankAllocator(self.tuner.model, self.config, NAME)

    def training_state(self) -> dict[str, Tensor]:
        """Parameters, the running means of importance and uncertainty, and the pruning pattern."""
        allocator, state = self.tuner.rankallocator, super().training_state()
        state |= {f"importance.{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        state |= {f"uncertainty.{name}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        pattern = self.config.rank_pattern or {}
        return state | {f"kept.{name}": torch.tensor(mask) for name, mask in pattern.items()}

    def load_training_state(self, state: dict[str, Tensor], source: str) -> None:
        super().load_training_state(state, source)
        allocator = self.tuner.rankallocator

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        allocator.exp_avg_ipt, allocator.exp_avg_unc = under("importance."), under("uncertainty.")
        # update_ipt resets all three for a name that is missing in the first of them
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in allocator.exp_avg_ipt.items()}
        self.config.rank_pattern = {name: mask.tolist() for name, mask in under("kept.").items()} or None
