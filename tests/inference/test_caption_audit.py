"""The audit of captions: evidence by its definition, and the command on data with known faults."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import audit as benchmark
from frozenprefix.cli.main import app
from frozenprefix.config import write_yaml
from frozenprefix.data import Sample
from frozenprefix.data.contradictions import contradictions
from frozenprefix.errors import DataError
from frozenprefix.inference import audit_captions
from frozenprefix.inference.caption_audit import without_image_effect
from tests.helpers.recipes import tiny_recipe_dict


def log_p(captioner, file, text: str) -> float:
    target = captioner.processor.encode_target("<image>", text)
    ids = torch.tensor([captioner.processor.encode_prompt("<image>") + target])
    with torch.no_grad():
        logits = captioner.model(input_ids=ids, image_features=captioner.encoder([file])).logits[0].log_softmax(-1)
    first = ids.shape[1] - len(target)
    return sum(float(logits[first + place - 1, token]) for place, token in enumerate(target))


def test_evidence_of_captions_is_what_its_definition_says(captioner, shapes):
    files = sorted((shapes / "images").iterdir())[:3]
    texts = ("a red circle", "the dog runs")
    samples = [Sample(file.name, (file,), texts) for file in files]
    audited = audit_captions(captioner, samples, captioner.encoder, others=9)
    assert [each.evidence for each in audited] == sorted(each.evidence for each in audited)
    table = {(file, text): log_p(captioner, file, text) for file in files for text in texts}
    # least squares of value = caption + image, over the images that are not a caption's own
    rows = [
        (i, j, table[file, text]) for i, (own, text) in enumerate(table) for j, file in enumerate(files) if file != own
    ]
    design = torch.zeros(len(rows), len(table) + len(files), dtype=torch.double)
    for row, (i, j, _) in enumerate(rows):
        design[row, i] = design[row, len(table) + j] = 1
    values = torch.tensor([value for _, _, value in rows], dtype=torch.double)
    effects = (torch.linalg.pinv(design) @ values)[len(table) :].tolist()
    effect = dict(zip(files, effects, strict=True))
    for each in audited:
        values = {file: table[file, each.caption] - effect[file] for file in files}
        own = values.pop(each.image)
        assert each.evidence == pytest.approx(own - sum(values.values()) / 2, abs=1e-3)
        assert each.better == sum(value > own for value in values.values()) / 2


def test_an_image_that_makes_all_texts_unlikely_does_not_make_its_captions_wrong():
    generator = torch.Generator().manual_seed(0)
    images, others = 30, 4
    shown = torch.stack([(number + torch.arange(1 + others) * 3) % images for number in range(images)])
    values = torch.randn(images, 1 + others, generator=generator) * 0.1
    values[:, 0] += 2  # every caption fits its image
    values[shown == 7] -= 30
    plain = values[:, 0] - values[:, 1:].mean(dim=1)
    corrected = without_image_effect(values, shown, images)
    assert plain[7] < -20
    assert (corrected[:, 0] - corrected[:, 1:].mean(dim=1)).min() > 0.5


def test_one_image_cannot_be_compared(captioner, shapes):
    file = shapes / "images" / "red_circle.png"
    with pytest.raises(DataError, match="got 1 images"):
        audit_captions(captioner, [Sample("1", (file,), ("a dog",))], captioner.encoder)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["Two dogs run.", "Three dogs run."], [("number", "dog", "2", "3")]),
        (["Two dogs run.", "2 big dogs play.", "A dog."], []),
        (["Two men and three men.", "Four men."], []),
        (["Five people.", "Four people walk."], [("number", "person", "5", "4")]),
        (["A black dog.", "The white dog runs."], [("colour", "dog", "black", "white")]),
        (["A brown dog.", "A tan dog."], []),
        (["A black and white dog.", "A white dog."], []),
        (["A grey cat.", "A gray cat."], []),
        (["A girl in a red shirt and a girl in a blue shirt.", "A green shirt."], []),
        (["A black dog.", "A white cat."], []),
        ([], []),
    ],
)
def test_contradictions(captions, expected):
    found = contradictions(captions)
    assert [(each.kind, each.noun, each.first, each.second) for each in found] == expected


def test_the_command_finds_known_faults(tiny_checkpoint, sharp_lm, shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    train = next(row for row in rows if row["split"] == "train")
    copied = next(row for row in rows if row["split"] == "val")
    # a photo, and the same one scaled and compressed, in validation
    photo = Image.effect_noise((12, 12), 120).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
    photo.save(data / "images" / "photo.png")
    photo.resize((80, 80)).save(data / "images" / "copy.jpg", quality=90)
    train["image"] = "images/photo.png"
    copied["image"] = "images/copy.jpg"
    train["captions"] = ["two dogs", "three dogs"]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_yaml(tiny_recipe_dict(sharp_lm, data, tmp_path / "run")))
    out = tmp_path / "audit.json"
    arguments = ["data", "audit", str(recipe), "--out", str(out), "--others", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "captions are not judged" in result.output
    found = json.loads(out.read_text())
    near = [{leak["image"], leak["other"]} for leak in found["leaks"]["near_duplicates"]]
    assert {str(data / "images/photo.png"), str(data / "images/copy.jpg")} in near
    assert [each["noun"] for each in found["contradictions"] if each["kind"] == "number"] == ["dog"]
    result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tiny_checkpoint)])
    assert result.exit_code == 0, result.output
    captions = json.loads(out.read_text())["captions"]
    assert captions
    assert all(each["evidence"] < 0 for each in captions)


def test_swapped_captions_are_known():
    samples = [Sample(str(n), (f"{n}.jpg",), tuple(f"{n} {i}" for i in range(5))) for n in range(8)]  # type: ignore[arg-type]
    swapped, wrong = benchmark.swap_captions(samples, 0.1)
    assert len(wrong) == 4
    for before, after in zip(samples, swapped, strict=True):
        new = set(after.targets) - set(before.targets)
        assert {(after.images[0], text) for text in new} == {key for key in wrong if key[0] == after.images[0]}
    assert sorted(t for s in swapped for t in s.targets) == sorted(t for s in samples for t in s.targets)
