"""The log outside of a terminal: a message is a line, however long it is."""

from __future__ import annotations

import re
import subprocess
import sys

CODE = """
import logging
from frozenprefix.utils import show_log
show_log()
logging.getLogger("frozenprefix.training").info("loss %s", "1.0 " * 60)
logging.getLogger("other").info("not shown")
logging.getLogger("other").warning("shown")
"""


def test_a_message_is_one_line_in_a_file():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, check=True)
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    loss (1\.0 ){60}", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING shown", second)
