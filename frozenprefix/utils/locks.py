"""Locks between processes that name their holder: process, host, and since when."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path

from filelock import FileLock, Timeout

from frozenprefix.errors import LockError
from frozenprefix.utils.files import write_text_atomic

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
# A process that was killed may leave children, such as decoding workers, that keep its lock until they notice.
_GRACE_SECONDS = 30.0
_threads: dict[Path, int] = {}  # locks held by this process, and by which of its threads


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and since when (local time, ISO 8601).

    Example:
        >>> str(Holder(7, "node1", "2025-01-01T12:00:00"))
        'process 7 on node1, since 2025-01-01T12:00:00'
    """

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def has_ended(self) -> bool:
        """Whether the process is known to have ended; False for one on another host."""
        if self.host != platform.node() or os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


@contextmanager
def hold_lock(path: str | PathLike[str], what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside the block. The lock of a process that has ended is taken over.

    The operating system releases the lock when its process ends. Beside it, `path` + ".json" names the holder.

    Args:
        what: what the lock protects, for messages: "output_dir 'runs/mlp'".
        wait: wait for the holder to finish, and say so in the log; else another holder is an error.

    Raises:
        LockError: another process holds the lock, and `wait` is False; or this thread itself holds it.
        OSError: the file cannot be written.

    Example:
        >>> with hold_lock(tmp_path / ".lock", "the folder"):
        ...     with hold_lock(tmp_path / ".lock", "the folder"):
        ...         pass
        Traceback (most recent call last):
        frozenprefix.errors.LockError: the folder is in use by process ..., since ...; ...
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_name(f"{path.name}.json")
    lock = FileLock(path)
    _acquire(lock, note, what, wait)
    _threads[path] = threading.get_ident()
    try:
        write_text_atomic(note, json.dumps(asdict(Holder(os.getpid(), platform.node(), _now()))))
        yield
    finally:
        note.unlink(missing_ok=True)
        del _threads[path]
        lock.release()


def _acquire(lock: FileLock, note: Path, what: str, wait: bool) -> None:
    began, said = time.monotonic(), False
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            holder = _read_holder(note)
        waited = time.monotonic() - began
        own = _threads.get(Path(str(lock.lock_file))) == threading.get_ident()
        # a holder writes its name right after it gets the lock
        patience = _GRACE_SECONDS if holder is not None and holder.has_ended() else 1.0 if holder is None else 0.0
        if own or (not wait and waited >= patience):
            name = holder or "another process"
            raise LockError(f"{what} is in use by {name}; wait for it, stop it, or use another folder")
        if not said and waited >= 1.0:
            logger.info("%s is in use by %s; waiting for it", what, holder or "another process")
            said = True
        time.sleep(_POLL_SECONDS)


def _read_holder(note: Path) -> Holder | None:
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
        return Holder(int(values["pid"]), str(values["host"]), str(values["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
