"""What the benchmarks share: paired timing, the machine, JSON reports, and the tables of the README."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

logger = logging.getLogger("benchmarks")
ROOT = Path(__file__).resolve().parents[1]
README = Path(__file__).with_name("README.md")


def timed_rounds(arms: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every arm in every round. All arms run in every round, so that a slow minute hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + rounds):
        for name, run in arms.items():
            before = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - before)
        gc.collect()
    return seconds


@dataclass
class Arm:
    """A process that does a run when it is asked to, see `serve`."""

    command: list[str]
    peak_rss_mib: float = 0.0

    def __enter__(self) -> Arm:
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()

    def run(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write("\n")
            stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise RuntimeError(f"an arm of the benchmark ended early: {self.command}")
        self.peak_rss_mib = float(answer)


def serve(run: Callable[[], Any]) -> None:
    """Do a run for every line that comes in, and answer with the peak of this process's memory."""
    for _ in sys.stdin:
        run()
        sys.stdout.write(f"{peak_rss_mib()}\n")
        sys.stdout.flush()


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of slow / fast, both of the same round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def gemm_gflops(dtype: torch.dtype = torch.bfloat16, repeats: int = 20) -> float:
    """Rate of 1024 x 2048 x 2048 matrix products, one after the other and nothing else, in GFLOP/s."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    torch.mm(a, b)
    before = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    return 2 * 1024 * 2048 * 2048 * repeats / (time.perf_counter() - before) / 1e9


def machine() -> dict[str, Any]:
    """The processor and the libraries that the figures belong to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far.

    Linux' `ru_maxrss` starts at the memory of the process that started this one; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if platform.system() == "Linux" else 1024**2)


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--quick", action="store_true", help="tiny models and one round: shows that it runs, nothing else"
    )
    made.add_argument("--json", type=Path, help="also write the report to this file")
    made.add_argument("--readme", type=Path, default=README, help="the file whose table is renewed (not with --quick)")
    return made


def finish(report: dict[str, Any], arguments: argparse.Namespace, section: str | None, markdown: str) -> None:
    """Log the report, write it where asked, and renew the README's section, if it has one."""
    report["machine"] = machine()
    text = json.dumps(report, indent=2)
    logger.info("%s", text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if section is not None and not arguments.quick:
        write_section(arguments.readme, section, markdown + "\n" + machine_line(report["machine"]))


def publish(
    run: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: argparse.Namespace,
    section: str | None,
    markdown: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Run a benchmark, and `finish` with its report."""
    start_logging()
    report = run(arguments)
    finish(report, arguments, section, markdown(report))
    return report


def machine_line(found: dict[str, Any]) -> str:
    return (
        f"\nMeasured on {found['cpu']}, {found['cores']} cores, {found['threads']} threads, torch {found['torch']}, "
        f"transformers {found['transformers']}.\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers get three digits."""
    lines = [header, ["---"] * len(header), *[[_cell(value) for value in row] for row in rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_section(path: Path, name: str, body: str) -> None:
    """Put `body` between `<!-- name:begin -->` and `<!-- name:end -->` of a Markdown file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no section between {begin} and {end}")
    head, rest = text.split(begin, 1)
    path.write_text(f"{head}{begin}\n{body.strip()}\n{end}{rest.split(end, 1)[1]}")


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
