"""Two million samples streamed from shards: memory, samples per second, and their order after kills.

python benchmarks/streaming.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from benchmarks import common
from benchmarks.plan_check import small_llama
from benchmarks.recipes import OPENINGS, SUBJECTS, WORDS, save_random_lm
from frozenprefix.data import Collator, FeatureCache, FeatureCacheWriter, ImageStream, StepDataset, load_source
from frozenprefix.data.cache import image_key
from frozenprefix.data.cache_format import FEATURES, Manifest
from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import open_source
from frozenprefix.data.streaming.build import write_shard
from frozenprefix.data.streaming.features import StreamedFeatures
from frozenprefix.data.streaming.groups import TrainingSet
from frozenprefix.data.streaming.index import Jobs
from frozenprefix.models.encoder_configuration import TimmEncoderConfig
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision import build_vision_encoder

ENCODER = {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32}
MANIFEST = Manifest({"encoder": "random"}, "float16", tokens=1, dim=32)  # 64 bytes an image
IMAGES_PER_STEP, SEED = 32, 7


@dataclass(frozen=True)
class Sizes:
    """How much is measured: samples and images per shard, samples that a memory arm reads, images of the rates."""

    samples: int
    per_shard: int
    read: int
    rated: int
    kills: int
    rounds: int


FULL = Sizes(2_000_000, 10_000, 40_000, 20_000, 5, 5)
QUICK = Sizes(2_000, 100, 320, 320, 2, 1)


def caption(number: int) -> str:
    """Two to four of the words of the random LM's tokenizer, which depend on the number."""
    draw = random.Random(number)
    return " ".join([draw.choice(OPENINGS), draw.choice(SUBJECTS), *draw.choices(WORDS, k=draw.randint(2, 6))])


def tiny_image(number: int) -> bytes:
    """A JPEG image of 64 x 64."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class Shards:
    """Writes shard n of a folder: with images, or with random features in their place."""

    folder: Path
    sizes: Sizes
    images: bool

    def __call__(self, shard: int) -> int:
        first = shard * self.sizes.per_shard
        vectors = np.random.default_rng(shard).standard_normal((self.sizes.per_shard, 32)).astype(np.float16)
        keys = []
        for place, vector in enumerate(vectors):
            number = first + place
            stored = MANIFEST.features_header + vector.tobytes()
            own = {"jpg": tiny_image(number)} if self.images else {FEATURES: stored}
            keys.append((f"{number:09d}", {**own, "txt": caption(number).encode()}))
        write_shard(self.folder / f"{shard:05d}.tar", keys)
        return len(keys)


def write_all(folder: Path, samples: int, sizes: Sizes, *, images: bool) -> dict[str, Any]:
    folder.mkdir(parents=True)
    if not images:
        MANIFEST.save(folder)
    count = samples // sizes.per_shard
    jobs = DataLoader(Jobs(range(count), Shards(folder, sizes, images)), batch_size=None, num_workers=2)
    before = time.perf_counter()
    written = sum(int(number) for number in jobs)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"shards": count, "bytes": size, "written_per_s": written / (time.perf_counter() - before)}


def loader(folder: Path, shards: int | None = None, *, parts: int = 1, steps: int = 10**9, keep: bool = False) -> Any:
    """The loader of streamed shards, as training makes it."""
    names = "*.tar" if shards is None else f"{{00000..{shards - 1:05d}}}.tar"
    stream = open_source({"type": "webdataset", "path": str(folder), "shards": names, "stream": True})
    groups = TrainingSet([stream])
    features: Any = None if stream.manifest is None else StreamedFeatures(stream.manifest, None)
    collator = Collator(processor(folder.parent), features, remember=False, keep_samples=keep)
    order = ImageStream(len(groups), IMAGES_PER_STEP, SEED, groups.order(SEED))
    return StepDataset(groups, order, collator, num_steps=steps, num_parts=parts, parts=range(parts))


def processor(folder: Path) -> FrozenPrefixProcessor:
    built = build_vision_encoder(TimmEncoderConfig(**ENCODER))
    return FrozenPrefixProcessor(built.image_processor, AutoTokenizer.from_pretrained(folder / "lm"), prefix_length=2)


# ── memory ──


def memory_arm(folder: Path, shards: int, samples: int) -> dict[str, float]:
    """In a process of its own: peak memory after so many samples, of all shards or of the first ones."""
    before = common.peak_rss_mib()
    dataset = loader(folder, shards)
    began = time.perf_counter()
    for step in range(samples // IMAGES_PER_STEP):
        dataset[step]
    seconds = time.perf_counter() - began
    return {
        "samples": len(dataset.groups),
        "mib": common.peak_rss_mib(),
        "start_mib": before,
        "per_s": samples / seconds,
    }


def measure_memory(folder: Path, sizes: Sizes) -> list[dict[str, float]]:
    counts = [max(2, sizes.samples // sizes.per_shard // part) for part in (20, 4, 1)]
    return [run_arm("memory", folder, count, sizes.read) for count in counts]


def run_arm(arm: str, *arguments: object) -> Any:
    command = [sys.executable, __file__, "--arm", arm, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# ── order ──


def order_arm(folder: Path, out: Path, steps: int, workers: int, parts: int) -> None:
    """In a process of its own: go on after the last step in `out`, with a line of ids for every step."""
    first = len(read_steps(out))
    dataset = loader(folder, parts=parts, steps=steps, keep=True)
    rest = range(first * parts, len(dataset))
    batches = iter(DataLoader(dataset, batch_size=None, sampler=rest, num_workers=workers))
    with out.open("a") as file:
        for _ in range(first, steps):
            step = [next(batches) for _ in range(parts)]
            ids = [sample.id for batch in step for _, pairs in batch["samples"] for sample, _ in pairs]
            file.write(json.dumps(ids) + "\n")
            file.flush()
            time.sleep(0.002)  # as a step of training would take


def read_steps(out: Path) -> list[list[str]]:
    """The complete steps of a file; what a kill left unfinished is taken away."""
    text = out.read_text() if out.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    out.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def measure_order(folder: Path, sizes: Sizes) -> dict[str, int]:
    """Kill the loader at random moments, go on with other numbers of workers and parts, and compare all ids."""
    whole, killed, draw = folder.parent / "whole.jsonl", folder.parent / "killed.jsonl", random.Random(0)
    steps = sizes.read // IMAGES_PER_STEP
    order_arm(folder, whole, steps, 0, 1)
    kills = 0
    for number in range(sizes.kills):
        workers, parts = number % 4, (1, 2, 4)[number % 3]
        command = [sys.executable, __file__, "--arm", "order", folder, killed, steps, workers, parts]
        process = subprocess.Popen([str(p) for p in command], cwd=common.ROOT, stderr=subprocess.DEVNULL)
        goal = (number + 1) * steps // (sizes.kills + 1)
        while process.poll() is None and (not killed.exists() or killed.read_bytes().count(b"\n") < goal):
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.2))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    order_arm(folder, killed, steps, 3, 2)
    ours, theirs = read_steps(killed), read_steps(whole)
    return {
        "kills": kills,
        "steps": steps,
        "steps_the_same": sum(sorted(a) == sorted(b) for a, b in zip(ours, theirs, strict=True)),
        "samples_repeated": (_counted(ours) - _counted(theirs)).total(),
        "samples_lost": (_counted(theirs) - _counted(ours)).total(),
    }


def _counted(steps: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(name for step in steps for name in step)


# ── rate ──


def make_lists(folder: Path, sizes: Sizes) -> tuple[dict[str, Any], Path]:
    """The same images as files with captions.jsonl, and a feature cache of them."""
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.jsonl").open("w") as rows, FeatureCacheWriter(folder / "cache", {"encoder": "x"}) as cache:
        for number in range(sizes.rated):
            data, name = tiny_image(number), f"images/{number:09d}.jpg"
            (folder / name).write_bytes(data)
            rows.write(json.dumps({"image": name, "captions": [caption(number)]}) + "\n")
            cache.add([image_key(data)], np.zeros((1, 1, 32), np.float16))
    return {"type": "captions", "path": str(folder)}, folder / "cache"


def list_loader(source: dict[str, Any], cache: Path | None, folder: Path) -> StepDataset:
    """The loader of a list, as training makes it: read, grouped, every target checked and tokenized."""
    groups = group_by_images(load_source(source))
    features = None if cache is None else FeatureCache.open(cache)
    if features is not None:
        features.keys_of([group.images[0] for group in groups])
    collator = Collator(processor(folder), features)
    collator.check_targets(groups)
    return StepDataset(groups, ImageStream(len(groups), IMAGES_PER_STEP, SEED), collator, num_steps=10**9)


def measure_rates(folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Samples per second of one process: of the loader alone, and of the first epoch with all that comes before."""
    source, cache = make_lists(folder / "list", sizes)
    few = Sizes(sizes.rated, sizes.rated // 4, 0, 0, 0, 0)
    for name, images in (("rated_images", True), ("rated_features", False)):
        write_all(folder / name, sizes.rated, few, images=images)
    rates = {}
    for kind, stored in (("images", None), ("features", cache)):
        arms: dict[str, Any] = {"list": lambda stored=stored: list_loader(source, stored, folder)}
        arms["streamed"] = lambda kind=kind: loader(folder / f"rated_{kind}")
        epoch: dict[str, list[float]] = {name: [] for name in arms}
        alone: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(sizes.rounds):  # in turns, so that a slow minute affects both
            for name, make in arms.items():
                began = time.perf_counter()
                dataset = make()
                ready = time.perf_counter()
                for step in range(sizes.rated // IMAGES_PER_STEP):
                    dataset[step]
                alone[name].append(sizes.rated / (time.perf_counter() - ready))
                epoch[name].append(sizes.rated / (time.perf_counter() - began))
        rates[kind] = {
            "list_per_s": statistics.median(alone["list"]),
            "streamed_per_s": statistics.median(alone["streamed"]),
            "ratio": statistics.median(a / b for a, b in zip(alone["streamed"], alone["list"], strict=True)),
            "epoch_ratio": statistics.median(a / b for a, b in zip(epoch["streamed"], epoch["list"], strict=True)),
        }
    return rates


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        save_random_lm(folder / "lm", small_llama(48, 2))
        written = write_all(folder / "shards", sizes.samples, sizes, images=False)
        memory = measure_memory(folder / "shards", sizes)
        order = measure_order(folder / "shards", sizes)
        rates = measure_rates(folder, sizes)
    most, least = (pick(row["mib"] for row in memory) for pick in (max, min))
    return {
        "benchmark": "streaming",
        "samples": sizes.samples,
        **written,
        "memory": memory,
        "memory_spread": most / least - 1,
        **order,
        "rates": rates,
    }


def markdown(report: dict[str, Any]) -> str:
    memory = [
        [f"{int(row['samples']):,}", row["mib"], row["mib"] - row["start_mib"], row["per_s"]]
        for row in report["memory"]
    ]
    rates = [
        [kind, row["list_per_s"], row["streamed_per_s"], row["ratio"], row["epoch_ratio"]]
        for kind, row in report["rates"].items()
    ]
    order = (
        f"{report['kills']} kills, each followed by another number of workers and of parts a step: "
        f"{report['steps_the_same']} of {report['steps']} steps have the samples of an undisturbed run, "
        f"{report['samples_repeated']} samples repeated, {report['samples_lost']} lost.\n"
    )
    return "\n".join(
        [
            common.table(["samples in the shards", "MiB, peak", "of these after the imports", "samples/s"], memory),
            common.table(
                ["one process", "list, samples/s", "streamed", "ratio", "ratio, first epoch and set-up"], rates
            ),
            order,
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where the shards are written: 4 GB; default: the temporary folder")
    parser.add_argument("--arm", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.arm:
        arm, folder, *rest = arguments.arm
        if arm == "memory":
            sys.stdout.write(json.dumps(memory_arm(Path(folder), *map(int, rest))) + "\n")
        else:
            order_arm(Path(folder), Path(rest[0]), *map(int, rest[1:]))
        return {}
    return common.publish(measure, arguments, "streaming", markdown)


if __name__ == "__main__":
    main()
