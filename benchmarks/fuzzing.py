"""Damaged files for every reader: only the package's own errors may come out.

Each input is a valid file with a few seeded changes: flipped bits, cut, doubled and foreign parts, other JSON values.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import random
import signal
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.fuzzing_readers import Reader, make_readers
from frozenprefix.errors import FrozenPrefixError

MOST_SECONDS = 20  # for one input
# what stands in the place of a value
_VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "\ud800", "\x1b[31m", [], [[]], {}, {"": None})
_BYTES = (b"", b"\0", b"\xff\xfe", b"\n", b"{", b"]", b'"', b"9" * 400, b"[" * 3000, b"null", b"NaN", b"\xf0\x9f")


def damaged(data: bytes, rng: random.Random, *, as_json: bool) -> bytes:
    """One to three changes of a file."""
    if as_json and rng.random() < 0.5:
        return _other_values(data, rng)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 4, 60, 2000))
        kind = rng.randrange(5)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length]
        elif kind == 3:
            changed[place:place] = rng.choice(_BYTES)
        else:
            del changed[place:]
    return bytes(changed)


def _other_values(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or rename a value somewhere in a JSON file, or in one line of JSON lines."""
    lines = data.split(b"\n") if b"\n{" in data.strip() or b"\n[" in data.strip() else [data]
    number = rng.randrange(len(lines))
    try:
        content = json.loads(lines[number])
    except ValueError:
        return data[: rng.randrange(len(data) + 1)]
    holder: Any = {"": content}
    key: Any = ""
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if isinstance(holder, dict) and key and rng.random() < 0.3:
        holder[rng.choice(("x", key + "x"))] = holder.pop(key)
    else:
        holder[key] = rng.choice(_VALUES)
        content = holder[""] if "" in holder and key == "" and isinstance(holder, dict) else content
    lines[number] = json.dumps(content).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def fuzz(folder: Path, inputs: int, *, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Read so many damaged files; files that take long to read get fewer of them.

    Returns:
        Inputs and foreign errors for each reader. The first foreign error of each reader is logged.
    """
    readers, rng = make_readers(folder), random.Random(seed)
    share = inputs / sum(1 / reader.cost for reader in readers)
    done, foreign = Counter[str](), Counter[str]()
    logging.disable(logging.WARNING)
    try:
        for reader in readers:
            original = reader.file.read_bytes()
            if not reader.forked:
                reader.read()  # the valid file
            as_json = reader.file.suffix in (".json", ".jsonl") or "part-r" in reader.file.name
            for _ in range(math.ceil(share / reader.cost)):
                reader.file.write_bytes(damaged(original, rng, as_json=as_json))
                done[reader.name] += 1
                problem = _problem_in_a_fork(reader) if reader.forked else _problem(reader)
                if problem is not None:
                    foreign[reader.name] += 1
                    if foreign[reader.name] <= int(os.environ.get("FUZZ_SHOWN", "1")):
                        logging.getLogger("benchmarks").error("%s: %s", reader.file.name, problem)
            reader.file.write_bytes(original)
    finally:
        logging.disable(logging.NOTSET)
    return done, foreign


def _problem(reader: Reader) -> str | None:
    """The traceback of a foreign error; None if the file was read, or refused by the package."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(MOST_SECONDS)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read()
    except FrozenPrefixError:
        return None
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def _too_long(*_: object) -> None:
    raise TimeoutError(f"not read within {MOST_SECONDS} s")


def _problem_in_a_fork(reader: Reader) -> str | None:
    """The same in a process of its own, which may crash."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, (_problem(reader) or "").encode()[-60_000:])
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:
        problem = file.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return problem or (None if status == 0 else f"the process ended with {status}")
