"""Seconds and memory to read captions.jsonl and group its rows by image, as a list and as a stream.

python benchmarks/loading.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks import common
from benchmarks.recipes import OPENINGS, SUBJECTS, WORDS
from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import load_source, open_source

ROWS, LISTED = 1_000_000, 100_000
ROWS_PER_IMAGE = 5


def write_rows(folder: Path, rows: int) -> Path:
    """Rows with a caption each, five an image, in a random order; one image exists."""
    folder.mkdir()
    draw = random.Random(0)
    with (folder / "captions.jsonl").open("w") as file:
        for _ in range(rows):
            number = draw.randrange(max(1, rows // ROWS_PER_IMAGE))
            caption = " ".join([draw.choice(OPENINGS), draw.choice(SUBJECTS), *draw.choices(WORDS, k=8)])
            name = f"images/{number:09d}.jpg"
            file.write(json.dumps({"image": name, "captions": [caption], "split": "train"}) + "\n")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def arm(kind: str, folder: Path) -> dict[str, float]:
    """In a process of its own: read and group."""
    source = {"type": "captions", "path": str(folder), "split": "train"}
    before, began, used = common.peak_rss_mib(), time.perf_counter(), time.process_time()
    groups = group_by_images(load_source(source)) if kind == "list" else open_source({**source, "stream": True})
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    mib = common.peak_rss_mib() - before
    return {"images": len(groups), "seconds": seconds, "processor_seconds": processor, "mib": mib}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {"list": 2000, "stream": 5000} if arguments.quick else {"list": LISTED, "stream": ROWS}
    arms = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, rows in sizes.items():
            folder = write_rows(Path(name) / kind, rows)
            command = [sys.executable, __file__, "--arm", kind, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            row = json.loads(done.stdout.splitlines()[-1])
            arms[kind] = {"rows": rows, **row, "bytes_per_row": row["mib"] * 2**20 / rows}
    return {"benchmark": "loading", "arms": arms}


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [kind, f"{row['rows']:,}", row["seconds"], row["processor_seconds"] * 1e6 / row["rows"], row["bytes_per_row"]]
        for kind, row in report["arms"].items()
    ]
    return common.table(
        ["captions", "rows", "seconds", "processor's, a million rows", "bytes a row, at the peak"], rows
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.arm:
        sys.stdout.write(json.dumps(arm(arguments.arm[0], Path(arguments.arm[1]))) + "\n")
        return {}
    return common.publish(measure, arguments, "loading", markdown)


if __name__ == "__main__":
    main()
