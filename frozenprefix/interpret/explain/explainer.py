"""Makes explanations: reads the model's numbers for one text about one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.evidence import RETRIEVES, EvidenceScorer, Word, split_words, target_of
from frozenprefix.inference.likelihood import token_log_likelihoods
from frozenprefix.interpret.explain.attention import NotAvailable, attention_maps
from frozenprefix.interpret.explain.explanation import Choice, ExplainedWord, Explanation, PrefixPosition
from frozenprefix.interpret.explain.occlusion import cells, occluded
from frozenprefix.models.language_model.base import word_embeddings
from frozenprefix.models.packing import Target
from frozenprefix.models.vision.precomputed import feature_table

GRID = 7  # cells of a heat map's side, at most, and where the encoder has no patches


class Explainer:
    """Explains texts about images.

    Args:
        captioner: the model.
        others: other images of the same kind, for evidence; see `EvidenceScorer`.
        nearest: number of nearest words and of alternatives.

    Example:
        >>> explain = Explainer(captioner, others=[images_folder / "blue_cross.png"])
        >>> explanation = explain(image)  # what the model writes itself
        >>> explanation.evidence.shape == (len(explanation.words),)
        True
    """

    def __init__(self, captioner: Captioner, others: Sequence[ImageInput] | Tensor = (), *, nearest: int = 5):
        self.captioner = captioner
        self.nearest = nearest
        compares = len(others) > 0 and captioner.retriever is None
        self.scorer = EvidenceScorer(captioner, others) if compares else None

    def __call__(
        self,
        image: ImageInput,
        text: str | None = None,
        *,
        prompt: str | None = None,
        heat_maps: bool = True,
        num_beams: int = 5,
        max_new_tokens: int = 30,
    ) -> Explanation:
        """Explain one text.

        Args:
            text: that is explained; what the model writes, when not given.
            prompt: before the text; by default the prompt of captions, with retrieved ones for a model that was trained
                with them, which needs a file. `processor.prompt_for("vqa", question)` asks.
            heat_maps: occlusion takes as many passes as the map has cells, attention a backward pass for each word.
            num_beams, max_new_tokens: of the model's own text.

        Raises:
            DataError: for a text, or a model's own one, without a word.
            BadImageError: for an image that cannot be read.
            ConfigError: for an image that is no file, with a model that retrieves captions for its prompt.
        """
        captioner, model = self.captioner, self.captioner.model
        with torch.no_grad():
            pixels = None if feature_table(model.vision_encoder) is not None else captioner.encoder.prepare(image)
            features = captioner.encoder([image]) if pixels is None else captioner.encoder.encode(pixels)
        prompt = self._prompt(image, features) if prompt is None else captioner.processor.with_image(prompt)
        if text is None:
            options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
            text = captioner.generate([prompt], features, **options)[0].text.strip()
        if not text.strip():
            raise DataError(f"text: got {text!r} for {_name(image)}, expected a text with a word")
        target = target_of(captioner, prompt, text)
        words = split_words(captioner.processor.tokenizer, target.input_ids[target.num_context : -1])
        unavailable: dict[str, str] = {}
        parts: dict[str, Callable[[], Any]] = {
            "evidence": lambda: self._evidence(prompt, text, features),
            "prefix": lambda: self._prefix(target, features),
        }
        if heat_maps:
            grid = _grid(features)
            parts["occlusion"] = lambda: self._occlusion(target, words, pixels, grid)
            parts["attention"] = lambda: cells(attention_maps(captioner, target, words, features), grid).numpy()
        made = {name: _try(name, part, unavailable) for name, part in parts.items()}
        return Explanation(
            image=None if pixels is None else shown_image(pixels, captioner.processor.image_processor),
            name=_name(image),
            prompt=prompt,
            text=text,
            words=self._words(words, self._choices(target, features), made["evidence"]),
            occlusion=made.get("occlusion"),
            attention=made.get("attention"),
            prefix=made["prefix"] or (),
            others=0 if self.scorer is None else len(self.scorer.others),
            unavailable=unavailable,
        )

    def _prompt(self, image: ImageInput, features: Tensor) -> str:
        """The prompt of captions."""
        captioner = self.captioner
        if captioner.retriever is None:
            return captioner.processor.prompt_for("caption")
        if not isinstance(image, str | PathLike):
            raise ConfigError(
                f"image: got {type(image).__name__}, expected a file: this model reads captions of similar images, "
                "which are found by the file's contents"
            )
        return captioner.caption_prompts([Path(image)], features)[0]

    @staticmethod
    def _words(
        words: Sequence[Word], choices: Sequence[Choice], evidence: Sequence[float] | None
    ) -> tuple[ExplainedWord, ...]:
        explained = []
        for number, word in enumerate(words):
            tokens = tuple(choices[word.first : word.last])
            log_prob = float(sum(np.log(max(token.probability, 1e-30)) for token in tokens))
            explained.append(ExplainedWord(word.text, log_prob, None if evidence is None else evidence[number], tokens))
        return tuple(explained)

    def _evidence(self, prompt: str, text: str, features: Tensor) -> list[float | None]:
        if self.captioner.retriever is not None:
            raise NotAvailable(RETRIEVES)
        if self.scorer is None:
            raise NotAvailable("no other images were given to compare with")
        return [word.evidence for word in self.scorer([prompt], [text], features)[0]]

    @torch.no_grad()
    def _logits(self, target: Target, features: Tensor) -> Tensor:
        """What the LM predicts: float32[T, V] after each token; for an encoder-decoder after those it writes."""
        model = self.captioner.model
        ids = torch.tensor(target.input_ids, device=model.device)[None]
        features = features.to(model.device)
        if not model.lm.is_encoder_decoder:
            return model(input_ids=ids, image_features=features).logits[0].float()
        context, labels = ids[:, : target.num_context], ids[:, target.num_context :]
        written = model(input_ids=context, image_features=features, labels=labels).logits[0].float()
        return torch.cat([written.new_zeros(target.num_context - 1, written.shape[1]), written])

    def _choices(self, target: Target, features: Tensor) -> list[Choice]:
        """The text's tokens, without the end token."""
        logits = self._logits(target, features)[target.num_context - 1 :]
        decode = self.captioner.processor.tokenizer.decode
        choices = []
        for token, line in zip(target.input_ids[target.num_context : -1], logits, strict=False):
            probabilities = line.softmax(dim=-1)
            best = probabilities.topk(self.nearest)
            others = tuple(
                (decode([other]), value)
                for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            )
            choices.append(Choice(decode([token]), float(probabilities[token]), others))
        return choices

    @torch.no_grad()
    def _prefix(self, target: Target, features: Tensor) -> tuple[PrefixPosition, ...]:
        """Nearest words of each prefix embedding."""
        model, tokenizer = self.captioner.model, self.captioner.processor.tokenizer
        if not model.fusion.is_prefix:
            raise NotAvailable(
                f"fusion '{model.config.fusion.type}' puts no embeddings in the places of words, so none is near a word"
            )
        # [P, D_lm] and [V, D_lm] -> [P, V]
        embeds = model.map_features(features.to(model.device))[0].float()
        table = word_embeddings(model.language_model).weight.float()
        cosine = torch.nn.functional.normalize(embeds, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).T
        cosine = cosine[:, : len(tokenizer)]
        places = [place for place, token in enumerate(target.input_ids) if token == model.config.image_token_id]
        if model.lm.is_encoder_decoder:
            heads: list[tuple[tuple[str, float], ...]] = [()] * len(places)
        else:
            logits = self._logits(target, features)[places]
            heads = [self._nearest(line) for line in logits.softmax(dim=-1)[:, : len(tokenizer)]]
        return tuple(PrefixPosition(self._nearest(line), head) for line, head in zip(cosine, heads, strict=True))

    def _nearest(self, scores: Tensor) -> tuple[tuple[str, float], ...]:
        best = scores.topk(self.nearest)
        decode = self.captioner.processor.tokenizer.decode
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple((decode([token]), value) for token, value in pairs)

    @torch.no_grad()
    def _occlusion(self, target: Target, words: Sequence[Word], pixels: Tensor | None, grid: int) -> np.ndarray:
        """float32[W, g, g]: how much log p(word) falls with each covered copy of the image."""
        if pixels is None:
            raise NotAvailable("this model has precomputed features; there is no image to cover")
        captioner = self.captioner
        copies = torch.cat([pixels, occluded(pixels, grid)])
        batches = copies.split(captioner.encoder.batch_size)
        # [1 + g², P, D_lm]
        features = torch.cat([captioner.encoder.encode(batch) for batch in batches]).to(captioner.model.device)
        embeds = captioner.model.map_features(features)
        group = [target]
        scored = token_log_likelihoods(captioner.model, [group] * len(embeds), embeds, rows_at_once=32)
        # [1 + g², tokens] -> [1 + g², W]
        tokens = torch.stack([each for (each,) in scored])
        sums = torch.stack([tokens[:, word.first : word.last].sum(dim=1) for word in words], dim=1)
        return (sums[0] - sums[1:]).T.reshape(len(words), grid, grid).numpy()


def explain(captioner: Captioner, image: ImageInput, text: str | None = None, **options: Any) -> Explanation:
    """One explanation; `others` and `nearest` as of `Explainer`, the rest as of its call.

    For several images keep an `Explainer`.

    Example:
        >>> explain(captioner, image, "a dog", heat_maps=False).unavailable["evidence"]
        'no other images were given to compare with'
    """
    of_explainer = {name: options.pop(name) for name in ("others", "nearest") if name in options}
    return Explainer(captioner, **of_explainer)(image, text, **options)


def shown_image(pixel_values: Tensor, image_processor: Any) -> Image.Image:
    """The image as the encoder sees it: pixel values float[1, 3, H, W] with the processor's normalization undone."""
    mean, std = (
        torch.tensor(getattr(image_processor, name, None) or default)[:, None, None]
        for name, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
    )
    pixels = ((pixel_values[0] * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _try(name: str, part: Callable[[], Any], unavailable: dict[str, str]) -> Any:
    try:
        return part()
    except NotAvailable as reason:
        unavailable[name] = str(reason)
        return None


def _grid(features: Tensor) -> int:
    """Cells of a map's side: those of the encoder's patches, up to `GRID`."""
    side = isqrt(features.shape[1])
    return min(side, GRID) if side > 1 and side * side == features.shape[1] else GRID


def _name(image: ImageInput) -> str:
    return "image" if isinstance(image, Image.Image) else Path(image).name
