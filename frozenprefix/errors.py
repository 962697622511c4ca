"""Every exception of the package, and the near-name hint that their messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FrozenPrefixError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(FrozenPrefixError, ValueError):
    """One or more wrong values in a config or recipe, all reported at once."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class AssetError(FrozenPrefixError):
    """A model or data reference that cannot be turned into a local file."""


class DataError(FrozenPrefixError, ValueError):
    """Data that cannot be read, or too much of it that is bad."""


class BadImageError(DataError):
    """An image that cannot be used. `reason` is a short key to count by."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


class CacheError(FrozenPrefixError):
    """A feature cache that is damaged, or that was made from something else."""


class CheckpointError(FrozenPrefixError):
    """A checkpoint whose keys, shapes or frozen parts are not those expected."""


class TrainingError(FrozenPrefixError):
    """Training that cannot go on: no label left, non-finite loss, and the like."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest of `choices`, or `""` when none is near."""
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
