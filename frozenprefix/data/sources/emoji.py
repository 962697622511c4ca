"""Emoji: small drawings with names and categories, from the npm package `emoji-datasource-twitter` and its siblings.

`path: npm://emoji-datasource-twitter==16.0.0/.` fetches it: the data are under the MIT licence, Twitter's drawings
under CC-BY 4.0. A drawing is 64 pixels wide, on a transparent ground, which is read as white.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json
from frozenprefix.errors import DataError

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


class EmojiSource(SourceConfig):
    """`emoji.json` and `img/SET/64`: one sample of task "classification" per emoji; the id is the file's name.

    Emoji without a drawing in the set, and those that another one has replaced, are left out.
    """

    type: Literal["emoji"] = "emoji"
    classes: Literal["easy", "name", "category", "subcategory"] = Field(
        "easy", description="what is learned: one of 50 everyday words, and only of emoji that show one; or the "
        "emoji's own name, category or subcategory, in small letters"
    )  # fmt: skip

    def read(self, root: Path) -> list[Sample]:
        folders = sorted(root.glob("img/*/64"))
        if len(folders) != 1:
            raise DataError(f"{root}: got {len(folders)} folders img/SET/64, expected one with the drawings")
        drawings = folders[0]
        rows = read_json(root / "emoji.json")
        if not isinstance(rows, list):
            raise DataError(f"{root / 'emoji.json'}: got a JSON {type(rows).__name__}, expected a list of emoji")
        samples = []
        for number, values in enumerate(rows):
            row = Row(str(root / "emoji.json"), values, f"[{number}]")
            label = self._label(row)
            path = drawings / row.text("image")
            if label is not None and "obsoleted_by" not in row and path.is_file():
                samples.append(_sample(row, path, label))
        return samples

    def _label(self, row: Row) -> str | None:
        return _EASY.get(row.text("name")) if self.classes == "easy" else row.text(self.classes).lower()


def _sample(row: Row, path: Path, label: str) -> Sample:
    return Sample(
        id=path.stem,
        images=(path,),
        targets=(label,),
        task="classification",
        metadata={name: row.text(name).lower() for name in ("name", "category", "subcategory")},
    )
