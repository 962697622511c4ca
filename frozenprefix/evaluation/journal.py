"""Predictions as they are made, one file a process, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from frozenprefix.data.processes import Processes
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.version import __version__

logger = logging.getLogger(__name__)


class Journal:
    """Predictions by run and sample id, on disk as soon as a batch is made. A context manager.

    Files `PREDICTIONS.part-rNN`, one for each process: a header with what the predictions depend on, then one line a
    prediction. Every process reads all of them, whatever number of processes has left them. Processes must see the same
    folder for that; otherwise each goes on with its own.

    Args:
        predictions: the file that the predictions will end in.
        header: what they depend on, as plain JSON.
        restart: throw away what is there.

    Raises:
        ConfigError: what is there was made with another header; the message names the field.
    """

    def __init__(
        self,
        predictions: Path,
        header: Mapping[str, Any],
        *,
        processes: Processes | None = None,
        restart: bool = False,
    ):
        self._processes = processes or Processes()
        self._folder, self._name = predictions.parent, predictions.name
        self._header = {key: json.loads(json.dumps(value)) for key, value in header.items()}
        self._stream: TextIO | None = None
        self.made: dict[tuple[str, str], Any] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        if restart and self._processes.is_main:
            self.remove()
        self._processes.barrier()
        for file in self._files():
            self._read(file)
        self._processes.barrier()  # nobody writes before everybody has read
        if self.made:
            logger.info("%s: going on after %d predictions of an earlier start", predictions, len(self.made))

    def add(self, run: str, values: Mapping[str, Any]) -> None:
        """Write the predictions of a batch: sample id → text, or whatever JSON value the task has."""
        if self._stream is None:
            self._stream = self._open()
        for key, value in values.items():
            self.made[run, key] = value
            self._stream.write(json.dumps([run, key, value], ensure_ascii=False) + "\n")
        self._stream.flush()

    def gather(self) -> dict[str, dict[str, Any]]:
        """The predictions of all processes: run → sample id → value, each once. All processes must call it."""
        made: dict[str, dict[str, Any]] = {}
        for (run, key), value in self._processes.gather(list(self.made.items())):
            made.setdefault(run, {})[key] = value
        return made

    def remove(self) -> None:
        """Remove the files of all processes: the predictions are elsewhere."""
        for file in self._files():
            file.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def _files(self) -> list[Path]:
        start = f"{self._name}.part-r"
        return sorted(file for file in self._folder.iterdir() if file.name.startswith(start))

    def _open(self) -> TextIO:
        path = self._folder / f"{self._name}.part-r{self._processes.rank:02d}"
        stream = path.open("a", encoding="utf-8")
        # the first newline ends a line that a killed process left unfinished
        stream.write("\n" + json.dumps({"header": self._header}, ensure_ascii=False) + "\n")
        return stream

    def _read(self, file: Path) -> None:
        unreadable, checked = 0, False
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                unreadable += 1
                continue
            if isinstance(row, dict):
                self._check(file, row.get("header", {}))
                checked = True
            elif checked:
                run, key, value = row
                self.made[run, key] = value
        if unreadable:
            logger.info("%s: %d unfinished lines; these are predicted again", file, unreadable)

    def _check(self, file: Path, header: dict[str, Any]) -> None:
        for field in {**self._header, **header}:
            if header.get(field) != self._header.get(field):
                raise ConfigError(
                    f"{field}: an evaluation was begun with {header.get(field)!r} and not finished, this one has "
                    f"{self._header.get(field)!r}; go on with the same {field}, or give --restart (restart=True) to "
                    f"throw away {file}"
                )


def header_of(captioner: Captioner, samples: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What predictions depend on: settings, the model's weights, its prompts, and the samples."""
    rows = [[s.id, [str(path) for path in s.images], s.prompt, s.question, s.history] for s in samples]
    return {
        **settings,
        "version": __version__,
        "model": model_hash(captioner),
        "prompts": dict(captioner.processor.prompts),
        "number of samples": len(samples),
        "samples": digest(rows),
    }


def model_hash(captioner: Captioner) -> str:
    """SHA-256 of the trained tensors and of the frozen parts' identity, first 16 hex digits."""
    model = captioner.model
    parts = [hash_tensors(model.trainable_state()), model.config.identity]
    return digest(parts)


def digest(values: Any) -> str:
    """SHA-256 of plain JSON, its first 16 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
