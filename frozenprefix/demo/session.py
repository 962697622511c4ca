"""What one user sees: the files, which of them is chosen, what the models said about it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from frozenprefix.demo.inputs import Item, read_items
from frozenprefix.demo.markup import explained, table
from frozenprefix.demo.retraining import Retraining, correction_recipe, replays
from frozenprefix.demo.studio import DemoModel, Studio
from frozenprefix.errors import BadImageError, ConfigError, FrozenPrefixError
from frozenprefix.evaluation.samples import recipe_images
from frozenprefix.inference import Dialog

MOST_COMPARED = 8  # corrections shown before and after a training
Messages = list[dict[str, str]]


@dataclass
class Session:
    """One user's files, captions, conversations and training.

    Attributes:
        items: what was dropped; chosen: the number of the item that is looked at, None without any.
        captions: (path, number of the model) → its caption.

    Example:
        >>> from frozenprefix.demo import Corrections
        >>> session = Session(Studio([DemoModel(checkpoint, captioner)], Corrections(tmp_path / "corrections")))
        >>> session.add([image_path])
        []
        >>> texts = list(session.caption_all(max_new_tokens=3))[-1]
        >>> texts == [session.captions[image_path, 0]]
        True
    """

    studio: Studio
    items: list[Item] = field(default_factory=list)
    chosen: int | None = None
    captions: dict[tuple[Path, int], str] = field(default_factory=dict)
    dialogs: dict[int, Dialog] = field(default_factory=dict)
    seen: dict[int, Path] = field(default_factory=dict)  # the last image of each conversation
    training: Retraining | None = None
    trained: tuple[int, Path] | None = None  # model, and the checkpoint that it has now; not yet kept

    # ── files ──

    def add(self, paths: Sequence[str | Path]) -> list[str]:
        """Put files and folders in place of those before; returns the reasons of those left out."""
        self.items, problems = read_items(paths)
        self.chosen = 0 if self.items else None
        return problems

    def choose(self, number: int) -> None:
        """Look at another item."""
        if 0 <= number < len(self.items):
            self.chosen = number

    @property
    def item(self) -> Item | None:
        """The item that is looked at."""
        return None if self.chosen is None else self.items[self.chosen]

    def need_item(self) -> Item:
        """The chosen item.

        Raises:
            ConfigError: there is none.
        """
        if self.item is None:
            raise ConfigError("Drop a photo or a clip first.")
        return self.item

    def texts(self) -> list[str]:
        """What each model wrote about the chosen item; "" where it has not yet."""
        if self.item is None:
            return [""] * len(self.studio.models)
        return [self.captions.get((self.item.path, n), "") for n in range(len(self.studio.models))]

    def gallery(self) -> list[tuple[Image.Image, str]]:
        """Each item with its captions."""
        models = range(len(self.studio.models))
        told = [
            [text for n in models if (text := self.captions.get((item.path, n)))] or [item.name] for item in self.items
        ]
        return [(item.preview, " / ".join(texts)) for item, texts in zip(self.items, told, strict=True)]

    # ── texts ──

    def caption_all(self, *, beams: int = 1, max_new_tokens: int = 30) -> Iterator[list[str]]:
        """Caption all items with all models, the chosen one first; yields the texts of the chosen one as they grow.

        It ends when other files are dropped.
        """
        if self.chosen is None:
            return
        items = self.items
        order = [self.chosen, *(n for n in range(len(self.items)) if n != self.chosen)]
        for item in [items[number] for number in order]:
            for number, model in enumerate(self.studio.models):
                with closing(_told(model.caption(item, beams=beams, max_new_tokens=max_new_tokens))) as texts:
                    for text in texts:
                        if self.items is not items:
                            return
                        self.captions[item.path, number] = text
                        yield self.texts()

    def ask(self, question: str) -> Iterator[list[str]]:
        """Answers of all models to a question about the chosen item, as they grow.

        Raises:
            ConfigError: without a question or an item.
        """
        item = self.need_item()
        if not question.strip():
            raise ConfigError("Write a question first.")
        answers = [""] * len(self.studio.models)
        for number, model in enumerate(self.studio.models):
            for text in _told(model.answer(item, question.strip())):
                answers[number] = text
                yield list(answers)

    def chat(self, number: int, message: str, *, max_new_tokens: int = 64) -> Iterator[Messages]:
        """A conversation with a model, as the reply grows. The chosen item comes in with the first message after it.

        Raises:
            ConfigError: without a message, or for a model that cannot chat.
        """
        model = self.studio.models[number]
        if not message.strip():
            raise ConfigError("Write a message first.")
        if number not in self.dialogs:
            problem = model.chat_problem
            if problem is not None:
                raise ConfigError(problem)
            self.dialogs[number] = model.new_dialog()
        dialog, item = self.dialogs[number], self.item
        new = item if item is not None and self.seen.get(number) != item.path else None
        before = self.messages(number)
        told = message.strip() if new is None else f"[{new.name}] {message.strip()}"
        asked = {"role": "user", "content": told}
        for text in model.chat(dialog, message.strip(), new, max_new_tokens=max_new_tokens):
            yield [*before, asked, {"role": "assistant", "content": text}]
        if new is not None:
            self.seen[number] = new.path

    def messages(self, number: int) -> Messages:
        """The conversation with a model so far."""
        dialog = self.dialogs.get(number)
        told = [] if dialog is None else dialog.messages
        return [{"role": one["role"], "content": one["content"].replace("<image>", "[image] ")} for one in told]

    def reset_chat(self, number: int) -> None:
        """Forget a conversation."""
        self.dialogs.pop(number, None)
        self.seen.pop(number, None)

    def explain(self, number: int) -> str:
        """HTML that explains what a model wrote about the chosen item.

        Raises:
            FrozenPrefixError: nothing was written yet, or it cannot be explained.
        """
        item, text = self.need_item(), self.texts()[number]
        if not text.strip():
            raise ConfigError("There is no caption to explain yet.")
        return explained(self.studio.models[number].explain(item, text))

    # ── corrections ──

    def correct(self, number: int, right: str) -> str:
        """Keep what is right about the chosen photo.

        Returns:
            What was done.

        Raises:
            FrozenPrefixError: as of `Corrections.add`, and for a clip.
        """
        item = self.need_item()
        if item.kind == "clip":
            raise ConfigError("Corrections are kept for photos; a clip has one prefix for all its frames.")
        self.studio.corrections.add(item.path, self.texts()[number], right)
        return f"Kept; {_counted(len(self.studio.corrections))} in {self.studio.corrections.folder}"

    def corrections_table(self) -> str:
        """All corrections as HTML."""
        corrections = self.studio.corrections
        rows: list[list[Any]] = [[_small(corrections.path_of(one)), one.wrong, one.right] for one in corrections]
        if not rows:
            return '<p class="fp-empty">No corrections yet: mark a caption as wrong, and write what is right.</p>'
        return table(f"Corrections in {corrections.folder}", ["photo", "was", "right"], rows)

    def train(self, number: int, *, steps: int) -> Iterator[tuple[str, str]]:
        """Train a model on the corrections; yields what is going on, and at last a table of before and after.

        Raises:
            FrozenPrefixError: as of `correction_recipe` and `Retraining.run`; the model is then as it was.
        """
        model, corrections = self.studio.models[number], self.studio.corrections
        folder = corrections.folder / "runs" / datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
        recipe = correction_recipe(model.checkpoint, corrections, folder, steps=steps)
        yield "captions before the training …", ""
        compared = self._compared(model)
        before = [_caption(model, item) for item, _ in compared]
        self.training = training = Retraining(recipe)
        self.studio.trainings.append(training)
        try:
            for line in training.run():
                yield line, ""
            losses = training.validation_losses()
        finally:
            self.training = None
            self.studio.trainings.remove(training)
        model.use_weights(folder / "last")
        self.trained = number, folder / "last"
        yield "captions after the training …", ""
        after = [_caption(model, item) for item, _ in compared]
        rows: list[list[Any]] = [
            [item.preview, right or "–", old, new]
            for (item, right), old, new in zip(compared, before, after, strict=True)
        ]
        told = f"Trained {steps} steps on {_counted(len(corrections))}"
        told += (
            ", mixed with images of the first training"
            if replays(recipe)
            else (", without others: the images of the first training are not here, so other captions may get worse")
        )
        if losses:
            told += f". Validation loss {losses[0]:.3f} before, {losses[1]:.3f} after"
        yield (
            f"{told}. The page now uses the new mapper.",
            table("Before and after", ["photo", "right", "before", "after"], rows),
        )

    def stop_training(self) -> None:
        """End a training that is going on."""
        if self.training is not None:
            self.training.stop()

    def keep(self) -> str:
        """Say where the new mapper is."""
        if self.trained is None:
            raise ConfigError("There is no new mapper; train first.")
        number, folder = self.trained
        self.studio.models[number].checkpoint, self.trained = str(folder), None
        return f"Kept: {folder}. Use it as any checkpoint: frozenprefix caption {folder} photo.jpg"

    def go_back(self) -> str:
        """Give a model the weights that it had before the training."""
        if self.trained is None:
            raise ConfigError("There is no new mapper to go back from.")
        model = self.studio.models[self.trained[0]]
        model.use_weights(Path(model.checkpoint).expanduser())
        self.trained = None
        return "The mapper is as it was."

    def _compared(self, model: DemoModel) -> list[tuple[Item, str]]:
        """Corrected photos and what is right, then some validation images."""
        corrections = self.studio.corrections
        pairs = [(corrections.path_of(one), one.right) for one in corrections][-MOST_COMPARED:]
        pairs += [(path, "") for path in recipe_images(Path(model.checkpoint).expanduser())[: self.studio.examples]]
        compared: list[tuple[Item, str]] = []
        for path, right in pairs:
            items, _ = read_items([path])
            compared += [(item, right) for item in items]
        return compared


def _caption(model: DemoModel, item: Item) -> str:
    """The whole caption."""
    return list(model.caption(item))[-1]


def _counted(count: int) -> str:
    return f"{count} correction" + "s" * (count != 1)


def _told(texts: Iterator[str]) -> Generator[str, None, None]:
    """The texts; an error as a text in their place, so that other items and models go on."""
    text = ""
    try:
        for text in texts:
            yield text
        if not text:
            yield "(nothing)"
    except FrozenPrefixError as error:
        yield f"({error})"


def _small(path: Path) -> Any:
    try:
        return read_items([path])[0][0].preview
    except (BadImageError, IndexError):
        return "(missing)"
