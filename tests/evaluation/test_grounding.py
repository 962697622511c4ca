"""Boxes as text, the source of RefCOCO's files, the task, and boxes drawn on pages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from frozenprefix.data.boxes import boxes_in, format_box, is_box, overlap
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import detect_sources, load_source
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.evaluation.tasks import TASKS
from frozenprefix.evaluation.tasks.grounding import box_scorer
from frozenprefix.interpret.report import with_boxes


def write_refcoco(folder, boxes=((10, 20, 30, 40), (50, 0, 50, 100))):
    """Two images of 100 × 200 pixels with a box each, [left, top, width, height]."""
    (folder / "images").mkdir(parents=True)
    images, annotations, refs = [], [], []
    for number, box in enumerate(boxes):
        name = f"{number}.png"
        Image.new("RGB", (100, 200), ["red", "blue"][number % 2]).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": 100, "height": 200})
        annotations.append({"id": 70 + number, "image_id": number, "bbox": list(box)})
        sentences = [{"sent": "the dog", "sent_id": 1}, {"raw": "left one"}]
        ref = {"ref_id": 5 + number, "ann_id": 70 + number, "split": ["train", "val"][number % 2]}
        refs.append({**ref, "sentences": sentences})
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "refs.json").write_text(json.dumps(refs))
    return folder


# ── boxes ──


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 30 55 80", [(0.12, 0.3, 0.55, 0.8)]),
        ("[12, 30, 55, 80]", [(0.12, 0.3, 0.55, 0.8)]),
        ("0.12, 0.3, 0.55, 1.0", [(0.12, 0.3, 0.55, 1.0)]),
        ("0 0 1 1", [(0.0, 0.0, 0.01, 0.01)]),  # percent
        ("0 0 100 100.", [(0.0, 0.0, 1.0, 1.0)]),
        ("<loc0256><loc0128><loc0512><loc1024>", [(0.125, 0.25, 1.0, 0.5)]),
        ("<patch_index_0000><patch_index_1023>", [(0.0, 0.0, 1.0, 1.0)]),
        ("12 30 55", []),
        ("55 30 12 80", []),
        ("12 30 155 80", []),
        ("2021 12 30 55", []),
        ("", []),
    ],
)
def test_boxes_are_read(text, expected):
    assert boxes_in(text) == [pytest.approx(box) for box in expected]


def test_boxes_are_written_and_read_again():
    generator = np.random.default_rng(0)
    for _ in range(200):
        left, right = sorted(generator.uniform(0, 1, 2))
        top, bottom = sorted(generator.uniform(0, 1, 2))
        if right - left > 0.02 and bottom - top > 0.02:
            (again,) = boxes_in(format_box((left, top, right, bottom)))
            assert again == pytest.approx((left, top, right, bottom), abs=0.00501)
    assert is_box(format_box((0.0, 0.0, 1.0, 1.0)))
    # a box thinner than the step stays a box
    assert format_box((0.501, 0.2, 0.504, 0.9), step=5) == "50 20 55 90"
    assert format_box((0.99, 0.2, 1.0, 0.9), step=25) == "75 25 100 100"
    with pytest.raises(DataError, match="box: got"):
        format_box((0.5, 0.0, 0.4, 1.0))


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert overlap((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert overlap((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)


# ── the source ──


def test_references_become_questions(tmp_path):
    folder = write_refcoco(tmp_path / "data")
    assert [source["type"] for source in detect_sources(folder)] == ["refcoco"]
    samples = load_source({"type": "refcoco", "path": str(folder), "split": "train"})
    assert [(s.id, s.question, s.targets) for s in samples] == [
        ("5.0", "Where is the dog?", ("10 10 40 30",)),
        ("5.1", "Where is left one?", ("10 10 40 30",)),
    ]
    assert samples[0].metadata["box"] == pytest.approx((0.1, 0.1, 0.4, 0.3))
    asked = {"type": "refcoco", "path": str(folder), "question": "{phrase}:", "step": 25, "split": "val"}
    assert next((s.question, s.targets) for s in load_source(asked)) == ("the dog:", ("50 0 100 50",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs, file: refs[0].update(ann_id=1), "refs.json: \\[0\\]: field 'ann_id': got 1, expected an id"),
        (lambda refs, file: refs[0].pop("sentences"), "field 'sentences' is missing"),
        (lambda refs, file: file["annotations"][0].update(bbox=[1, 2, 3]), "field 'bbox': got \\[1, 2, 3\\]"),
        (lambda refs, file: file["annotations"][0].update(bbox=[200, 0, 5, 5]), "inside the image of 100 × 200"),
        (lambda refs, file: file["images"][0].update(width=0), "inside the image"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, change, message):
    folder = write_refcoco(tmp_path / "data")
    refs, file = (json.loads((folder / name).read_text()) for name in ("refs.json", "instances.json"))
    change(refs, file)
    (folder / "refs.json").write_text(json.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(file))
    with pytest.raises(DataError, match=message):
        load_source({"type": "refcoco", "path": str(folder)})


def test_a_pickle_is_refused_and_the_way_out_named(tmp_path):
    folder = write_refcoco(tmp_path / "data")
    (folder / "refs(unc).p").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"a pickle runs code.*json\.dump"):
        load_source({"type": "refcoco", "path": str(folder), "refs": "refs(unc).p"})
    with pytest.raises(ConfigError, match=r"expected .phrase. in it"):
        load_source({"type": "refcoco", "path": str(folder), "question": "Where?"})


# ── the task ──


def test_scores_by_hand():
    truth = {"1": (0.1, 0.1, 0.4, 0.3), "2": (0.0, 0.0, 1.0, 1.0), "3": (0.0, 0.0, 0.5, 0.5)}
    scores = box_scorer(truth)({"1": "10 10 40 30", "2": "0 0 40 100", "3": "a dog"})
    assert scores.metrics == pytest.approx({"accuracy": 1 / 3, "iou": 1.4 / 3, "boxes": 2 / 3})
    assert scores.per_sample["2"] == {"accuracy": 0.0, "iou": 0.4, "boxes": 1.0}


def test_the_task_has_its_baselines(captioner, tmp_path):
    samples = load_source({"type": "refcoco", "path": str(write_refcoco(tmp_path / "data"))})
    options = EvaluationOptions(tmp_path / "predictions.jsonl", max_new_tokens=4)
    result = TASKS.get("grounding").run(captioner, samples, options)
    assert result["n"] == 4
    assert set(result["metrics"]) == {"accuracy", "iou", "boxes"}
    assert set(result["baselines"]) == {"blind", "shuffled"}
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["references"] == ["10 10 40 30"]


def test_samples_without_a_box_are_refused(captioner, shapes, tmp_path):
    sample = Sample("1", (shapes / "images" / "red_circle.png",), ("red",), question="what?", task="vqa")
    options = EvaluationOptions(tmp_path / "predictions.jsonl")
    with pytest.raises(DataError, match="got the target 'red', expected a box such as '12 30 55 80'"):
        TASKS.get("grounding").run(captioner, [sample], options)


# ── pages ──


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (100, 100), "white")
    drawn = np.asarray(with_boxes(image, ["20 40 60 80"], ["50 50 90 90"]))
    far = np.abs(drawn.astype(int) - 255).sum(-1) > 60
    assert far[40:80, 20].all()
    assert far[40, 20:60].all()
    assert not far[:38].any()
    # the true box in green, the model's in another colour
    assert drawn[60, 20, 1] > drawn[60, 20, 0]
    assert drawn[89, 70, 0] > drawn[89, 70, 1]
    assert (np.asarray(with_boxes(image, ["a dog"], [])) == 255).all()
