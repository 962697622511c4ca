"""Training runs in processes of their own that can be stopped and killed, without importing everything each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers import ROOT

SERVER = """
import os, sys
import frozenprefix.training.trainer
from frozenprefix.cli.main import app
print("ready", flush=True)
for recipe in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            app(["train", recipe.strip()])
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Starts `frozenprefix train RECIPE` in a forked process, one after the other. A context manager."""

    def __init__(self, errors: Path):
        self.errors = errors

    def __enter__(self) -> Runs:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def start(self, recipe: Path) -> int:
        """Start a run; returns its process id."""
        assert self._server.stdin is not None
        self._server.stdin.write(f"{recipe}\n")
        self._server.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit code of the run, negative for a signal."""
        return int(self._line())

    def run(self, recipe: Path) -> int:
        self.start(recipe)
        return self.wait()

    def killed(self, recipe: Path, after: float, number: int = signal.SIGKILL) -> int:
        """Send a signal after so many seconds; returns the exit code."""
        child = self.start(recipe)
        time.sleep(after)
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(child, number)
        return self.wait()

    def _line(self) -> str:
        assert self._server.stdout is not None
        while True:
            line = self._server.stdout.readline().strip()
            if line.lstrip("-").isdecimal() or line == "ready":
                return line
            if not line and self._server.poll() is not None:
                raise RuntimeError(self.errors.read_text())
