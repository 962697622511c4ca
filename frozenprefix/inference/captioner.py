"""Captions and answers: images in, text out, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from frozenprefix.assets import opening_checkpoint
from frozenprefix.config import inference_precision
from frozenprefix.config.base_recipe import DTYPES
from frozenprefix.data.caption_retriever import CaptionRetriever, image_keys
from frozenprefix.data.image_encoder import ImageEncoder, ImageInput
from frozenprefix.data.images import BadImages
from frozenprefix.errors import DataError
from frozenprefix.inference.generate_options import CAPTIONER_REFUSES, check_generate
from frozenprefix.models.checkpoint import checkpoint_config
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.ensemble import Ensemble
from frozenprefix.models.language_model import end_tokens, padding_token
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.packing import pack_prompts
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor
from frozenprefix.utils import progress_bar

T = TypeVar("T")

LOG_PROB_WEIGHT = 0.01  # of a beam's mean log-probability beside its agreement with captions, which is about 0 to 1


@dataclass(frozen=True)
class Generation:
    """A generated text, and the mean log-probability of its tokens (None for sampling).

    Example:
        >>> Generation("a dog", -0.5).text
        'a dog'
    """

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Caption:
    """An image's caption, with its score as in `Generation`.

    Example:
        >>> Caption(image_path, "a red circle", -0.5).text
        'a red circle'
    """

    path: Path
    text: str
    score: float | None = None


class Captioner:
    """Captions images and answers questions with a trained model.

    Args:
        model, processor: as saved together in a checkpoint.
        batch_size: prompts generated for at once.
        retriever: finds the captions of similar images that caption prompts were trained with.
        reranker: finds the captions of similar images by which one of the beams is chosen.
        ensemble: writes in place of the model alone, which is the first of it.

    Example:
        >>> [caption.path.name for caption in captioner.caption([image_path], num_beams=1, max_new_tokens=3)]
        ['red_circle.png']
        >>> isinstance(captioner.answer(image, "what is it?"), str)
        True
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        *,
        batch_size: int = 32,
        retriever: CaptionRetriever | None = None,
        reranker: CaptionRetriever | None = None,
        ensemble: Ensemble | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.retriever, self.reranker, self.ensemble = retriever, reranker, ensemble
        self.encoder = ImageEncoder.from_model(model, processor)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        batch_size: int = 32,
        language_model: str | Path | None = None,
        precision: str = "auto",
        ensemble: Sequence[str | Path] = (),
    ) -> Captioner:
        """Load a checkpoint folder or Hub id onto `device` (a GPU when there is one).

        Args:
            ensemble: further checkpoints, which choose each word together with the first one; see `Ensemble`.
            language_model: path of the checkpoint's language model, if it has moved; it must be the same one.
            precision: of the frozen parts, as of `inference_precision`: "auto" is the faster of fp32 and bf16 here,
                whatever the checkpoint was trained in.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with opening_checkpoint(checkpoint), progress_bar("loading the model"):
            config = checkpoint_config(FrozenPrefixConfig, checkpoint, language_model=language_model)
            dtype = DTYPES[inference_precision(config, precision, device=device)]
            model = FrozenPrefixForConditionalGeneration.from_pretrained(
                checkpoint, config=config, dtype=dtype, device_map=device
            )
            processor = FrozenPrefixProcessor.from_pretrained(checkpoint)
            store = CaptionRetriever.load(checkpoint)
            retriever = store if store is not None and store.options.prompts else None
            reranker = store if store is not None and store.options.reranks else None
            captioner = cls(model, processor, batch_size=batch_size, retriever=retriever, reranker=reranker)
        return captioner.together_with(ensemble) if ensemble else captioner

    def together_with(self, checkpoints: Sequence[str | Path]) -> Captioner:
        """A captioner whose model chooses each word together with those of other checkpoints; see `Ensemble`.

        Prompts, retrieved captions and evidence are those of this captioner's own checkpoint.

        Raises:
            ConfigError: for checkpoints with other frozen parts.

        Example:
            >>> len(captioner.together_with([checkpoint]).ensemble.models)
            2
        """
        models = [self.model]
        for checkpoint in checkpoints:
            with opening_checkpoint(checkpoint), progress_bar("loading the ensemble"):
                config = checkpoint_config(FrozenPrefixConfig, checkpoint)
                options = {"dtype": self.model.language_model.dtype, "device_map": str(self.model.device)}
                model = FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint, config=config, **options)
                models.append(model.eval())
        return Captioner(
            self.model,
            self.processor,
            batch_size=self.batch_size,
            retriever=self.retriever,
            reranker=self.reranker,
            ensemble=Ensemble(models),
        )

    def caption(
        self,
        paths: Iterable[str | Path],
        *,
        prompt: str | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        bad: BadImages | None = None,
        **generate: Any,
    ) -> Iterator[Caption]:
        """Caption image files, in order.

        Args:
            prompt: text before the caption; by default the prompt of the training. Retrieved captions, if the model
                was trained with them, come before it.
            bad: collects the images that cannot be read, which are left out; without it the first one raises.
            generate: further options of transformers' `generate`, such as `do_sample=True, top_p=0.9, num_beams=1`.

        Raises:
            BadImageError: for an image that cannot be read.
        """
        text = self.processor.prompt_for("caption") if prompt is None else self.processor.with_image(prompt)
        for batch, features in self.encoder.batches(map(Path, paths), self.batch_size, bad):
            files = cast(list[Path], batch)
            prompts = self.caption_prompts(files, features, text)
            options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **generate}
            texts = self.caption_groups([[prompt] for prompt in prompts], features, files, **options)
            for path, (generation,) in zip(files, texts, strict=True):
                yield Caption(path, generation.text, generation.score)

    def caption_prompts(self, files: Sequence[Path], features: Tensor, text: str | None = None) -> list[str]:
        """What stands before the caption of each image file, with retrieved captions for a model trained with them.

        Args:
            features: float[n, N, D_enc] of the files.
            text: the prompt; by default that of the training.
        """
        prompts = [self.processor.prompt_for("caption") if text is None else text] * len(files)
        if self.retriever is None:
            return prompts
        return self.retriever.prompts(prompts, features.cpu(), image_keys(self.model.vision_encoder, files))

    def caption_groups(
        self, groups: Sequence[Sequence[str]], features: Tensor, files: Sequence[Path], **generate: Any
    ) -> list[list[Generation]]:
        """As `generate_groups`, for groups with one image each.

        A model that was trained with `data.retrieval.use: rerank` or `both` takes of the beams the one that agrees best
        with the captions that similar training images predict, and among equals the likelier one. Greedy search and
        sampling have one text to choose from.

        Args:
            features: float[n, N, D_enc] of the image files.
        """
        beams = generate.get("num_beams", 1)
        if self.reranker is None or beams == 1 or generate.get("do_sample"):
            return self.generate_groups(groups, features, **generate)
        check_generate(generate, CAPTIONER_REFUSES)
        found = self._generate(groups, features, {**generate, "num_return_sequences": beams})
        texts = [[list(islice(found, beams)) for _ in group] for group in groups]
        keys = image_keys(self.model.vision_encoder, files)
        written = [[one.text for beam in group for one in beam] for group in texts]
        agreements = self.reranker.agreement(written, features.cpu(), keys)
        chosen = []
        for group, agreement in zip(texts, agreements, strict=True):
            by_prompt = agreement.reshape(len(group), beams)
            scores = by_prompt + LOG_PROB_WEIGHT * np.array([[one.score for one in beam] for beam in group])
            chosen.append([beam[best] for beam, best in zip(group, scores.argmax(axis=1), strict=True)])
        return chosen

    def answer(self, image: ImageInput, question: str, *, max_new_tokens: int = 10, **generate: Any) -> str:
        """Answer a question about one image, greedily unless `generate` says otherwise."""
        prompt = self.processor.prompt_for("vqa", question)
        options = {"max_new_tokens": max_new_tokens, "num_beams": 1, **generate}
        return self.generate([prompt], [image], **options)[0].text

    def generate(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageInput] | Tensor | None = None,
        **generate: Any,
    ) -> list[Generation]:
        """Continue one batch of prompts.

        Args:
            prompts: texts with an `<image>` for every image; without images the LM continues them blind.
            images: files, PIL images, or image features float[n, N, D_enc], in reading order over all prompts.
            generate: options of transformers' `generate`.

        Raises:
            ConfigError: for an option that a captioner does not take; see `check_generate`.
        """
        return [text for (text,) in self.generate_groups([[prompt] for prompt in prompts], images, **generate)]

    def generate_groups(
        self,
        groups: Sequence[Sequence[str]],
        images: Sequence[ImageInput] | Tensor | None = None,
        **generate: Any,
    ) -> list[list[Generation]]:
        """Continue one batch of prompts, several about the same images, which the LM then reads once for all of them.

        Args:
            groups: the prompts of each group of images, with an `<image>` for every image in each prompt.
            images: as of `generate`, in reading order over the groups.

        Raises:
            DataError: for more or fewer images than there are `<image>` marks.

        Example:
            >>> questions = [processor.prompt_for("vqa", text) for text in ("what color is it?", "what shape is it?")]
            >>> [len(answers) for answers in captioner.generate_groups([questions], [image], max_new_tokens=2)]
            [2]
        """
        check_generate(generate, CAPTIONER_REFUSES)
        texts = self._generate(groups, images, generate)
        return [list(islice(texts, len(prompts))) for prompts in groups]

    def _generate(
        self, groups: Sequence[Sequence[str]], images: Sequence[ImageInput] | Tensor | None, generate: Mapping[str, Any]
    ) -> Iterator[Generation]:
        """All texts of all prompts, `num_return_sequences` of each, in order."""
        if images is None:
            groups = [[self.blind_prompt(prompt) for prompt in prompts] for prompts in groups]
        features = None if images is None else self.encoder(images).to(self.model.device)
        tokenizer = self.processor.tokenizer
        settings = {
            "do_sample": False,
            "eos_token_id": end_tokens(self.model, tokenizer),
            "pad_token_id": padding_token(self.model, tokenizer),
            "return_dict_in_generate": True,
            **generate,
        }
        encoded = [[self.processor.encode_prompt(prompt) for prompt in prompts] for prompts in groups]
        counts = images_per_group(groups)
        if features is not None and sum(counts) != len(features):
            raise DataError(
                f"images: got {len(features)} for {sum(counts)} {IMAGE_TOKEN} marks; every {IMAGE_TOKEN} in the "
                "text needs one image"
            )
        longest = max(len(ids) for prompts in encoded for ids in prompts)
        if self.ensemble is not None or self.model.searches_rows(longest, sees_images=images is not None, **settings):
            output = self._search_rows(encoded, counts, features, settings)
        else:
            output = self._search_each(encoded, counts, features, settings)
        scores = [None] * len(output.sequences) if settings["do_sample"] else self._scores(output)
        return map(Generation, self.processor.batch_decode(output.sequences), scores)

    def _search_rows(
        self, groups: list[list[list[int]]], counts: list[int], features: Tensor | None, settings: dict[str, Any]
    ) -> Any:
        packed = pack_prompts(
            groups,
            image_token_id=self.processor.image_token_id,
            prefix_length=self.model.placeholders_per_image,
            images_per_group=counts,
        )
        writer = self.model if self.ensemble is None else self.ensemble
        return writer.generate(packed=packed.to(self.model.device), image_features=features, **settings)

    def _search_each(
        self, groups: list[list[list[int]]], counts: list[int], features: Tensor | None, settings: dict[str, Any]
    ) -> Any:
        """The images of a group are repeated for each of its prompts."""
        prompts = [ids for group in groups for ids in group]
        inputs = self.processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        if features is not None:
            firsts = accumulate(counts, initial=0)
            numbers = [
                first + i
                for group, count, first in zip(groups, counts, firsts, strict=False)
                for _ in group
                for i in range(count)
            ]
            features = features[numbers]
        return self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            attention_mask=inputs["attention_mask"].to(self.model.device),
            image_features=features,
            output_scores=True,
            **settings,
        )

    def blind_prompt(self, prompt: str) -> str:
        """The prompt without its images; an empty one starts with the LM's first token."""
        text = prompt.replace(IMAGE_TOKEN, "").lstrip()  # a chat's prompt ends in a new line
        if text or self.processor.encode_prompt(""):
            return text
        return self.processor.tokenizer.bos_token or self.processor.tokenizer.eos_token

    def _scores(self, output: Any) -> list[float]:
        if getattr(output, "sequences_scores", None) is not None:
            return output.sequences_scores.tolist()
        steps = self.model.language_model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )
        # up to the first end token and with it: what follows is padding
        ids = torch.tensor(end_tokens(self.model, self.processor.tokenizer), device=steps.device)
        ends = torch.isin(output.sequences, ids)
        real = ends.cumsum(-1) - ends.long() == 0
        return (steps.masked_fill(~real, 0).sum(-1) / real.sum(-1)).tolist()


def images_per_group(groups: Sequence[Sequence[str]]) -> list[int]:
    """How many images the prompts of each group show."""
    counts = []
    for prompts in groups:
        marks = sorted({prompt.count(IMAGE_TOKEN) for prompt in prompts})
        if len(marks) != 1:
            raise DataError(
                f"prompts: those of a group have {' and '.join(map(str, marks)) or 'no'} {IMAGE_TOKEN} marks, expected "
                "prompts about the same images"
            )
        counts += marks
    return counts


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items.

    Example:
        >>> list(batched("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
