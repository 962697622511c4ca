"""The processes that share work among them: one alone, or those that torchrun or accelerate started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Processes:
    """The processes that share the images among them; the default is one alone.

    Args:
        rank, count: number of this process, and how many there are.
        barrier: waits for all of them.
        gather: the list of this process → the lists of all processes, joined in the order of their ranks.
    """

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] = _nothing
    gather: Callable[[list[Any]], list[Any]] = list

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def of(cls, state: Accelerator | PartialState) -> Processes:
        """The processes of an accelerate object that is there already."""
        from accelerate.utils import gather_object

        return cls(state.process_index, state.num_processes, state.wait_for_everyone, gather_object)

    @classmethod
    def current(cls) -> Processes:
        """Those that `torchrun` or `accelerate launch` started together with this one, by `WORLD_SIZE`."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        return cls.of(PartialState(cpu=not torch.accelerator.is_available()))
