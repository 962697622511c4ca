"""A checkpoint of parts that others trained: encoder, mapper and language model, put together and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frozenprefix.errors import AssetError
from frozenprefix.models.configuration import FrozenPrefixConfig, LanguageModelConfig, MapperConfig
from frozenprefix.models.encoder_configuration import vision_encoder_config
from frozenprefix.models.language_model.loading import language_model_identity
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.self_contained import LM_FOLDER
from frozenprefix.models.state_dict import misfits
from frozenprefix.models.vision import BuiltEncoder, build_vision_encoder
from frozenprefix.models.vision.weights import read_weights
from frozenprefix.utils import atomic_folder


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that somebody else wrote; nothing in it is run.

    Raises:
        AssetError: there is no such file, it holds more than tensors, or values that are not finite.

    Example:
        >>> torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
        >>> read_state(tmp_path / "a.pt")
        {'weight': tensor([1., 1.])}
    """
    path = Path(file)
    if not path.is_file():
        raise AssetError(f"FILE: got '{file}', expected a file that exists")
    try:
        state = read_weights(path)
    except AssetError:
        raise
    except Exception as error:  # damaged files raise errors of many classes in torch's reader
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise AssetError(f"{path.name} is damaged or no file of tensors ({reason}); fetch it again") from error
    wrong = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wrong:
        raise AssetError(f"{path.name}: {wrong[0]} has values that are not finite; fetch the file again")
    return state


def build_encoder(fields: Mapping[str, Any]) -> tuple[Any, BuiltEncoder]:
    """The config section of an encoder, and the encoder.

    Args:
        fields: of the section, as in a recipe: source, name, weights, output, …
    """
    section = vision_encoder_config(**fields)
    return section, build_vision_encoder(section)


def save_imported(
    out: str | Path,
    *,
    encoder: tuple[Any, BuiltEncoder],
    mapper: MapperConfig,
    tensors: Mapping[str, Tensor],
    language_model: LanguageModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    own_language_model: PreTrainedModel | None = None,
    end_tokens: list[int] | None = None,
    unit_features: bool = False,
) -> FrozenPrefixForConditionalGeneration:
    """Put the parts together and write the checkpoint; it is there completely or not at all.

    Args:
        tensors: of the mapper without what is behind it, by the names of its class here.
        language_model: where the frozen one is.
        own_language_model: one with weights of its own, which become part of the checkpoint.
        end_tokens: ids that end a text beside the tokenizer's end token.
        unit_features: whether features were scaled to unit length in training.

    Raises:
        AssetError: naming the tensors whose shapes do not fit.
    """
    section, built = encoder
    processor = FrozenPrefixProcessor(built.image_processor, tokenizer, prefix_length=mapper.prefix_length)
    config = FrozenPrefixConfig(
        vision_encoder=section,
        mapper=mapper,
        language_model=language_model,
        identity={"vision_encoder": built.identity},
        image_token_id=processor.image_token_id,
        unit_features=unit_features,
    )
    model = FrozenPrefixForConditionalGeneration(
        config, vision_encoder=built.module, language_model=own_language_model
    ).eval()
    own = model.mapper.body.state_dict()
    problems = misfits(own, tensors)
    if problems:
        raise AssetError("the mapper does not fit: " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    if end_tokens:
        model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, *end_tokens})
    with atomic_folder(out) as folder:
        if own_language_model is not None:
            _save_language_model(model, tokenizer, folder / LM_FOLDER)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model


def _save_language_model(model: Any, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a language model with weights of its own into the checkpoint, and let the config name it there."""
    model.language_model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    identity = language_model_identity(model.language_model, target)
    model.config.identity = {**model.config.identity, "language_model": identity}
    model.config.language_model = model.config.language_model.model_copy(update={"path": str(target)})
