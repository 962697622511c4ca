"""A lock has one holder, names it, and is taken over when its holder has ended."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from frozenprefix.errors import LockError
from frozenprefix.utils import hold_lock

HOLD = """
    import sys, time
    from frozenprefix.utils import hold_lock
    with hold_lock(sys.argv[1], "the folder"):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path/.lock`."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_holder_is_named_and_its_lock_is_taken_over_when_it_is_killed(tmp_path, holder):
    with (
        pytest.raises(LockError, match=rf"the folder is in use by process {holder.pid} on {platform.node()}, since 20"),
        hold_lock(tmp_path / ".lock", "the folder"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock.json").exists(), "the killed process could not remove its name"
    with hold_lock(tmp_path / ".lock", "the folder"):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_waiting_ends_with_the_holder(tmp_path, holder, caplog):
    timer = threading.Timer(1.5, holder.kill)
    timer.start()
    with caplog.at_level("INFO"), hold_lock(tmp_path / ".lock", "the folder", wait=True):
        assert f"the folder is in use by process {holder.pid}" in caplog.text
    timer.join()


def test_threads_of_one_process_take_turns(tmp_path):
    order = []

    def work(name: str) -> None:
        with hold_lock(tmp_path / ".lock", "the folder", wait=True):
            order.append(name)
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[0::2] == order[1::2]
