"""Reports of data that is left out or changed, in one form: how many of how many, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Literal

from frozenprefix.errors import DataError

log = logging.getLogger(__name__)
Where = str | PathLike[str]
Change = Literal["left out", "changed", "joined", "cut"]
_MOST_EXAMPLES = 3


def report_left_out(
    where: Where,
    total: int,
    reasons: Mapping[str, int],
    *,
    what: str = "rows",
    examples: Collection[object] = (),
    fix: str = "check where the images are",
) -> None:
    """Log how many of `total` rows (or names, …) are left out, by reason. If all are, that is an error.

    Args:
        fix: what to do when nothing is left.

    Raises:
        DataError: nothing is left.

    Example:
        >>> report_left_out("data.train", 1, {"no target": 1}, what="samples")
        Traceback (most recent call last):
        frozenprefix.errors.DataError: data.train: all of its 1 samples are left out (no target 1); ...
    """
    if total and sum(reasons.values()) == total:
        raise DataError(f"{where}: all of its {total} {what} are left out ({_counts(reasons)}); {fix}")
    report(where, total, reasons, what=what, examples=examples)


def report(
    where: Where,
    total: int,
    reasons: Mapping[str, int],
    *,
    done: Change = "left out",
    what: str = "rows",
    examples: Collection[object] = (),
    level: int = logging.WARNING,
) -> None:
    """Log how many of `total` rows (or names, …) are left out, changed, joined or cut, by reason; nothing for none.

    Args:
        where: the file, folder or recipe key that the rows come from.
        examples: of the rows; the first ones are named.

    Example:
        >>> report("captions.jsonl", 3, {"too long": 1}, done="cut", what="targets", examples=["a dog and"])
    """
    if sum(reasons.values()):
        log.log(level, "%s", summary(where, total, reasons, done=done, what=what, examples=examples))


def summary(
    where: Where,
    total: int,
    reasons: Mapping[str, int],
    *,
    done: Change = "left out",
    what: str = "rows",
    examples: Collection[object] = (),
) -> str:
    """The line that `report` logs.

    Example:
        >>> summary("data", 9, {"missing": 2, "empty": 1}, what="images", examples=["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
        'data: 3 of 9 images are left out: missing 2, empty 1 (1.jpg, 2.jpg, 3.jpg, …)'
    """
    named = [str(example) for example in list(examples)[:_MOST_EXAMPLES]]
    listed = f" ({', '.join(named)}{', …' if len(examples) > len(named) else ''})" if named else ""
    return f"{where}: {sum(reasons.values())} of {total} {what} are {done}: {_counts(reasons)}{listed}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in Counter(reasons).most_common() if count)
