"""`frozenprefix new`: what is found in a stranger's folder, and the recipe that is written for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.config import load_recipe
from frozenprefix.config.starting import starting_recipe
from frozenprefix.data.sources import detect_sources, load_sources, unread_tables
from frozenprefix.data.sources.spreadsheets import read_spreadsheet
from frozenprefix.data.survey import survey
from frozenprefix.errors import DataError


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twenty photos as a camera names them, without texts."""
    folder = tmp_path / "my photos"
    for number in range(20):
        save(folder / f"IMG_{number:04}.JPG", number)
    return folder


def save(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(path, "JPEG")
    return path


def table(folder: Path, name: str = "Texte.csv", count: int = 20) -> Path:
    rows = [f"IMG_{number:04};Bild Nummer {number}" for number in range(count)]
    (folder / name).write_text("Datei;Was man sieht\n" + "\n".join(rows), encoding="cp1252")
    return folder / name


def new(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["new", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def divided(found) -> None:
    """The recipe's two parts share no image, and have all of them."""
    train, val = (load_sources(sources) for sources in (found.train, found.validation))
    images = [{sample.images for sample in samples} for samples in (train, val)]
    assert [len(part) for part in images] == [found.train_images, found.validation_images]
    assert images[0].isdisjoint(images[1])


def test_a_table(photos):
    table(photos)
    found = survey(photos)
    assert found.found[1:3] == [
        "column 'Datei' names the images: 20 of 20 are there",
        "column 'Was man sieht': captions",
    ]
    assert (found.task, found.train_images, found.validation_images) == ("caption", 16, 4)
    assert [note.partition(":")[0] for note in found.notes] == ["16 images are few"]
    divided(found)


def test_what_may_be_wrong_is_said(photos):
    file = table(photos, count=18)
    file.write_text(file.read_text() + "\nIMG_0099;weg\n")
    (photos / "IMG_0003.JPG").write_bytes(b"no image")
    found = survey(photos)
    assert found.notes == [
        f"1 images are named and not there, the first is IMG_0099 ({file}:20)",
        "2 images have no text (IMG_0018.JPG, IMG_0019.JPG)",
        f"1 images cannot be read, the first: {photos / 'IMG_0003.JPG'}: Pillow knows no such format",
    ] or found.notes[2].startswith("1 images cannot be read, the first: ")
    assert found.missing == 2


def test_the_table_with_most_images_is_taken(photos):
    table(photos, "a.csv", 3)
    table(photos, "b.csv")
    (photos / "~$b.xlsx").write_bytes(b"open in Excel")
    assert survey(photos).train[0]["file"] == "b.csv"
    assert survey(photos).notes[0].startswith("there are other tables, which are not read (a.csv)")
    assert survey(photos, table=photos / "a.csv").train[0]["file"] == "a.csv"


def test_a_table_beside_the_folder(photos):
    file = table(photos).rename(photos.parent / "t.csv")
    found = survey(photos, table=file)
    assert found.train_images == 16
    divided(found)
    assert survey(photos.parent).train_images == 16


def test_a_damaged_table_is_an_error(photos):
    file = table(photos)
    file.write_text(file.read_text() + "\nIMG_0001;a;b\n")
    with pytest.raises(DataError, match=r"Texte.csv:22: got 3 cells"):
        survey(photos)


def test_splits_of_the_data(photos):
    rows = "".join(f"IMG_{n:04},a dog,{'validation' if n > 15 else 'train'}\n" for n in range(20))
    (photos / "t.csv").write_text("file,text,split\n" + rows)
    found = survey(photos)
    assert (found.train[0]["split"], found.validation[0]["split"]) == ("train", "validation")
    assert (found.train_images, found.validation_images) == (16, 4)
    divided(found)


def test_versions_of_a_photo_are_kept_together(photos):
    for number in range(0, 20, 2):
        save(photos / f"IMG_{number:04}_edited.jpg", number)
    rows = "".join(f"{path.name},a dog\n" for path in sorted(photos.iterdir()))
    (photos / "t.csv").write_text("file,text\n" + rows)
    found = survey(photos)
    assert found.train[0]["holdout"]["versions"] == "together"
    divided(found)


def test_text_files(photos):
    for number in range(20):
        (photos / f"IMG_{number:04}.txt").write_text(f"photo {number}\nanother line\n")
    found = survey(photos)
    assert (found.train[0]["type"], found.train[0]["texts"], found.targets) == ("image_folder", ".txt", 2.0)
    divided(found)


@pytest.mark.parametrize("splits", [False, True])
def test_folders_as_labels(tmp_path, splits):
    for split in ("train", "val") if splits else ("",):
        for label in ("cat", "dog"):
            for number in range(8):
                save(tmp_path / split / label / f"{number}.jpg", number)
    found = survey(tmp_path)
    assert (found.task, found.train[0]["labels"]) == ("classification", True)
    assert found.train_images == (16 if splits else 13)
    divided(found)


def test_known_files_go_first(photos):
    lines = [{"image": f"IMG_{n:04}.JPG", "captions": ["a dog"]} for n in range(20)]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table(photos)
    assert survey(photos).train[0]["type"] == "captions"
    assert survey(photos, texts_from="table").train[0]["file"] == "Texte.csv"
    lines = [{"file": f"IMG_{n:04}.JPG", "text": "a dog"} for n in range(20)]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (photos / "Texte.csv").unlink()
    assert survey(photos).train[0] | {"holdout": None} == {
        "type": "csv",
        "path": str(photos),
        "file": "captions.jsonl",
        "image": "file",
        "captions": "text",
        "holdout": None,
    }, "of that name, but with other fields"


def test_a_file_that_a_known_data_set_lacks_stays_unread(tmp_path):
    images = [int(save(tmp_path / "VG_100K" / f"{n}.jpg", n).stem) for n in range(20)]
    box = {"x": 0, "y": 0, "width": 8, "height": 8}
    regions = [{"id": n, "regions": [{"region_id": n, "image_id": n, "phrase": "a dog", **box}]} for n in images]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))
    found = survey(tmp_path)
    assert (found.train[0]["type"], found.train[0]["questions"]) == ("visual_genome", None)
    text = starting_recipe(found, name="a", file="a.yaml", output_dir="a")
    (tmp_path / "r.yaml").write_text(text)
    assert len(load_sources(load_recipe(tmp_path / "r.yaml").data.train)) == found.train_images


def test_a_table_is_read_to_look_at_it_and_to_load_it(photos, monkeypatch):
    read: list[str] = []

    def counted(path: Path, **options: object):
        read.append(path.name)
        return read_spreadsheet(path, **options)

    monkeypatch.setattr("frozenprefix.data.sources.csv_table.read_spreadsheet", counted)
    table(photos)
    survey(photos)
    assert read == ["Texte.csv"] * 2


def test_photos_without_texts(photos):
    with pytest.raises(DataError, match="has 20 images and no texts to learn; expected a table with a row for each"):
        survey(photos)
    with pytest.raises(DataError, match="has no table"):
        survey(photos, texts_from="table")
    (photos.parent / "empty").mkdir()
    with pytest.raises(DataError, match="has no image"):
        survey(photos.parent / "empty")


def test_few_images_have_no_validation(tmp_path):
    for number in range(3):
        save(tmp_path / f"IMG_{number:04}.JPG")
    table(tmp_path, count=3)
    found = survey(tmp_path)
    assert (found.validation, found.train_images) == ([], 3)
    assert "too few for a validation" in found.notes[0]


# ── the command ──


def test_new_writes_a_recipe_and_says_what_is_next(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(photos)
    output = new("my photos", "--no-plan")
    assert "wrote my_photos.yaml\nnext:\n" in output
    assert "  frozenprefix train my_photos.yaml\n" in output
    assert "  frozenprefix caption runs/my_photos/best 'my photos' --out captions.csv\n" in output
    recipe = load_recipe(tmp_path / "my_photos.yaml")
    assert (recipe.name, str(recipe.output_dir)) == ("my photos", "runs/my_photos")
    assert len(load_sources(recipe.data.train)) == 16
    text = (tmp_path / "my_photos.yaml").read_text()
    long = ("pypi://", "type: csv", "prompts: ")
    assert all(len(line) < 125 for line in text.splitlines() if not any(part in line for part in long))
    assert "'my_photos.yaml' exists" in new("my photos", "--no-plan", code=2)
    new("my photos", "--no-plan", "--force")


def test_options_override_the_guess(photos, tmp_path):
    rows = "".join(f"IMG_{n:04},a long text about nothing,dog\n" for n in range(20))
    (photos / "t.csv").write_text("a,b,c\n" + rows)
    out = tmp_path / "r.yaml"
    new(photos, "--no-plan", "--out", out, "--label", "c", "--validation", 0.5)
    recipe = load_recipe(out)
    assert recipe.data.train[0]["label"] == "c"
    assert recipe.training.images_per_step == 8
    assert len(load_sources(recipe.data.validation)) == 10
    assert "no column 'd'" in new(photos, "--no-plan", "--caption", "d", "--out", tmp_path / "s.yaml", code=2)
    (photos / "t.csv").write_text("a,n\n" + "".join(f"IMG_{n:04},{n}\n" for n in range(20)))
    new(photos, "--no-plan", "--out", tmp_path / "n.yaml", "--label", "n")  # what nobody would guess
    assert load_recipe(tmp_path / "n.yaml").data.train[0]["label"] == "n"


def test_questions_long_texts_and_missing_images_are_in_the_recipe(photos, tmp_path):
    rows = "".join(f"IMG_{n:04},where?,{'word ' * 60}\n" for n in range(22))
    (photos / "t.csv").write_text("image,question,answer\n" + rows)
    out = tmp_path / "r.yaml"
    output = new(photos, "--no-plan", "--out", out)
    assert "frozenprefix evaluate runs/r/best --task vqa" in output
    recipe = load_recipe(out)
    assert recipe.training.max_target_tokens == 104
    assert recipe.data.max_bad_share == pytest.approx(0.1)


def test_a_folder_that_is_not_there(tmp_path):
    assert "expected a folder of photos" in new(tmp_path / "x", code=2)


def test_the_time_is_told(tmp_path, photos, monkeypatch):
    table(photos)
    asked = []
    monkeypatch.setattr("frozenprefix.cli.new.say_stages", lambda recipe, measure: asked.append(recipe.name))
    assert "next:\n  frozenprefix train" in new(photos, "--out", tmp_path / "r.yaml")
    assert asked == ["my photos"]


def test_a_table_of_captions_that_were_generated_is_not_learned_from(photos):
    rows = "".join(f"IMG_{number:04}.JPG,a dog,-0.5\n" for number in range(20))
    (photos / "captions.csv").write_text("image,caption,score\n" + rows)
    with pytest.raises(DataError, match="was written by `frozenprefix caption`"):
        survey(photos)
    table(photos)
    assert survey(photos).train[0]["file"] == "Texte.csv"


def test_other_commands_find_the_table_too(photos):
    table(photos)
    (config,) = detect_sources(photos)
    assert (config["type"], config["file"], config["captions"]) == ("csv", "Texte.csv", "Was man sieht")
    assert unread_tables(photos) == []
    (photos / "Texte.csv").write_text("Datei;Text\nIMG_0001;ein Hund\n")
    assert detect_sources(photos)[0]["type"] == "image_folder", "it names few of the images"
    assert unread_tables(photos) == [photos / "Texte.csv"]


def test_few_captions_are_examples_in_the_prompt(photos, tmp_path):
    rows = "".join(f"IMG_{n:04};Ein Hund Nummer {n}\n" for n in range(18))
    (photos / "t.csv").write_text(f"image;text\n{rows}IMG_0018;a {{b}} c d\nIMG_0019;a <image> b c\n")
    new(photos, "--no-plan", "--out", tmp_path / "r.yaml")
    recipe = load_recipe(tmp_path / "r.yaml")
    *examples, last = recipe.data.prompts["caption"].split("\n")
    assert (last, len(examples)) == ("<image>Caption:", 4)
    trained = {text for sample in load_sources(recipe.data.train) for text in sample.targets}
    shown = {line.removeprefix("Caption: ").removesuffix("<|im_end|>") for line in examples}
    assert shown <= trained, "none of the validation"
    assert all(text.startswith("Ein Hund Nummer ") for text in shown)


def test_many_or_long_captions_are_not_in_the_prompt(tmp_path):
    folder = tmp_path / "photos"
    for number in range(30):
        save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("long " * 40 + str(number))
    found = survey(folder)
    assert 'caption: "Caption:"' in starting_recipe(found, name="a", file="a.yaml", output_dir="a")
    found.train_images, found.examples = 1000, ["a dog", "a cat"]
    assert 'caption: "Caption:"' in starting_recipe(found, name="a", file="a.yaml", output_dir="a")
