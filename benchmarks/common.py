"""Shared by all benchmarks: paired timing, a description of the machine, JSON reports, and the tables of the README."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import re
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
    """Seconds of every arm in every round. All arms run in every round, so that a slow minute affects all of them."""
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
    """A process that does one run on request; `serve` is its other end."""

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
    """Do a run for every input line, and print this process's peak memory after each."""
    for _ in sys.stdin:
        run()
        sys.stdout.write(f"{peak_rss_mib()}\n")
        sys.stdout.flush()


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of slow / fast within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def gemm_gflops(dtype: torch.dtype = torch.bfloat16, repeats: int = 20) -> float:
    """Rate of 1024 x 2048 x 2048 matrix products, run back to back, in GFLOP/s."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    torch.mm(a, b)
    before = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    return 2 * 1024 * 2048 * 2048 * repeats / (time.perf_counter() - before) / 1e9


# Instruction sets that decide which matrix products are fast, fastest first, as /proc/cpuinfo names them.
INSTRUCTION_SETS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The processor and the versions of the libraries, for the report."""
    lines = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)) if cpuinfo.exists() else {}
    cpu = lines.get("model name") or platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "processor_kind": processor_kind(cpu, lines.get("flags", "")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def processor_kind(model_name: str, flags: str) -> str:
    """The processor's family and its best instruction set: `AMD EPYC, AVX-512 BF16`. One README table per kind.

    Model numbers are dropped, so that machines of one family share a table.
    """
    name = re.sub(r"\((R|TM|C)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", model_name, flags=re.IGNORECASE)
    family = " ".join(name.split()[:2]) or "unknown processor"
    best = next((label for flag, label in INSTRUCTION_SETS.items() if flag in flags.split()), None)
    return f"{family}, {best}" if best else family


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far.

    VmHWM is read first: on Linux, `ru_maxrss` also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if platform.system() == "Linux" else 1024**2)


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="tiny models and one round: a check that the script runs")
    options.add_argument("--json", type=Path, help="write the report to this file, and no table")
    options.add_argument(
        "--readme", type=Path, default=README, help="file whose table for this kind of processor is replaced"
    )
    return options


def finish(report: dict[str, Any], arguments: argparse.Namespace, section: str | None, markdown: str) -> None:
    """Log the report, and write it to `--json` or as a table into the README.

    No table is written with `--json` or `--quick`, or without a section.
    """
    report["machine"] = machine()
    text = json.dumps(report, indent=2)
    logger.info("%s", text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    elif section is not None and not arguments.quick:
        body = markdown + machine_line(report["machine"])
        write_section(arguments.readme, section, report["machine"]["processor_kind"], body)


def publish(
    run: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: argparse.Namespace,
    section: str | None,
    markdown: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Run a benchmark and `finish` with its report."""
    start_logging()
    report = run(arguments)
    finish(report, arguments, section, markdown(report))
    return report


def machine_line(description: dict[str, Any]) -> str:
    return (
        f"\nMeasured on {description['processor_kind']}, {description['cores']} cores, "
        f"{description['threads']} threads, torch {description['torch']}, transformers {description['transformers']}.\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers have three significant digits."""
    lines = [header, ["---"] * len(header), *[[_cell(value) for value in row] for row in rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_section(path: Path, name: str, kind: str, body: str) -> None:
    """Replace one processor kind's table in a section of a Markdown file; the tables of other kinds stay.

    A section lies between `<!-- name:begin -->` and `<!-- name:end -->`, and each of its tables begins with
    `<!-- on kind -->`.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no section between {begin} and {end}")
    head, rest = text.split(begin, 1)
    section, tail = rest.split(end, 1)
    _, *parts = re.split(r"^<!-- on (.+) -->$", section, flags=re.MULTILINE)
    tables = dict(zip(parts[::2], parts[1::2], strict=True)) | {kind: body}
    written = "\n\n".join(f"<!-- on {kind} -->\n{tables[kind].strip()}" for kind in sorted(tables))
    path.write_text(f"{head}{begin}\n{written}\n{end}{tail}")


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
