"""Machines to plan for: their published peak rates, and the share of them that a training step reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frozenprefix.registry import Registry

# Shares of the published peaks that are assumed to be reached. A frozen LM's step is mostly large matrix products, of
# which well-tuned training reaches 0.35 to 0.5 on GPUs (PaLM, Chowdhery et al. 2022, table 3: model FLOPs utilisation).
COMPUTE_SHARE = 0.4
BANDWIDTH_SHARE = 0.7
# A GPU starts kernels one after the other, and small models wait for that. A decoder layer of transformers takes about
# 30 kernels forward and 50 backward, and PyTorch needs about 5 microseconds to start one.
KERNELS_PER_LAYER = 80
KERNEL_SECONDS = 5e-6


@dataclass(frozen=True)
class Hardware:
    """A machine that a recipe can be planned for.

    Args:
        bf16, fp32: peak FLOP/s of dense matrix products (bf16: with float32 accumulation; fp32: without TF32, which
            PyTorch does not use unless asked to).
        bandwidth: memory, bytes/s; memory: bytes, None for machines whose memory can be chosen.
        cores: CPU cores that decode images; for GPUs those that its usual machine has for each GPU (8 H100 or A100
            have 112 or 128 in NVIDIA's DGX).
        source: where the figures were published.

    Example:
        >>> round(HARDWARE.get("h100").seconds(1e15, 0, half=True), 1)
        2.5
    """

    label: str
    kind: Literal["gpu", "cpu"]
    bf16: float
    fp32: float
    bandwidth: float
    memory: float | None
    cores: int
    source: str

    def seconds(self, flops: float, num_bytes: float, *, half: bool, layers: int = 0) -> float:
        """Time of some work: the slowest of arithmetic, memory and starting kernels.

        Args:
            flops, num_bytes: operations, and bytes moved.
            half: whether the products are in bfloat16.
            layers: decoder layers, for the kernels to start.
        """
        compute = flops / ((self.bf16 if half else self.fp32) * COMPUTE_SHARE)
        memory = num_bytes / (self.bandwidth * BANDWIDTH_SHARE)
        launches = layers * KERNELS_PER_LAYER * KERNEL_SECONDS if self.kind == "gpu" else 0.0
        return max(compute, memory, launches)

    def encode_seconds(self, flops: float, num_bytes: float, decode_seconds: float, *, half: bool) -> float:
        """Time of an image from file to features.

        Args:
            flops, num_bytes, half: as for `seconds`.
            decode_seconds: time that one core needs to decode it.
        """
        encode, decode = self.seconds(flops, num_bytes, half=half), decode_seconds / self.cores
        # a GPU encodes while the cores decode; without one the same cores do both
        return max(encode, decode) if self.kind == "gpu" else encode + decode


HARDWARE: Registry[Hardware] = Registry("hardware")
HARDWARE.register("h100")(
    Hardware("NVIDIA H100 SXM", "gpu", 989.4e12, 66.9e12, 3.35e12, 80e9, 14, "NVIDIA H100 data sheet and white paper")
)
HARDWARE.register("a100")(
    Hardware("NVIDIA A100 SXM 80 GB", "gpu", 312e12, 19.5e12, 2.039e12, 80e9, 16, "NVIDIA A100 data sheet")
)
HARDWARE.register("rtx4090")(
    Hardware("NVIDIA RTX 4090", "gpu", 165.2e12, 82.6e12, 1.008e12, 24e9, 16, "NVIDIA Ada white paper, appendix A")
)
# 96 cores x 2.4 GHz base clock x two 256-bit multiply-adds; bf16 dot products are twice as wide
HARDWARE.register("cpu")(
    Hardware("AMD EPYC 9654 (96 cores)", "cpu", 14.7e12, 7.37e12, 460.8e9, None, 96, "AMD product page, Zen 4 guide")
)
