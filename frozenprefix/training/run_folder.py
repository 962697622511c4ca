"""The output folder of a run: its lock, the best checkpoint, and the states that a resumed run may continue from."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import TypeVar

from frozenprefix.config import resolve_precision
from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.errors import CheckpointError, TrainingError
from frozenprefix.training.checkpoints import check_state
from frozenprefix.utils import atomic_folder, hold_lock, recover_folder, system_error
from frozenprefix.utils.sums import check_sums, write_sums

logger = logging.getLogger(__name__)
Write = Callable[[Path], None]
R = TypeVar("R", bound=BaseRecipe)
_DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota of the disk is used up; make room",
    errno.EFBIG: "the file is larger than the limit for files; raise it",
    errno.EROFS: "the disk is read-only; make it writable, or choose another output_dir",
    errno.EACCES: "permission denied; make it writable, or choose another output_dir",
    errno.EPERM: "permission denied; make it writable, or choose another output_dir",
    errno.ENOTDIR: "a file is in the way; choose another output_dir",
    errno.EEXIST: "a file is in the way; choose another output_dir",
    errno.EIO: "the disk failed; choose another output_dir",
}


class RunFolder:
    """`best/`, `last/`, and up to `keep_last - 1` earlier states `step-000300/`. Every one of them is whole.

    Example:
        >>> folder = RunFolder(tmp_path / "run", keep_last=2)
        >>> for step in (3, 6, 9):
        ...     folder.save_state(step, lambda draft: (draft / "weights").touch())
        >>> [state.name for state in folder.states()]
        ['last', 'step-000006']
    """

    def __init__(self, path: str | PathLike[str], *, keep_last: int = 1):
        self.path, self.keep_last = Path(path), keep_last
        self._last_step: int | None = None  # of last/; None where it is not to be kept

    def lock(self) -> AbstractContextManager[None]:
        """While it is entered, no other run can write to the folder.

        Raises:
            LockError: another run does.
        """
        return hold_lock(self.path / ".lock", f"output_dir '{self.path}'")

    def states(self) -> list[Path]:
        """The states on disk, newest first, whether or not they are whole."""
        last = recover_folder(self.path / "last")
        earlier = sorted(self.path.glob("step-*"), key=_step_of, reverse=True)
        return [*([last] if last.exists() else []), *earlier]

    def find_state(self) -> Path | None:
        """The newest whole state, or None without any state. The log names newer ones, and why they are not whole.

        Raises:
            CheckpointError: there are states, and none is whole.
        """
        problems = []
        for state in self.states():
            try:
                check_sums(state, required=True)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("not resumed from a later state: %s", problem)
            return state
        if problems:
            raise CheckpointError("; ".join(problems) + "; no state is whole: use --resume never to start over")
        return None

    def state_to_resume(self, resume: str) -> Path | None:
        """The state that a run continues from: "auto", "never" or a folder; None for a new run.

        Raises:
            CheckpointError: a folder that holds no whole state.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return self.find_state()
        check_state(Path(resume))
        check_sums(resume, required=True)
        return Path(resume)

    def save_best(self, write: Write) -> None:
        with self._replaced("best") as draft:
            write(draft)

    def save_state(self, step: int, write: Write) -> None:
        """Write the state after `step` into `last/`; the former one is kept, or removed, as `keep_last` says."""
        keep = self.keep_last > 1 and self._last_step is not None and self._last_step < step
        with self._replaced("last", keep_as=f"step-{self._last_step:06d}" if keep else None) as draft:
            write(draft)
        self._last_step = step
        earlier = [state for state in self.states() if state.name != "last"]
        # later ones are of a run that went further before
        kept = [state for state in earlier if _step_of(state) < step][: self.keep_last - 1]
        for state in earlier:
            if state not in kept:
                shutil.rmtree(state, ignore_errors=True)

    def begin(self, resumed_from: Path | None, step: int) -> None:
        """Note where the run continues; a new run removes earlier states, so that none of them is taken for its own."""
        recover_folder(self.path / "best")
        if resumed_from is not None:
            self._last_step = step if resumed_from == self.path / "last" else None
            return
        for state in self.path.glob("step-*"):
            shutil.rmtree(state, ignore_errors=True)

    @contextmanager
    def _replaced(self, name: str, keep_as: str | None = None) -> Iterator[Path]:
        with (
            disk_errors(self.path / name),
            atomic_folder(self.path / name, keep=None if keep_as is None else self.path / keep_as) as draft,
        ):
            yield draft
            write_sums(draft)


def with_run_precision(recipe: R, resume: str) -> R:
    """The recipe with its precision decided; a run that is resumed keeps its own.

    Args:
        resume: as for `BaseTrainer.run`.

    Example:
        >>> with_run_precision(recipe, "auto").training.precision
        'fp32'
    """
    if resume == "auto":
        states = RunFolder(recipe.output_dir).states()
        return resolve_precision(recipe, resumed=states[0] if states else None)
    return resolve_precision(recipe, resumed=None if resume == "never" else Path(resume))


def _step_of(state: Path) -> int:
    number = state.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what libraries raise when they cannot write into one clear error; other errors pass.

    Raises:
        TrainingError: a disk that is full or read-only, and the like.

    Example:
        >>> with disk_errors(tmp_path):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: cannot write to '...': the disk is full; make room and run the same ...
    """
    try:
        yield
    except Exception as error:
        reason = _DISK_PROBLEMS.get(system_error(error) or 0)
        if reason is None:
            raise
        raise TrainingError(
            f"cannot write to '{getattr(error, 'filename', None) or path}': {reason} and run the same command again. "
            "Checkpoints that were saved before are unharmed, and the run continues from the last one"
        ) from error
