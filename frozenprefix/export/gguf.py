"""A checkpoint as two GGUF files for llama.cpp: the language model, and encoder with mapper (mmproj)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from frozenprefix.errors import ExportError
from frozenprefix.export.gguf_language_model import write_language_model
from frozenprefix.export.gguf_tensors import FileType, write_tensors
from frozenprefix.export.mlp import PlainMLP
from frozenprefix.export.source import Source, built_in_images
from frozenprefix.export.vit import PlainViT
from frozenprefix.utils import atomic_folder

LM_FILE = "language_model.gguf"
MMPROJ_FILE = "mmproj.gguf"


def export_gguf(
    source: Source, out: str | Path, file_type: FileType = "f32", *, only_language_model: bool = False
) -> Path:
    """Write `language_model.gguf` and `mmproj.gguf`.

    Args:
        file_type: of matrices; vectors are float32.
        only_language_model: for a checkpoint whose encoder and mapper run here, as with `LlamaCppCaptioner`.

    Raises:
        ExportError: for an encoder, a mapper, a language model or a tokenizer that llama.cpp does not have.

    Example:
        >>> export_gguf(Source(checkpoint, model, processor), tmp_path / "gguf")
        Traceback (most recent call last):
        frozenprefix.errors.ExportError: model.mapper.output_norm: got 'layer', a layer norm ...
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("writing GGUF files needs the gguf package: run `pip install gguf`")
    if only_language_model:
        with atomic_folder(out) as folder:
            _write_language_model(source, folder / LM_FILE, file_type)
        return Path(out)
    mlp, vit = source.mlp(), source.vit()
    if vit.has_class_token:
        raise ExportError(
            f"model.vision_encoder: '{source.model.vision_encoder.name}' has a class token, which llama.cpp puts "
            "behind the patches instead of in front of them, so that no file gives the same features; use a SigLIP "
            "encoder, `frozenprefix export llava`, or `caption --engine llama.cpp`, which encodes images here"
        )
    projector = projector_of(vit, mlp)
    _check_pixels(source)
    with atomic_folder(out) as folder:
        _write_language_model(source, folder / LM_FILE, file_type)
        _write_mmproj(source, vit, mlp, projector, folder / MMPROJ_FILE, file_type)
    return Path(out)


def _write_language_model(source: Source, path: Path, file_type: FileType) -> None:
    config: Any = source.model.config
    place = str(getattr(config.language_model, "path", ""))
    write_language_model(
        source.model.language_model,
        path,
        file_type,
        tokenizer=source.processor.tokenizer,
        gguf_path=place if place.split("#")[0].endswith(".gguf") else "",
        sha256=config.identity.get("language_model", {}).get("sha256"),
    )


def _check_pixels(source: Source) -> None:
    """Refuse an image processor that changes images of the encoder's own size: llama.cpp takes those as they are.

    Raises:
        ExportError: for one that crops.
    """
    size = source.image_size
    processor: Any = source.processor.image_processor
    image = built_in_images(size)[1]
    mean, std = (np.array(value, np.float32) for value in (processor.image_mean, processor.image_std))
    expected = (np.asarray(image, np.float32) / 255 - mean) / std
    got = source.pixel_values(image)[0].permute(1, 2, 0).numpy()
    if got.shape != expected.shape or np.abs(got - expected).max() > 1e-3:
        raise ExportError(
            f"model.vision_encoder.resize: the encoder's image processor crops images, even those of {size} x {size} "
            "pixels, but llama.cpp shows them whole; train with model.vision_encoder.resize=squash"
        )


def projector_of(vit: PlainViT, mlp: PlainMLP) -> str:
    """llama.cpp's graph: `janus_pro` uses the encoder's activation in the projector too; `mlp` uses GELU there, and has
    room for layer norms.

    Raises:
        ExportError: for blocks that the graph `mlp` would misread.
    """
    if vit.gelu != "quick" and mlp.norms is None:
        return "janus_pro"
    if vit.inner == vit.width:
        raise ExportError(
            "model.vision_encoder: its feed-forward layers are as wide as its tokens, which llama.cpp takes for layers "
            "in the wrong order; use another encoder"
        )
    return "mlp"


def _write_mmproj(
    source: Source, vit: PlainViT, mlp: PlainMLP, projector: str, path: Path, file_type: FileType
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "clip")
    images: Any = source.processor.image_processor
    writer.add_string("general.name", f"{source.model.vision_encoder.name} with a mapper of frozenprefix")
    writer.add_string("clip.projector_type", projector)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", vit.gelu != "quick")
    numbers = {
        "embedding_length": vit.width,
        "attention.head_count": vit.heads,
        "feed_forward_length": vit.inner,
        "block_count": vit.blocks,
        "projection_dim": mlp.down.shape[0],
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vit.eps)
    writer.add_array("clip.vision.image_mean", [float(value) for value in images.image_mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in images.image_std])
    if projector == "mlp":  # otherwise that graph leaves out the last block
        writer.add_array("clip.vision.feature_layer", [vit.blocks])
    tensors = {_vision_name(name): tensor for name, tensor in vit.tensors.items()}
    write_tensors(writer, tensors | _mlp_tensors(mlp, projector, vit.eps), file_type)


def _mlp_tensors(mlp: PlainMLP, projector: str, eps: float) -> dict[str, Tensor]:
    """The mapper's tensors by llama.cpp's names.

    Its layer norms have the encoder's `eps`. Scaling their input by c is the same as dividing eps by c², so the linear
    layers before them are scaled by c = √(eps / own eps).
    """
    if mlp.norms is None:
        second = "mm.1" if projector == "janus_pro" else "mm.2"
        names = {"mm.0": (mlp.up, mlp.up_bias), second: (mlp.down, mlp.down_bias)}
    else:
        hidden, output = mlp.norms
        first, last = ((eps / norm.eps) ** 0.5 for norm in mlp.norms)
        names = {
            **{"mm.0": (mlp.up * first, mlp.up_bias * first), "mm.1": (hidden.weight, hidden.bias)},
            **{"mm.3": (mlp.down * last, mlp.down_bias * last), "mm.4": (output.weight, output.bias)},
        }
    return {f"{name}.{part}": pair[i] for name, pair in names.items() for i, part in enumerate(("weight", "bias"))}


def _vision_name(name: str) -> str:
    """The name of a tensor of `PlainViT` in an mmproj file."""
    whole = {
        **{"patch.weight": "v.patch_embd.weight", "patch.bias": "v.patch_embd.bias"},
        **{"position": "v.position_embd.weight", "class": "v.class_embd"},
    }
    if name in whole:
        return whole[name]
    if not name.startswith("blocks."):
        return "v." + name.replace("_norm", "_ln")
    _, number, part, kind = name.split(".")
    parts = {
        **{"norm1": "ln1", "norm2": "ln2", "up": "ffn_up", "down": "ffn_down"},
        **{one: f"attn_{one}" for one in ("q", "k", "v", "out")},
    }
    return f"v.blk.{number}.{parts[part]}.{kind}"
