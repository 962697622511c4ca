"""Predictions, written as soon as they are generated, one file a process, so that a killed evaluation can resume."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.utils import append_jsonl, content_hash, read_jsonl
from frozenprefix.utils.processes import current_processes
from frozenprefix.version import __version__

logger = logging.getLogger(__name__)


class Journal:
    """Predictions by run and sample id, on disk as soon as a batch is done.

    Files `PREDICTIONS.part-rNN`, one for each process: a header with what the predictions depend on, then one line a
    prediction, with its CRC-32. Every process reads all of them, however many processes wrote them; that takes a folder
    that all processes see. Without one each resumes its own.

    Args:
        predictions: the file that the predictions are written to in the end.
        header: what they depend on, as plain JSON.
        restart: discard what is there.

    Attributes:
        known: (run, sample id) → prediction.

    Raises:
        ConfigError: the files were written with another header; the message names the field.

    Example:
        >>> journal = Journal(tmp_path / "p.jsonl", {"num_beams": 1})
        >>> journal.add({("model", "image 1"): "a dog"})
        >>> Journal(tmp_path / "p.jsonl", {"num_beams": 1}).known
        {('model', 'image 1'): 'a dog'}
    """

    def __init__(
        self,
        predictions: Path,
        header: Mapping[str, Any],
        *,
        processes: PartialState | None = None,
        restart: bool = False,
    ):
        self._processes = processes or current_processes()
        self._predictions = predictions
        self._own_file = predictions.with_name(f"{predictions.name}.part-r{self._processes.process_index:02d}")
        self._header = {key: json.loads(json.dumps(value)) for key, value in header.items()}
        self._has_header = False
        self.known: dict[tuple[str, str], Any] = {}
        predictions.parent.mkdir(parents=True, exist_ok=True)
        if restart and self._processes.is_main_process:
            self.remove()
        self._processes.wait_for_everyone()
        for file in self._files():
            self._read(file)
        self._processes.wait_for_everyone()  # nobody writes before everybody has read
        if self.known:
            logger.info("%s: resuming after %d predictions of an earlier start", predictions, len(self.known))

    def add(self, predictions: Mapping[tuple[str, str], Any]) -> None:
        """Write the predictions of a batch: (run, sample id) → text, or another JSON value."""
        rows: list[Any] = [] if self._has_header else [{"header": self._header}]
        self._has_header = True
        for (run, key), value in predictions.items():
            self.known[run, key] = value
            rows.append([run, key, value, _checksum(run, key, value)])
        append_jsonl(self._own_file, rows)

    def gather(self) -> dict[str, dict[str, Any]]:
        """The predictions of all processes: run → sample id → value, each once. All processes must call it."""
        predictions: dict[str, dict[str, Any]] = {}
        for (run, key), value in gather_object(list(self.known.items())):
            predictions.setdefault(run, {})[key] = value
        return predictions

    def remove(self) -> None:
        """Remove the files of all processes."""
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        start = f"{self._predictions.name}.part-r"
        return sorted(file for file in self._predictions.parent.iterdir() if file.name.startswith(start))

    def _read(self, file: Path) -> None:
        checked, damaged = False, 0
        for _, row in read_jsonl(file, skip_damaged=True):
            match row:
                case {"header": dict(header)}:
                    self._check(file, header)
                    checked = True
                case [str(run), str(key), value, int(checksum)] if checked and checksum == _checksum(run, key, value):
                    self.known[run, key] = value
                case _:
                    damaged += 1
        if damaged:
            logger.warning("%s: lines that are damaged: %d; these samples are predicted again", file, damaged)

    def _check(self, file: Path, header: dict[str, Any]) -> None:
        for field in {**self._header, **header}:
            if header.get(field) != self._header.get(field):
                raise ConfigError(
                    f"{field}: an evaluation was begun with {header.get(field)!r} and not finished, this one has "
                    f"{self._header.get(field)!r}; go on with the same {field}, or give --restart (restart=True) to "
                    f"throw away {file}"
                )


def _checksum(run: str, key: str, value: Any) -> int:
    """CRC-32 of a line's content."""
    return zlib.crc32(json.dumps([run, key, value]).encode())


def header_of(captioner: Captioner, samples: Sequence[Sample], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What predictions depend on: settings, the model's weights and their dtype, its prompts, and the samples."""
    model = captioner.model
    models = [model] if captioner.ensemble is None else captioner.ensemble.models
    rows = [[s.id, [str(path) for path in s.images], s.prompt, s.question, s.history] for s in samples]
    return {
        **settings,
        "version": __version__,
        "precision": str(model.language_model.dtype).removeprefix("torch."),
        "model": digest([*(hash_tensors(one.trainable_state()) for one in models), model.config.identity]),
        "prompts": dict(captioner.processor.prompts),
        "number of samples": len(samples),
        "samples": digest(rows),
    }


def digest(value: Any) -> str:
    """SHA-256 of plain JSON, its first 16 hex digits.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return content_hash(json.dumps(value, sort_keys=True))[:16]
