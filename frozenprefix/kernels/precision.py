"""Precision of computations: the faster one here, measured on matrix products of a language model's sizes; autocast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from frozenprefix.kernels.linear import PlainWeight, PrepackedWeight, prepackable_dtypes

ROWS = 512  # about as many as a training step has
MAX_FLOPS = 5e8  # of one round, so that a large model is measured on fewer rows
MAX_HIDDEN, MAX_INNER = 2048, 8192  # beyond these the rates hardly change
MIN_ROUNDS = 5  # of each dtype, however slow it is: one disturbed round must not decide
MIN_GAIN = 1.1  # bfloat16 has to be faster by this factor, or the choice would change from run to run
DTYPES = (torch.float32, torch.bfloat16)


class ProductRates(NamedTuple):
    """Operations per second of matrix products on this machine's CPU: on one core of it, or on all.

    Example:
        >>> ProductRates(float32=2e11, bfloat16=1e11).faster
        torch.float32
    """

    float32: float
    bfloat16: float

    @property
    def faster(self) -> torch.dtype:
        """float32, unless bfloat16 is clearly faster."""
        return torch.bfloat16 if self.bfloat16 > MIN_GAIN * self.float32 else torch.float32


def measure_products(hidden: int, inner: int, *, seconds: float = 0.25, all_cores: bool = False) -> ProductRates:
    """Measure the two products of a feed-forward layer, with weights laid out as in training; once per process.

    On one core, in the processor time of this thread: how the two dtypes compare then hardly depends on what other
    programs are doing. Where several threads wait for each other on a busy machine, both dtypes take equally long.

    Args:
        hidden, inner: sizes of the layer, [rows, hidden] -> [rows, inner] -> [rows, hidden].
        seconds: time to measure for.
        all_cores: with all threads of torch, by the clock: the rates that a program has here now.

    Example:
        >>> measure_products(64, 128, seconds=0.01).float32 > 0
        True
    """
    sizes, threads = (min(hidden, MAX_HIDDEN), min(inner, MAX_INNER)), torch.get_num_threads()
    if all_cores:
        return _measure_products(*sizes, seconds, threads, time.perf_counter)
    torch.set_num_threads(1)
    try:
        return _measure_products(*sizes, seconds, 1, _thread_clock())
    finally:
        torch.set_num_threads(threads)


def _thread_clock() -> Callable[[], float]:
    """The processor time of this thread, where the system counts it finely."""
    fine = time.get_clock_info("thread_time").resolution < 1e-4
    return time.thread_time if fine else time.perf_counter


@cache
def _measure_products(
    hidden: int, inner: int, seconds: float, threads: int, clock: Callable[[], float]
) -> ProductRates:
    rows = max(16, min(ROWS, int(MAX_FLOPS / (4 * hidden * inner))))
    flops = 4 * rows * hidden * inner
    layers = {dtype: _feed_forward(hidden, inner, dtype) for dtype in DTYPES}
    inputs = {dtype: torch.full((rows, hidden), 0.1, dtype=dtype) for dtype in DTYPES}
    rates = dict.fromkeys(DTYPES, 0.0)
    started, rounds = time.perf_counter(), 0
    # in turns, and the best round of each: other programs can only slow a round down
    while rounds <= MIN_ROUNDS or time.perf_counter() - started < seconds:
        for dtype, (up, down) in layers.items():
            if rounds > MIN_ROUNDS and rates[dtype] < max(rates.values()) / 4:
                continue  # slower beyond doubt: the time is for the other one
            before = clock()
            down.forward(up.forward(inputs[dtype]))
            took = clock() - before
            if rounds and took > 0:  # the first round lays the weights out
                rates[dtype] = max(rates[dtype], flops / took)
        rounds += 1
    return ProductRates(*(rates[dtype] for dtype in DTYPES))


def _feed_forward(hidden: int, inner: int, dtype: torch.dtype) -> list[PlainWeight | PrepackedWeight]:
    layers = []
    for size, outputs in ((hidden, inner), (inner, hidden)):
        layer = nn.utils.skip_init(nn.Linear, size, outputs, bias=False, dtype=dtype).requires_grad_(False)
        layer.weight.fill_(0.01)
        layers.append(PrepackedWeight(layer) if dtype in prepackable_dtypes() else PlainWeight(layer.weight, None))
    return layers


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Autocast to `dtype` on the kind of `device`; disabled for float32 and for None.

    Example:
        >>> with autocast_to(torch.bfloat16, torch.device("cpu")):
        ...     nn.Linear(2, 2)(torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    half = dtype not in (None, torch.float32)
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def native_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 itself, and does not emulate it.

    Example:
        >>> native_bfloat16() in (True, False)
        True
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
