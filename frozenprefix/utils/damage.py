"""One error for whatever a library raises when it reads a damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from frozenprefix.errors import FrozenPrefixError


@contextmanager
def refusing_damage(error_class: type[FrozenPrefixError], message: str) -> Iterator[None]:
    """Read a file with a library inside the block: a damaged file can raise any error there.

    Args:
        message: what cannot be read, with a place for the `{reason}`.

    Raises:
        FrozenPrefixError: of `error_class`, in place of every error but the package's own.

    Example:
        >>> from frozenprefix.errors import DataError
        >>> with refusing_damage(DataError, "scores.json is damaged ({reason})"):
        ...     raise KeyError("metrics")
        Traceback (most recent call last):
        frozenprefix.errors.DataError: scores.json is damaged (KeyError: 'metrics')
    """
    try:
        yield
    except FrozenPrefixError:
        raise
    except Exception as error:
        raise error_class(message.replace("{reason}", reason_of(error))) from error


def reason_of(error: Exception) -> str:
    """The first line of an error, with its class where the text alone says little.

    Example:
        >>> reason_of(ValueError("not a header")), reason_of(KeyError("metrics")), reason_of(EOFError())
        ('not a header', "KeyError: 'metrics'", 'EOFError')
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    if not line:
        return name
    return line if len(line.split()) > 1 and not isinstance(error, TypeError) else f"{name}: {line}"
