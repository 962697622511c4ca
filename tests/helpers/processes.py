"""Several processes, played by threads or one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


def fake_process(rank: int, count: int, wait: Callable[[], None] = lambda: None) -> Any:
    """What this package reads of `accelerate.PartialState`."""
    return SimpleNamespace(process_index=rank, num_processes=count, is_main_process=rank == 0, wait_for_everyone=wait)


def replace_gathering(monkeypatch: pytest.MonkeyPatch, gather: Callable[[list], list]) -> None:
    """Let `gather` join the lists of all processes wherever the package does so."""
    for module in (
        "data.features",
        "evaluation.journal",
        "evaluation.result",
        "evaluation.tasks.retrieval",
        "training.setup",
    ):
        monkeypatch.setattr(f"frozenprefix.{module}.gather_object", gather)


def run_in_threads(count: int, run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> list:
    """Call `run(processes)` as so many processes would: they meet at barriers and gather lists."""
    barrier, lists, results = threading.Barrier(count, timeout=60), {}, {}

    def gather(items: list) -> list:
        lists[int(threading.current_thread().name)] = items
        barrier.wait()
        joined = [item for rank in range(count) for item in lists[rank]]
        barrier.wait()
        return joined

    def work(rank: int) -> None:
        results[rank] = run(fake_process(rank, count, lambda: barrier.wait() and None))

    replace_gathering(monkeypatch, gather)
    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(count)]
