"""What the columns of somebody's table are: guessed from their names and from what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from frozenprefix.data.sources.rows import Row
from frozenprefix.errors import DataError

_ROWS = 300  # that are looked at
_WORDS = {
    "image": "image images img imagefile imagepath file filename filepath path photo photos picture name id url bild "
    "foto datei dateiname fichier imagen archivo nom nombre immagine obraz файл",
    "captions": "caption captions text texts description descriptions desc title alt alttext comment comments sentence "
    "beschreibung bildbeschreibung bildunterschrift titel legende légende descripción descripcion titulo título "
    "didascalia descrizione opis podpis описание подпись 説明 描述 说明",
    "question": "question questions frage pregunta domanda pytanie вопрос",
    "answers": "answer answers antwort antworten respuesta réponse reponse risposta odpowiedź ответ",
    "label": "label labels class category klasse kategorie categoría catégorie species genre",
    "split": "split subset partition fold",
}
_NAMES = {role: frozenset(words.split()) for role, words in _WORDS.items()}


@dataclass(frozen=True)
class Guess:
    """The columns of a table by role.

    Attributes:
        image: column that names the images; found: share of its cells that name one which is there.
        texts: "captions" → columns, or "question" and "answers", or "label".
        split: column of the splits.

    Example:
        >>> Guess("Photo", 1.0, {"captions": ["Text"]}).split is None
        True
    """

    image: str
    found: float
    texts: Mapping[str, list[str]]
    split: str | None = None


def guess_columns(
    columns: Sequence[str],
    rows: Sequence[Row],
    is_there: Callable[[str], bool],
    where: str,
    *,
    image: str | None = None,
    texts: Mapping[str, list[str]] | None = None,
) -> Guess:
    """Guess what columns are.

    The image column is the one whose cells name most images that are there. Texts are found by the names of columns
    in several languages, and where no name is known, by what is in them: the longest texts are captions, and a few
    short ones that repeat are labels.

    Args:
        is_there: whether a cell names an image.
        where: the table, for messages.
        image, texts: as of `Guess`, if they are known.

    Raises:
        DataError: a column that is not known cannot be guessed.

    Example:
        >>> rows = [Row("t:2", {"Datei": "1.jpg", "Was man sieht": "ein roter Ball"})]
        >>> guess_columns(["Datei", "Was man sieht"], rows, {"1.jpg"}.__contains__, "t").texts
        {'captions': ['Was man sieht']}
    """
    cells = {name: [found for row in rows[:_ROWS] if (found := _cells(row, name))] for name in columns}
    shares = {name: _share(values, is_there) for name, values in cells.items()}
    named = _of_role("image", columns)
    candidates = [image] if image else sorted(columns, key=lambda name: (-shares[name], name not in named))
    if not image and shares[candidates[0]] < 0.1:
        if not named:
            first = next((str(value[0][0]) for value in cells.values() if value), "")
            raise DataError(
                f"{where}: no column names images of the folder; columns: {', '.join(columns)}; the first cell is "
                f"'{first[:40]}'; name the column of the images in `image`, and their folder in `images`"
            )
        candidates = named
    image = candidates[0]
    rest = [name for name in columns if name != image and cells[name]]
    split = next((name for name in _of_role("split", rest) if len(_different(cells[name])) <= 6), None)
    rest = [name for name in rest if name != split and shares[name] < 0.5]
    return Guess(image, shares.get(image, 0.0), texts or _texts(rest, cells, where), split)


def _texts(columns: list[str], cells: Mapping[str, list[list[str]]], where: str) -> dict[str, list[str]]:
    question, answers = _of_role("question", columns), _of_role("answers", columns)
    if question and answers:
        return {"question": question[:1], "answers": answers}
    lengths = {name: mean(len(text.split()) for texts in cells[name] for text in texts) for name in columns}
    captions = _of_role("captions", columns)
    if captions:
        longest = max(captions, key=lambda name: lengths[name])
        base = _base(longest)
        return {"captions": [name for name in captions if _base(name) == base]}
    if label := _of_role("label", columns):
        return {"label": label[:1]}
    written = [name for name in columns if lengths[name] >= 2 and not _are_numbers(cells[name])]
    if written:
        return {"captions": [max(written, key=lambda name: lengths[name])]}
    repeated = [name for name in columns if len(_different(cells[name])) <= len(cells[name]) / 2]
    if repeated:
        return {"label": repeated[:1]}
    listed = ", ".join(columns) or "none"
    raise DataError(
        f"{where}: no column holds texts besides that of the images; other columns: {listed}; name it in `captions`, "
        "or `question` and `answers`, or `label`"
    )


def _cells(row: Row, name: str) -> list[str]:
    value = row.value_or_none(name)
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str) and item.strip()]


def _share(values: list[list[str]], is_there: Callable[[str], bool]) -> float:
    return sum(is_there(texts[0]) for texts in values) / len(values) if values else 0.0


def _different(values: list[list[str]]) -> set[str]:
    return {text for texts in values for text in texts}


def _are_numbers(values: list[list[str]]) -> bool:
    return all(re.fullmatch(r"[\d.,:/ -]+", text) for texts in values for text in texts)


def _of_role(role: str, columns: Sequence[str]) -> list[str]:
    """Columns whose whole name is one of the role's words, then those that have one in it."""
    words = _NAMES[role]
    whole = [name for name in columns if re.sub(r"[\W\d_]+", "", name.casefold()) in words]
    part = [name for name in columns if name not in whole and words & set(re.split(r"[\W\d_]+", _spaced(name)))]
    return whole + part


def _base(name: str) -> str:
    """A name without its number: caption 1 and caption_2 belong together."""
    return re.sub(r"[\W\d_]+", "", name.casefold())


def _spaced(name: str) -> str:
    """Names such as imagePath as words, in small letters."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()
