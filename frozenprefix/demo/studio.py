"""The models behind the page. All users share them; one of them computes at a time."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from frozenprefix.demo.corrections import Corrections
from frozenprefix.demo.inputs import Item
from frozenprefix.demo.retraining import Retraining
from frozenprefix.errors import ConfigError, FrozenPrefixError
from frozenprefix.evaluation.samples import other_images, recipe_images
from frozenprefix.inference import Captioner, Dialog, VideoCaptioner, stream_text
from frozenprefix.interpret import Explainer, Explanation
from frozenprefix.training.checkpoints import load_initial

KEPT_FEATURES = 256  # items whose image features are kept
OTHERS = 16  # images that evidence compares with
_UNUSUAL = re.compile(r"(^|/)(best|last|step-\d+)$")


class DemoModel:
    """One checkpoint on the page.

    Generation is serialised by a lock, which may be released by another thread than the one that took it: a web server
    runs the steps of one generator in several threads.

    Args:
        checkpoint: its folder or Hub id; captioner: loaded from it.

    Example:
        >>> from frozenprefix.demo import read_items
        >>> model = DemoModel(checkpoint, captioner)
        >>> ((item,), _) = read_items([image_path])
        >>> prompts = [processor.prompt_for("caption")]
        >>> whole = captioner.generate(prompts, [image], num_beams=1, max_new_tokens=3)[0].text.strip()
        >>> list(model.caption(item, max_new_tokens=3))[-1] == whole
        True
    """

    def __init__(self, checkpoint: str | Path, captioner: Captioner):
        self.checkpoint, self.captioner = str(checkpoint), captioner
        self.name = display_name(self.checkpoint)
        self.lock = Lock()
        self._features: OrderedDict[Path, Tensor] = OrderedDict()
        self._explainer: Explainer | None = None

    @classmethod
    def load(cls, checkpoint: str | Path, **options: Any) -> DemoModel:
        """Load a checkpoint; `options` as of `Captioner.from_pretrained`."""
        return cls(checkpoint, Captioner.from_pretrained(checkpoint, **options))

    # ── texts ──

    def caption(self, item: Item, *, beams: int = 1, max_new_tokens: int = 30) -> Iterator[str]:
        """The caption as far as it is written, again and again; with several beams once, when it is whole.

        Raises:
            FrozenPrefixError: for an item that this model cannot read.
        """
        with self.lock:
            features = self._encode(item)
            prompt = self._caption_prompt(item, features)
            if beams == 1:
                yield from _growing(stream_text(self.captioner, prompt, features, max_new_tokens=max_new_tokens))
                return
            options = {"num_beams": beams, "max_new_tokens": max_new_tokens}
            yield self.captioner.generate([prompt], features, **options)[0].text.strip()

    def answer(self, item: Item, question: str, *, max_new_tokens: int = 20) -> Iterator[str]:
        """The answer to a question about an item, as far as it is written, again and again."""
        with self.lock:
            features = self._encode(item)
            prompt = self.captioner.processor.prompt_for("vqa", question, images=len(features))
            yield from _growing(stream_text(self.captioner, prompt, features, max_new_tokens=max_new_tokens))

    @property
    def chat_problem(self) -> str | None:
        """Why this checkpoint cannot chat; None if it can."""
        try:
            self.new_dialog()
        except FrozenPrefixError as error:
            return f"{self.name} cannot chat: {error}"
        return None

    def new_dialog(self) -> Dialog:
        """A conversation, which belongs to one user."""
        return Dialog(self.captioner.model, self.captioner.processor)

    def chat(self, dialog: Dialog, message: str, item: Item | None, *, max_new_tokens: int = 64) -> Iterator[str]:
        """The reply to a message, as far as it is written; `item` comes before it."""
        with self.lock:
            images: Any = () if item is None else self._encode(item)
            yield from _growing(dialog.stream(message, images, max_new_tokens=max_new_tokens))

    def explain(self, item: Item, text: str) -> Explanation:
        """Evidence and heat maps of a text about a photo.

        Raises:
            FrozenPrefixError: for a text without a word, or an item that cannot be explained.
        """
        if item.kind == "clip":
            raise ConfigError(f"{item.name}: heat maps are for photos; a clip has one prefix for all its frames")
        with self.lock:
            if self._explainer is None:
                candidates = recipe_images(Path(self.checkpoint).expanduser())
                self._explainer = Explainer(self.captioner, other_images(self.captioner.encoder, candidates, OTHERS))
            return self._explainer(item.path, text)

    def use_weights(self, folder: Path) -> None:
        """Take the trained weights of another checkpoint with the same frozen parts."""
        with self.lock:
            load_initial(self.captioner.model, folder)
            self._explainer = None
            self._features.clear()  # the encoder may be among what is trained

    # ── parts ──

    def _encode(self, item: Item) -> Tensor:
        if item.path not in self._features:
            photo = item.kind == "photo"
            made = self.captioner.encoder([item.path]) if photo else VideoCaptioner(self.captioner).features(item.path)
            self._features[item.path] = made.cpu()
            while len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        return self._features[item.path]

    def _caption_prompt(self, item: Item, features: Tensor) -> str:
        if item.kind == "clip":
            return self.captioner.processor.prompt_for("caption", images=len(features))
        return self.captioner.caption_prompts([item.path], features)[0]


@dataclass
class Studio:
    """Models, and the corrections that users have made.

    Example:
        >>> from frozenprefix.demo import Corrections
        >>> Studio([DemoModel(checkpoint, captioner)], Corrections(tmp_path / "corrections")).names
        ['checkpoint']
    """

    models: list[DemoModel]
    corrections: Corrections
    examples: int = 4  # validation images shown before and after a training on corrections
    trainings: list[Retraining] = field(default_factory=list)  # that are going on

    @property
    def names(self) -> list[str]:
        """Names of the models on the page, each once."""
        names = [model.name for model in self.models]
        return [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]

    def stop(self) -> None:
        """End the trainings of all users."""
        for training in list(self.trainings):
            training.stop()


def display_name(checkpoint: str) -> str:
    """A short name of a checkpoint: of the run, if the folder is called as in every run.

    Example:
        >>> display_name("runs/flickr8k/best"), display_name("me/captions")
        ('flickr8k', 'captions')
    """
    path = Path(checkpoint).expanduser()
    parts = [part for part in path.parts if part not in ("/", ".", "..")]
    if len(parts) > 1 and _UNUSUAL.search(path.as_posix()):
        return parts[-2] if parts[-1] == "best" else f"{parts[-2]}, {parts[-1]}"
    return parts[-1] if parts else checkpoint


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        text += piece
        yield text.rstrip()
    if not text:
        yield ""
