"""The table of a run: what is in the model, what is trained and how fast, and where it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

COLUMNS = ("part", "parameters", "trained", "learning rate", "dtype", "saved in")
NAMES = {"lm": "language_model"}  # attributes of a model whose part is called otherwise
ADAPTER_FOLDERS = {"language_model": "language_adapter/", "vision_encoder": "vision_adapter/"}


@dataclass(frozen=True)
class PartRow:
    """One part of a model.

    Attributes:
        parameters, trained: numbers; rates: peak learning rates of what is trained.
        dtypes: of its parameters; saved_in: a file or folder of a checkpoint, or "config.json (by name)" for a part
            of which nothing is trained.

    Example:
        >>> PartRow("mapper", 100, 100, (2e-3,), ("float32",), "model.safetensors").cells()[3]
        '0.002'
    """

    part: str
    parameters: int
    trained: int
    rates: tuple[float, ...]
    dtypes: tuple[str, ...]
    saved_in: str

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        rates = ", ".join(f"{rate:.3g}" for rate in self.rates) or "–"
        numbers = f"{self.parameters:,}", f"{self.trained:,}" if self.trained else "–"
        return (self.part, *numbers, rates, ", ".join(self.dtypes), self.saved_in)


def part_rows(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[PartRow]:
    """A row for each part of a model that has parameters; shared parameters count where they are met first.

    Example:
        >>> from frozenprefix.training import Trainer
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> [(row.part, row.trained > 0) for row in part_rows(trainer.model, trainer.optimizer)]
        [('vision_encoder', False), ('language_model', False), ('mapper', True)]
    """
    rates = {id(p): float(group["peak"]) for group in optimizer.param_groups for p in group["params"]}
    adapters = getattr(model, "adapters", None)
    apart = set() if adapters is None else set(adapters.parameter_ids())
    rows, seen = [], set[int]()
    children = [(NAMES.get(name, name), child) for name, child in model.named_children()]
    own = [(name, p) for name, p in model.named_parameters(recurse=False)]
    for name, held in [*((n, list(c.parameters())) for n, c in children), *((n, [p]) for n, p in own)]:
        parameters = [p for p in held if id(p) not in seen]
        seen |= {id(p) for p in parameters}
        if parameters:
            rows.append(_row(name, parameters, rates, apart))
    return rows


def _row(name: str, parameters: Sequence[nn.Parameter], rates: dict[int, float], apart: set[int]) -> PartRow:
    trained = [p for p in parameters if p.requires_grad]
    places = [ADAPTER_FOLDERS.get(name, "an adapter folder")] if any(id(p) in apart for p in trained) else []
    places += ["model.safetensors"] if any(id(p) not in apart for p in trained) else []
    return PartRow(
        part=name,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        rates=tuple(sorted({rates[id(p)] for p in trained if id(p) in rates}, reverse=True)),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        saved_in=", ".join(places) or "config.json, by name",
    )


def overview(model: Any, optimizer: torch.optim.Optimizer, output_dir: Path) -> str:
    """The table as lines of text, with the folders that checkpoints are written to.

    Example:
        >>> from frozenprefix.training import Trainer
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> print(overview(trainer.model, trainer.optimizer, Path("runs/mlp")))
        part              parameters    trained    learning rate    dtype      saved in
        vision_encoder       300,096          –    –                float32    config.json, by name
        language_model        28,192          –    –                float32    config.json, by name
        mapper                10,400     10,400    0.01             float32    model.safetensors
        checkpoints: runs/mlp/best (the best validation) and runs/mlp/last (to go on from)
    """
    rows = [COLUMNS, *(row.cells() for row in part_rows(model, optimizer))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    right = (1, 2)
    lines = [
        "    ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    where = f"checkpoints: {output_dir / 'best'} (the best validation) and {output_dir / 'last'} (to go on from)"
    return "\n".join([*lines, where])
