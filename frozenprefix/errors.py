"""The exceptions of the package, and helpers for their messages: near-name hints, shortened values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class FrozenPrefixError(Exception):
    """Base of all errors that this package raises on purpose. `exit_code` is that of the command that it ends.

    Example:
        >>> issubclass(DataError, FrozenPrefixError)
        True
    """

    exit_code = 2


class ConfigError(FrozenPrefixError, ValueError):
    """One or more wrong values in a config or recipe, all reported at once."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Problem(NamedTuple):
    """One problem of a config section: a text, and the keys that it is about; messages start with the first one."""

    text: str
    keys: tuple[str, ...] = ("",)


class SectionError(ValueError):
    """Raised by the validators of config sections, with all problems at once.

    Keys are relative to the place of the validator: the names of a section's fields in a model validator, and the
    field itself, or names below it, in a field validator. `ConfigError` of the whole recipe has the full keys.

    Example:
        >>> str(SectionError([Problem("got 3, expected at most 2", ("captions",))]))
        'captions: got 3, expected at most 2'
    """

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{keys[0]}: {text}".removeprefix(": ") for text, keys in self.problems))

    @classmethod
    def check(cls, problems: Iterable[Problem]) -> None:
        """Raise when there are problems."""
        problems = list(problems)
        if problems:
            raise cls(problems)


class AssetError(FrozenPrefixError):
    """A model or data reference that cannot be resolved to a local file."""


class DataError(FrozenPrefixError, ValueError):
    """Data that cannot be read, or with too many bad images."""


class BadImageError(DataError):
    """An image that cannot be used. `reason` is a short key to count by."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


class CacheError(FrozenPrefixError):
    """A feature cache that is damaged, or has a different fingerprint."""


class LockError(FrozenPrefixError):
    """A folder that another process is writing to."""


class CheckpointError(FrozenPrefixError):
    """A checkpoint whose keys, shapes or frozen parts differ from those expected."""


class ExportError(FrozenPrefixError):
    """A checkpoint that another engine cannot hold: why, and what could be exported instead."""


class TrainingError(FrozenPrefixError):
    """Training that cannot continue, for instance because the loss is not finite."""


class StoppedError(FrozenPrefixError):
    """Training that was told to stop by a signal, and has saved its state. Exit code 75 asks to be run again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def nearest(name: object, choices: Iterable[object]) -> str | None:
    """The most similar of `choices`, or None when none is similar.

    Example:
        >>> nearest("tim", ["timm", "open_clip"]), nearest("TIMM", ["timm"])
        ('timm', 'timm')
    """
    by_letters = {str(choice).lower(): str(choice) for choice in choices}
    near = difflib.get_close_matches(str(name).lower(), by_letters, n=1, cutoff=0.6)
    return by_letters[near[0]] if near else None


def did_you_mean(name: object, choices: Iterable[object]) -> str:
    """A hint for an error message, or "" when no choice is similar.

    Example:
        >>> did_you_mean("tim", ["timm", "open_clip"])
        " (did you mean 'timm'?)"
    """
    near = nearest(name, choices)
    return f" (did you mean '{near}'?)" if near else ""


def shorten(value: object, limit: int = 60) -> str:
    """A value as an error message shows it.

    Example:
        >>> shorten("a" * 100, limit=10)
        "'aaaaaa..."
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
