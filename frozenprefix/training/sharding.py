"""FSDP2 for what is frozen: the decoder layers of the language model are shared out over all processes."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.compat import layer_class_names

FSDP = "ACCELERATE_USE_FSDP"
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
OTHERS = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM"}


def requested_sharding() -> FullyShardedDataParallelPlugin | None:
    """What accelerate's configuration says of sharding; None for plain data parallelism (DDP).

    Raises:
        ConfigError: for FSDP of version 1, DeepSpeed and Megatron-LM.

    Example:
        >>> requested_sharding() is None
        True
    """
    for name, variable in OTHERS.items():
        if parse_flag_from_env(variable):
            raise ConfigError(
                f"accelerate: got {name} ({variable}), expected DDP or FSDP2: few parameters are trained, and FSDP2 "
                "shards the others; start with recipes/accelerate/fsdp2.yaml, or run `accelerate config` again"
            )
    if not parse_flag_from_env(FSDP):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"accelerate: got fsdp_version {plugin.fsdp_version}, expected 2; see recipes/accelerate/fsdp2.yaml"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("accelerate: got fsdp_offload_params true, expected false: there is no offloading here")
    return plugin


def make_accelerator(mixed_precision: str, sharding: FullyShardedDataParallelPlugin | None) -> Accelerator:
    """Make the accelerator of a run. With `sharding` it treats the trained parameters as data parallelism does.

    Accelerate's own FSDP2 would also shard the trained parameters. Here they are few and stay whole, so that optimizer,
    checkpoints and resuming are the same as without it.

    Raises:
        ConfigError: under `accelerate launch --cpu --num_processes N`, which starts one process.

    Example:
        >>> make_accelerator("no", None).num_processes
        1
    """
    # accelerate's launcher gives the address for several processes, and then starts one
    alone = "MASTER_PORT" in os.environ and not any(name in os.environ for name in WORLD_SIZES)
    if alone and parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "accelerate launch --cpu: got --num_processes above 1, but with --cpu it starts one process only; use "
            "--config_file recipes/accelerate/ddp.yaml --num_processes N without --cpu, or torchrun --nproc_per_node N"
        )
    flag = os.environ.pop(FSDP, None)
    try:
        # without `cpu`, processes without a GPU do not form a group
        return Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
    finally:
        if sharding is not None and flag is not None:
            os.environ[FSDP] = flag


def shard_frozen_layers(language_model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin) -> int:
    """Shard the frozen parameters of the decoder layers with torch's FSDP2, in place.

    Each process keeps its share of a layer, and all of it only while the layer computes. Trained parameters (LoRA),
    word embeddings and the head stay whole on each process. From then on all processes must run the model equally
    often.

    Args:
        language_model: a transformers model on the CPU; each layer is moved to the GPU of the process, if there is one.
        plugin: accelerate's; `reshard_after_forward` and `transformer_cls_names_to_wrap` are used.

    Returns:
        The number of layers that are sharded.

    Raises:
        ConfigError: the layers are not known, or quantized.
    """
    names = plugin.transformer_cls_names_to_wrap or layer_class_names(language_model)
    layers = [module for module in language_model.modules() if type(module).__name__ in set(names)]
    if not layers:
        raise ConfigError(
            f"accelerate: FSDP2 found no decoder layer in {type(language_model).__name__} (looked for: "
            f"{', '.join(names) or 'nothing'}); give the class in fsdp_transformer_layer_cls_to_wrap"
        )
    for layer in layers:
        if any(not p.is_floating_point() for p in layer.parameters()):
            raise ConfigError("accelerate: got FSDP2 with a quantized language model, expected whole weights; use DDP")
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, ignored_params=trained)
    return len(layers)


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the mean over all processes, as DDP does; a missing one counts as zeros."""
    if accelerator.num_processes == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for p, part in zip(trained, mean.split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
