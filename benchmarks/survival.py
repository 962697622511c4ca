"""Runs that are killed at random moments, against undisturbed ones, and damaged files for every reader.

python benchmarks/survival.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks import common
from benchmarks.fuzzing import fuzz
from benchmarks.plan_check import small_llama
from benchmarks.recipes import save_random_lm, synthetic_photos
from frozenprefix.config import write_yaml
from frozenprefix.data.streaming.build import build_shards, open_all
from frozenprefix.training import read_log

STEPS = 12
LOSSES = ("repeated", "lost")
KINDS = (
    "mapper",
    "mapper, no cache",
    "LoRA",
    "contrastive",
    "mapper, two processes",
    "LoRA, two processes",
    "mapper, streamed",
    "mapper, streamed by weight",
    "LoRA, streamed",
    "contrastive, streamed",
    "mapper, streamed, two processes",
    "LoRA, streamed, two processes",
)
# One interpreter imports everything once, and forks for every run. Each step logs the ids of its samples.
SERVER = """
import os, sys, traceback
import frozenprefix.training.trainer, frozenprefix.training.contrastive
from frozenprefix.cli.main import app
from frozenprefix.training import ContrastiveTrainer, Trainer

def with_ids(take):
    def step(self, batches):
        first = self.progress.step * len(self.steps.parts)
        ids = [name for part in range(len(self.steps.parts)) for name in self.steps.ids_of(first + part)]
        return {**take(self, batches), "samples": ids}
    return step

for trainer in (Trainer, ContrastiveTrainer):
    trainer.step = with_ids(trainer.step)
print("ready", flush=True)
for line in sys.stdin:
    recipe, count, port = line.split()
    children = []
    for rank in range(int(count)):
        child = os.fork()
        if child == 0:
            if count != "1":
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
                )
            try:
                app(["train", recipe])
            except SystemExit as stop:
                os._exit(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    print("pids", *children, flush=True)
    print("codes", *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


class Runs:
    """Starts `frozenprefix train RECIPE` in forked processes, one run after the other. A context manager.

    Args:
        errors: file for what the runs write to standard error.
    """

    def __init__(self, errors: Path):
        self.errors = errors

    def __enter__(self) -> Runs:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            cwd=common.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._read("ready")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def start(self, recipe: Path, processes: int = 1) -> list[int]:
        """Start a run; returns the ids of its processes."""
        assert self._server.stdin is not None
        self._server.stdin.write(f"{recipe} {processes} {_free_port()}\n")
        self._server.stdin.flush()
        return self._read("pids")

    def wait(self) -> int:
        """The exit code of the run, negative for a signal; the first that is not 0 of several processes."""
        return next((code for code in self._read("codes") if code), 0)

    def run(self, recipe: Path, processes: int = 1) -> None:
        """Start a run and wait for its end.

        Raises:
            RuntimeError: it failed.
        """
        self.start(recipe, processes)
        if self.wait():
            raise RuntimeError(self.errors.read_text()[-3000:])

    def kill(self, recipe: Path, after: float, processes: int = 1) -> bool:
        """Start a run and kill it after so many seconds; returns whether it was still running."""
        children = self.start(recipe, processes)
        time.sleep(after)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = self.wait()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(self.errors.read_text()[-3000:])
        return code != 0

    def _read(self, what: str) -> list[int]:
        assert self._server.stdout is not None
        while line := self._server.stdout.readline():
            first, *numbers = line.split() or [""]
            if first == what:
                return [int(number) for number in numbers]
        raise RuntimeError(self.errors.read_text()[-3000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_with_kills(
    runs: Runs, recipe: Path, kills: int, rng: random.Random, seconds: float, processes: int = 1
) -> None:
    """Kill a run so many times at random moments of its `seconds`, each time start it again, and let it end."""
    done = 0
    while done < kills:
        done += runs.kill(recipe, rng.uniform(0.02, 0.95) * seconds, processes)
        if _step(recipe.with_suffix("")) >= STEPS and done < kills:
            shutil.rmtree(recipe.with_suffix(""))  # it was quicker than the kill: from the start once more
    runs.run(recipe, processes)


def _step(run: Path) -> int:
    if not (run / "last").exists():
        return 0
    return int(json.loads((run / "last/training_state.json").read_text())["step"])


def differences(whole: Path, other: Path) -> dict[str, int]:
    """Whether weights and optimizer are bit-identical, and the samples that were repeated and lost."""
    same = all(
        torch.equal(tensor, load_file(other / file.relative_to(whole))[name])
        for file in sorted((whole / "last").rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    )
    ours, theirs = (_samples(folder) for folder in (other, whole))
    return {
        "identical": int(same),
        "samples_repeated": (ours - theirs).total(),
        "samples_lost": (theirs - ours).total(),
    }


def _samples(run: Path) -> Counter[tuple[int, str]]:
    return Counter((row["step"], name) for row in read_log(run) for name in row.get("samples", []))


# ── recipes ──


def recipes_of(folder: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Name → recipe and number of processes, of every kind of run."""
    source = synthetic_photos(folder / "photos", 16, (48, 48))
    lm = save_random_lm(folder / "lm", small_llama(48, 2))
    encoder = {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32}
    training = {
        "max_steps": STEPS, "images_per_step": 4, "targets_per_image": 2, "precision": "fp32", "warmup_steps": 0,
        "log_every": 1, "save_every": 1, "validate_every": 5, "keep_last": 2,
    }  # fmt: skip
    data = {"train": [source], "validation": [source], "workers": 0}
    mapper = {"type": "mlp", "prefix_length": 2, "hidden_dim": 32, "tokens": "flatten", "dropout": 0.2}
    base = {
        "model": {"vision_encoder": encoder, "mapper": mapper, "language_model": {"path": str(lm)}},
        "data": {**data, "feature_cache": str(folder / "features")},
        "training": training,
    }
    lora = {"path": str(lm), "peft": {"type": "lora", "r": 2, "lora_dropout": 0.2}}
    contrastive = {
        "kind": "contrastive",
        "model": {
            "vision_encoder": {**encoder, "output": "pooled"},
            "text_tower": {"path": str(_save_bert(folder / "bert", lm)), "trained_layers": 1},
            "projection_dim": 16,
        },
        "data": {**data, "feature_cache": str(folder / "pooled")},
        "training": training,
    }
    shards = {"type": "webdataset", "path": str(folder / "shards"), "stream": True, "shuffle_images": 6}
    build_shards(open_all([source]), folder / "shards", images_per_shard=3, workers=0)
    streamed = {**data, "train": [shards], "feature_cache": "off"}
    mixed = [{**source, "weight": 0.7}, {**shards, "weight": 0.3, "name": "shards"}]
    with_lora = {**base["model"], "language_model": lora}
    return {
        "mapper": (base, 1),
        "mapper, no cache": ({**base, "data": {**data, "feature_cache": "off"}}, 1),
        "LoRA": ({**base, "model": with_lora}, 1),
        "contrastive": (contrastive, 1),
        "mapper, two processes": (base, 2),
        "LoRA, two processes": ({**base, "model": with_lora}, 2),
        "mapper, streamed": ({**base, "data": streamed}, 1),
        "mapper, streamed by weight": ({**base, "data": {**streamed, "train": mixed}}, 1),
        "LoRA, streamed": ({**base, "model": with_lora, "data": streamed}, 1),
        "contrastive, streamed": ({**contrastive, "data": streamed}, 1),
        "mapper, streamed, two processes": ({**base, "data": streamed}, 2),
        "LoRA, streamed, two processes": ({**base, "model": with_lora, "data": streamed}, 2),
    }


def _save_bert(folder: Path, lm: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.pad_token = "</s>"
    config = BertConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=2
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def survive(runs: Runs, folder: Path, names: Sequence[str], killed: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """For each kind of run, `killed` runs with one, two, three kills, and so on; yields one row a kind."""
    rng, recipes = random.Random(seed), recipes_of(folder)
    for name in names:
        recipe, processes = recipes[name]

        def write(run: str, recipe: dict[str, Any] = recipe, name: str = name) -> Path:
            path = folder / f"{name.replace(', ', '-').replace(' ', '_')}-{run}.yaml"
            path.write_text(write_yaml({**recipe, "name": name, "output_dir": str(path.with_suffix(""))}))
            return path

        whole = write("whole")
        before = time.monotonic()
        runs.run(whole, processes)
        seconds = time.monotonic() - before
        row = Counter({"kills": 0, "runs": 0, "identical": 0, "samples_repeated": 0, "samples_lost": 0})
        for number in range(killed):
            kills = 1 + number % 3
            other = write(str(number))
            run_with_kills(runs, other, kills, rng, seconds, processes)
            row.update({"kills": kills, "runs": 1, **differences(whole.with_suffix(""), other.with_suffix(""))})
        yield {"kind": name, **row}


@contextmanager
def own_home(folder: Path) -> Iterator[None]:
    """No file of the user's cache is used."""
    before = os.environ.get("FROZENPREFIX_HOME")
    os.environ["FROZENPREFIX_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FROZENPREFIX_HOME"]
        else:
            os.environ["FROZENPREFIX_HOME"] = before


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, own_home(Path(name) / "home"):
        folder = Path(name)
        with Runs(folder / "errors") as runs:
            names, killed = (["mapper", "mapper, streamed"], 2) if arguments.quick else (list(KINDS), arguments.runs)
            rows = list(survive(runs, folder, names, killed))
        inputs, foreign = fuzz(folder / "fuzz", arguments.inputs or (500 if arguments.quick else 100_000), seed=0)
    total = Counter[str]()
    for row in rows:
        total.update({key: value for key, value in row.items() if key != "kind"})
    return {
        "benchmark": "survival",
        **total,
        "kinds": rows,
        "fuzz_inputs": sum(inputs.values()),
        "foreign_errors": sum(foreign.values()),
        "readers": {reader: {"inputs": inputs[reader], "foreign": foreign[reader]} for reader in inputs},
    }


def markdown(report: dict[str, Any]) -> str:
    header = ["run", "kills", "bit-identical", "samples repeated", "samples lost"]
    rows = [
        [
            row["kind"],
            row["kills"],
            f"{row['identical']} of {row['runs']}",
            row["samples_repeated"],
            row["samples_lost"],
        ]
        for row in report["kinds"]
    ]
    readers = [[name, row["inputs"], row["foreign"]] for name, row in report["readers"].items()]
    return common.table(header, rows) + "\n" + common.table(["reader", "damaged inputs", "foreign errors"], readers)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=4, help="killed runs of each kind")
    parser.add_argument("--inputs", type=int, help="damaged inputs for all readers together")
    return common.publish(measure, parser.parse_args(argv), "survival", markdown)


if __name__ == "__main__":
    main()
