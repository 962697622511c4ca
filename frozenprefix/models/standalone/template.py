"""The model of a checkpoint's own code: config, encode → map → fuse → language model, and loading from the folder.

`write_code` copies what stands here, and all that it uses, into one file. It is plainer than `models/modeling.py`: no
training, no packing, no adapters, and transformers' own search. Tests hold both to the same logits and texts.
"""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.kernels.compat import config_option
from frozenprefix.kernels.precision import autocast_to
from frozenprefix.models.fusion.base import ImageContext, decoder_layers
from frozenprefix.models.fusion.placeholders import fuse_prefix, index_placeholders
from frozenprefix.models.language_model.base import check_generate_arguments, positions_from_mask
from frozenprefix.models.mappers import PrefixMapper
from frozenprefix.models.mappers.blocks import PrefixScale
from frozenprefix.models.serving import servable
from frozenprefix.models.standalone.choices import ChosenFusion, ChosenMapper, load_encoder

MAX_PIXELS = 89_478_485  # of an image
MAX_BYTES = 1 << 30
MAX_ASPECT = 200  # how many times longer one side of an image may be
# Arguments of `from_pretrained` that say how the checkpoint is fetched, those for the language model, and others that
# ask for what happens anyway.
_FETCHING = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_FOR_LANGUAGE_MODEL = ("attn_implementation", "quantization_config", "device_map", "max_memory")
_WITHOUT_NEED = ("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "weights_only", "code_revision")


class FrozenPrefixConfig(PreTrainedConfig):
    """Config of a checkpoint: dicts that describe the encoder, the mapper, the fusion and the language model."""

    model_type = "frozenprefix"

    def __init__(
        self,
        vision_encoder: dict[str, Any] | None = None,
        mapper: dict[str, Any] | None = None,
        language_model: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        image_size: int | None = None,
        unit_features: bool = False,
        **kwargs: Any,
    ):
        self.vision_encoder = vision_encoder or {}
        self.mapper = mapper or {}
        self.language_model = language_model or {}
        self.fusion = fusion or {"type": "prefix"}
        self.image_token_id = image_token_id
        self.image_size = image_size
        self.unit_features = unit_features
        super().__init__(**kwargs)


@servable
class FrozenPrefixForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen image encoder, a trained mapper, and a frozen language model that reads the prefix embeddings.

    Shape letters: B texts, T tokens, N image tokens, P prefix embeddings, D_enc and D_lm widths.
    """

    config_class = FrozenPrefixConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers reads it from the class
    _supports_sdpa = True

    def __init__(self, config: FrozenPrefixConfig, vision_encoder: Any, language_model: PreTrainedModel):
        super().__init__(config)
        own = ("type", "prefix_length", "output_norm")
        options = {key: value for key, value in config.mapper.items() if key not in own}
        layers = decoder_layers(language_model)
        words: Any = language_model.get_input_embeddings()
        lm_dim = words.weight.shape[1]
        body = ChosenMapper(
            encoder_dim=vision_encoder.encoder_dim,
            num_tokens=vision_encoder.num_tokens,
            lm_dim=lm_dim,
            prefix_length=config.mapper["prefix_length"],
            **options,
        )
        self.vision_encoder = vision_encoder
        has_norm = config.mapper.get("output_norm", "layer") == "layer"
        self.mapper = PrefixMapper(body, PrefixScale(lm_dim, embedding_rms=1.0) if has_norm else nn.Identity())
        self.language_model = language_model
        fusion_options = {key: value for key, value in config.fusion.items() if key != "type"}
        self.fusion = ChosenFusion(lm_dim=lm_dim, num_layers=len(layers), **fusion_options)
        self.fusion.attach(layers)
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: parts arrive with their weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a folder, or a repository of the Hub: frozen parts from their folders, the mapper in float32.

        Args:
            options: `dtype` of the frozen parts; `device_map`, `attn_implementation` and `quantization_config` of the
                language model; `subfolder`; `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`;
                `generation_config`, `output_loading_info`.

        Raises:
            ConfigError: for other arguments.
        """
        config, folder = options.pop("config", None), Path(pretrained_model_name_or_path)
        subfolder, wants_report = options.pop("subfolder", None) or "", options.pop("output_loading_info", False)
        fetching = {name: options.pop(name) for name in _FETCHING if options.get(name) is not None}
        if not folder.is_dir():
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), **fetching))
        folder = folder / subfolder
        if not isinstance(config, FrozenPrefixConfig):
            config = FrozenPrefixConfig.from_pretrained(folder)
        generation_config = options.pop("generation_config", None)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        for_lm = {name: options.pop(name) for name in _FOR_LANGUAGE_MODEL if options.get(name) is not None}
        # what the Auto classes take out of the call, they put into the config
        asked = config_option(config, "attn_implementation")
        for_lm |= {"attn_implementation": asked} if asked and "attn_implementation" not in for_lm else {}
        unknown = [
            name
            for name, value in options.items()
            if value is not None and not name.startswith("_") and name not in ("adapter_kwargs", *_WITHOUT_NEED)
        ]
        if unknown or args:
            raise ConfigError(f"from_pretrained: {', '.join(unknown) or args}: has no effect here; remove it")
        model = cls._assemble(config, folder, dtype, for_lm)
        saved = (folder / "generation_config.json").is_file()
        own = GenerationConfig.from_pretrained(folder) if saved else model.language_model.generation_config
        model.generation_config = generation_config or own
        nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, {**nothing, "error_msgs": []}) if wants_report else model

    @classmethod
    def _assemble(cls, config: FrozenPrefixConfig, folder: Path, dtype: Any, for_lm: dict[str, Any]) -> Any:
        of_lm, of_encoder = config.language_model["dtype"], config.vision_encoder["dtype"]
        if dtype not in (None, "auto"):
            of_lm = of_encoder = str(dtype).removeprefix("torch.")
        language_model = AutoModelForCausalLM.from_pretrained(folder / "language_model", dtype=of_lm, **for_lm)
        encoder = load_encoder({**config.vision_encoder, "image_size": config.image_size}, folder)
        model = cls(config, encoder, language_model)
        trained = load_file(folder / "model.safetensors")
        heads = {name for name in trained if name.startswith("contrastive.")}  # for search, which is not done here
        found = model.load_state_dict({name: trained[name] for name in trained.keys() - heads}, strict=False)
        missing = [name for name in found.missing_keys if name.startswith(("mapper.", "fusion."))]
        if missing or found.unexpected_keys:
            raise ConfigError(f"{folder}: model.safetensors lacks {missing}, has no place for {found.unexpected_keys}")
        if config.vision_encoder["trainable"] == "none":
            encoder.to(getattr(torch, of_encoder))
        else:  # trained weights stay float32, and compute in the shorter type
            encoder.autocast_dtype = getattr(torch, of_encoder)
        for part in (encoder, model.mapper, model.fusion):
            part.to(language_model.device)
        return model.requires_grad_(False).eval()

    # ── encode → map → fuse → language model ──

    def prefix(self, pixel_values: Tensor) -> Tensor:
        """float[images, 3, H, W] -> prefix_embeds: float[images, P, D_lm]."""
        device, dtype = self.language_model.device, self.language_model.dtype
        # -> [images, N, D_enc]
        image_features = self.vision_encoder(pixel_values.to(device)).float()
        if self.config.unit_features:
            image_features = F.normalize(image_features, dim=-1)
        with autocast_to(dtype, device):
            return self.mapper(image_features)

    def fuse(self, input_ids: Tensor, prefix_embeds: Tensor | None) -> tuple[Tensor, ImageContext | None]:
        """int64[B, T] -> input embeddings float[B, T, D_lm], and what the hooks of the fusion read."""
        per_image = self.fusion.placeholders(self.config.mapper["prefix_length"])
        images = 0 if prefix_embeds is None else len(prefix_embeds)
        prefix_index = index_placeholders(input_ids, self.config.image_token_id, images * per_image)
        words = self.language_model.get_input_embeddings()
        if self.fusion.is_prefix:
            inputs_embeds = fuse_prefix(words, input_ids, prefix_index, prefix_embeds)
        else:  # the placeholder only marks the place of the image
            inputs_embeds = words(input_ids.masked_fill(prefix_index >= 0, self._start_token))
        if prefix_embeds is None:
            return inputs_embeds, None
        image = prefix_index.cummax(dim=1).values.div(per_image, rounding_mode="floor")
        return inputs_embeds, ImageContext(prefix_embeds, prefix_index, image)

    @property
    def _start_token(self) -> int:
        text = self.language_model.config.get_text_config()
        return text.bos_token_id if isinstance(text.bos_token_id, int) else text.eos_token_id

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float[B, T, V] of texts int64[B, T] with `prefix_length` placeholders per image.

        Args:
            pixel_values: float[images, 3, H, W], in reading order; attention_mask: int64[B, T], 0 on padding.
            labels: int64[B, T], -100 where nothing counts, for a loss.
        """
        inputs_embeds, context = self.fuse(input_ids, None if pixel_values is None else self.prefix(pixel_values))
        if attention_mask is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = positions_from_mask(attention_mask)
        with self.fusion.seeing(context):
            return self.language_model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
            )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts that are padded on the left; int64[B, T + new tokens], prompts in front, as servers expect it.

        Args:
            args, kwargs: of transformers' `generate`: max_new_tokens, num_beams, streamer, …
        """
        check_generate_arguments(attention_mask, {"generation_config": args[0], **kwargs} if args else kwargs)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise DataError("generate: input_ids: got none; give a prompt, or '<image>' for none")
        inputs_embeds, context = self.fuse(input_ids, None if pixel_values is None else self.prefix(pixel_values))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        search: Any = self.language_model.generate
        with self.fusion.seeing(context):
            found = search(None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        new = found if isinstance(found, Tensor) else found.sequences
        whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), dim=0).to(new.device), new], dim=1)
        if isinstance(found, Tensor):
            return whole
        found.sequences = whole
        return found

    # ── as a transformers model ──

    @property
    def generation_config(self) -> Any:
        """The language model's generation config, which `generate` follows."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        if "language_model" in self._modules:  # transformers' constructor sets one before there is a language model
            self.language_model.generation_config = config

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "save_pretrained: this code only reads a checkpoint; copy its folder, or install frozenprefix"
        )


def to_images(images: Any) -> Any:
    """Images in (nested) lists as upright 8-bit RGB: files, addresses, PIL images, uint8 arrays and tensors."""
    if isinstance(images, (list, tuple)):
        return [to_images(image) for image in images]
    if hasattr(images, "detach"):
        images = images.detach().cpu().numpy()
        images = images.transpose(1, 2, 0) if images.ndim == 3 and images.shape[0] in (1, 3, 4) else images
    if isinstance(images, np.ndarray):
        images = Image.fromarray(images)
    name = str(images)[:60] if isinstance(images, str | PathLike) else "image"
    try:
        return _to_rgb(_opened(images), name)
    except BadImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError("not_an_image", f"{name}: cannot be read as an image ({error})") from error


def _opened(image: Any) -> Image.Image:
    """A PIL image, also of a file, an http(s) address, or a `data:` address with base64 in it."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str) and image.startswith("data:"):
        return Image.open(BytesIO(b64decode(image.partition(",")[2], validate=True)))
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with urlopen(image, timeout=30) as response:
            return Image.open(BytesIO(response.read(MAX_BYTES)))
    return Image.open(image)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(
            "too_large",
            f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS} and sides that differ by a factor of "
            f"{MAX_ASPECT} at most",
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits
        image = image.point(lambda value: value * (255.0 / 65535.0)).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
