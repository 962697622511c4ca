"""Valid files for every reader of the package, which `benchmarks/fuzzing.py` damages."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from openpyxl import Workbook
from PIL import Image

from benchmarks.plan_check import small_llama
from benchmarks.recipes import save_random_lm
from frozenprefix import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from frozenprefix.config import load_recipe, recipe_from_dict, write_yaml
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.data.sources import load_source, open_source
from frozenprefix.data.streaming.build import build_shards
from frozenprefix.data.streaming.index import beside
from frozenprefix.errors import BadImageError
from frozenprefix.evaluation import Evaluation, compare
from frozenprefix.evaluation.journal import Journal
from frozenprefix.models.checkpoint import read_checkpoint
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.language_model import load_language_model, load_tokenizer
from frozenprefix.models.vision.precomputed import FeatureTable
from frozenprefix.models.vision.weights import read_weights
from frozenprefix.training import read_log
from frozenprefix.training.checkpoints import Progress, load_training_state, save_training_state
from frozenprefix.training.setup import build_model
from frozenprefix.utils import write_jsonl
from frozenprefix.utils.hashing import hash_file
from frozenprefix.utils.random_state import random_state
from frozenprefix.utils.sums import SUMS_FILE, check_sums, write_sums
from frozenprefix.utils.tensors import save_tensors


class Reader(NamedTuple):
    """A file that is damaged, and what reads it.

    Attributes:
        cost: how much longer than others it takes; it gets fewer inputs.
        forked: read in a process of its own, because a library below may crash.
    """

    name: str
    file: Path
    read: Callable[[], Any]
    cost: float = 1.0
    forked: bool = False


def make_readers(folder: Path) -> list[Reader]:
    """A valid file for every reader."""
    folder.mkdir(parents=True)
    return [
        *_files_of_users(folder),
        *_files_of_sources(folder / "sources"),
        *_files_of_runs(folder),
        *_files_of_caches(folder),
        *_files_of_streams(folder),
        *_files_of_models(folder / "models"),
        *_files_of_results(folder / "results"),
    ]


def _files_of_users(folder: Path) -> list[Reader]:
    recipe, image = folder / "recipe.yaml", folder / "image.png"
    recipe.write_text(
        write_yaml(
            {
                "name": "fuzz",
                "output_dir": str(folder / "run"),
                "model": {
                    "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random"},
                    "mapper": {"type": "mlp", "prefix_length": 4},
                    "language_model": {"path": "lm"},
                },
                "data": {"train": [{"type": "captions", "path": "data"}]},
                "training": {"max_steps": 3, "betas": [0.9, 0.98]},
            }
        )
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(pixels).save(folder / "image.jpg")
    captions, table = folder / "captions.jsonl", folder / "table.npy"
    rows = [{"image": "image.png", "captions": ["a cat", "two cats"], "split": "train", "id": str(n)} for n in range(3)]
    write_jsonl(captions, rows)
    np.save(table, np.ones((3, 2, 4), np.float32))
    (folder / "table.json").write_text(json.dumps(["a", "b", "c"]))

    def read_table() -> Any:
        return FeatureTable(table, folder / "table.json").features([Path("a.png"), Path("c.png")])

    return [
        Reader("recipe", recipe, lambda: load_recipe(recipe)),
        Reader("image", image, lambda: load_image(image)),
        Reader("image", folder / "image.jpg", lambda: load_image(folder / "image.jpg")),
        Reader("captions", captions, lambda: load_source({"type": "captions", "path": str(folder)})),
        Reader("feature table", table, read_table),
        Reader("feature table", folder / "table.json", read_table),
    ]


def _files_of_runs(folder: Path) -> list[Reader]:
    state, run = folder / "state", folder / "log"
    state.mkdir()
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training_state(state, optimizer, Progress(step=3), [random_state()])
    save_tensors({"weight": torch.ones(3)}, state / "model.safetensors")

    def read_state() -> Any:
        return load_training_state(state, torch.optim.AdamW(module.parameters()), {})

    write_jsonl(run / "log.jsonl", [{"step": step, "loss": 0.5} for step in range(1, 4)])
    sums = folder / "sums"
    sums.mkdir()
    (sums / "a").write_text("a")
    write_sums(sums)
    Journal(folder / "p.jsonl", {"beams": 1}).add({("model", "1"): "a cat", ("model", "2"): "a dog"})
    journal = folder / "p.jsonl.part-r00"
    files = ("training_state.json", "optimizer.safetensors", "random_state.safetensors")
    return [
        *(Reader("training state", state / name, read_state) for name in files),
        Reader("weights", state / "model.safetensors", lambda: read_checkpoint(state)),
        Reader("log", run / "log.jsonl", lambda: read_log(run)),
        Reader("sums", sums / "sums.json", lambda: check_sums(sums)),
        Reader("journal", journal, lambda: Journal(folder / "p.jsonl", {"beams": 1})),
    ]


def _files_of_caches(folder: Path) -> list[Reader]:
    cache = folder / "cache"
    with FeatureCacheWriter(cache, {"encoder": "fuzz"}) as writer:
        writer.add(["a", "b"], np.ones((2, 2, 4), np.float32))

    def read() -> Any:
        opened = FeatureCache.open(cache, {"encoder": "fuzz"})
        return opened.get(list(opened))

    return [Reader("feature cache", file, read) for file in sorted(cache.iterdir()) if file.suffix in (".json", ".tar")]


def _files_of_streams(folder: Path) -> list[Reader]:
    """Streamed rows; a tar, its index, and a tar without one."""
    images = [folder / "image.png", folder / "image.jpg"]
    groups = [ImageGroup((image,), (Sample(image.name, (image,), ("a cat", "two cats")),)) for image in images]
    for name in ("shards", "bare"):
        build_shards(groups, folder / name, workers=0)
    beside(folder / "bare/00000.tar").unlink()
    shards, bare = (partial(_read_stream, {"type": "webdataset", "path": str(folder / n)}) for n in ("shards", "bare"))
    return [
        Reader("streams", folder / "captions.jsonl", partial(_read_stream, {"type": "captions", "path": str(folder)})),
        Reader("streams", folder / "shards/00000.tar", shards),
        Reader("streams", beside(folder / "shards/00000.tar"), shards),
        Reader("streams", folder / "bare/00000.tar", bare),
    ]


def _read_stream(source: dict[str, Any]) -> None:
    """Read every sample of a stream, with its images."""
    groups = open_source({**source, "stream": True})
    for number in range(len(groups)):
        with suppress(BadImageError):  # which a step leaves out
            for image in groups[number].images:
                load_image(image)


def _files_of_sources(folder: Path) -> list[Reader]:
    """The files of each source that is read by code of its own."""
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(folder / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    captions = [{"id": number, "image_id": number, "caption": "a"} for number in (1, 2)]
    sentences = [{"raw": "a cat"}, {"raw": "two"}]
    questions = [{"image_id": 1, "question": "what?", "question_id": 1}]
    answers = [{"question_id": 1, "multiple_choice_answer": "a", "answers": [{"answer": "a"}]}]
    contents = {
        "coco.json": {"images": images, "annotations": captions},
        "karpathy.json": {"images": [{"filename": "a.png", "imgid": 1, "split": "train", "sentences": sentences}]},
        "qa.json": [{"image": "a.png", "question": "what?", "answers": ["a", "b"], "split": "train"}],
        "llava.json": [{"id": "1", "image": "a.png", "conversations": turns}],
        "questions.json": {"data_subtype": "val2014", "questions": questions},
        "answers.json": {"annotations": answers},
        "regions.json": [{"id": 1, "regions": [{"region_id": 1, "image_id": 1, "phrase": "a cat"}]}],
        "labelled/labels.json": {"x": "cat"},
        "instances.json": {
            "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
            "annotations": [{"id": 2, "image_id": 1, "bbox": [1, 2, 3, 4]}],
        },
        "refs.json": [{"ref_id": 3, "ann_id": 2, "split": "train", "sentences": [{"sent": "a cat"}]}],
    }
    (folder / "labelled" / "x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "labelled" / "x" / "c.png")
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "table.csv").write_text("photo;what is on it\na;a cat\nb;a dog\n")
    write_workbook(folder / "table.xlsx", [["photo", "what is on it"], ["a", "a cat"], ["b", "a dog"]])
    (folder / "tokens.txt").write_text("a.png#0\ta cat\na.png#1\ttwo\nb.png#0\ta dog\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("k.png", (folder / "a.png").read_bytes()), ("k.txt", b"a cat"), ("k.json", b'{"a": 1}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    vqa = {"type": "vqa_v2", "questions": "questions.json", "annotations": "answers.json", "images": "."}
    sources: dict[str, dict[str, Any]] = {
        "coco.json": {"type": "coco", "annotations": "coco.json", "images": "."},
        "karpathy.json": {"type": "karpathy", "file": "karpathy.json"},
        "qa.json": {"type": "qa", "file": "qa.json"},
        "llava.json": {"type": "llava", "file": "llava.json"},
        "questions.json": {**vqa, "file_pattern": "{image_id}.png"},
        "answers.json": {**vqa, "file_pattern": "{image_id}.png"},
        "regions.json": {"type": "visual_genome", "regions": "regions.json", "questions": None, "images": ["."]},
        "labelled/labels.json": {"type": "image_folder", "labels": True, "label_file": "labels.json"},
        "table.csv": {"type": "csv", "file": "table.csv"},
        "table.xlsx": {"type": "csv", "file": "table.xlsx"},
        "refs.json": {"type": "refcoco", "images": "."},
        "instances.json": {"type": "refcoco", "images": "."},
        "tokens.txt": {"type": "flickr_tokens", "tokens": "tokens.txt", "images": "."},
        "0.tar": {"type": "webdataset", "shards": "0.tar"},
    }
    for name in ("1.png", "1.jpg"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    readers = [
        Reader("sources", folder / name, partial(load_source, {**source, "path": str((folder / name).parent)}))
        for name, source in sources.items()
    ]
    return readers + _tables(folder / "tables")


def write_workbook(path: Path, rows: list[list[str]]) -> None:
    """A table of Excel."""
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def _tables(folder: Path) -> list[Reader]:
    """Files of the library `datasets`."""
    rows = {"image": [{"bytes": b"x", "path": "a.png"}] * 3, "caption": ["a", "b", "c"]}
    saved = Dataset.from_dict(rows, features=Features({"image": ImageColumn(decode=False), "caption": Value("string")}))
    saved.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    saved.to_parquet(folder / "parquet" / "train.parquet")
    read_saved = partial(load_source, {"type": "hf_dataset", "path": str(folder / "saved")})
    read_parquet = partial(load_source, {"type": "hf_dataset", "path": str(folder / "parquet")})
    stream_saved = partial(_read_stream, {"type": "hf_dataset", "path": str(folder / "saved")})
    stream_parquet = partial(_read_stream, {"type": "hf_dataset", "path": str(folder / "parquet")})
    saved_files = [file for file in sorted((folder / "saved").iterdir()) if file.is_file()]
    files = [(file, read) for file in saved_files for read in (read_saved, stream_saved)]
    files += [(folder / "parquet" / "train.parquet", read) for read in (read_parquet, stream_parquet)]
    return [Reader("tables", file, read, cost=10, forked=True) for file, read in files]


def _files_of_models(folder: Path) -> list[Reader]:
    """A language model, a checkpoint with an adapter, and weights of torch."""
    lm = save_random_lm(folder / "lm", small_llama(48, 1))
    config = LanguageModelConfig(path=str(lm))
    source = {"type": "captions", "path": str(folder)}
    peft = {"type": "lora", "r": 2}
    model, processor = build_model(
        recipe_from_dict(
            {
                "name": "fuzz",
                "output_dir": str(folder / "run"),
                "model": {
                    "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
                    "mapper": {"type": "mlp", "prefix_length": 2},
                    "language_model": {"path": str(lm), "peft": peft},
                },
                "data": {"train": [source]},
                "training": {"max_steps": 1, "precision": "fp32"},
            }
        )
    )
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    (checkpoint / SUMS_FILE).unlink(missing_ok=True)  # it would find every change
    weights = folder / "weights.pth"
    torch.save({"weight": torch.ones(4)}, weights)

    def read_model() -> Any:
        return FrozenPrefixForConditionalGeneration.from_pretrained(checkpoint)

    def read_processor() -> Any:
        return FrozenPrefixProcessor.from_pretrained(checkpoint)

    adapter = checkpoint / "language_adapter"
    return [
        Reader("language model", lm / "config.json", partial(load_language_model, config), cost=10),
        Reader("language model", lm / "model.safetensors", partial(load_language_model, config), cost=10),
        Reader("tokenizer", lm / "tokenizer.json", partial(load_tokenizer, config), cost=5),
        Reader("tokenizer", lm / "tokenizer_config.json", partial(load_tokenizer, config), cost=5),
        Reader("checkpoint", checkpoint / "config.json", read_model, cost=20),
        Reader("checkpoint", checkpoint / "generation_config.json", read_model, cost=20),
        Reader("checkpoint", adapter / "adapter_config.json", read_model, cost=20),
        Reader("checkpoint", adapter / "adapter_model.safetensors", read_model, cost=20),
        Reader("processor", checkpoint / "processor_config.json", read_processor, cost=5),
        Reader("weights", weights, partial(read_weights, weights)),
    ]


def _files_of_results(folder: Path) -> list[Reader]:
    """A result of `evaluate` and its predictions."""
    predictions, result = folder / "predictions.jsonl", folder / "result.json"
    scores = {"model": {"accuracy": 1.0}, "shuffled": {"accuracy": 0.0}}
    row = {"images": ["a.png"], "question": "what?", "references": ["a"], "scores": scores, "statistics": {}}
    write_jsonl(predictions, [{"id": str(number), **row} for number in range(3)])
    values = {"task": "vqa", "metrics": {"accuracy": 1.0}, "settings": {"beams": 1}, "predictions": str(predictions)}

    def write_result() -> None:
        result.write_text(json.dumps({**values, "predictions_sha256": hash_file(predictions)}))

    def read() -> Any:
        return compare(Evaluation.load(result), Evaluation.load(result), n=10)

    def read_predictions() -> Any:
        write_result()  # with their hash, which would find every change
        return read()

    write_result()
    return [Reader("results", result, read), Reader("predictions", predictions, read_predictions)]
